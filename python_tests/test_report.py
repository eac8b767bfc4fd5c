"""The bit map, the Pareto plot and tables: what stands in them, not how they look."""

import builtins
import csv
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from conftest import make_model
from rich.console import Console
from rich.text import Text

from mxq_ext import report
from mxq_ext.errors import MxqError, PlanError
from mxq_ext.plan import Plan, pareto_front
from mxq_ext.report import Column, bit_map_entries, bit_map_svg, bit_map_text, markdown_table, pareto_svg, table
from mxq_ext.sensitivity.table import CostTable
from mxq_ext.structure import find_units


def svg_texts(path):
    return ["".join(e.itertext()).strip() for e in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture(scope="module")
def entries():
    plan = Plan(default="w4g64", units={"re:.*v_proj": "w8", "model.layers.1.mlp.down_proj": "w2g32_asym", "lm_head": "keep"})
    return bit_map_entries(plan, find_units(make_model(tied=False)))


def test_entries_of_a_plan(entries):
    by_name = {e[0]: e[1:] for e in entries}
    assert len(by_name) == 16
    assert by_name["lm_head"] == (-1, "lm_head", "keep", 16.0)
    # 64 x 96: 24 bytes of codes, three scales, three zeros of two bits; 8 * 31 / 96
    assert by_name["model.layers.1.mlp.down_proj"] == (1, "down_proj", "w2g32_asym", pytest.approx(8 * (24 + 6 + 1) / 96))
    assert by_name["model.layers.0.self_attn.v_proj"] == (0, "v_proj", "w8", pytest.approx(8 * 66 / 64))
    inspected = {"units": [{"name": n, "layer": e[0], "format": e[2], "stored_bits": e[3]} for n, e in by_name.items()]}
    assert bit_map_entries(inspected) == entries
    with pytest.raises(PlanError, match="pass find_units"):
        bit_map_entries(Plan())


def test_text(entries):
    text = bit_map_text(entries, color=False)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert lines[1].split() == ["embed_tokens", "4.25"] and lines[4].split() == ["lm_head", "16.0"]
    assert lines[2].split() == ["0", "4.25", "4.25", "8.25", "4.25", "4.25", "4.25", "4.33"]
    assert lines[3].split()[-1] == "2.58"
    assert lines[5] == "" and lines[6] == " - w2g32_asym: 2.58 bits, 1 unit" and lines[-1] == " - keep: 16.00 bits, 1 unit"


@pytest.mark.parametrize(("system", "code", "shift"), [("truecolor", "48;2;", 1.0), ("", "48;5;", 1.1)])
def test_coloured_text_says_the_same(entries, monkeypatch, system, code, shift):
    monkeypatch.setenv("COLORTERM", system)
    # Other colours for each terminal: rich remembers the escape codes of a style, whatever terminal it met it on first.
    entries = [(*rest, bits * shift) for *rest, bits in entries]
    coloured, plain = bit_map_text(entries, color=True), bit_map_text(entries, color=False)
    assert code in coloured
    bare = Text.from_ansi(coloured).plain
    assert [line.rstrip().lstrip("- ") for line in bare.splitlines()] == [line.lstrip("- ") for line in plain.splitlines()]


@pytest.mark.parametrize(("tty", "env", "coloured"),
                         [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)])
def test_colour_only_where_it_can_be_seen(entries, monkeypatch, tty, env, coloured):
    for name, value in {"NO_COLOR": "", "TERM": "xterm", **env}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(report.sys.stdout, "isatty", lambda: tty, raising=False)
    assert ("\x1b" in bit_map_text(entries)) is coloured


def test_experts_share_a_column():
    moe = [(f"model.layers.{i}.mlp.experts.{x}.up_proj", i, "up_proj", "w2g64" if x else "w4g64",
            2.25 + 2 * (x == 0)) for i in range(3) for x in range(4)]
    moe += [(f"model.layers.{i}.shared.up_proj", i, "up_proj", "w8", 8.25) for i in (0, 2)]
    lines = bit_map_text(moe, color=False).splitlines()
    assert lines[0].split() == ["layer", "mlp.experts.*.up_proj", "shared.up_proj"]
    assert [line.split() for line in lines[1:4]] == [["0", "2.75", "8.25"], ["1", "2.75"], ["2", "2.75", "8.25"]]


def test_no_entries():
    with pytest.raises(PlanError, match="no units to show"):
        bit_map_text([])


def test_svg(entries, tmp_path):
    path = tmp_path / "deep" / "bits.svg"
    bit_map_svg(entries, path, title="Tiny model")
    texts = svg_texts(path)
    for want in ("Tiny model", "layer", "embed_tokens", "lm_head", "q_proj", "down_proj", "0", "1", "2.58", "16.0",
                 "w8: 8.25 bits, 2 units"):
        assert want in texts, want
    assert sum(bool(re.fullmatch(r"\d+\.\d+", t)) for t in texts) == len(entries)  # one number per unit
    fills = re.findall(r"fill: (#[0-9a-f]{6})", path.read_text())
    drawn = [bits for *_, bits in entries] + [np.mean([e[4] for e in entries if e[3] == fmt]) for fmt in {e[3] for e in entries}]  # cells, legend
    for bits in drawn:
        assert fills.count("#" + bytes(report.colour(bits)).hex()) == [report.colour(b) for b in drawn].count(report.colour(bits))
    before = path.read_bytes()
    bit_map_svg(entries, path, title="Tiny model")
    assert path.read_bytes() == before  # no dates, no random ids: it can be committed


def test_png_and_other_suffixes(entries, tmp_path):
    bit_map_svg(entries, tmp_path / "bits.png")
    assert (tmp_path / "bits.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(MxqError, match="svg, png or pdf, not jpeg"):
        bit_map_svg(entries, tmp_path / "bits.jpeg")
    assert [p.name for p in tmp_path.iterdir()] == ["bits.png"]


def test_deep_and_wide_models_stay_on_a_page(tmp_path):
    deep = [(f"h.{i}.{r}", i, r, "w4g64", 4.25) for i in range(127) for r in [f"a_long_module_name_{j}x" for j in range(17)]]
    bit_map_svg(deep, tmp_path / "deep.svg")
    width, height = (float(x[:-2]) / 72 for x in re.search(r'width="([\d.]+pt)" height="([\d.]+pt)"',
                                                           (tmp_path / "deep.svg").read_text()).groups())
    assert height < 20 and width < 16 and "128" not in svg_texts(tmp_path / "deep.svg") and "126" in svg_texts(tmp_path / "deep.svg")


def test_palette_rises_in_lightness_and_ink_stays_legible():
    def luminance(rgb):
        c = np.array(rgb) / 255
        return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    bits = np.geomspace(2, 9, 60)
    light = [luminance(report.colour(b)) for b in bits]
    assert all(a < b for a, b in zip(light, light[1:], strict=False))
    for b in [*bits, 16.0]:
        ink = 0.0 if report._ink(report.colour(b)) == "#000000" else 1.0
        lo, hi = sorted((ink, luminance(report.colour(b))))
        assert (hi + 0.05) / (lo + 0.05) >= 4.5, b  # WCAG AA for text
    assert report.colour(0.5) == report.colour(1.0) and report.colour(9.0) == report.colour(10.0) != report.colour(16.0)


def test_missing_matplotlib_is_explained(entries, monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MxqError, match=r"drawing .*bits\.svg: matplotlib is not installed .*; pip install matplotlib"):
        bit_map_svg(entries, tmp_path / "bits.svg")


# -- Pareto ----------------------------------------------------------------------------------------------------------------------


def test_pareto_svg_and_its_csv(tmp_path):
    costs = CostTable(["a", "b"], ["w2g64", "w4g64", "w8"], [[4.0, 1.0, 0.1], [np.inf, 0.5, 0.05]], [[2, 4, 8], [2, 4, 8]], [8, 8])
    points = report.front_points(costs, pareto_front(costs))
    assert [p["label"] for p in points if p["series"] == "uniform"] == ["w4g64", "w8"]  # w2g64 is impossible for b
    points.append({"series": "measured", "stored_bits": 4.0, "value": 1.2, "error": 0.1})
    pareto_svg(points, tmp_path / "front.svg", title="Front", ylabel="KL")
    texts = svg_texts(tmp_path / "front.svg")
    for want in ("Front", "KL", "stored bits per weight", "mixed", "uniform", "measured", "w4g64", "w8"):
        assert want in texts, want
    rows = list(csv.DictReader((tmp_path / "front.csv").open()))
    assert [(r["series"], float(r["stored_bits"]), float(r["value"]), r["label"], r["error"]) for r in rows] == [
        (p["series"], p["stored_bits"], p["value"], p.get("label", ""), str(p.get("error", ""))) for p in points]


@pytest.mark.parametrize("points", [[], [{"stored_bits": 3.0}], [{"value": 3.0}]])
def test_pareto_needs_points(points, tmp_path):
    with pytest.raises(PlanError, match="stored_bits and value"):
        pareto_svg(points, tmp_path / "p.svg")
    assert not list(tmp_path.iterdir())


def test_pareto_of_values_that_have_no_logarithm(tmp_path):
    pareto_svg([{"stored_bits": b, "value": 0.0} for b in (2, 3)], tmp_path / "p.svg")
    assert "stored bits per weight" in svg_texts(tmp_path / "p.svg")


# -- tables ------------------------------------------------------------------------------------------------------------------------


def test_markdown():
    got = markdown_table(["plan", "bits", "size"], [["float", "32.000", "537.1 MB"], ["a|b", 4.25, "-"]])
    assert got.splitlines() == ["| plan  |   bits |     size |", "| ----- | -----: | -------: |", "| float | 32.000 | 537.1 MB |",
                                "| a\\|b  |   4.25 |        - |"]
    with pytest.raises(MxqError, match="table of 2 columns: a row has 1 cells"):
        markdown_table(["a", "b"], [["x"]])


def test_table_of_mappings():
    rows = [{"plan": "w4g64", "bits": 4.25, "n": 1234567, "ok": True}, {"plan": "[red]", "bits": 3, "n": None, "ok": False}]
    t = table(rows, ["plan", Column("bits", "stored bits", ".3f"), Column("n", spec=",d"), "ok", "not_there"])
    assert t.header == ("plan", "stored bits", "n", "ok", "not there")
    assert t.cells == (("w4g64", "4.250", "1,234,567", "True", "-"), ("[red]", "3.000", "-", "False", "-"))
    assert t.right == [False, True, True, False, True]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(t.rich("Title"))
    shown = console.export_text()
    assert "Title" in shown and "[red]" in shown and "1,234,567" in shown


def test_empty_table():
    assert table([], ["a"]).markdown() == "| a   |\n| --- |"
