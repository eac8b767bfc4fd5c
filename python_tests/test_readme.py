"""The README tells the truth: its Python runs, its commands parse, its targets exist, its format table is computed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from conftest import make_model, make_tokenizer

from mxq_ext import cli
from mxq_ext.formats import Format

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "third_party" / "README.md"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands() -> list[str]:
    lines = [line.split(" #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def test_readme_has_code():
    assert len(blocks("python")) >= 2 and len(commands()) >= 8


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path, monkeypatch):
    """Each block stands on its own, given a float ``model`` and its ``tokenizer``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calib.txt").write_text("All happy families are alike; each unhappy family is unhappy in its own way. " * 60)
    exec(compile(code, "README.md", "exec"), {"model": make_model(), "tokenizer": make_tokenizer()})


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("mxq ")])
def test_mxq_commands_parse(command):
    """The real parser reads the options; verbs that need no model are run."""
    words = shlex.split(command)[1:]
    if words in (["--help"], ["doctor"]):
        done = subprocess.run([sys.executable, "-m", "mxq_ext", *words], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout
        return
    group = typer.main.get_command(cli.app)
    verb = group.commands[words[0]]
    context = verb.make_context(words[0], words[1:])
    for name in ("candidates", "formats"):
        cli._formats(context.params.get(name))


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith("mxq ")])
def test_other_commands(command):
    words = shlex.split(command)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{words[1]}:", makefile, re.M), f"Makefile has no target {words[1]}"
    else:
        assert words == ["pip", "install", "."]


def test_format_table_is_computed():
    rows = re.findall(r"^\| `([a-z0-9_]+)` \| ([0-9.]+) \|", README, re.M)
    assert len(rows) >= 8
    for name, bits in rows:
        assert bits == f"{Format.parse(name).stored_bits(4096, 4096):.3f}", name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_architecture_names_modules_and_verbs_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:csrc/)?[a-z_]+(?:/[a-z_]+)*\.(?:py|h|inl|cpp))`", text):
        homes = [ROOT / path, ROOT / "mxq_ext" / path, ROOT / "csrc" / "cpu" / path, ROOT / "python_tests" / path]
        assert any(home.exists() for home in homes), path
    known = typer.main.get_command(cli.app).commands
    for verb in re.findall(r"`mxq ([a-z]+)", text):
        assert verb in known, verb


def test_the_table_is_that_of_the_results():
    """bench/readme.py writes it from bench/results/demo.json; a number changed by hand, or a new file not taken over, fails here."""
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "readme.py"), "--check"])
    assert done.returncode == 0, "run: python bench/readme.py"
