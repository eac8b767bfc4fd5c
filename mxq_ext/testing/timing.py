"""The one way to take times: candidates in turns, in one process, with the weights' memory cycled as a model would.

Turns, because a machine's speed drifts (clock, neighbours): what ran in the same second can be compared. Minimum and median are both
reported; the minimum is what the machine can do, the distance to the median tells how quiet it was.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

#: Weights of one benchmark are copied until they fill this much, so that a layer's weights come from memory as in a model.
CYCLE_BYTES = 96 << 20


@dataclass(frozen=True)
class Times:
    """Seconds per call."""

    minimum: float
    median: float
    rounds: int


def copies(nbytes: int, cycle: int = CYCLE_BYTES) -> int:
    """How many copies of a weight of ``nbytes`` fill ``cycle`` bytes (at least one)."""
    return max(1, -(-cycle // max(1, nbytes)))


def in_turns(candidates: dict[str, Callable[[int], object]], rounds: int = 15, seconds: float = 0.02) -> dict[str, Times]:
    """Times each ``f(i)``; i counts its calls, to pick one of several copies of the data.

    Each round gives every candidate a burst of calls of at least ``seconds`` in total, in an order that rotates. A burst's
    fastest and middle call count.
    """
    calls = dict.fromkeys(candidates, 0)
    best: dict[str, list[float]] = {name: [] for name in candidates}
    middle: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)

    def burst(name: str, limit: float) -> list[float]:
        f, out, start = candidates[name], [], time.perf_counter()
        while not out or time.perf_counter() - start < limit:
            i = calls[name]
            calls[name] += 1
            t = time.perf_counter()
            f(i)
            out.append(time.perf_counter() - t)
        return sorted(out)

    for name in names:
        burst(name, seconds / 2)  # warm-up: page faults, lazy set-up, clock
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            t = burst(name, seconds)
            best[name].append(t[0])
            middle[name].append(t[len(t) // 2])
    return {name: Times(min(best[name]), sorted(middle[name])[rounds // 2], rounds) for name in names}


def machine() -> dict:
    """What a number depends on: CPU, cores, load, versions, and the commit if there is one."""
    model = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            model = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), model)
    except OSError:
        pass
    here = os.path.dirname(__file__)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here).stdout.strip()
    return {"cpu": model, "cores": os.cpu_count(), "load": [round(v, 2) for v in os.getloadavg()], "system": platform.platform(),
            "python": platform.python_version(), "torch": torch.__version__, "commit": commit or None,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
