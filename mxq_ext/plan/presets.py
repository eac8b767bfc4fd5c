"""Presets of the whole line, as data: unit x candidates x metric x allocator x quantizer x transform x activations x KV x solver budget.

``mxq presets`` lists them with their sources, ``mxq quantize --preset NAME`` runs one, ``--set PART=VALUE`` replaces any part, and so does
``find_preset(name, part=value)`` in Python. A preset holds names only; ``pipeline.py`` resolves them. Those of the literature, in ``frameworks.py``, say
where they depart from their papers, and what is missing where one cannot run yet: then it is refused, never approximated.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import PlanError
from ..fileio import read_json
from ..formats import Format
from .frameworks import CONTROLS, FRAMEWORKS
from .kv import NORMAL, KVPlan, KVSpec, Mixed
from .language import DEFAULT_CANDIDATES, Preset
from .schema import Plan

_OURS: dict[str, Preset] = {
    "mxq": Preset(DEFAULT_CANDIDATES,
                  about="GPTQ with positions of keys and values weighted by the attention they receive, second-order KL as cost: the default"),
    "mxq_tuned": Preset(DEFAULT_CANDIDATES, reconstruct=0, distill=64,
                        about="the default, then each linear again on its real inputs, and scales and norms trained on the float model's predictions"),
    "gradient": Preset(DEFAULT_CANDIDATES, weighting="gradient",
                       about="positions weighted by the squared gradient of each layer's output instead (GuidedQuant, 2025)"),
    "anchored_kl": Preset(DEFAULT_CANDIDATES, metric="anchored_kl", about="cost = KL measured with the coarsest candidate, scaled by second order"),
    "output_error": Preset(DEFAULT_CANDIDATES, metric="output", weighting="none", about="cost = squared output error; a control, known to be a bad cost"),
    "rtn": Preset(DEFAULT_CANDIDATES, method="rtn", about="round to nearest under the default plan search; a control"),
    "lut": Preset(("lut2", "lut3", "lut4", "w8g128_asym"), about="k-means tables per row with error feedback"),
}


#: name -> Preset: ours, those of the literature, and the controls.
PRESETS: dict[str, Preset] = {**_OURS, **FRAMEWORKS, **CONTROLS}


def find_preset(name: str | Preset | None, **changes) -> Preset:
    """A preset by name (None: the default), or one made by hand, with the parts in ``changes`` that are not None replaced
    (``candidates`` by a list, or by names between commas).

    Raises PlanError for an unknown name, part or value, FormatError for a bad candidate.
    """
    if not isinstance(name, Preset):
        name = name or "mxq"
        if name not in PRESETS:
            close = difflib.get_close_matches(name, PRESETS, n=1)
            raise PlanError(f"preset {name!r}", f"the presets are {', '.join(PRESETS)}", f"did you mean {close[0]!r}?" if close else "choose one of them")
        name = PRESETS[name]
    changes = {k: v for k, v in changes.items() if v is not None}
    parts = [f.name for f in dataclasses.fields(Preset)]
    for part in changes:
        if part not in parts:
            close = difflib.get_close_matches(part, parts, n=1)
            raise PlanError(f"part {part!r} of a preset", f"its parts are {', '.join(parts)}", f"did you mean {close[0]!r}?" if close else "choose one of them")
    if "candidates" in changes:
        named = changes["candidates"]
        changes["candidates"] = tuple(Format.parse(c).name for c in (named.replace(" ", "").split(",") if isinstance(named, str) else named))
    for part in ("options", "solver"):
        if isinstance(changes.get(part), Mapping):
            changes[part] = tuple(changes[part].items())
    return dataclasses.replace(name, **changes)


def parse_changes(settings: Sequence[str], preset: str | None) -> dict[str, object]:
    """``["allocator=greedy", "options.damp=0.02"]`` -> changes for :func:`find_preset`; values are JSON where they can be, else text.

    ``options.NAME`` and ``solver.NAME`` change one of the pairs of ``preset``. Raises PlanError for what has no ``=``.
    """
    base, out = find_preset(preset), {}
    for text in settings:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise PlanError(f"--set {text!r}", "PART=VALUE is expected", "write for example --set allocator=greedy")
        try:
            value = json.loads(raw)
        except json.JSONDecodeError:
            value = raw
        part, _, inner = key.partition(".")
        if inner and part in ("options", "solver"):
            out[part] = tuple((dict(out.get(part, getattr(base, part))) | {inner: value}).items())
        else:
            out[key] = [c.strip() for c in raw.split(",") if c.strip()] if key == "candidates" else value
    return out


@dataclass(frozen=True)
class KVPreset:
    """A policy of the literature for keys and values that needs no calibration: one spec for all layers, its source, and where ours departs from it."""

    spec: KVSpec
    about: str


_KIVI = ("KIVI (Liu et al. 2024, arXiv 2402.02750): keys per channel by 32 tokens, values per token by 32 channels, float zeros, the newest 128 tokens exact. "
         "Pages of 64 leave that window one by one, where KIVI packs 128 keys at once and values one by one")
_KVQUANT = ("KVQuant (Hooper et al. 2024, arXiv 2401.18079): keys before the rotary embedding, codebooks, 1 % of outliers beside the codes, the first tokens "
            "exact. Levels for normal numbers instead of calibrated ones (the policy kvquant calibrates), scales of keys by 64 tokens instead of one from "
            "calibration, outliers counted by page instead of by vector, no Q-Norm; up to 63 of the newest tokens are exact until their page is full")
_TOKENS = ("the newest 64 tokens exact, and those that still wait for a round of pages; keys per channel, values per token; probes are every 16th query and "
           "the newest 16 before a round. Tokens keep their bits")
#: name -> policy
KV_PRESETS: dict[str, KVPreset] = {
    "kivi4": KVPreset(KVSpec(4, 4, group=32, residual=128), _KIVI),
    "kivi2": KVPreset(KVSpec(2, 2, group=32, residual=128), _KIVI),
    **{f"kvquant{bits}": KVPreset(KVSpec(bits, bits, residual=0, sink=4, pre_rope=True, levels=NORMAL, outliers=0.01), _KVQUANT) for bits in (4, 3, 2)},
    "zipcache": KVPreset(KVSpec(4, 4, mixed=Mixed(2, 2, 3, 2)),
                         "ZipCache (He et al. 2024, arXiv 2405.14256): 3 of 5 tokens with 4 bits, by the mean attention of those queries that could see "
                         f"them, the others with 2, without its scales by channel of values; {_TOKENS}"),
    "mikv": KVPreset(KVSpec(8, 8, mixed=Mixed(2, 2, 1, 3, accumulated=True)),
                     "MiKV (Yang et al. 2024, arXiv 2402.18096): a quarter of the tokens with 8 bits, by accumulated attention, the others with 2; the share "
                     f"and the bits are ours, and there is no balancer of channels; {_TOKENS}"),
}


@dataclass(frozen=True)
class KVPolicy:
    """A policy that calibrates layer by layer (``kv_planning.plan_kv``): what it measures, which pairs a layer may have, what all share.

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
    "kvquant": KVPolicy(CODEBOOK, None, KVSpec(residual=0, sink=4, pre_rope=True, levels=NORMAL, outliers=0.01),
                        "KVQuant (Hooper et al. 2024, arXiv 2401.18079): keys before the rotary embedding, 1 % of outliers beside the codes, a codebook for "
                        "the keys and one for the values of each layer by Fisher-weighted k-means over the others. Scales of keys come from each 64 tokens "
                        "instead of from calibration, outliers are counted by page instead of by vector; no Q-Norm"),
    "kvquant_dense": KVPolicy(CODEBOOK, None, KVSpec(residual=0, sink=4, pre_rope=True, levels=NORMAL), "kvquant without outliers, as KVQuant calls it"),
}

#: Policies that pages cannot hold, and why. They are refused instead of being imitated.
_REFUSED = {
    "qaq": ("the bits of its tokens follow from a bound on the error of each; pages have two kinds of tokens, in fixed shares", "zipcache is the nearest"),
    "gear": ("it adds a low-rank part to what was rounded; pages hold codes and sparse outliers", "use a width more, for example k4v4g32"),
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
        raise PlanError(f"kv preset {name!r}", "it is made by calibration", "make its plan first, with kv_planning.plan_kv(...), and name the file")
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
        if re.match(r"k\d", name):  # meant as a spec: what is wrong with it is said
            raise
        close = difflib.get_close_matches(name, KV_PRESETS, n=1)
        fix = f"did you mean {close[0]!r}?" if close else f"{e.fix}, or one of {', '.join(KV_PRESETS)}, a plan's file, or none"
        raise PlanError(e.asked, e.rule, fix) from None
