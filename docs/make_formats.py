"""Writes docs/formats.md: the document comments of csrc/formats.h, csrc/cuda_layout.h and csrc/kv_formats.h, and tables computed from mxq_ext/formats.py.

    python docs/make_formats.py            writes the file
    python docs/make_formats.py --check    exits with 1 if it is not up to date
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mxq_ext.formats import GROUPS, LUT_BITS, NF4_LEVELS, UNIFORM_BITS, Format  # noqa: E402

HEADERS = (ROOT / "csrc" / "formats.h", ROOT / "csrc" / "cuda_layout.h", ROOT / "csrc" / "kv_formats.h")
OUTPUT = ROOT / "docs" / "formats.md"


def document(header: str) -> str:
    """The ``/**doc ... */`` comments of the header, in order."""
    return "\n".join(part.strip("\n") + "\n" for part in re.findall(r"/\*\*doc\n(.*?)\*/", header, re.S))


def names() -> list[str]:
    """Every format with fp16 scales, by bits and then by name."""
    out = [Format("float", 16), *(Format("lut", b) for b in LUT_BITS), *(Format("nf", 4, g) for g in (*GROUPS, 0))]
    out += [Format("uniform", b, g, z) for b in UNIFORM_BITS for g in (*GROUPS, 0) for z in ("sym", "int", "float") if b > 1 or z == "float"]
    return [f.name for f in sorted(out, key=lambda f: (f.bits, f.kind, f.group or 1 << 20, f.zero == "float", f.zero == "int"))]


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
    note = "<!-- Generated from csrc/formats.h, csrc/cuda_layout.h and csrc/kv_formats.h by docs/make_formats.py; edit those. -->\n\n"
    return note + "\n".join(document(h.read_text(encoding="utf-8")) for h in HEADERS) + "\n" + tables()


if __name__ == "__main__":
    text = render()
    if "--check" in sys.argv[1:]:
        if not OUTPUT.exists() or OUTPUT.read_text(encoding="utf-8") != text:
            sys.exit("docs/formats.md is not up to date: run `python docs/make_formats.py`")
    else:
        OUTPUT.write_text(text, encoding="utf-8")
