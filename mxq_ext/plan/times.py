"""TimeTable: what each weight costs in microseconds on one machine, and what a plan will therefore take for a token.

    times = TimeTable.load("times.json")                          written by `mxq bench MODEL --table times.json`
    table = times.fill(table)                                     CostTable.seconds, for a plan under a time limit
    times.predict(units, plan.resolve(units))                     {"decode_ms": ..., "decode_tokens_per_s": ..., "prefill_ms": ..., ...}

    time(plan) = rest + sum over linears of time(shape, format, rows)

``rest`` is everything else in the model (attention, norms, calls), measured once as what a whole model takes beyond its linears. A weight in bands or tiles
takes the mean of its formats, weighted by their shares; a lookup takes nothing. The head reads one row, also when a prompt is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import BudgetError, PlanError
from ..fileio import read_json, write_json
from ..formats import Format
from ..sensitivity.table import KEEP, CostTable
from ..structure import Unit
from .schema import Cut, Decision

VERSION = 1
FIX = "measure it: `mxq bench MODEL --table times.json --formats ...`"


@dataclass
class TimeTable:
    """Microseconds by (shape, format, rows).

    Attributes:
        us: (N, K, format name, rows of x) -> microseconds of the product alone, without the overhead of a call.
        rest: rows of x -> microseconds of a model's forward beyond its linears; 1: a decoded token; the other: a prompt of so many tokens.
        meta: machine, threads, target, model; plain JSON.

    Raises PlanError for times that are no positive numbers.
    """

    us: dict[tuple[int, int, str, int], float]
    rest: dict[int, float] = field(default_factory=dict)
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        try:
            self.us = {(int(n), int(k), name if name == KEEP else Format.parse(name).name, int(m)): float(t) for (n, k, name, m), t in self.us.items()}
            self.rest = {int(m): float(t) for m, t in self.rest.items()}
        except (TypeError, ValueError) as e:
            raise PlanError("time table", f"its entries are no numbers ({e})", FIX) from None
        if not self.us or not all(np.isfinite(t) and t >= 0 for t in (*self.us.values(), *self.rest.values())):
            raise PlanError("time table", "it needs at least one entry, and every time is finite and not negative", FIX)

    @property
    def prefill(self) -> int | None:
        """The other number of rows that was measured, None if there is none."""
        return max((m for *_, m in self.us if m > 1), default=None)

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON atomically."""
        write_json(path, {"mxq_times": VERSION, "us": [[*key, t] for key, t in self.us.items()], "rest": {str(m): t for m, t in self.rest.items()},
                          "meta": self.meta})

    @staticmethod
    def load(path: str | os.PathLike) -> TimeTable:
        """Raises CheckpointError for an unreadable file, PlanError for one that is no time table."""
        obj = read_json(path)
        if obj.get("mxq_times") != VERSION or not isinstance(obj.get("us"), list) or not all(isinstance(e, list) and len(e) == 5 for e in obj["us"]) \
                or not isinstance(obj.get("rest"), dict):
            raise PlanError(f"time table {path}", f"it is none of version {VERSION}", FIX)
        return TimeTable({tuple(e[:4]): e[4] for e in obj["us"]}, obj["rest"], obj.get("meta", {}))

    def of(self, shape: tuple[int, int], decision: Decision, rows: int) -> float:
        """Microseconds of one weight [N, K] for x [rows, K]. Raises PlanError for what was not measured."""
        n, k = shape
        if isinstance(decision, Cut):
            return sum(self.of(shape, f, rows) * (r1 - r0) * (c1 - c0) / (n * k) for r0, r1, c0, c1, f in decision.rectangles(shape))
        name = KEEP if decision is None else decision.name
        if (n, k, name, rows) not in self.us:
            known = sorted({f for a, b, f, m in self.us if (a, b, m) == (n, k, rows)})
            raise PlanError(f"time of {n} x {k} in {name} for {rows} row{'s' if rows > 1 else ''}",
                            f"the table has {', '.join(known) if known else 'no times'} of that shape", FIX)
        return self.us[n, k, name, rows]

    def fill(self, table: CostTable) -> CostTable:
        """The same table with ``seconds`` float64 [U, F] of a decoded token. Raises PlanError if it does not say the shapes of its units."""
        places = table.meta.get("shapes")
        if not isinstance(places, Mapping) or set(places) != set(table.units):
            raise PlanError("times of a cost table", "it does not say the shapes of its units", "measure the cost table again with `mxq sense`")
        columns = [None if f == KEEP else Format.parse(f) for f in table.formats]
        # A lookup takes nothing; a pair that cannot be chosen needs no time.
        seconds = np.zeros(table.loss.shape)
        for (u, f), possible in np.ndenumerate(table.possible):
            place = places[table.units[u]]
            if possible and (place["tied"] or not place["embedding"]):
                seconds[u, f] = 1e-6 * self.of(tuple(place["shape"]), columns[f], 1)
        return CostTable(table.units, table.formats, table.loss, table.nbytes, table.numel, seconds, dict(table.meta), table.kv)

    def room(self, max_ms: float) -> float:
        """Seconds that the linears may take for a token within ``max_ms``. Raises BudgetError if the rest alone takes as long."""
        rest = self._rest(1)
        if not max_ms * 1e3 > rest:
            raise BudgetError(f"at most {max_ms:g} ms for a token", f"all but the linears takes {rest / 1e3:.4g} ms on this machine", "allow more time")
        return max_ms / 1e3 - rest / 1e6

    def predict(self, units: Sequence[Unit], decisions: Mapping[str, Decision]) -> dict[str, float]:
        """``decode_ms``, ``decode_tokens_per_s``, and with a measured prompt ``prefill``, ``prefill_ms``, ``prefill_tokens_per_s``.

        ``decisions``: what ``Plan.resolve(units)`` gives. Raises PlanError for what was not measured.
        """
        out, linears = {}, [u for u in units if not is_lookup(u)]
        for name, rows in (("decode", 1), ("prefill", self.prefill)):
            if rows is None or rows not in self.rest:
                continue
            ms = (self._rest(rows) + sum(self.of(u.shape, decisions[u.name], 1 if is_head(u) else rows) for u in linears)) / 1e3
            out |= {f"{name}_ms": ms, f"{name}_tokens_per_s": 1e3 * rows / ms} | ({"prefill": rows} if rows > 1 else {})
        return out

    def _rest(self, rows: int) -> float:
        if rows not in self.rest:
            raise PlanError(f"time of a model for {rows} row{'s' if rows > 1 else ''}", "the table holds no rest, which a whole model is needed for",
                            "measure it: `mxq bench MODEL --table times.json`")
        return self.rest[rows]


def is_lookup(unit: Unit) -> bool:
    """Whether the unit is an embedding that is no head too."""
    return unit.kind == "embedding" and not unit.tied


def is_head(unit: Unit) -> bool:
    """Whether it makes logits, of one position at a time: everything outside of the blocks that is no lookup."""
    return unit.layer < 0 and not is_lookup(unit)
