"""The rule of flow: an import goes to a lower level, or further left in its own row of the table below.

Imports are read from the source (ast), those inside functions included, so that a lazy import cannot hide an upward one.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mxq_ext"

#: Level -> its modules, left to right. A folder is one entry: what happens inside it is held to "no cycles" only.
LEVELS = [
    ["_plugin", "errors", "env", "formats", "_native"],
    ["pack", "fileio", "progress", "qtensor", "reference"],
    ["structure", "decoding", "cuda", "ops"],
    ["text", "stats", "testing"],
    ["sensitivity"],
    ["plan"],
    ["quantizers", "transforms", "kv"],
    ["nn"],
    ["checkpoint", "hf"],
    ["evaluate", "tasks", "trials", "banding", "kv_planning", "request", "pipeline"],
    ["verbs", "report", "bench", "doctor", "llamacpp", "verdicts", "compare", "demo", "cli", "__main__"],
]
POSITION = {name: (level, place) for level, row in enumerate(LEVELS) for place, name in enumerate(row)}
#: Names that live in the package's own __init__ and may be imported from anywhere: it imports nothing itself but ``_plugin``.
FREE = {"__version__"}


def sources() -> dict[str, Path]:
    """Dotted module name inside the package -> file; ``stats/__init__.py`` is ``stats``."""
    out = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts:
            out[".".join(parts)] = path
    return out


def imports(name: str, path: Path, modules: set[str], text: str | None = None) -> set[tuple[str, int]]:
    """Modules of the package that a file imports anywhere, with line numbers; ``stats.walk`` style, without the package's name."""
    parts = name.split(".")
    package = parts if path.name == "__init__.py" else parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if text is None else text)):
        if isinstance(node, ast.Import):
            found |= {(alias.name.removeprefix("mxq_ext").lstrip("."), node.lineno) for alias in node.names
                      if alias.name == "mxq_ext" or alias.name.startswith("mxq_ext.")}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            if not node.level and module[0] != "mxq_ext":
                continue
            base = ".".join(filter(None, package[: len(package) - node.level + 1] + module if node.level else module[1:]))
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                if inner in modules:
                    found.add((inner, node.lineno))
                elif base or alias.name not in FREE:
                    found.add((base, node.lineno))
    return found


MODULES = sources()


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    top = name.split(".")[0]
    assert top in POSITION, f"{name} has no level: add it to LEVELS here and to the table in docs/architecture.md"
    for target, line in imports(name, MODULES[name], set(MODULES)):
        where = f"mxq_ext/{name.replace('.', '/')}.py:{line} imports {target or 'the package itself'}"
        assert target, f"{where}: import the module that defines the name"
        other = target.split(".")[0]
        assert other in POSITION, f"{where}, which does not exist"
        if other != top:
            assert POSITION[other] < POSITION[top], f"{where}: level {POSITION[other][0]} is not below level {POSITION[top][0]}"


def test_every_entry_of_the_table_exists():
    assert {name.split(".")[0] for name in MODULES} >= set(POSITION)


def test_no_cycles():
    edges = {name: {t for t, _ in imports(name, path, set(MODULES))} - {name} for name, path in MODULES.items()}
    done, active = set(), []

    def visit(name):
        assert name not in active, "import cycle: " + " -> ".join([*active[active.index(name):], name])
        if name not in done:
            active.append(name)
            for target in sorted(edges.get(name, ())):
                visit(target)
            active.pop()
            done.add(name)

    for name in edges:
        visit(name)


def test_documented_table_is_this_table():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| L(\d+) \| ([^|]+) \|", text, re.M)
    documented = [[m.rstrip("/") for m in re.findall(r"`([^`]+)`", cell)] for _, cell in rows]
    assert [int(level) for level, _ in rows] == list(range(len(LEVELS)))
    assert documented == LEVELS


@pytest.mark.parametrize("text, expected", [
    ("from .errors import MxqError", {"errors"}),
    ("from . import ops", {"ops"}),
    ("from . import __version__", set()),
    ("from . import Plan", {""}),
    ("def f():\n    from .plan.schema import Plan", {"plan.schema"}),
    ("import mxq_ext.nn.linear", {"nn.linear"}),
    ("from mxq_ext.formats import Format", {"formats"}),
    ("from mxq_ext import pipeline", {"pipeline"}),
    ("import torch\nfrom torch import nn", set()),
])
def test_reader_of_imports(text, expected):
    modules = {"errors", "ops", "plan", "plan.schema", "nn", "nn.linear", "formats", "pipeline"}
    assert {m for m, _ in imports("hf", PACKAGE / "hf.py", modules, text)} == expected


@pytest.mark.parametrize("name, file, text, expected", [
    ("stats", "stats/__init__.py", "from .walk import walk", {"stats.walk"}),
    ("stats", "stats/__init__.py", "from ..errors import MxqError", {"errors"}),
    ("stats.walk", "stats/walk.py", "from .store import Stats", {"stats.store"}),
    ("stats.walk", "stats/walk.py", "from ..errors import MxqError", {"errors"}),
    ("stats.walk", "stats/walk.py", "from .. import ops", {"ops"}),
])
def test_reader_of_relative_imports_in_folders(name, file, text, expected):
    assert {m for m, _ in imports(name, PACKAGE / file, {"errors", "ops", "stats", "stats.walk", "stats.store"}, text)} == expected
