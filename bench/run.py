"""The one entry of all benchmarks.

    python bench/run.py --op linear --device cpu --formats all --shapes llama3-8b,smollm2 --m 1,4,16,64,512 --threads 1,2 --peers all
    python bench/run.py --formats w4g64,lut3 --shapes 4096x4096 --m 1,16 --peers none --out try.json
    python bench/run.py --ladder w4g64 --m 1,16 --out ladder.json
    python bench/run.py --op linear --device cuda --shapes llama3-8b --m 1,8,16,64,512 --peers all
    python bench/run.py --op attention --device cuda --contexts 1024,4096,16384,65536 --peers all

Prints Markdown tables as they are measured and keeps them, and the numbers with the machine and the versions as JSON, under
bench/results: ``linear-cpu.md`` and ``linear-cpu.json`` unless ``--out`` says otherwise. What is finished is kept if a run is stopped.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the checkout wins over an installed package

#: op -> module beside this file: arguments(parser), run(options) -> (results so far, Markdown of the newest) ...
OPS = {"attention": "attention", "decode": "decode", "linear": "linear", "mixed": "mixed", "plan": "plan", "stack": "stack", "times": "times"}
#: The same on a GPU; such a module also has check_device() and where(), what to say of the device.
CUDA_OPS = {"attention": "attention_cuda", "linear": "linear_cuda"}


def main(argv: list[str] | None = None) -> None:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--op", choices=OPS, default="linear", help="what to measure")
    first.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    wanted = first.parse_known_args(argv)[0]
    on_gpu = wanted.device == "cuda"
    if on_gpu and wanted.op not in CUDA_OPS:
        raise SystemExit(f"bench: --op {wanted.op} --device cuda: on a GPU there is {', '.join(CUDA_OPS)}; measure with --device cpu")
    op = importlib.import_module((CUDA_OPS if on_gpu else OPS)[wanted.op])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[first])
    if not on_gpu:
        parser.add_argument("--target", help="instruction set, the fastest one without it")
    parser.add_argument("--out", help="JSON file, the tables beside it as .md; a bare name goes to bench/results; none: only print")
    op.arguments(parser)
    options = parser.parse_args(argv)

    from mxq_ext import ops
    from mxq_ext.errors import MxqError
    from mxq_ext.fileio import write_json, write_text
    from mxq_ext.testing.timing import machine

    name = options.out or f"{options.op}-{options.device}.json"
    path = Path(name) if "/" in name else HERE / "results" / name
    asked = {k: v for k, v in vars(options).items() if k != "out"}  # results hold no path of a machine
    tables = []
    try:
        if on_gpu:
            op.check_device()
            where = machine() | op.where()
        else:
            if options.target:
                ops.set_target(options.target)
            where = machine() | {"target": ops.target()}
        tables.append(", ".join(f"{name} {value}" for name, value in where.items()))
        print(tables[0])
        refused = []
        for result, table in op.run(options):
            print(table, flush=True)
            tables[1:] = [table] if getattr(op, "REPLACES", False) else [*tables[1:], table]
            refused = result["refused"]
            if name != "none":
                write_json(path, {"machine": where, "options": asked} | result)
                write_text(path.with_suffix(".md"), "\n".join(tables) + "\n")
    except MxqError as error:
        raise SystemExit(f"bench: {error}") from None
    if name != "none":
        print(f"\nwritten to {path} and {path.with_suffix('.md').name}")
    if refused:
        raise SystemExit(f"bench: {len(refused)} rows could not be timed, the first: {refused[0]}")


if __name__ == "__main__":
    main()
