"""Presets: which candidates, metric, quantizer and second moments a run uses, as data. ``mxq quantize --preset NAME`` picks one.

A preset holds names only; ``pipeline.py`` resolves them. Any field can be replaced on the command line or in Python.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from dataclasses import dataclass

from ..errors import PlanError
from ..fileio import read_json
from ..formats import Format
from .kv import NORMAL, KVPlan, KVSpec, Mixed
from .schema import Plan


@dataclass(frozen=True)
class Preset:
    """One choice for each step of the line.

    Attributes:
        candidates: format names that the plan may mix.
        metric: a name of ``sensitivity.METRICS``.
        method: a quantizer, or ``"auto"``.
        weighting: which second moments the quantizer minimizes the error under: ``none``, ``attention`` or ``gradient``.
        options: further options of the quantizer.
        about: one sentence.
    """

    candidates: tuple[str, ...]
    metric: str = "fisher"
    method: str = "gptq"
    weighting: str = "attention"
    options: tuple[tuple[str, object], ...] = ()
    about: str = ""

    def quantizer(self) -> dict:
        """The ``quantizer`` section of a Plan."""
        return {"name": self.method, "weighting": self.weighting, **dict(self.options)}


#: What the solver takes at 2.5 to 4 stored bits when it is offered everything: integer zero points, since a symmetric grid loses a level that
#: 2 bits cannot spare; groups of 128, which leave more bytes for code bits than groups of 32 bring; at 3 bits a symmetric g64 between them.
DEFAULT_CANDIDATES = ("w2g64_asym", "w3g128_asym", "w3g64", "w4g128_asym", "w4g64_asym", "w8g128_asym")

PRESETS: dict[str, Preset] = {
    "mxq": Preset(DEFAULT_CANDIDATES,
                  about="GPTQ with positions of keys and values weighted by the attention they receive, second-order KL as cost: the default"),
    "gradient": Preset(DEFAULT_CANDIDATES, weighting="gradient",
                       about="positions weighted by the squared gradient of each layer's output instead (GuidedQuant, 2025)"),
    "linear_kl": Preset(DEFAULT_CANDIDATES, metric="linear_kl", about="cost = KL slope from noise probes times relative output error (HIGGS, 2024)"),
    "anchored_kl": Preset(DEFAULT_CANDIDATES, metric="anchored_kl", about="cost = KL measured with the coarsest candidate, scaled by second order"),
    "llm_mq": Preset(("w2g128_asym", "w3g128_asym", "w4g128_asym"), metric="first_order", weighting="none",
                     about="layer bits 2, 3, 4 by first-order |g.dW| (LLM-MQ, 2023), without its sparse outliers"),
    "output_error": Preset(DEFAULT_CANDIDATES, metric="output", weighting="none", about="cost = squared output error; a control, known to be a bad cost"),
    "rtn": Preset(DEFAULT_CANDIDATES, method="rtn", about="round to nearest under the default plan search; a control"),
    "lut": Preset(("lut2", "lut3", "lut4", "w8g128_asym"), about="k-means tables per row with error feedback"),
}


def find_preset(name: str | None, **changes) -> Preset:
    """A preset by name (None: the default), with the fields in ``changes`` that are not None replaced.

    Raises PlanError for an unknown name, FormatError for a bad candidate.
    """
    name = name or "mxq"
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        raise PlanError(f"preset {name!r}", f"the presets are {', '.join(PRESETS)}", f"did you mean {close[0]!r}?" if close else "choose one of them")
    changes = {k: v for k, v in changes.items() if v is not None}
    if "candidates" in changes:
        changes["candidates"] = tuple(Format.parse(c).name for c in changes["candidates"])
    return dataclasses.replace(PRESETS[name], **changes)


@dataclass(frozen=True)
class KVPreset:
    """A policy of the literature for keys and values that needs no calibration: one spec for all layers, its source, and where ours departs from it."""

    spec: KVSpec
    about: str


_KIVI = ("KIVI (Liu et al. 2024, arXiv 2402.02750): keys per channel by 32 tokens, values per token by 32 channels, float zeros, the newest 128 tokens exact. "
         "Pages of 64 leave that window one by one, where KIVI packs 128 keys at once and values one by one")
_KVQUANT = ("KVQuant (Hooper et al. 2024, arXiv 2401.18079): keys before the rotary embedding, codebooks, the first tokens exact. Levels for normal numbers "
            "instead of calibrated ones (the policy kvquant calibrates), scales of keys by 64 tokens instead of one from calibration, no sparse outliers, no "
            "Q-Norm; up to 63 of the newest tokens are exact until their page is full")
_TOKENS = ("the newest 64 tokens exact, and those that still wait for a round of pages; keys per channel, values per token; probes are every 16th query and "
           "the newest 16 before a round. Tokens keep their bits")
#: name -> policy
KV_PRESETS: dict[str, KVPreset] = {
    "kivi4": KVPreset(KVSpec(4, 4, group=32, residual=128), _KIVI),
    "kivi2": KVPreset(KVSpec(2, 2, group=32, residual=128), _KIVI),
    **{f"kvquant{bits}": KVPreset(KVSpec(bits, bits, residual=0, sink=4, pre_rope=True, levels=NORMAL), _KVQUANT) for bits in (4, 3, 2)},
    "zipcache": KVPreset(KVSpec(4, 4, mixed=Mixed(2, 2, 3, 2)),
                         "ZipCache (He et al. 2024, arXiv 2405.14256): 3 of 5 tokens with 4 bits, by the mean attention of those queries that could see "
                         f"them, the others with 2, without its scales by channel of values; {_TOKENS}"),
    "mikv": KVPreset(KVSpec(8, 8, mixed=Mixed(2, 2, 1, 3, accumulated=True)),
                     "MiKV (Yang et al. 2024, arXiv 2402.18096): a quarter of the tokens with 8 bits, by accumulated attention, the others with 2; the share "
                     f"and the bits are ours, and there is no balancer of channels; {_TOKENS}"),
}


@dataclass(frozen=True)
class KVPolicy:
    """A policy that calibrates layer by layer (``pipeline.plan_kv``): what it measures, which pairs a layer may have, what all share.

    The metric :data:`CODEBOOK` chooses no bits: all layers have those asked for, and codebooks of their own.
    """

    metric: str
    pairs: tuple[tuple[int, int], ...] | None
    spec: KVSpec
    about: str


CODEBOOK = "codebook"
KV_POLICIES: dict[str, KVPolicy] = {
    "layerwise": KVPolicy("fisher", None, KVSpec(), "keys and values of each layer by themselves, second order of the KL: ours"),
    "kvtuner": KVPolicy("attention", ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2)), KVSpec(group=32, residual=32),
                        "KVTuner (Li et al. 2025, arXiv 2502.04420): pairs by the relative error of the attention output. The exact knapsack over all layers "
                        "stands where KVTuner groups layers and searches with NSGA-II by task accuracy"),
    "pm_kvq": KVPolicy("first_order", ((4, 4), (2, 2)), KVSpec(group=64, residual=128, sink=1),
                       "PM-KVQ (Liu et al. 2025): 4 or 2 bits a layer by |g dK| + |g dV|, one sink token, 128 exact tokens. Labels are drawn from the model, "
                       "keys are grouped per channel, positions are not stretched and keys not smoothed; the shrink in place is KVSpec.budget"),
    "kvquant": KVPolicy(CODEBOOK, None, KVSpec(residual=0, sink=4, pre_rope=True, levels=NORMAL),
                        "KVQuant (Hooper et al. 2024, arXiv 2401.18079): keys before the rotary embedding, a codebook for the keys and one for the values of "
                        "each layer by Fisher-weighted k-means. Scales of keys come from each 64 tokens instead of from calibration; no sparse outliers, no "
                        "Q-Norm"),
}

#: Policies that pages cannot hold, and why. They are refused instead of being imitated.
_REFUSED = {
    "qaq": ("the bits of its tokens follow from a bound on the error of each; pages have two kinds of tokens, in fixed shares", "zipcache is the nearest"),
    "gear": ("it adds a low-rank part to what was rounded; pages hold codes alone", "use a width more, for example k4v4g32"),
}


def find_kv(name: str | os.PathLike) -> KVPlan | None:
    """How keys and values are cached, by a name of ``KV_PRESETS``, a spec's name (``k4v2g64``), the JSON file of a plan, or ``none``.

    Raises PlanError for an unknown name and for a plan without a KV section, CheckpointError for a file that cannot be read.
    """
    name = os.fspath(name)
    if name == "none":
        return None
    if name in KV_PRESETS:
        return KVPlan.parse(KV_PRESETS[name].spec)
    if name in KV_POLICIES:
        raise PlanError(f"kv preset {name!r}", "it is made by calibration", "make its plan first, with pipeline.plan_kv(...), and name the file")
    if name in _REFUSED:
        raise PlanError(f"kv preset {name!r}", *_REFUSED[name])
    if name.endswith(".json"):
        record = read_json(name)
        found = Plan.from_json(record, f"plan {name}").kv if "mxq_plan" in record else KVPlan.parse(record, f"kv section {name}")
        if found is None:
            raise PlanError(f"the KV section of {name}", "the plan has none", "name another plan, a preset or a spec such as k4v4g64")
        return found
    try:
        return KVPlan.parse(KVSpec.named(name))
    except PlanError as e:
        close = difflib.get_close_matches(name, KV_PRESETS, n=1)
        fix = f"did you mean {close[0]!r}?" if close else f"{e.fix}, or one of {', '.join(KV_PRESETS)}, a plan's file, or none"
        raise PlanError(e.asked, e.rule, fix) from None
