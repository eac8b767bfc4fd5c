"""What cached keys and values cost a model, and the plans of a cache that follow from it."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from .errors import PlanError
from .plan import KVPlan, KVSpec, solve_kv
from .plan.kv import BITS, NORMAL_LEVELS
from .plan.presets import CODEBOOK, KV_POLICIES
from .progress import SILENT, Progress
from .sensitivity import KVTable, sense_kv
from .sensitivity.kv import watch_kv


def make_kv_table(model: nn.Module, tokens: torch.Tensor, spec: KVSpec | None = None, *, bits: tuple[int, ...] = BITS, metric: str = "fisher",
                  anchored: bool = False, by_head: bool = False, progress: Progress = SILENT) -> KVTable:
    """What cached keys and values cost, on windows such as ``kv_tokens`` makes; ``spec`` gives group, residual, sink, rotate, pre_rope and
    outliers.

    ``anchored``: in nats that can stand beside those of weights, see :func:`anchor_kv`. ``by_head``: a cost for each key/value head, so that a plan gives each
    of them bits of its own.

    Raises as ``kv.attention.check_attention`` does for models that cannot have a packed cache.
    """
    from .kv.attention import check_attention  # they import transformers
    from .kv.trial import CacheTrial

    spec = spec or KVSpec()
    check_attention(model, KVPlan(spec))
    table = sense_kv(model, tokens, bits, trial=CacheTrial(model, spec), metric=metric, by_head=by_head, progress=progress)
    return anchor_kv(model, table, tokens, progress=progress) if anchored else table


def anchor_kv(model: nn.Module, table: KVTable, tokens: torch.Tensor, *, progress: Progress = SILENT) -> KVTable:
    """``table`` with the losses of each width multiplied so that their sum is the KL measured on ``tokens`` with all keys and values at that width.

    On the demo's model second order alone foretells a third of the KL of a cache of 2 or 3 bits (docs/kv.md).
    Which layers are sensitive stays what ``sense_kv`` found.
    """
    from .evaluate import Reference, evaluate  # they import transformers
    from .kv.attention import replace_attention

    reference, loss, measured = Reference.of(model, tokens, progress=progress), table.loss.copy(), {}
    for b, width in enumerate(table.bits):
        if not loss[:, b].any():  # exact
            continue
        replace_attention(model, KVSpec(width, width, **table.settings))
        try:
            measured[str(width)] = max(evaluate(model, reference, tokens, progress=progress).kl, 0.0)
        finally:
            replace_attention(model, None)
        loss[:, b] *= measured[str(width)] / loss[:, b].sum()
    return dataclasses.replace(table, loss=loss, meta=table.meta | {"anchored": measured})


def plan_kv(model: nn.Module, tokens: torch.Tensor, policy: str = "layerwise", *, bits: float | None = None, nbytes: int | None = None, context: int = 4096,
            batch: int = 1, by_head: bool = False, progress: Progress = SILENT) -> KVPlan:
    """The KV section that a policy of ``presets.KV_POLICIES`` chooses within a budget: average code ``bits``, or bytes of a cache (``plan.joint.solve_kv``).
    ``kvquant`` and ``kvquant_dense`` want 2, 3 or 4 ``bits``, those of all layers. ``by_head``: bits for each key/value head, and not for a layer's heads
    together.

    ``tokens``: windows such as ``kv_tokens`` makes. Raises PlanError for an unknown policy, BudgetError if nothing fits.
    """
    if policy not in KV_POLICIES:
        raise PlanError(f"KV policy {policy!r}", "it is unknown", f"choose one of {', '.join(KV_POLICIES)}")
    chosen = KV_POLICIES[policy]
    if chosen.metric == CODEBOOK:
        if by_head:
            raise PlanError(f"KV policy {policy!r} by head", "codebooks are made for the keys and the values of a layer", "leave by_head out")
        if nbytes is not None or bits not in NORMAL_LEVELS:
            raise PlanError(f"KV policy {policy!r} with bits={bits}, nbytes={nbytes}", "all of its layers have the same bits: 2, 3 or 4",
                            "pass bits=3, for example")
        return make_codebooks(model, tokens, dataclasses.replace(chosen.spec, key=int(bits), value=int(bits)), progress=progress)
    wide = BITS if chosen.pairs is None else tuple(sorted({b for pair in chosen.pairs for b in pair}))
    table = make_kv_table(model, tokens, chosen.spec, bits=wide, metric=chosen.metric, by_head=by_head, progress=progress)
    return solve_kv(table, bits=bits, nbytes=nbytes, context=context, batch=batch, pairs=chosen.pairs)


def make_codebooks(model: nn.Module, tokens: torch.Tensor, spec: KVSpec, *, progress: Progress = SILENT) -> KVPlan:
    """``spec``, which has ``levels``, for all layers, each with codebooks of its own (``kv.codebooks``).

    ``tokens``: as for :func:`make_kv_table`; raises as it does.
    """
    from .kv.attention import check_attention  # they import transformers
    from .kv.codebooks import fit_codebooks
    from .kv.rope import rope_of

    check_attention(model, KVPlan(spec))
    config = model.config
    ropes = [rope_of(config, i) if spec.pre_rope else None for i in range(config.num_hidden_layers)]
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return fit_codebooks(watch_kv(model, tokens, sink=spec.sink, residual=spec.residual, progress=progress), spec, ropes, dim)
