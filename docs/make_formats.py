"""Writes docs/formats.md: the document comments of csrc/formats.h, csrc/cuda_layout.h and csrc/kv_formats.h, what native code does not know (nested scales),
and tables computed from mxq_ext/formats.py.

    python docs/make_formats.py            writes the file
    python docs/make_formats.py --check    exits with 1 if it is not up to date
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mxq_ext.formats import GROUPS, LUT_BITS, NEST_BITS, NEST_GROUPS, NESTED_BITS, NF4_LEVELS, UNIFORM_BITS, Format  # noqa: E402

HEADERS = (ROOT / "csrc" / "formats.h", ROOT / "csrc" / "cuda_layout.h", ROOT / "csrc" / "kv_formats.h")
OUTPUT = ROOT / "docs" / "formats.md"


def document(header: str) -> str:
    """The ``/**doc ... */`` comments of the header, in order."""
    return "\n".join(part.strip("\n") + "\n" for part in re.findall(r"/\*\*doc\n(.*?)\*/", header, re.S))


#: In the place of {bits} and {groups}: the numbers in formats.py.
NESTED = """# Nested scales (on disk only)

    w<bits>g<group>_nest                   uniform, bits 2 to 4         w3g32_nest

Scales and float zeros quantized in their turn, as SpQR has them (Dettmers et al. 2023). The weight is `s * q + z` as in `_fz`, but `s` and `z` of a group
are codes of {bits} bits, and {groups} neighbouring groups of a row share a range of scales and one of zeros:

    s = fp16(scale_step * scale_code + scale_start)         z = fp16(zero_step * zero_code + zero_start)

The sum is rounded to float32 (the product is exact in it) and then to fp16. A rectangle of `R` rows and `C` columns with `G` groups, `S = ceil(G / {groups})`,
stores

| tensor | shape and type |
| --- | --- |
| `codes` | `uint8 [R, ceil(C * bits / 8)]`, bit stream |
| `scales`, `zeros` | `uint8 [R, ceil(G * {bits} / 8)]`, bit streams of one code per group |
| `scale_steps`, `scale_starts`, `zero_steps`, `zero_starts` | `fp16 [R, S]` each |

The last {groups} groups of a row may be fewer. Where they are whole, `w3g32_nest` takes 0.3125 bits per weight beside its codes, `w3g32_fz` takes 1.

Kernels do not know these formats. When a weight is packed, for CPUs or for CUDA, its scales and zeros are expanded to those of `_fz`, which are
fp16 values, so that all kernels give the very weights that the checkpoint holds; the codes of scales and zeros are kept beside, from which
`save` writes the checkpoint again, bit for bit. So memory while running is that of `_fz` and those codes, and only the checkpoint is smaller. Plans
count the checkpoint.
"""


def nested() -> str:
    return NESTED.replace("{bits}", str(NEST_BITS)).replace("{groups}", str(NEST_GROUPS))


def names() -> list[str]:
    """Every format with fp16 scales, by bits and then by name."""
    out = [Format("float", 16), *(Format("lut", b) for b in LUT_BITS), *(Format("nf", 4, g) for g in (*GROUPS, 0))]
    out += [Format("uniform", b, g, z) for b in UNIFORM_BITS for g in (*GROUPS, 0) for z in ("sym", "int", "float") if b > 1 or z == "float"]
    out += [Format("uniform", b, g, "float", nested=True) for b in NESTED_BITS for g in GROUPS]
    return [f.name for f in sorted(out, key=lambda f: (f.bits, f.kind, f.group or 1 << 20, f.nested, f.zero == "float", f.zero == "int"))]


def tables() -> str:
    lines = ["## Stored bits", "", "Bits per weight on disk, scales, zeros and tables included, of layers with 576 and 4096 inputs and 4096 outputs.",
             "bfloat16 scales take the same.", "", "| format | K = 576 | K = 4096 |", "| --- | --- | --- |"]
    for name in names():
        f = Format.parse(name)
        lines.append(f"| `{name}` | {f.stored_bits(4096, 576):.4f} | {f.stored_bits(4096, 4096):.4f} |")
    lines += ["", "## The NF4 levels", "", "| code | level |", "| --- | --- |"]
    lines += [f"| {q} | {level!r} |" for q, level in enumerate(NF4_LEVELS)]
    return "\n".join(lines) + "\n"


def render() -> str:
    note = "<!-- Generated from csrc/formats.h, csrc/cuda_layout.h and csrc/kv_formats.h, and in docs/make_formats.py itself; edit those. -->\n\n"
    return note + "\n".join([*(document(h.read_text(encoding="utf-8")) for h in HEADERS), nested(), tables()])


if __name__ == "__main__":
    text = render()
    if "--check" in sys.argv[1:]:
        if not OUTPUT.exists() or OUTPUT.read_text(encoding="utf-8") != text:
            sys.exit("docs/formats.md is not up to date: run `python docs/make_formats.py`")
    else:
        OUTPUT.write_text(text, encoding="utf-8")
