"""Plan: reading, checking, resolving, predicting bytes, comparing. Bytes are compared with real tensors."""

import json

import pytest
import torch
from conftest import make_model

from mxq_ext.errors import CheckpointError, FormatError, PlanError
from mxq_ext.formats import Format
from mxq_ext.plan import Bands, Cut, Plan
from mxq_ext.qtensor import QTensor, Rectangle
from mxq_ext.structure import Unit, find_units


@pytest.fixture(scope="module")
def units():
    return find_units(make_model())


@pytest.fixture(scope="module")
def untied():
    return find_units(make_model(tied=False))


def stored(fmt, rows, cols):
    """Tensors of a rectangle as they are stored, made from the format's own list of shapes."""
    return {n: torch.zeros(s, dtype=getattr(torch, d)) for n, (s, d) in Format.parse(fmt).tensor_shapes(rows, cols).items()}


# -- JSON -------------------------------------------------------------------------------------------------------------------------


def test_file_round_trip(tmp_path):
    plan = Plan(default="w4g64_sym", units={"a.b": "w3g64_asym", "re:.*down_proj": {"format": "w8"}, "lm_head": "keep",
                                            "c": {"cols": [[64, "w3g64"], [32, "w8"]], "permute": True}},
                quantizer={"name": "gptq", "damp": 0.01}, meta={"why": ["test", 1.5, None]})
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan and list(again.units) == list(plan.units)
    obj = json.loads((tmp_path / "plan.json").read_text())
    assert obj["mxq_plan"] == 1 and obj["default"] == "w4g64" and obj["kv"] is None  # names are written in canonical form
    assert obj["units"]["re:.*down_proj"] == "w8" and obj["units"]["c"] == {"cols": [[64, "w3g64"], [32, "w8"]], "permute": True}
    assert Plan.from_json(plan.to_json()) == plan


def test_the_smallest_file_and_the_defaults(units):
    assert Plan.from_json({"mxq_plan": 1}) == Plan() and Plan().quantizer == {"name": "gptq"}
    assert set(Plan().resolve(units).values()) == {None}
    assert Plan(default="keep") == Plan(default=None)
    assert Plan(units={"a": Format.parse("w8"), "b": Bands("rows", ((8, Format.parse("w4")),))}).units == {"a": "w8",
                                                                                                           "b": {"rows": [[8, "w4"]]}}
    a, b = Plan(), Plan()
    a.units["x"] = "w8"
    assert b.units == {}  # no shared default objects


def test_unreadable_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"mxq_plan": 1, "units": {')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Plan.load(tmp_path / "cut.json")
    (tmp_path / "other.json").write_text('{"mxq_plan": 2}')
    with pytest.raises(PlanError, match=r"other\.json of version 2: this mxq_ext reads version 1; install"):
        Plan.load(tmp_path / "other.json")


@pytest.mark.parametrize(("obj", "text"), [
    ([], "a JSON object is expected, found list"),
    ({"default": "w4g64"}, "the key mxq_plan, the version of the schema, is missing"),
    ({"mxq_plan": True}, "of version True"),
    ({"mxq_plan": 1, "unit": {}}, "key 'unit': a plan has the keys .*did you mean units"),
    ({"mxq_plan": 1, "default": "w7"}, r"default 'w7': bits must be one of \(1, 2, 3, 4, 5, 6, 8\)"),
    ({"mxq_plan": 1, "default": "int4"}, "default 'int4': the name does not follow the grammar; names look like"),
    ({"mxq_plan": 1, "default": 4}, "default 4: a format name is expected, found int"),
    ({"mxq_plan": 1, "default": {"rows": [[8, "w4"]]}}, "bands and tiles belong to one unit"),
    ({"mxq_plan": 1, "units": ["a"]}, "an object of name -> format is expected, found list"),
    ({"mxq_plan": 1, "units": {"": "w4"}}, "the name of a unit is a non-empty string"),
    ({"mxq_plan": 1, "units": {"a": None}}, "plan entry 'a': None: a format name is expected, found NoneType; write a format"),
    ({"mxq_plan": 1, "units": {"a": "w4g48"}}, r"plan entry 'a': 'w4g48': group must be one of \(32, 64, 128\)"),
    ({"mxq_plan": 1, "units": {"re:(": "w4"}}, "plan entry 're:\\(': it is no valid regular expression"),
    ({"mxq_plan": 1, "units": {"a": {"format": {"format": "w4"}}}}, "a format name is expected, found dict"),
    ({"mxq_plan": 1, "units": {"a": {}}}, "exactly one of the keys format, rows, cols"),
    ({"mxq_plan": 1, "units": {"a": {"rows": [[8, "w4"]], "cols": [[8, "w4"]]}}}, "exactly one of the keys"),
    ({"mxq_plan": 1, "units": {"a": {"format": "w4", "group": 3}}}, "exactly one of the keys"),
    ({"mxq_plan": 1, "units": {"a": {"rows": []}}}, "a non-empty list of"),
    ({"mxq_plan": 1, "units": {"a": {"rows": {"8": "w4"}}}}, "a non-empty list of"),
    ({"mxq_plan": 1, "units": {"a": {"rows": [8]}}}, r"a band is a pair \[count, format\]"),
    ({"mxq_plan": 1, "units": {"a": {"rows": [[0, "w4"]]}}}, "positive integer, found 0"),
    ({"mxq_plan": 1, "units": {"a": {"rows": [[True, "w4"]]}}}, "positive integer, found True"),
    ({"mxq_plan": 1, "units": {"a": {"rows": [[8, "keep"], [8, "w8"]]}}}, "format of band 0 'keep'"),
    ({"mxq_plan": 1, "units": {"a": {"rows": [[12, "w4"], [8, "w8"]]}}}, "ends at row 12: bands end at multiples of 8 rows.*use 8 or 16"),
    ({"mxq_plan": 1, "units": {"a": {"cols": [[40, "w4"], [8, "w8"]]}}}, "ends at col 40: bands end at multiples of 32 cols.*use 32 or 64"),
    ({"mxq_plan": 1, "units": {"a": {"rows": [[8, "w8"], [8, "w4"]]}}},
     r"must not fall from band to band \(8 to 4\); put the most precise"),
    ({"mxq_plan": 1, "units": {"a": {"tiles": [[8, [[32, "w4"]]]], "sparse": 3}}}, "exactly one of the keys format, rows, cols, tiles"),
    ({"mxq_plan": 1, "units": {"a": {"tiles": [[8, "w4"]]}}}, "columns of band 0: cols 'w4': a non-empty list"),
    ({"mxq_plan": 1, "units": {"a": {"tiles": [[12, [[32, "w4"]]], [8, [[32, "w4"]]]]}}}, "ends at row 12: bands end at multiples of 8 rows"),
    ({"mxq_plan": 1, "units": {"a": {"tiles": [[8, [[40, "w8"], [8, "w4"]]]]}}}, "columns of band 0: band 0 ends at col 40"),
    ({"mxq_plan": 1, "default": {"tiles": [[8, [[32, "w4"]]]]}}, "bands and tiles belong to one unit"),
    ({"mxq_plan": 1, "units": {"a": {"rows": [[8, "w8"]], "permute": 1}}}, "permute 1: it must be true or false"),
    ({"mxq_plan": 1, "quantizer": "gptq"}, "quantizer 'gptq': an object with string keys is expected, found str"),
    ({"mxq_plan": 1, "quantizer": {}}, "it must have a name"),
    ({"mxq_plan": 1, "kv": {"k": 4}}, "kv: key 'k': a spec has the keys key, value, group, residual, sink, rotate"),
    ({"mxq_plan": 1, "activations": "a4"}, "linears read their input as a16 or a8"),
    ({"mxq_plan": 1, "meta": []}, "meta .*found list"),
    ({"mxq_plan": 1, "meta": {"a": float("nan")}}, "cannot be written as JSON"),
    ({"mxq_plan": 1, "meta": {"a": torch}}, "cannot be written as JSON"),
])
def test_refusals(obj, text):
    with pytest.raises(PlanError, match=text):
        Plan.from_json(obj)


# -- resolving -------------------------------------------------------------------------------------------------------------------


def test_exact_names_then_patterns_in_order_then_default(units):
    name = "model.layers.1.mlp.down_proj"
    plan = Plan(default="w4g64", units={"re:.*down_proj": "w8", "re:model\\.layers\\.1\\..*": "w3g64", name: "lut4"})
    got = plan.resolve(units)
    assert list(got) == [u.name for u in units]
    assert got[name] == Format.parse("lut4")
    assert got["model.layers.0.mlp.down_proj"] == Format.parse("w8")
    assert got["model.layers.1.mlp.up_proj"] == Format.parse("w3g64")
    assert got["model.layers.0.mlp.up_proj"] == got["model.embed_tokens"] == Format.parse("w4g64")
    del plan.units[name]
    assert plan.resolve(units)[name] == Format.parse("w8")  # both patterns match, the first wins
    assert Plan(units={"re:down_proj": "w8"}, default="w4").units  # a pattern matches the full name, or nothing
    with pytest.raises(PlanError, match="'re:down_proj'"):
        Plan(units={"re:down_proj": "w8"}).resolve(units)


@pytest.mark.parametrize(("entry", "near"), [
    ("model.layers.1.mlp.down_porj", "did you mean model.layers.1.mlp.down_proj"),
    ("down_porj", "did you mean model.layers.0.mlp.down_proj"),
    ("re:.*\\.donw_proj", "mlp.down_proj"),
    ("re:model\\.layer\\.0\\.mlp\\.up_proj", "did you mean model.layers.0.mlp.up_proj"),
    ("lm_haed", "did you mean lm_head"),
    ("zzz", "names are for example model.embed_tokens"),
])
def test_unmatched_entries_name_the_closest(units, entry, near):
    with pytest.raises(PlanError) as e:
        Plan(default="w4g64", units={entry: "w8"}).validate(units)
    assert repr(entry) in str(e.value) and near in str(e.value) and f"({len(units)} units)" in str(e.value)


def test_many_unmatched_entries_make_one_error(units):
    with pytest.raises(PlanError, match="'x0', 'x1', 'x2' and 2 more"):
        Plan(units={f"x{i}": "w4" for i in range(5)}).resolve(units)
    with pytest.raises(PlanError, match="no units at all"):
        Plan(units={"x": "w4"}).resolve([])


def test_a_tied_head_is_its_embedding(units, untied):
    embedding = units[0]
    assert embedding.tied == ("lm_head",)
    for entries in ({"lm_head": "w8"}, {"re:lm_.*": "w8"}, {"lm_head": "w8", "model.embed_tokens": "w8"},
                    {"re:.*": "w3g64", "lm_head": "w8"}):
        assert Plan(default="w4g64", units=entries).resolve(units)["model.embed_tokens"] == Format.parse("w8")
    got = Plan(default="w4g64", units={"lm_head": "w8", "model.embed_tokens": "w3g64"}).resolve(untied)
    assert (got["lm_head"], got["model.embed_tokens"]) == (Format.parse("w8"), Format.parse("w3g64"))


@pytest.mark.parametrize("entries", [{"lm_head": "w8", "model.embed_tokens": "w4g64"}, {"re:.*embed_tokens": "w8", "re:.*lm_head": "keep"}])
def test_conflicting_entries_for_one_weight(units, entries):
    with pytest.raises(PlanError, match="share one weight.*leave one of the entries"):
        Plan(default="w4g64", units=entries).resolve(units)
    # A catch-all behind a pattern is the fallback of both names, not a conflict.
    Plan(units={"re:.*lm_head": "keep", "re:.*": "w4g64"}).resolve(units)


def test_uniform_and_keep(units, untied):
    for some in (units, untied):
        got = Plan.uniform("w4g64", keep=("re:.*lm_head",)).resolve(some)
        kept = {n for n, f in got.items() if f is None}
        assert kept == {"model.embed_tokens" if some is units else "lm_head"}
        assert {f.name for f in got.values() if f} == {"w4g64"}
    assert Plan.uniform(Format.parse("w8"), quantizer={"name": "rtn"}) == Plan("w8", quantizer={"name": "rtn"})
    with pytest.raises(FormatError, match="grammar"):
        Plan.uniform("four")
    with pytest.raises(PlanError, match="found one string"):
        Plan.uniform("w4", keep="lm_head")


# -- bands -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "name"), [
    ({"rows": [[32, "w3g64"], [24, "w4g64"], [8, "fp16"]]}, "w3g64+w4g64+fp16"),
    ({"cols": [[64, "w3g32_asym"], [32, "w8"]]}, "w3g32_asym+w8"),
    ({"rows": [[40, "lut3"], [24, "lut4"]], "permute": True}, "lut3+lut4"),
    ({"cols": [[96, "w2g64"]], "permute": True}, "w2g64"),
    ({"tiles": [[40, [[64, "w4g32_asym"], [32, "w3g32_asym"]]], [24, [[96, "w4g32_asym"]]]], "permute": True}, "w3g32_asym+w4g32_asym"),
    ({"tiles": [[64, [[64, "w8"], [32, "w3g32"]]]], "permute": True}, "w3g32+w8"),
    ({"tiles": [[40, [[96, "w8"]]], [24, [[96, "w4"]]]], "permute": True}, "w4+w8"),
    ({"tiles": [[40, [[32, "lut3"], [64, "w4g64"]]], [24, [[96, "lut3"]]]]}, "lut3+w4g64"),
])
def test_bands_predict_the_bytes_of_real_tensors(entry, name):
    unit = Unit("l.down_proj", "linear", (64, 96), 0, "down_proj")
    plan = Plan(units={"l.down_proj": entry})
    bands = plan.resolve([unit])["l.down_proj"]
    assert isinstance(bands, Cut) and bands.name == str(bands) == name and bands.to_json() == plan.units["l.down_proj"] == entry
    rects = [Rectangle(*r[:4], r[4], stored(r[4], r[1] - r[0], r[3] - r[2])) for r in bands.rectangles(unit.shape)]
    perm = {f"perm_{axis}": torch.arange(unit.shape[axis == "cols"], dtype=torch.int32) for axis in bands.permuted}
    q = QTensor(unit.shape, rects, **perm)
    q.validate()  # the rectangles tile the weight
    assert q.format_name == name
    assert plan.predicted_bytes([unit]) == {"total": q.nbytes(), "units": {"l.down_proj": q.nbytes()}}


def test_bands_that_do_not_fill_the_unit(units):
    name = "model.layers.0.mlp.down_proj"  # 64 x 96
    with pytest.raises(PlanError, match=rf"bands of {name} \(64 x 96\): the counts of cols must sum to 96, they sum to 64; add 32 cols"):
        Plan(units={name: {"cols": [[32, "w4"], [32, "w8"]]}}).validate(units)
    with pytest.raises(PlanError, match="must sum to 64, they sum to 72; take away 8 rows"):
        Plan(units={name: {"rows": [[64, "w4"], [8, "w8"]]}}).validate(units)
    with pytest.raises(PlanError, match=rf"band 1 of the tiles of {name} \(64 x 96\): the counts of cols must sum to 96, they sum to 64"):
        Plan(units={name: {"tiles": [[32, [[96, "w4"]]], [32, [[64, "w4"]]]]}}).validate(units)
    with pytest.raises(PlanError, match=rf"^tiles of {name} .*the counts of rows must sum to 64, they sum to 32; add 32 rows"):
        Plan(units={name: {"tiles": [[32, [[96, "w4"]]]]}}).validate(units)


# -- what it amounts to ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["w2g32", "w3g64_asym", "w4g128_fz", "w8", "nf4g64", "lut3", "fp16"])
def test_predicted_bytes_are_those_of_the_stored_tensors(units, fmt):
    plan = Plan.uniform(fmt)
    want = {u.name: sum(t.nbytes for t in stored(fmt, *u.shape).values()) for u in units}
    got = plan.predicted_bytes(units)
    assert got == {"total": sum(want.values()), "units": want}
    assert plan.stored_bits(units) == 8 * sum(want.values()) / sum(u.shape[0] * u.shape[1] for u in units)


def test_kept_units_count_in_the_float_type_of_the_checkpoint(units):
    plan = Plan.uniform("w4g64", keep=("model.embed_tokens",))
    half, full = plan.predicted_bytes(units), plan.predicted_bytes(units, float_bytes=4)
    assert half["units"]["model.embed_tokens"] == 2 * 257 * 64 and full["total"] - half["total"] == 2 * 257 * 64
    assert Plan().stored_bits(units) == 16 and Plan().stored_bits(units, float_bytes=4) == 32


def test_counts(units):
    plan = Plan(default="w4g64", units={"re:.*down_proj": "w8", "lm_head": "keep"})
    assert plan.counts(units) == {"w4g64": len(units) - 3, "w8": 2, "keep": 1}
    assert plan.counts() == {"w8": 1, "keep": 1}


def test_diff(units):
    a = Plan(default="w4g64", units={"model.layers.0.mlp.up_proj": "w3g64", "re:.*down_proj": "w8"})
    assert a.diff(a) == [] and a.diff(Plan.from_json(a.to_json() | {"meta": {"x": 1}})) == []
    b = Plan(default="w3g64", units={"re:.*down_proj": "w8", "model.layers.0.mlp.gate_proj": "w4g64"}, quantizer={"name": "rtn"})
    # up_proj is named by one plan only, and both give it w3g64; gate_proj likewise gets w4g64 from both.
    assert a.diff(b) == [("default", "w4g64", "w3g64"), ("quantizer", {"name": "gptq"}, {"name": "rtn"})]
    here, there = a.resolve(units), b.resolve(units)
    rows = a.diff(b, units)
    assert rows[:-1] == [(n, here[n].name, there[n].name) for n in here if here[n] != there[n]] and len(rows) > 3
    c = Plan(default="w4g64", units={"model.layers.0.mlp.up_proj": "keep", "re:.*up_proj": "w8"})
    assert a.diff(c) == [("model.layers.0.mlp.up_proj", "w3g64", "keep"), ("re:.*down_proj", "w8", "absent"),
                         ("re:.*up_proj", "absent", "w8")]
    assert [(n, y, x) for n, x, y in c.diff(a)] != [] and len(c.diff(a)) == 3
