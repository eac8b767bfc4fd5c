"""docs/frameworks.md is what the presets say, with no number that was not measured."""

import importlib.util
import re
from pathlib import Path

from mxq_ext.plan.presets import PRESETS

ROOT = Path(__file__).parents[1]


def make():
    spec = importlib.util.spec_from_file_location("make_frameworks", ROOT / "docs" / "make_frameworks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date():
    assert (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8") == make().render(), "run `python docs/make_frameworks.py`"


def test_every_preset_is_told_with_source_and_state():
    text = make().render([])
    for name, p in PRESETS.items():
        assert f"`{name}`" in text
        if p.source != "ours":
            part = text.split(f"### {name}\n")[1].split("\n### ")[0]
            assert p.source in part and p.formula in part and all(d in part for d in p.departures) and all(m in part for m in p.missing)
            assert ("Cannot run yet" in part) != ("Not measured yet" in part)
    assert "| yes |" not in re.sub(r"\| yes \| not yet \|", "", text)  # without results nothing counts as measured


def test_measured_rows_are_shown_beside_their_command():
    row = {"preset": "owq", "bits": 3.25, "stored_bits": 3.249, "bytes": 54631042, "kl": 0.125, "perplexity": None, "decode_tokens_per_s": 31.5,
           "command": "mxq compare M --presets owq"}
    text = make().render([row])
    assert "| 3.25 | 3.249 | 54,631,042 | 0.125 | - | 31.5 | `mxq compare M --presets owq` |" in text
    part = text.split("### owq\n")[1].split("\n### ")[0]
    assert "Not measured yet" not in part and re.search(r"\| `owq` .* \| yes \| yes \|", text)
