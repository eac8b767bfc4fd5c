"""One byte budget for weights and cached keys and values, and plans of the cache alone.

    plan = solve_joint(table, nbytes=80_000_000, context=4096, batch=1)     table.kv holds what the cache costs (``sensitivity.sense_kv``)
    kv = solve_kv(table.kv, bits=3.0)                                       weights as they are

Losses of both are nats per token, so the knapsack of ``knapsack.py`` takes them as they are: the keys of a layer, and its values, are two units more, whose
bytes are those of a cache of the stated context and batch. Restricted to pairs (bits of keys, bits of values), a layer is one unit, as in KVTuner and PM-KVQ.
In a table by head, each head of a layer is what a layer is here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BudgetError, PlanError
from ..sensitivity.table import CostTable, KVTable
from . import knapsack
from .allocate import Allowed, Groups, _merge, budget_bytes, plan_of, warn_surplus
from .kv import KVPlan, KVSpec
from .rules import METHODS
from .schema import Plan

Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class _Units:
    """The cache as the knapsack sees it: one row per side of a layer (of a head, in a table by head), or per layer (head) where pairs are given."""

    loss: np.ndarray  # float64 [R, C]
    nbytes: np.ndarray  # int64 [R, C]
    pairs: tuple[tuple[int, int], ...] | None

    @staticmethod
    def of(table: KVTable, context: int, batch: int, pairs: Pairs | None) -> _Units:
        loss, nbytes = table.loss, table.nbytes(context, batch)
        if pairs is None:
            return _Units(loss, nbytes, None)
        pairs = tuple((int(k), int(v)) for k, v in pairs)
        for pair in pairs:
            if unknown := [b for b in pair if b not in table.bits]:
                raise PlanError(f"KV pairs {list(pairs)}", f"the table was measured with {', '.join(map(str, table.bits))} bits, not {unknown[0]}",
                                "measure it with those widths, or leave the pair out")
        keys, values = ([table.bits.index(pair[side]) for pair in pairs] for side in (0, 1))
        return _Units(loss[::2][:, keys] + loss[1::2][:, values], nbytes[::2][:, keys] + nbytes[1::2][:, values], pairs)

    def bits(self, table: KVTable, choice: np.ndarray) -> list[tuple[int, int]]:
        """(bits of keys, bits of values) of each layer, or of each head of one layer after the other."""
        if self.pairs is not None:
            return [self.pairs[c] for c in choice]
        wide = [table.bits[c] for c in choice]
        return list(zip(wide[::2], wide[1::2], strict=True))


def kv_plan_of(table: KVTable, bits: Sequence[tuple[int, int]]) -> KVPlan:
    """The KV section of (bits of keys, bits of values) per layer, or per head in a table by head: the commonest spec as the default, and the layers that
    differ. A layer whose heads are all alike is one without bits by head."""
    step = table.heads or 1
    layers = [tuple(bits[i : i + step]) for i in range(0, len(bits), step)]
    specs = [KVSpec(*own[0], **table.settings) if len(set(own)) == 1 else KVSpec(heads=own, **table.settings) for own in layers]
    default = Counter(specs).most_common(1)[0][0]
    return KVPlan.parse(KVPlan(default, dict(enumerate(specs))))


def _need_kv(table: CostTable, asked: str) -> KVTable:
    if table.kv is None:
        raise PlanError(asked, "the cost table holds no costs of cached keys and values", "measure them: `mxq sense --kv`, or sense_kv(...)")
    return table.kv


def solve_kv(table: KVTable, *, bits: float | None = None, nbytes: int | None = None, context: int = 4096, batch: int = 1, pairs: Pairs | None = None,
             method: str = "dp") -> KVPlan:
    """The KV section of least loss within a budget.

    Args:
        bits: average code bits of keys and values over all layers and heads (KVTuner's measure; scales and exact tokens are not counted), or
        nbytes: bytes of a cache of ``batch`` sequences of ``context`` tokens, with everything.
        pairs: the (keys, values) bits that a layer may have; None: any of the table's, for each side by itself.

    Raises BudgetError if nothing fits or not exactly one budget is given, PlanError for pairs that were not measured.
    """
    if (bits is None) == (nbytes is None):
        raise BudgetError(f"a KV budget of bits={bits}, nbytes={nbytes}", "exactly one of the two must be given", "pass for example bits=3.0")
    units = _Units.of(table, context, batch, pairs)
    sizes, budget = units.nbytes, nbytes
    if bits is not None:  # counted as if they were bytes
        width = np.array([k + v for k, v in units.pairs]) if units.pairs else np.array(table.bits)
        sizes = np.broadcast_to(width, units.loss.shape).copy()
        budget = int(np.floor(len(table.loss) * bits + 1e-9))
    a = METHODS[method](units.loss, sizes, budget)
    return kv_plan_of(table, units.bits(table, a.choice))


def solve_joint(table: CostTable, *, nbytes: int, context: int, batch: int = 1, pairs: Pairs | None = None, method: str = "dp", groups: Groups | None = None,
                allowed: Allowed | None = None, quantizer: dict | None = None, meta: dict | None = None) -> Plan:
    """The plan of least loss whose weights and cache take at most ``nbytes`` together.

    Args:
        context, batch: tokens and sequences of the cache that is counted.
        pairs, groups, allowed, method: as :func:`solve_kv` and ``allocate.choose`` have them.

    The plan's meta has, beside those of ``plan_of``, ``allocation``: method, budget_bytes, exact, gap, and ``joint``: context, batch, and bytes and loss
    of weights and of the cache. Warns as ``allocate.solve`` does. Raises BudgetError if nothing fits,
    PlanError for a table without ``kv``, or whose losses have no common unit.
    """
    kv = _need_kv(table, f"a plan of weights and cache in {nbytes:,} bytes")
    if kv.meta.get("metric") == "attention":
        raise PlanError("a plan of weights and cache", "the KV metric attention has no unit in common with the weights'", "measure with the KV metric fisher")
    merged, units, budget = _merge(table, groups, allowed), _Units.of(kv, context, batch, pairs), budget_bytes(table, nbytes=nbytes)
    (rows, columns), (more, widths) = merged.loss.shape, units.loss.shape
    loss = np.full((rows + more, max(columns, widths)), np.inf)
    sizes = np.zeros(loss.shape, dtype=np.int64)
    loss[:rows, :columns], sizes[:rows, :columns] = merged.loss, merged.nbytes
    loss[rows:, :widths], sizes[rows:, :widths] = units.loss, units.nbytes
    least = knapsack.Problem.of(loss, sizes).smallest
    if budget < least:
        raise BudgetError(f"budget of {budget:,} bytes for {len(table.units)} units and a cache of {batch} x {context} tokens",
                          f"the smallest choice takes {least:,} bytes, {least - budget:,} more", "allow more, or plan for a shorter context")
    warn_surplus(budget, int(np.where(np.isfinite(loss), sizes, 0).max(1).sum()), lambda size: f"{size:,} bytes for weights and cache")
    a = METHODS[method](loss, sizes, budget)
    of_weights, of_cache = a.choice[:rows][merged.row], a.choice[rows:]
    at = np.arange(more)
    cache = {"nbytes": int(units.nbytes[at, of_cache].sum()), "loss": float(units.loss[at, of_cache].sum())}
    out = plan_of(table, of_weights, quantizer=quantizer)
    joint = {"context": context, "batch": batch, "weights": {"nbytes": out.meta["nbytes"], "loss": out.meta["loss"]}, "cache": cache}
    how = {"method": a.method, "budget_bytes": budget, "exact": a.exact, "gap": a.gap}
    out.kv = kv_plan_of(kv, units.bits(kv, of_cache))
    out.meta = out.meta | {"allocation": how, "joint": joint} | (meta or {})
    return out
