"""The one entry of all benchmarks.

    python bench/run.py --op linear --formats w4g64,lut3 --shapes 4096x4096 --m 1,16,512 --threads 1 --out linear.json

Prints Markdown tables. With ``--out NAME`` the numbers, the machine and the versions go to bench/results/NAME as JSON.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the checkout wins over an installed package

OPS = {"linear": "linear"}  # op -> module beside this file, with arguments(parser) and run(options) -> rows


def main(argv: list[str] | None = None) -> None:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--op", choices=OPS, default="linear", help="what to measure")
    op = importlib.import_module(OPS[first.parse_known_args(argv)[0].op])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[first])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", help="instruction set, the fastest one without it")
    parser.add_argument("--out", help="JSON file; a bare name goes to bench/results")
    op.arguments(parser)
    options = parser.parse_args(argv)

    import torch

    from mxq_ext import ops
    from mxq_ext.errors import MxqError
    from mxq_ext.fileio import write_json
    from mxq_ext.testing.timing import machine

    torch.set_num_threads(options.threads)
    try:
        if options.target:
            ops.set_target(options.target)
        where = machine() | {"threads": options.threads, "target": ops.target()}
        print(", ".join(f"{name} {value}" for name, value in where.items()))
        rows = op.run(options)
    except MxqError as error:
        raise SystemExit(f"bench: {error}") from None
    if options.out:
        path = Path(options.out) if "/" in options.out else HERE / "results" / options.out
        write_json(path, {"op": options.op, "machine": where, "options": vars(options), "rows": rows})
        print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
