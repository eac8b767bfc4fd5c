"""formats.py, formats.h and the document say the same: names, bytes, levels."""

import importlib.util
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxq_ext import _native
from mxq_ext.errors import FormatError
from mxq_ext.formats import GROUPS, NF4_LEVELS, Format, kernel_format
from mxq_ext.qtensor import QTensor
from mxq_ext.testing.cases import FORMATS, NESTED, random_qtensor

ROOT = Path(__file__).parents[1]


def every_format():
    for kind, bits, group, zero, scale in itertools.product(("uniform", "nf", "lut", "float"), (1, 2, 3, 4, 5, 6, 7, 8, 16), (0, *GROUPS),
                                                            ("sym", "int", "float"), ("fp16", "bf16")):
        try:
            yield Format(kind, bits, group, zero, scale)
        except FormatError:
            continue


ALL = list(every_format())


def test_there_are_as_many_formats_as_the_grammar_says():
    assert len(ALL) == 6 * 4 * 3 * 2 + 4 * 2 + 4 * 2 + 3 + 1
    assert {Format.parse(n) for n in FORMATS} <= set(ALL)


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_names_agree_and_parse_back(fmt):
    assert _native.cpu.format_name(fmt.native) == fmt.name
    assert Format.parse(fmt.name) == fmt and Format.parse(fmt) == fmt


@given(st.sampled_from(ALL), st.integers(1, 40), st.integers(1, 3000))
def test_canonical_bytes_agree(fmt, rows, cols):
    shapes = fmt.tensor_shapes(rows, cols)
    size = {"uint8": 1, "float16": 2, "bfloat16": 2}
    width = {name: shape[1] * size[dtype] for name, (shape, dtype) in shapes.items()}
    assert all(shape[0] == rows for shape, _ in shapes.values())
    want = (width.get("codes", width.get("values")), width.get("scales", width.get("table", 0)), width.get("zeros", 0))
    assert _native.cpu.canonical_row_bytes(fmt.native, cols) == want
    assert _native.cpu.canonical_nbytes(fmt.native, rows, cols) == fmt.nbytes(rows, cols) == rows * sum(width.values())


@pytest.mark.parametrize("name", [*FORMATS, *NESTED])
def test_nbytes_is_what_the_tensors_take(name):
    q = random_qtensor(name, 7, 100)
    fmt = Format.parse(name)
    assert q.nbytes() == fmt.nbytes(7, 100)
    assert q.stored_bits() == pytest.approx(fmt.stored_bits(7, 100))


@pytest.mark.parametrize("name,bits", [("w2g64", 2.25), ("w3g64_asym", 3 + 19 / 64), ("w4g64", 4.25), ("w4g32_fz", 5.0), ("w8", 8 + 16 / 4096),
                                       ("nf4g64", 4.25), ("lut3", 3 + 128 / 4096), ("fp16", 16.0),
                                       ("w3g32_nest", 3 + 6 / 32 + 64 / 512), ("w4g64_nest", 4 + 6 / 64 + 64 / 1024), ("w2g128_nest", 2 + 6 / 128 + 64 / 2048)])
def test_stored_bits_by_hand(name, bits):
    assert Format.parse(name).stored_bits(4096, 4096) == pytest.approx(bits, abs=1e-12)


def test_nf4_levels_agree_and_are_quantiles():
    assert _native.cpu.NF4_LEVELS == [pytest.approx(v, abs=0) for v in NF4_LEVELS]
    assert list(NF4_LEVELS) == sorted(NF4_LEVELS) and NF4_LEVELS[7] == 0 and (NF4_LEVELS[0], NF4_LEVELS[15]) == (-1, 1)
    # QLoRA, appendix E: 8 quantiles from 0.5 to offset above zero, 7 below, each half scaled to its end.
    from scipy.stats import norm
    offset = 0.9677083
    up = [norm.ppf(0.5 + (offset - 0.5) * i / 8) for i in range(9)]
    down = [norm.ppf(0.5 + (offset - 0.5) * i / 7) for i in range(8)]
    want = [-v / up[-1] for v in reversed(down)][:-1] + [v / up[-1] for v in up]
    assert list(NF4_LEVELS) == pytest.approx(want, abs=2e-4)


@pytest.mark.parametrize("name,rule", [("w7g64", "bits must be one of"), ("w4g48", "group must be one of"), ("lut3g64", "lut formats have no groups"),
                                       ("nf4g64_asym", "only uniform"), ("lut4_bf16", "scales are fp16 or bf16"), ("w4g64_zz", "suffix _zz is unknown"),
                                       ("w1g64", "two levels need a float zero"), ("w5g32_nest", "uniform formats of 2, 3, 4 bits"), ("w3_nest", "with groups"),
                                       ("w4g64_nest_fz", "one suffix for its zeros"), ("w4g64_asym_nest", "one suffix for its zeros"),
                                       ("w4g64_fp16_bf16", "one for the type of its scales"), ("w3g32_nest_bf16", "fp16 ranges"),
                                       ("nf4g32_nest", "only uniform"),
                                       ("int4", "does not follow the grammar"), ("nf3", "bits must be one of"), ("", "does not follow the grammar")])
def test_wrong_names_are_refused_with_the_rule(name, rule):
    with pytest.raises(FormatError, match=rule):
        Format.parse(name)


def test_unknown_kind_and_zero():
    with pytest.raises(FormatError, match="must be one of uniform, nf, lut, float"):
        Format("ternary", 2)
    with pytest.raises(FormatError, match="zero point 'half'"):
        Format("uniform", 4, zero="half")


@pytest.mark.parametrize("name", NESTED)
def test_nested_formats_are_known_to_the_checkpoint_alone(name):
    fmt = Format.parse(name)
    assert fmt.name == name and fmt.nested and fmt.expanded.name == name.replace("_nest", "_fz") and fmt.expanded.expanded == fmt.expanded
    with pytest.raises(FormatError, match="kernels read scales and zeros that are expanded"):
        fmt.native  # noqa: B018 (the access raises)
    assert kernel_format(f"{name}+w8+{fmt.expanded}+sparse") == f"{fmt.expanded}+w8+sparse"


@given(st.sampled_from(NESTED), st.integers(1, 40), st.integers(1, 3000))
def test_nested_bytes_by_hand(name, rows, cols):
    fmt = Format.parse(name)
    groups = -(-cols // fmt.group)
    spans = -(-groups // 16)
    assert fmt.nbytes(rows, cols) == rows * (-(-cols * fmt.bits // 8) + 2 * (-(-groups * 3 // 8)) + 8 * spans)


def test_document_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_formats", ROOT / "docs" / "make_formats.py")
    make_formats = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_formats)
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert text == make_formats.render(), "run `python docs/make_formats.py`"
    for f in [*ALL, *map(Format.parse, NESTED)]:
        if f.scale_dtype == "fp16":
            assert f"| `{f.name}` |" in text


def test_qtensor_of_one_rectangle_names_its_format():
    q = random_qtensor("w3g64_asym", 3, 70)
    assert isinstance(q, QTensor) and q.format_name == "w3g64_asym"
