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
    text = make().render(make().NOTHING)
    for name, p in PRESETS.items():
        assert f"`{name}`" in text
        part = text.split(f"### {name}\n")[1].split("\n### ")[0]
        assert p.source in part and p.formula in part and all(d in part for d in p.departures) and all(m in part for m in p.missing)
        assert ("Cannot run yet" in part) != ("Not measured yet" in part)
    assert "| yes |" not in re.sub(r"\| yes \| not yet \|", "", text)  # without results nothing counts as measured
    assert "Side by side" not in text


def test_measured_rows_are_shown_beside_their_command():
    quality = {"technical": {"perplexity": 20.25, "kl": 0.125}, "literary": {"perplexity": 30.5, "kl": 0.25}}
    row = {"name": "owq 3.25", "preset": "owq", "family": "frameworks", "bits": 3.25, "stored_bits": 3.249, "linear_bits": 3.2, "bytes": 54631042,
           "checkpoint_bytes": 56_000_000, "minutes": 1.5, "decode_tokens_per_s": 31.5, "command": "mxq compare M --presets owq", **quality}
    refused = {"name": "owq 2", "preset": "owq", "family": "frameworks", "bits": 2.0, "refused": "the budget is too small", "command": "mxq compare M"}
    setup = {"calibration_windows": 48, "held_out": {k: {"windows": 12, "length": 512} for k in quality}}
    base = {"name": "float32", "family": "float", "stored_bits": 32.0, "checkpoint_bytes": 1, **quality}
    text = make().render(make().NOTHING | {"rows": [base, row, refused], "setup": setup})
    part = text.split("### owq\n")[1].split("\n### ")[0]
    line = next(line for line in part.splitlines() if line.startswith("| owq"))
    assert [c.strip() for c in line.strip("|").split("|")] == ["owq", "3.25", "3.249", "56.0", "20.25", "0.1250", "30.50", "0.2500", "31.5", "1.5",
                                                              "`mxq compare M --presets owq`"]
    assert "2 bits were refused: the budget is too small" in part
    assert "Not measured yet" not in part and re.search(r"\| `owq` .* \| yes \| yes \|", text)
    assert "12 windows of 512 tokens of the literary text" in text
