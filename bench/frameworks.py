"""Every preset at every budget on the demo's model: ``mxq compare`` on its shuffled copy, and its rows for docs/frameworks.md.

    python bench/frameworks.py [-o mxq-frameworks] [--bits 2.25,2.5,3,3.5,4] [--presets all] [--also "mxq reconstruct=50"]
        [--llama-cpp all] [--tasks pairs,cloze] [--untimed]

The copy is written to OUT/smollm2-shuffled (the same function; its channels are in another order, so that no group falls on one of the 4-bit file's own). Rows
that OUT has already are kept. bench/results/frameworks.json then holds what OUT/compare.json does, without the values of single windows.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout wins over an installed package

from mxq_ext.compare import compare  # noqa: E402
from mxq_ext.errors import MxqError  # noqa: E402
from mxq_ext.fileio import write_json  # noqa: E402
from mxq_ext.hf import demo_model_path, load_model, permute_model  # noqa: E402
from mxq_ext.progress import Progress  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "frameworks.json"
NAME = "smollm2-shuffled"


def shuffled_model(out: Path) -> Path:
    """The directory of the shuffled copy, written unless it is there."""
    path = out / NAME
    if not path.exists():
        part = out / f".{NAME}.part"  # renamed when it is whole
        shutil.rmtree(part, ignore_errors=True)
        model, tokenizer = load_model(demo_model_path())
        permute_model(model)
        tokenizer.save_pretrained(part)
        model.save_pretrained(part)
        part.rename(path)
    return path


def without_windows(row: dict) -> dict:
    """A row of compare.json with means and errors only."""
    return {k: {n: v for n, v in value.items() if not n.endswith("_windows")} if isinstance(value, dict) and k != "formats" else value
            for k, value in row.items()}


def names(text: str) -> list[str]:
    """``"a,b"`` -> ``["a", "b"]``."""
    return [name for name in text.split(",") if name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("mxq-frameworks"))
    parser.add_argument("--bits", default="2.25,2.5,3,3.5,4")
    parser.add_argument("--presets", default="all")
    parser.add_argument("--also", action="append", default=[])
    parser.add_argument("--llama-cpp", default="", help="types, or all")
    parser.add_argument("--tasks", default="", help="zero-shot tasks; needs lm-eval")
    parser.add_argument("--untimed", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with Progress() as progress:
        result = compare(shuffled_model(options.out), options.out, bits=[float(b) for b in options.bits.split(",")],
                         presets=names(options.presets), also=options.also, llama_cpp=names(options.llama_cpp), tasks=names(options.tasks),
                         timed=not options.untimed, progress=progress)
    write_json(options.results, result | {"rows": [without_windows(r) for r in result["rows"]]})
    print((options.out / "compare.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        main()
    except MxqError as error:
        raise SystemExit(f"bench: {error}") from None
