"""The KV section of a plan: in which form each decoder layer keeps its keys and values while the model runs.

In a plan's JSON::

    "kv": null                                     nothing is quantized: the ordinary cache of transformers
    "kv": {"key": 4, "value": 2}                   one spec for all layers; what is left out has its default
    "kv": {"default": {"key": 4, "value": 4},      layers that are not named; null keeps them in float
           "layers": {"0": {"key": 8, "value": 8}, "1": "keep"}}       by the layer's index; "keep" leaves a layer in float
    {"heads": {"0,3": {"key": 8, "value": 4},      a spec whose key/value heads differ: every head of the layer is named once, by its index or in a
               "1-2": {"key": 2, "value": 2}}}     range from first to last; key and value stand there and nowhere else

Layers count from 0 in the order of the decoder blocks. A layer that the model does not have is an error when the plan is applied.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace

from ..errors import PlanError

BITS = (2, 3, 4, 8, 16)  #: code bits of keys and of values, independently; 16 is float16
GROUPS = (32, 64, 128)
MAX_ROUND = 16  #: pages of one kind in a round of mixed pages
MAX_HEADS = 1024  #: key/value heads of a layer that a spec may name
KEEP = "keep"  #: the entry of a layer that stays in float
NORMAL = "normal"  #: the codebooks of :data:`NORMAL_LEVELS`
#: bits -> the levels of least mean squared error for 64 normal numbers scaled to -1 .. 1 by their own range, symmetric. Against the uniform grid from the
#: smallest to the largest the error is 0.56 times as large at 2 bits, 0.77 at 3 and 0.84 at 4.
NORMAL_LEVELS = {bits: (*(-x for x in reversed(upper)), *upper) for bits, upper in {
    2: (0.1978, 0.6621), 3: (0.1025, 0.3159, 0.559, 0.8809), 4: (0.0504, 0.1522, 0.2569, 0.3672, 0.4862, 0.6188, 0.7738, 0.9688)}.items()}

_HEADS_FIX = 'write for example {"0,3": {"key": 8, "value": 4}, "1-2": {"key": 2, "value": 2}}'
_FIX = 'write for example {"key": 4, "value": 4}, or {"default": {"key": 4, "value": 4}, "layers": {"0": {"key": 8, "value": 8}}}'


def _refuse(where: str, name: str, value: object, rule: str, fix: str) -> PlanError:
    return PlanError(f"{where}: {name} {value!r}", rule, fix)


@dataclass(frozen=True)
class Mixed:
    """Bits by token (ZipCache, He et al. 2024, arXiv 2405.14256; MiKV, Yang et al. 2024, arXiv 2402.18096). Raises PlanError for values that do not exist.

    Pages are made in rounds of ``high + low``: of the oldest tokens beyond the window those that queries looked at most fill ``high`` pages with the bits
    of the spec, the others ``low`` pages with the bits given here.

    Attributes:
        key, value: code bits of tokens that are not salient.
        high, low: pages of a round.
        accumulated: tokens are ranked by the attention that they received in all (MiKV), and not by its mean over the queries that could see them
            (ZipCache); the former favours old tokens.
    """

    key: int = 2
    value: int = 2
    high: int = 3
    low: int = 2
    accumulated: bool = False

    def __post_init__(self):
        where = "kv spec: mixed"
        for name in ("key", "value"):
            if isinstance(have := getattr(self, name), bool) or have not in BITS:
                raise _refuse(where, name, have, f"it must be one of {', '.join(map(str, BITS))}", "choose one of them")
        for name in ("high", "low"):
            if isinstance(have := getattr(self, name), bool) or not isinstance(have, int) or not 1 <= have <= MAX_ROUND:
                raise _refuse(where, name, have, f"it is a number of pages of a round, 1 to {MAX_ROUND}", "write for example 3 and 2")
        if not isinstance(self.accumulated, bool):
            raise _refuse(where, "accumulated", self.accumulated, "it must be true or false", "write true or false")

    @property
    def pages(self) -> int:
        """Of a round."""
        return self.high + self.low

    @property
    def name(self) -> str:
        return f"mix{self.high}.{self.low}k{self.key}v{self.value}{'a' * self.accumulated}"

    @staticmethod
    def parse(value: object) -> Mixed:
        """From its JSON object; a Mixed as it is. Raises PlanError."""
        if isinstance(value, Mixed):
            return value
        names = [f.name for f in fields(Mixed)]
        if not isinstance(value, Mapping) or any(k not in names for k in value):
            raise _refuse("kv spec", "mixed", value, f"it is an object of {', '.join(names)}", 'write for example {"key": 2, "value": 2, "high": 3, "low": 2}')
        return Mixed(**value)


@dataclass(frozen=True)
class KVSpec:
    """How one layer keeps its keys and values. Raises PlanError for values that do not exist.

    Attributes:
        key, value: code bits of each, of :data:`BITS`.
        group: numbers that share a scale and a zero point: tokens of a channel for keys (at most :data:`PAGE`), channels of a token
            for values (all channels of a head where ``group`` does not divide them).
        residual: at least this many of the newest tokens stay in the model's dtype; a page is made of the oldest :data:`PAGE` tokens
            beyond them.
        sink: the first tokens of a sequence, which stay in the model's dtype forever. Queries look at them more than at any other.
        rotate: keys and values are multiplied by a Hadamard matrix first, which spreads channels that stand out over all the others.
            Queries are multiplied along, outputs back. Head dimensions must be powers of two.
        budget: bytes of the layer's pages (those of all sequences) at which they all shrink to half their bits, in place and from their codes: 16 to 8,
            8 to 4, 4 to 2, as often as needed (PM-KVQ); ``key`` and ``value`` are what they begin with. At 2 bits they grow on. None: never.
        pre_rope: pages hold keys before the rotary embedding, which is applied while they are read (KVQuant; ``kv.rope``).
        levels: codebooks in place of uniform grids: a code stands for ``s * level + z``, with ``s`` half the range of the group and ``z`` its middle.
            ``"normal"`` for :data:`NORMAL_LEVELS`, or (levels of keys, levels of values), each 2^bits ascending numbers within -1 .. 1, which are
            rounded to float16. Only with 2, 3 or 4 bits on both sides. None: uniform grids.
        mixed: bits by token: ``key`` and ``value`` are those of salient tokens, the others have fewer. Not with pre_rope, whose pages are of neighbours, nor
            with a budget or codebooks of a plan's own, which are made for one width. None: all tokens alike.
        outliers: share of a page's numbers that are kept beside their codes, those furthest from the mean of their group (KVQuant): 0.001 to 0.1, rounded to
            what fills cache lines (``kv.ops.outlier_count``). Scales are taken of the others. Sides of 16 bits have none, which keep every number as well as
            that. Not with a budget or with mixed. 0: none.
        heads: bits by head: (bits of keys, bits of values) of each key/value head of the layer in order, or groups of heads with their bits as in a plan's
            JSON. ``key`` and ``value`` are left out then, and become the most that a head has. Not with a budget, with mixed, or with codebooks of a plan's
            own, which are made for one pair. None: all heads alike.
    """

    key: int = 4
    value: int = 4
    group: int = 64
    residual: int = 64
    sink: int = 0
    rotate: bool = False
    budget: int | None = None
    pre_rope: bool = False
    levels: str | tuple[tuple[float, ...], tuple[float, ...]] | None = None
    mixed: Mixed | None = None
    heads: tuple[tuple[int, int], ...] | None = None
    outliers: float = 0.0

    def __post_init__(self):
        where = "kv spec"
        if self.heads is not None:
            self._take_heads(where)
        for name, allowed in (("key", BITS), ("value", BITS), ("group", GROUPS)):
            have = getattr(self, name)
            if isinstance(have, bool) or have not in allowed:
                raise _refuse(where, name, have, f"it must be one of {', '.join(map(str, allowed))}", "choose one of them")
        for name in ("residual", "sink"):
            have = getattr(self, name)
            if isinstance(have, bool) or not isinstance(have, int) or have < 0:
                raise _refuse(where, name, have, "it is a number of tokens, 0 or more", "write for example 64")
        for name in ("rotate", "pre_rope"):
            if not isinstance(have := getattr(self, name), bool):
                raise _refuse(where, name, have, "it must be true or false", "write true or false")
        if self.rotate and self.pre_rope:
            raise _refuse(where, "pre_rope", True, "the Hadamard matrix of rotate mixes the channels that the rotary embedding turns", "choose one of them")
        if self.budget is not None:
            if isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < 1:
                raise _refuse(where, "budget", self.budget, "it is a number of bytes, 1 or more", "leave it out for none")
            if 3 in (self.key, self.value):
                raise _refuse(where, "budget", self.budget, "pages of 3 bits cannot be halved", "begin with 16, 8 or 4 bits")
            if self.levels is not None:
                raise _refuse(where, "budget", self.budget, "pages are halved from codes of uniform grids, these have codebooks", "leave one of them out")
        if isinstance(self.outliers, bool) or not isinstance(self.outliers, int | float) or not (self.outliers == 0 or 0.001 <= self.outliers <= 0.1):
            raise _refuse(where, "outliers", self.outliers, "it is a share of the numbers, 0.001 to 0.1, or 0 for none", "write for example 0.01")
        object.__setattr__(self, "outliers", float(self.outliers))
        for name in ("budget", "mixed"):
            if self.outliers and getattr(self, name) is not None:
                why = {"budget": "pages are halved from their codes alone, and what outliers add belongs to the codes as they were",
                       "mixed": "pages of tokens in two widths have no room for outliers"}
                raise _refuse(where, "outliers", self.outliers, why[name], f"leave outliers or {name} out")
        if self.levels is not None:
            for pair in self.heads or ((self.key, self.value),):
                object.__setattr__(self, "levels", _checked_levels(self.levels, pair, where))
        if self.mixed is not None:
            object.__setattr__(self, "mixed", Mixed.parse(self.mixed))
            if self.pre_rope or self.budget is not None or self.levels not in (None, NORMAL):
                raise _refuse(where, "mixed", self.mixed.name, "it does not go with pre_rope, a budget, or codebooks of one width", "leave one of them out")
            if self.levels is not None:
                _checked_levels(self.levels, (self.mixed.key, self.mixed.value), where)

    def _take_heads(self, where: str) -> None:
        object.__setattr__(self, "heads", _checked_heads(self.heads, where))
        for side, name in enumerate(("key", "value")):
            most = max(pair[side] for pair in self.heads)
            if (have := getattr(self, name)) not in (getattr(KVSpec, name), most):
                raise _refuse(where, name, have, f"bits are given head by head, at most {most}", "leave it out")
            object.__setattr__(self, name, most)
        if self.budget is not None or self.mixed is not None or self.levels not in (None, NORMAL):
            raise _refuse(where, "heads", _heads_name(self.heads), "bits by head do not go with a budget, with mixed, or with codebooks of a plan's own, which "
                          "are made for one pair of bits", "leave one of them out")

    @property
    def pairs(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """(bits of keys, bits of values) -> the heads that have them, for a spec with ``heads``; in the order of their first heads."""
        out: dict[tuple[int, int], tuple[int, ...]] = {}
        for head, pair in enumerate(self.heads):
            out[pair] = (*out.get(pair, ()), head)
        return out

    @property
    def parts(self) -> list[KVSpec]:
        """A spec for each group of heads, in the order of :attr:`pairs`; this one where all heads are alike."""
        return [self] if self.heads is None else [replace(self, key=key, value=value, heads=None) for key, value in self.pairs]

    @property
    def low(self) -> KVSpec:
        """What tokens that are not salient are kept in, for a spec with ``mixed``."""
        return replace(self, key=self.mixed.key, value=self.mixed.value, mixed=None)

    @property
    def round_pages(self) -> int:
        """Pages that are made at a time."""
        return 1 if self.mixed is None else self.mixed.pages

    def codebook(self, side: int) -> tuple[float, ...] | None:
        """The levels of keys (0) or values (1), ascending; None for a uniform grid."""
        if self.levels is None:
            return None
        return _halves(NORMAL_LEVELS[(self.key, self.value)[side]]) if self.levels == NORMAL else self.levels[side]

    @property
    def name(self) -> str:
        """For example ``k4v2g64``, with what differs from the defaults appended: ``k4v2g64_r128_s4_rot``. Bits by head are in the order of the heads:
        ``k8v4-k2v2x2-k8v4g64``. ``_book``, for codebooks of a plan's own, is not enough to find the spec again."""
        default = KVSpec()
        rest = [f"r{self.residual}"] * (self.residual != default.residual) + [f"s{self.sink}"] * (self.sink != default.sink) + ["rot"] * self.rotate
        rest += [f"b{self.budget}"] * (self.budget is not None) + ["pre"] * self.pre_rope
        rest += [] if self.levels is None else ["normal" if self.levels == NORMAL else "book"]
        rest += [f"o{self.outliers}"] * (self.outliers > 0)
        rest += [] if self.mixed is None else [self.mixed.name]
        bits = f"k{self.key}v{self.value}" if self.heads is None else _heads_name(self.heads)
        return "_".join([f"{bits}g{self.group}", *rest])

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def named(name: str) -> KVSpec:
        """The spec of a :attr:`name`; what is left out of it has its default, so ``k4v2`` will do. Raises PlanError."""
        found = re.fullmatch(r"((?:k\d+v\d+(?:x\d+)?-)*k\d+v\d+(?:x\d+)?)(?:g(\d+))?(?:_r(\d+))?(?:_s(\d+))?(_rot)?(?:_b(\d+))?(_pre)?(_normal)?"
                             r"(?:_o(0\.\d+))?(?:_mix(\d+)\.(\d+)k(\d+)v(\d+)(a)?)?", name)
        if found is None:
            raise PlanError(f"kv spec {name!r}", "it is k, bits of keys, v, bits of values (of one head after the other, as k8v4-k2v2x2, where they "
                            "differ), and what differs from the defaults of g (group), _r (residual), _s (sink), _rot, _b (budget), _pre (pre_rope), "
                            "_normal (levels), _o (outliers), _mix (mixed), in this order; codebooks of its own are in the plan's file",
                            "write for example k4v2g64 or k4v2g32_r128_s4, or name the file")
        bits, *three, rotate, budget, pre_rope, normal, outliers, high, low, low_key, low_value, accumulated = found.groups()
        numbers = zip(("group", "residual", "sink", "budget"), (*three, budget), strict=True)
        return KVSpec(**_bits_named(bits), **{field: int(n) for field, n in numbers if n is not None}, rotate=rotate is not None,
                      pre_rope=pre_rope is not None, levels=NORMAL if normal else None, outliers=float(outliers or 0),
                      mixed=None if high is None else Mixed(int(low_key), int(low_value), int(high), int(low), accumulated is not None))

    @staticmethod
    def parse(value: object, where: str = "kv spec") -> KVSpec:
        """A spec from its JSON object or its :attr:`name`; a KVSpec as it is. Raises PlanError."""
        if isinstance(value, KVSpec):
            return value
        if isinstance(value, str):
            return KVSpec.named(value)
        if not isinstance(value, Mapping):
            raise PlanError(f"{where} {value!r}", f"an object with bits of keys and values is expected, found {type(value).__name__}", _FIX)
        names = [f.name for f in fields(KVSpec)]
        for key in value:
            if key not in names:
                raise PlanError(f"{where}: key {key!r}", f"a spec has the keys {', '.join(names)}", _FIX)
        if value.get("heads") is not None and (beside := [n for n in ("key", "value") if n in value]):
            raise _refuse(where, beside[0], value[beside[0]], "bits are given head by head", "leave it out")
        try:
            return KVSpec(**{n: value[n] for n in names if n in value})
        except PlanError as e:
            raise PlanError(e.asked.replace("kv spec", where, 1), e.rule, e.fix) from None

    def to_json(self) -> dict:
        """Every field, but those that came later only where they differ from their defaults: plans that were written before read the same. With ``heads``
        there are no bits beside them."""
        out = {k: v for k, v in asdict(self).items() if k not in ("budget", "pre_rope", "levels", "mixed", "heads", "outliers") or v not in (None, False, 0.0)}
        if self.heads is not None:
            del out["key"], out["value"]
            out["heads"] = {_ranges(heads): {"key": key, "value": value} for (key, value), heads in self.pairs.items()}
        return out | ({"levels": [list(x) for x in self.levels]} if isinstance(self.levels, tuple) else {})


def _runs(items: Sequence) -> list[tuple[object, int]]:
    """(item, how often it comes in a row)."""
    return [(item, len(list(same))) for item, same in itertools.groupby(items)]


def _heads_name(heads: Sequence[tuple[int, int]]) -> str:
    """``k8v4-k2v2x2-k8v4``; heads that are all alike are counted too, or nothing would tell them from a spec without heads."""
    runs = _runs(heads)
    return "-".join(f"k{k}v{v}" + (f"x{count}" if count > 1 or len(runs) == 1 else "") for (k, v), count in runs)


def _bits_named(name: str) -> dict:
    """The fields of a spec that the first part of its name says. Raises PlanError."""
    parts = re.findall(r"k(\d+)v(\d+)(?:x(\d+))?", name)
    if len(parts) == 1 and not parts[0][2]:
        return {"key": int(parts[0][0]), "value": int(parts[0][1])}
    counts = [int(count or 1) for *_, count in parts]
    if min(counts) < 1 or sum(counts) > MAX_HEADS:
        raise PlanError(f"kv spec {name!r}", f"a layer has 1 to {MAX_HEADS} key/value heads", "write how many there are of each kind")
    return {"heads": tuple((int(k), int(v)) for (k, v, _), count in zip(parts, counts, strict=True) for _ in range(count))}


def _ranges(heads: Sequence[int]) -> str:
    """Ascending indices as a plan names them: ``0,3-5``."""
    out, starts = [], [i for i, head in enumerate(heads) if not i or head != heads[i - 1] + 1]
    for start, stop in zip(starts, (*starts[1:], len(heads)), strict=True):
        first, last = heads[start], heads[stop - 1]
        out.append(str(first) if first == last else f"{first}-{last}")
    return ",".join(out)


def _named_heads(name: object, where: str) -> list[int]:
    """Inverse of :func:`_ranges`, for any order. Raises PlanError."""
    if not isinstance(name, str) or not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", name, re.ASCII):
        raise _refuse(where, "heads", name, "heads are named by their index, 0 for the first, or as a range from first to last", _HEADS_FIX)
    out = []
    for part in name.split(","):
        first, _, last = part.partition("-")
        out += (named := range(int(first), int(last or first) + 1))
        if not named or named[-1] >= MAX_HEADS:
            raise _refuse(where, "heads", name, f"a range goes from first to last, and heads are 0 to {MAX_HEADS - 1}", _HEADS_FIX)
    return out


def _checked_heads(heads: object, where: str) -> tuple[tuple[int, int], ...]:
    """A pair of bits for each head, of such pairs or of groups of heads. Raises PlanError, also where a head is missing or named twice."""
    if isinstance(heads, Mapping):
        pairs: dict[int, tuple[object, object]] = {}
        for name, bits in heads.items():
            if not isinstance(bits, Mapping) or set(bits) != {"key", "value"}:
                raise _refuse(where, f"heads {name}:", bits, "bits of keys and bits of values are expected, and nothing else", _HEADS_FIX)
            for head in _named_heads(name, where):
                if head in pairs:
                    raise _refuse(where, "heads", name, f"head {head} is named twice", "name every head once")
                pairs[head] = bits["key"], bits["value"]
        if missing := [i for i in range(max(pairs, default=0) + 1) if i not in pairs]:
            raise _refuse(where, "heads", ",".join(map(str, heads)), f"head {missing[0]} is missing", "name every key/value head of the layer")
        out = [pairs[i] for i in range(len(pairs))]
    elif isinstance(heads, Sequence) and not isinstance(heads, str) and 0 < len(heads) <= MAX_HEADS and all(
            isinstance(p, Sequence) and not isinstance(p, str) and len(p) == 2 for p in heads):
        out = heads
    else:
        raise _refuse(where, "heads", heads, "it names groups of heads, or has a pair of bits for each head", _HEADS_FIX)
    for i, pair in enumerate(out):
        for name, bits in zip(("key", "value"), pair, strict=True):
            if isinstance(bits, bool) or bits not in BITS:
                raise _refuse(where, f"head {i}: {name}", bits, f"it must be one of {', '.join(map(str, BITS))}", "choose one of them")
    return tuple((int(k), int(v)) for k, v in out)


def _halves(levels: Sequence[float]) -> tuple[float, ...]:
    """Rounded to float16, so that scale times level is exact in float32."""
    return tuple(struct.unpack("e", struct.pack("e", x))[0] for x in levels)


def _checked_levels(levels: object, bits: tuple[int, int], where: str) -> str | tuple[tuple[float, ...], tuple[float, ...]]:
    if any(b not in NORMAL_LEVELS for b in bits):
        raise _refuse(where, "levels", levels, f"codebooks have 2, 3 or 4 bits, the spec {bits[0]} for keys and {bits[1]} for values", "leave it out")
    if levels == NORMAL:
        return NORMAL
    if not isinstance(levels, Sequence) or isinstance(levels, str) or len(levels) != 2:
        raise _refuse(where, "levels", levels, f"it is {NORMAL!r}, or the levels of keys and those of values", f"write {NORMAL!r}")
    for side, have, b in zip(("keys", "values"), levels, bits, strict=True):
        numbers = isinstance(have, Sequence) and all(isinstance(x, int | float) and math.isfinite(x) and abs(x) <= 1 for x in have)
        if not numbers or len(have) != 2**b or list(have) != sorted(have):
            raise _refuse(where, f"levels of {side}", have, f"{b} bits have {2**b} ascending levels within -1 .. 1", f"write {NORMAL!r}, or as many numbers")
    return _halves(levels[0]), _halves(levels[1])


def _parse_entry(value: object, where: str) -> KVSpec | None:
    return None if value is None or value == KEEP else KVSpec.parse(value, where)


def _parse_layer(key: object) -> int:
    if isinstance(key, int) and not isinstance(key, bool) and key >= 0:
        return key
    if isinstance(key, str) and key.isascii() and key.isdigit() and str(int(key)) == key:
        return int(key)
    raise PlanError(f"plan: kv: layer {key!r}", "layers are named by their index, 0 for the first", 'write for example "0"')


@dataclass(frozen=True)
class KVPlan:
    """The KV section: ``layers`` by index, ``default`` for all others; None stands for a layer in float."""

    default: KVSpec | None = None
    layers: Mapping[int, KVSpec | None] = field(default_factory=dict)

    @staticmethod
    def parse(value: object, where: str = "plan: kv") -> KVPlan | None:
        """The section of a JSON value, a KVSpec or its name (for all layers), a KVPlan, or None where nothing is quantized. Raises PlanError."""
        if value is None:
            return None
        if isinstance(value, KVPlan):
            out = value
        elif isinstance(value, Mapping) and ("default" in value or "layers" in value):
            if odd := [k for k in value if k not in ("default", "layers")]:
                raise PlanError(f"{where}: key {odd[0]!r}", "beside default and layers there are no others", _FIX)
            listed = value.get("layers", {})
            if not isinstance(listed, Mapping):
                raise PlanError(f"{where}: layers {listed!r}", f"an object of layer -> spec is expected, found {type(listed).__name__}", _FIX)
            out = KVPlan(_parse_entry(value.get("default"), f"{where}: default"),
                         {_parse_layer(k): _parse_entry(v, f"{where}: layer {k}") for k, v in listed.items()})
        else:
            out = KVPlan(KVSpec.parse(value, where))
        # Canonical: what says the same as the default is left out, so that equal sections compare equal.
        layers = {i: s for i, s in sorted(out.layers.items()) if s != out.default}
        return None if out.default is None and not layers else KVPlan(out.default, layers)

    def to_json(self) -> dict:
        if self.default is not None and not self.layers:
            return self.default.to_json()
        return {"default": None if self.default is None else self.default.to_json(),
                "layers": {str(i): KEEP if s is None else s.to_json() for i, s in self.layers.items()}}

    def spec(self, layer: int) -> KVSpec | None:
        """The spec of one layer, None for float."""
        return self.layers.get(layer, self.default)

    def resolve(self, layers: int) -> list[KVSpec | None]:
        """One entry per layer of a model with that many. Raises PlanError if the plan names a layer beyond them."""
        if beyond := [i for i in self.layers if i >= layers]:
            raise PlanError(f"plan: kv: layer {beyond[0]}", f"the model has the layers 0 to {layers - 1}", "take the entry out, or use the plan of this model")
        return [self.spec(i) for i in range(layers)]

    def __str__(self) -> str:
        rest = "".join(f", {i}: {KEEP if s is None else s}" for i, s in self.layers.items())
        return f"{KEEP if self.default is None else self.default}{rest}"

    def diff(self, other: KVPlan) -> list[tuple[str, str | dict, str | dict]]:
        """(``kv.default`` or ``kv.<layer>``, entry here, entry there) where the two sections differ."""
        rows = [("kv.default", self.default, other.default)]
        rows += [(f"kv.{i}", self.spec(i), other.spec(i)) for i in sorted({*self.layers, *other.layers})]
        return [(name, *(KEEP if s is None else s.to_json() for s in (a, b))) for name, a, b in rows if a != b]
