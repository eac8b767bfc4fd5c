"""Does a plan take what its time table foretells? Random mixed plans of a real model, predicted and measured, and a plan under a time limit.

    python bench/run.py --op times --threads 1 --out times-cpu.json

Weights are rounded to nearest: their values do not matter for speed. The model is the demo's unless ``--model`` names another.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
from collections.abc import Iterator

import torch

from mxq_ext.bench import TABLE_FORMATS, time_table
from mxq_ext.evaluate import speed
from mxq_ext.hf import demo_model_path, load_model
from mxq_ext.nn import replace_linear
from mxq_ext.plan import Plan
from mxq_ext.plan.times import TimeTable
from mxq_ext.structure import find_units


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a Hugging Face directory or a GGUF file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plans", type=int, default=4, help="random mixed plans")
    parser.add_argument("--rounds", type=int, default=3, help="of the time table")
    parser.add_argument("--repeats", type=int, default=3, help="prompts of each measurement")
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(TABLE_FORMATS))
    parser.add_argument("--table", help="a file to keep the time table in, or to read it from when it is there")


def run(options: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    """Yields (results so far, Markdown of the newest)."""
    torch.set_num_threads(options.threads)
    model, _ = load_model(options.model or demo_model_path())
    units, generator = find_units(model), random.Random(0)
    if options.table and os.path.exists(options.table):
        times = TimeTable.load(options.table)
    else:
        times = time_table(model, options.formats, prefill=options.prefill, rounds=options.rounds)
        if options.table:
            times.save(options.table)
    names = [f for f in options.formats if f not in times.meta["reference"]]
    plans = {f"random {i}": Plan(units={u.name: generator.choice(names) for u in units}, quantizer={"name": "rtn"}) for i in range(options.plans)}
    plans |= {f: Plan.uniform(f, quantizer={"name": "rtn"}) for f in names[:2]}
    rows, lines = [], ["| plan | predicted decode ms | measured | error | predicted prefill ms | measured | error |", "| --- |" + " ---: |" * 6]
    for name, plan in plans.items():
        want = times.predict(units, plan.resolve(units))
        got = speed(replace_linear(copy.deepcopy(model), plan, fuse="auto"), prefill=options.prefill, repeats=options.repeats)
        row = {"plan": name, "stored_bits": plan.stored_bits(units), "predicted": want,
               "measured": {"decode_ms": 1e3 / got["decode_tokens_per_s"], "prefill_ms": 1e3 * options.prefill / got["prefill_tokens_per_s"]}}
        rows.append(row)
        cells = [f"{want[k]:.2f} | {row['measured'][k]:.2f} | {want[k] / row['measured'][k] - 1:+.1%}" for k in ("decode_ms", "prefill_ms")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    result = {"threads": options.threads, "rest_us": times.meta["rest_us"], "rows": rows, "refused": []}
    yield result, "\n".join(lines)
