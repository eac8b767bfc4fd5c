"""Does a plan take what its time table foretells? Random mixed plans of a real model, predicted and measured, and a plan under a time limit.

    python bench/run.py --op times --threads 1 --out times-cpu.json

Weights are rounded to nearest: their values do not matter for speed. The model is the demo's unless ``--model`` names another. A machine's speed drifts,
and more so with neighbours: a uniform model is measured before and after each plan, and ``drift`` is how its time compares with the foretold one.
``error`` is of the times as they are, ``of drift`` that of the prediction times the drift of its minutes.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
from collections.abc import Iterator

import numpy as np
import torch

from mxq_ext.bench import TABLE_FORMATS, time_table
from mxq_ext.evaluate import speed
from mxq_ext.formats import Format
from mxq_ext.hf import demo_model_path, load_model
from mxq_ext.nn import replace_linear
from mxq_ext.plan import Plan, choose, solve
from mxq_ext.plan.times import TimeTable
from mxq_ext.sensitivity.table import CostTable
from mxq_ext.structure import Unit, find_units

BITS = 4.3
KINDS = ("decode_ms", "prefill_ms")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a Hugging Face directory or a GGUF file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plans", type=int, default=4, help="random mixed plans")
    parser.add_argument("--uniform", type=int, default=2, help="uniform plans, of the first formats")
    parser.add_argument("--rounds", type=int, default=3, help="of the time table")
    parser.add_argument("--repeats", type=int, default=3, help="prompts of each measurement")
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(TABLE_FORMATS))
    parser.add_argument("--table", help="a file to keep the time table in, or to read it from when it is there")


def limited(times: TimeTable, units: list[Unit], names: list[str]) -> Plan:
    """A plan of 4.3 stored bits whose time is limited halfway between that of the best plan of this size and of the fastest, for losses that fall
    fourfold per bit."""
    formats = [Format.parse(f) for f in names]
    nbytes, numel = np.array([[f.nbytes(*u.shape) for f in formats] for u in units]), np.array([u.numel for u in units])
    loss = numel[:, None] * 4.0 ** (-8 * nbytes / numel[:, None]) * np.random.default_rng(0).lognormal(0, 1, (len(units), 1))
    shapes = {u.name: {"shape": list(u.shape), "layer": u.layer, "embedding": u.kind == "embedding", "tied": list(u.tied)} for u in units}
    table = times.fill(CostTable([u.name for u in units], names, loss, nbytes, numel, meta={"shapes": shapes}))
    free = choose(table, bits=BITS).choice
    fastest = choose(CostTable(table.units, names, table.seconds, nbytes, numel), bits=BITS).choice
    rest, rows = times.rest[1] / 1e3, np.arange(len(units))
    limit = rest + 1e3 * float(table.seconds[rows, free].sum() + table.seconds[rows, fastest].sum()) / 2
    return solve(table, bits=BITS, max_seconds=times.room(limit), quantizer={"name": "rtn"}, meta={"limit_ms": limit})


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
    plans |= {f: Plan.uniform(f, quantizer={"name": "rtn"}) for f in names[: options.uniform]}
    rows, head = [], ["| plan | what | predicted ms | measured | error | drift | error of drift |", "| --- | --- |" + " ---: |" * 5]
    plans["under a limit"] = limited(times, units, list(dict.fromkeys([*options.formats, *times.meta["reference"]])))
    base = Plan.uniform(times.meta["reference"][-1], quantizer={"name": "rtn"})
    whole, alone = replace_linear(copy.deepcopy(model), base, fuse="auto"), times.predict(units, base.resolve(units))
    for kind, rows_of_x in zip(KINDS, (1, times.prefill), strict=True):  # what this one took when the table was made: its own rest, not the mean of two
        alone[kind] += (times.meta["rest_us"][str(rows_of_x)][-1] - times.rest[rows_of_x]) / 1e3
    for name, plan in plans.items():
        want = times.predict(units, plan.resolve(units))
        quantized = replace_linear(copy.deepcopy(model), plan, fuse="auto")
        before, got, after = (milliseconds(m, options) for m in (whole, quantized, whole))
        drift = {k: (before[k] + after[k]) / 2 / alone[k] for k in KINDS}
        row = {"plan": name, "stored_bits": plan.stored_bits(units), "predicted": want, "measured": got, "drift": drift}
        if "limit_ms" in plan.meta:
            row["limit_ms"] = plan.meta["limit_ms"]
            name += f" of {row['limit_ms']:.2f} ms"
        rows.append(row)
        result = {"threads": options.threads, "rest_us": times.meta["rest_us"], "rows": rows, "refused": []}
        lines = [f"| {name} | {k} | {want[k]:.2f} | {got[k]:.2f} | {want[k] / got[k] - 1:+.1%} | {drift[k]:.2f} | {want[k] * drift[k] / got[k] - 1:+.1%} |"
                 for k in KINDS]
        yield result, "\n".join([*head, *lines])
        head = []


def milliseconds(model: torch.nn.Module, options: argparse.Namespace) -> dict[str, float]:
    """Of a decoded token and of the prompt, as ``TimeTable.predict`` names them."""
    got = speed(model, prefill=options.prefill, repeats=options.repeats)
    return {"decode_ms": 1e3 / got["decode_tokens_per_s"], "prefill_ms": 1e3 * options.prefill / got["prefill_tokens_per_s"]}
