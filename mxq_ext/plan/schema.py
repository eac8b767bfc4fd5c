"""Plan: which Format each unit of a model gets. The file that people read, edit, diff and hand around.

A plan is a JSON object::

    {"mxq_plan": 1,                       version of this schema
     "default": "w4g64",                  units that no entry names; null keeps them in float
     "units": {"model.layers.0.mlp.up_proj": "w3g64",         exact module name
               "re:.*\\\\.down_proj": "w8",                     fullmatch on the module name
               "model.layers.1.mlp.up_proj": {"cols": [[448, "w3g64"], [128, "w8"]], "permute": true},
               "model.layers.2.mlp.up_proj": {"tiles": [[512, [[576, "w3g64"]]], [64, [[448, "w3g64"], [128, "w4g64"]]]], "permute": true},
               "lm_head": "keep"},                            stays in float
     "quantizer": {"name": "gptq"},       how codes are found, with its options
     "activations": "a8",                 how linears read their input: a16 exactly, a8 rounded to int8 by groups; null: a16
     "kv": {"key": 4, "value": 2},        how keys and values are cached, the same for all layers or layer by layer (``kv``); null: as they are
     "meta": {}}                          anything; never read by the code that applies the plan

Exact names win over patterns, patterns are tried in the order in which they stand, then ``default`` applies. An entry that
matches no unit is an error, never ignored: a misspelt name would otherwise silently get the default.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..errors import FormatError, PlanError
from ..fileio import read_json, write_json
from ..formats import Format
from ..structure import Unit
from .kv import KVPlan, KVSpec

VERSION = 1
ACTIVATIONS = ("a16", "a8")
KEEP = "keep"  #: the entry that leaves a unit in floating point
PATTERN = "re:"  #: prefix of an entry's name that makes it a regular expression

#: Band boundaries are multiples of these, so that a kernel tile never straddles two formats. The last band takes the rest.
ROW_TILE, COL_TILE = 8, 32

_KEYS = ("mxq_plan", "default", "units", "quantizer", "kv", "activations", "meta")
_ENTRY_FIX = 'write a format such as "w4g64", "keep", {"rows": [[count, format], ...]}, {"cols": [[count, format], ...]} or ' \
             '{"tiles": [[rows, [[cols, format], ...]], ...]}'
_ENTRY_RULE = "an entry object has exactly one of the keys format, rows, cols, tiles, permute beside the last three, and sparse beside rows and cols"


def closest(name: str, names: Iterable[str], count: int = 3) -> str:
    """``did you mean a, b`` for an unknown ``name``, patterns included; the first few names when nothing comes near."""
    names = list(names)
    # A pattern is compared by the letters in it: its metacharacters are no part of any module name.
    bare = re.sub(r"\\[a-zA-Z]|[\\*+?^$()|\[\]{}]", "", name.removeprefix(PATTERN)) if name.startswith(PATTERN) else name
    near = difflib.get_close_matches(bare, names, count, 0.5)
    if not near:  # a bare role such as down_porj is far from every full name, but near to the last part of one
        by_tail = {n.rpartition(".")[2]: n for n in reversed(names)}
        near = [by_tail[t] for t in difflib.get_close_matches(bare.rpartition(".")[2], by_tail, count, 0.6)]
    if near:
        return f"did you mean {', '.join(near)}"
    return f"names are for example {', '.join(names[:count])}" if names else "there are no units at all"


def compile_pattern(name: str) -> re.Pattern:
    """The regular expression of an entry ``re:...``. Raises PlanError if it does not compile."""
    try:
        return re.compile(name.removeprefix(PATTERN))
    except re.error as e:
        raise PlanError(f"plan entry {name!r}", f"it is no valid regular expression ({e})",
                        "correct it; a literal dot is written \\.") from None


def _format(value: object, where: str) -> Format:
    if not isinstance(value, str):
        raise PlanError(f"{where} {value!r}", f"a format name is expected, found {type(value).__name__}", _ENTRY_FIX)
    try:
        return Format.parse(value)
    except FormatError as e:
        raise PlanError(f"{where} {value!r}", e.rule, e.fix) from None


class Cut:
    """What the two ways of cutting one unit into rectangles of different formats share: :class:`Bands` and :class:`Tiles`."""

    permute: bool
    sparse: int = 0

    @property
    def permuted(self) -> tuple[str, ...]:
        """The axes, ``"rows"`` and ``"cols"``, whose permutation the unit stores."""
        raise NotImplementedError

    @property
    def formats(self) -> tuple[Format, ...]:
        """In the order of :meth:`rectangles`, each once."""
        raise NotImplementedError

    def rectangles(self, shape: tuple[int, int], name: str = "unit") -> list[tuple[int, int, int, int, Format]]:
        """(r0, r1, c0, c1, Format) that tile a weight of ``shape`` [N, K]. Raises PlanError if the counts do not sum to the axis."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """For example ``w3g64+w8``, as :attr:`QTensor.format_name` prints it."""
        return "+".join(f.name for f in self.formats)

    def __str__(self) -> str:
        return self.name

    def nbytes(self, rows: int, cols: int) -> int:
        """Exact stored bytes of a [rows, cols] weight, permutations (4 bytes per entry) and sparse part (a start per row, 6 bytes per value) included."""
        dense = sum(f.nbytes(r1 - r0, c1 - c0) for r0, r1, c0, c1, f in self.rectangles((rows, cols)))
        dense += 4 * (rows + 1) + 6 * self.sparse if self.sparse else 0
        return dense + sum(4 * (rows if axis == "rows" else cols) for axis in self.permuted)


@dataclass(frozen=True)
class Bands(Cut):
    """One unit cut along one axis into bands of different formats.

    Attributes:
        axis: ``"rows"`` or ``"cols"`` of the weight [N, K].
        parts: (count, Format) from row (column) 0 on; the counts sum to N (K), and code bits never fall, because quantizers that
            propagate errors from left to right need the most precise columns last.
        permute: the unit stores an int32 permutation of that axis, so that any rows (columns) can be gathered in a band. Without it
            the bands cover the weight in its own order.
        sparse: fp16 values that are added to the bands, wherever they lie (``qtensor.Sparse``); 0: there is no such part.
    """

    axis: str
    parts: tuple[tuple[int, Format], ...]
    permute: bool = False
    sparse: int = 0

    @property
    def permuted(self) -> tuple[str, ...]:
        return (self.axis,) if self.permute else ()

    @property
    def formats(self) -> tuple[Format, ...]:
        return tuple(dict.fromkeys(f for _, f in self.parts))

    @staticmethod
    def parse(value: Mapping, where: str) -> Bands:
        """Bands of a JSON entry ``{"rows"|"cols": [[count, format], ...], "permute": bool}``. Raises PlanError."""
        axis = "rows" if "rows" in value else "cols"
        if set(value) - {axis, "permute", "sparse"} or axis not in value:
            raise PlanError(f"{where} {dict(value)!r}", _ENTRY_RULE, _ENTRY_FIX)
        sparse = value.get("sparse", 0)
        if not isinstance(sparse, int) or isinstance(sparse, bool) or sparse < 0:
            raise PlanError(f"{where}: sparse {sparse!r}", "it must be the number of values of the sparse part, an integer >= 0", "write for example 1000")
        permute, parts = _flag(value, where), _counted(value[axis], axis, where, _format)
        for i, ((_, a), (_, b)) in enumerate(pairwise(parts), 1):
            if b.bits < a.bits:
                raise PlanError(f"{where}: band {i} is {b} after {a}", f"code bits must not fall from band to band ({a.bits} to {b.bits})",
                                "put the most precise band last")
        return Bands(axis, parts, permute, sparse)

    def rectangles(self, shape: tuple[int, int], name: str = "unit") -> list[tuple[int, int, int, int, Format]]:
        n, k = shape
        _check_sum(self.parts, self.axis, shape, f"bands of {name}")
        return [(a, b, 0, k, fmt) if self.axis == "rows" else (0, n, a, b, fmt) for a, b, fmt in spans(self.parts)]

    def to_json(self) -> dict:
        out = {self.axis: [[c, f.name] for c, f in self.parts]}
        return out | ({"permute": True} if self.permute else {}) | ({"sparse": self.sparse} if self.sparse else {})


@dataclass(frozen=True)
class Tiles(Cut):
    """One unit cut into bands of rows, and each of these into columns of different formats, wherever its own need them.

    Attributes:
        bands: (rows, ((columns, Format), ...)) from row 0 and column 0 on; rows sum to N, the columns of each band to K. Bits may rise and fall along a
            band: one permutation serves all bands, so it cannot put the most precise columns of each of them last.
        permute: the unit stores int32 permutations, of its rows if there are several bands, and of its columns if any band has several formats.
    """

    bands: tuple[tuple[int, tuple[tuple[int, Format], ...]], ...]
    permute: bool = False

    @property
    def permuted(self) -> tuple[str, ...]:
        cut = {"rows": len(self.bands) > 1, "cols": any(len(parts) > 1 for _, parts in self.bands)}
        return tuple(axis for axis in cut if self.permute and cut[axis])

    @property
    def formats(self) -> tuple[Format, ...]:
        return tuple(sorted(dict.fromkeys(f for _, parts in self.bands for _, f in parts), key=lambda f: (f.bits, f.name)))

    @staticmethod
    def parse(value: Mapping, where: str) -> Tiles:
        """Tiles of a JSON entry ``{"tiles": [[rows, [[cols, format], ...]], ...], "permute": bool}``. Raises PlanError."""
        if set(value) - {"tiles", "permute"}:
            raise PlanError(f"{where} {dict(value)!r}", _ENTRY_RULE, _ENTRY_FIX)
        bands = _counted(value["tiles"], "rows", where, lambda parts, at: _counted(parts, "cols", at, _format), "[rows, [[cols, format], ...]]", "columns")
        return Tiles(bands, _flag(value, where))

    def rectangles(self, shape: tuple[int, int], name: str = "unit") -> list[tuple[int, int, int, int, Format]]:
        """Those of few bits first, so that equal mixes have one name whatever lies at row 0."""
        _check_sum(self.bands, "rows", shape, f"tiles of {name}")
        for i, (_, parts) in enumerate(self.bands):
            _check_sum(parts, "cols", shape, f"band {i} of the tiles of {name}")
        out = [(r0, r1, c0, c1, fmt) for r0, r1, parts in spans(self.bands) for c0, c1, fmt in spans(parts)]
        rank = {f: i for i, f in enumerate(self.formats)}
        return sorted(out, key=lambda r: rank[r[4]])

    def to_json(self) -> dict:
        out = {"tiles": [[rows, [[c, f.name] for c, f in parts]] for rows, parts in self.bands]}
        return out | ({"permute": True} if self.permute else {})


def spans(parts: Iterable[tuple[int, object]]) -> list[tuple[int, int, object]]:
    """(start, end, value) of each (count, value), one behind the other from 0 on."""
    out, start = [], 0
    for count, value in parts:
        out.append((start, start + count, value))
        start += count
    return out


def _counted(listed: object, axis: str, where: str, read: Callable, form: str = "[count, format]", of: str = "format") -> tuple[tuple[int, object], ...]:
    """(count, ``read(value, where)``) of each pair in a JSON list. Raises PlanError for what is none, and for bands that end inside a kernel tile."""
    if not isinstance(listed, list | tuple) or not listed:
        raise PlanError(f"{where}: {axis} {listed!r}", f"a non-empty list of {form} is expected", _ENTRY_FIX)
    out, tile, end = [], ROW_TILE if axis == "rows" else COL_TILE, 0
    for i, part in enumerate(listed):
        if not isinstance(part, list | tuple) or len(part) != 2:
            raise PlanError(f"{where}: band {part!r}", f"a band is a pair {form}", _ENTRY_FIX)
        count, value = part[0], read(part[1], f"{where}: {of} of band {i}")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise PlanError(f"{where}: band {part!r}", f"its count must be a positive integer, found {count!r}", f"give a number of {axis}")
        end += count
        if i < len(listed) - 1 and end % tile:
            raise PlanError(f"{where}: band {i} ends at {axis[:-1]} {end}", f"bands end at multiples of {tile} {axis}, the last one excepted",
                            f"use {end // tile * tile or tile} or {-(-end // tile) * tile}")
        out.append((count, value))
    return tuple(out)


def _flag(value: Mapping, where: str) -> bool:
    """``permute`` of an entry object. Raises PlanError."""
    permute = value.get("permute", False)
    if not isinstance(permute, bool):
        raise PlanError(f"{where}: permute {permute!r}", f"it must be true or false, found {type(permute).__name__}", "write true or false")
    return permute


def _check_sum(parts: Sequence[tuple[int, object]], axis: str, shape: tuple[int, int], what: str) -> None:
    """Raises PlanError if the counts do not fill the axis of a weight of ``shape``."""
    total, size = sum(c for c, _ in parts), shape[0] if axis == "rows" else shape[1]
    if total != size:
        raise PlanError(f"{what} ({shape[0]} x {shape[1]})", f"the counts of {axis} must sum to {size}, they sum to {total}",
                        f"{'add' if total < size else 'take away'} {abs(size - total)} {axis}")


#: What a plan decides for a unit: a Format, Bands or Tiles, or None for float.
Decision = Format | Cut | None


def parse_entry(value: object, where: str = "plan entry") -> Decision:
    """Decision of one JSON entry (format name, ``"keep"`` or an object). Raises PlanError."""
    if value == KEEP:
        return None
    if isinstance(value, Format | Cut):
        return value
    if isinstance(value, Mapping):
        if set(value) == {"format"}:
            return parse_entry(value["format"], where) if not isinstance(value["format"], Mapping) else _format(value["format"], where)
        return (Tiles if "tiles" in value else Bands).parse(value, where)
    return _format(value, where)


def entry_json(decision: Decision) -> str | dict:
    """Inverse of :func:`parse_entry`, in canonical form."""
    return KEEP if decision is None else decision.name if isinstance(decision, Format) else decision.to_json()


def _checked_object(value: object, what: str) -> dict:
    """``value`` as a dict with string keys that JSON can hold; PlanError otherwise."""
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise PlanError(f"plan: {what} {value!r}", f"an object with string keys is expected, found {type(value).__name__}",
                        f'write "{what}": {{...}}')
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise PlanError(f"plan: {what}", f"it cannot be written as JSON ({e})", "use numbers, strings, lists and objects only") from None
    return dict(value)


@dataclass
class Plan:
    """The precision map of a model; see the head of this file for the JSON form.

    Attributes:
        default: canonical format name for units that no entry names, or None to keep them in float.
        units: entry name (module name or ``re:`` pattern) -> entry in its canonical JSON form, in order.
        quantizer: ``{"name": ..., options}``; the names and options are checked where quantizers live.
        activations: ``"a16"``, ``"a8"``, or None, which is the former (``ops.linear``).
        kv: which layers keep their keys and values in how many bits (``kv.KVPlan``; its JSON form and a KVSpec are taken too), or None.
        meta: free notes, for example how the plan was found.

    Everything is validated on construction; raises PlanError.
    """

    default: str | None = None
    units: dict[str, str | dict] = field(default_factory=dict)
    quantizer: dict = field(default_factory=lambda: {"name": "gptq"})
    kv: KVPlan | None = None
    activations: str | None = None
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        self.validate()

    # -- making, reading, writing ---------------------------------------------------------------------------------------------

    @staticmethod
    def uniform(fmt: str | Format, *, keep: Sequence[str] = (), quantizer: dict | None = None, activations: str | None = None,
                meta: dict | None = None) -> Plan:
        """One format for all units but those named in ``keep`` (names or ``re:`` patterns), which stay in float."""
        if isinstance(keep, str):
            raise PlanError(f"uniform plan with keep={keep!r}", "keep is a sequence of names, found one string", f"write keep=({keep!r},)")
        rest = {} if quantizer is None else {"quantizer": quantizer}
        return Plan(default=Format.parse(fmt).name, units=dict.fromkeys(keep, KEEP), activations=activations, meta=meta or {}, **rest)

    @staticmethod
    def for_kv(key: int = 4, value: int = 4, *, layers: Mapping[int, KVSpec | Mapping | str | None] | None = None, meta: dict | None = None,
               **options) -> Plan:
        """A plan that quantizes the KV cache alone: ``key`` and ``value`` bits, ``options`` of :class:`KVSpec`, other specs for some ``layers``."""
        return Plan(kv={"default": {"key": key, "value": value, **options}, "layers": layers or {}}, meta=meta or {})

    @staticmethod
    def from_json(obj: object, where: str = "plan") -> Plan:
        """Plan of a parsed JSON object. Raises PlanError for a missing or other version, unknown keys and malformed entries."""
        if not isinstance(obj, Mapping):
            raise PlanError(f"{where} {obj!r}", f"a JSON object is expected, found {type(obj).__name__}",
                            'write {"mxq_plan": 1, "default": "w4g64"}')
        if "mxq_plan" not in obj:
            raise PlanError(f"{where} with keys {', '.join(map(str, obj)) or '(none)'}",
                            "the key mxq_plan, the version of the schema, is missing",
                            f'add "mxq_plan": {VERSION} if this is a plan')
        version = obj["mxq_plan"]
        if isinstance(version, bool) or version != VERSION:
            raise PlanError(f"{where} of version {version!r}", f"this mxq_ext reads version {VERSION}",
                            "install the mxq_ext that wrote it, or make the plan again")
        for key in obj:
            if key not in _KEYS:
                raise PlanError(f"{where}: key {key!r}", f"a plan has the keys {', '.join(_KEYS)}", closest(str(key), _KEYS))
        return Plan(**{k: obj[k] for k in _KEYS[1:] if k in obj})

    def to_json(self) -> dict:
        """JSON object in canonical form; ``Plan.from_json(p.to_json()) == p``."""
        return {"mxq_plan": VERSION, "default": self.default, "units": dict(self.units), "quantizer": dict(self.quantizer),
                "kv": None if self.kv is None else self.kv.to_json(), "activations": self.activations, "meta": dict(self.meta)}

    @staticmethod
    def load(path: str | os.PathLike) -> Plan:
        """Reads a plan file. Raises CheckpointError if it is missing or no JSON, PlanError if it is no plan."""
        return Plan.from_json(read_json(path), f"plan {path}")

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan atomically."""
        self.validate()
        write_json(path, self.to_json())

    # -- checking and applying -----------------------------------------------------------------------------------------------

    def validate(self, units: Sequence[Unit] | None = None) -> None:
        """Checks every value and brings it to canonical form; with ``units``, also that the plan fits that model. Raises PlanError."""
        if self.default is not None:
            decision = parse_entry(self.default, "plan: default")
            if isinstance(decision, Cut):
                raise PlanError(f"plan: default {self.default!r}", "bands and tiles belong to one unit, they cannot be the default",
                                'write a format such as "w4g64", or null')
            self.default = None if decision is None else decision.name
        if not isinstance(self.units, Mapping):
            raise PlanError(f"plan: units {self.units!r}", f"an object of name -> format is expected, found {type(self.units).__name__}",
                            'write "units": {"model.layers.0.mlp.up_proj": "w3g64"}')
        entries = {}
        for name, value in self.units.items():
            if not isinstance(name, str) or not name:
                raise PlanError(f"plan entry {name!r}", "the name of a unit is a non-empty string",
                                "name a module, or write re:<regular expression>")
            if name.startswith(PATTERN):
                compile_pattern(name)
            entries[name] = entry_json(parse_entry(value, f"plan entry {name!r}:"))
        self.units = entries
        self.quantizer = _checked_object(self.quantizer, "quantizer")
        if not isinstance(self.quantizer.get("name"), str) or not self.quantizer["name"]:
            raise PlanError(f"plan: quantizer {self.quantizer!r}", "it must have a name, a non-empty string",
                            'write for example {"name": "gptq"}')
        if self.activations not in (None, *ACTIVATIONS):
            raise PlanError(f"plan: activations {self.activations!r}", f"linears read their input as {' or '.join(ACTIVATIONS)}", "write one of them, or null")
        self.kv = KVPlan.parse(self.kv)
        self.meta = _checked_object(self.meta, "meta")
        if units is not None:
            self.resolve(units)

    def _for_names(self, names: Sequence[str], patterns: list[tuple[str, re.Pattern]]) -> Decision:
        """Decision for the one weight that is called by all of ``names`` (a unit and the modules tied to it)."""
        exact = [(n, self.units[n]) for n in names if n in self.units]
        if exact:
            self._agree(exact)
            return parse_entry(exact[0][1])
        winner = None
        for text, pattern in patterns:
            hits = {n for n in names if pattern.fullmatch(n)}
            if not hits:
                continue
            if winner is None:
                winner, taken = text, hits
            elif not hits & taken:  # e.g. one pattern for embeddings, another for heads: no order of patterns can honour both
                self._agree([(winner, self.units[winner]), (text, self.units[text])], names)
        return parse_entry(self.units[winner]) if winner is not None else parse_entry(KEEP if self.default is None else self.default)

    @staticmethod
    def _agree(entries: list[tuple[str, object]], names: Sequence[str] = ()) -> None:
        if any(e != entries[0][1] for _, e in entries):
            listed = ", ".join(f"{n} = {e}" for n, e in entries)
            weight = f" ({', '.join(names)})" if names else ""
            raise PlanError(f"plan entries {listed}", f"these modules share one weight{weight}, which can have one format only",
                            "leave one of the entries")

    def resolve(self, units: Sequence[Unit]) -> dict[str, Decision]:
        """Unit name -> Format, :class:`Bands` or :class:`Tiles`, or None for float, in the order of ``units``.

        The name of a module tied to a unit stands for that unit, in exact entries and in patterns. Raises PlanError if an entry matches
        no unit (with the closest names), if tied modules are given different formats, or if bands do not fit the shape.
        """
        self.validate()
        patterns = [(n, compile_pattern(n)) for n in self.units if n.startswith(PATTERN)]
        names = [n for u in units for n in (u.name, *u.tied)]
        known = set(names)
        lost = [n for n in self.units if not n.startswith(PATTERN) and n not in known]
        lost += [n for n, pattern in patterns if not any(map(pattern.fullmatch, names))]
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise PlanError(f"plan entries {', '.join(map(repr, lost[:3]))}{more}",
                            f"no unit of the model ({len(units)} units) has such a name",
                            "; ".join(dict.fromkeys(closest(n, names) for n in lost[:3])))
        out = {}
        for u in units:
            decision = self._for_names((u.name, *u.tied), patterns)
            if isinstance(decision, Cut):
                decision.rectangles(u.shape, u.name)
            out[u.name] = decision
        return out

    # -- what it amounts to --------------------------------------------------------------------------------------------------

    def predicted_bytes(self, units: Sequence[Unit], float_bytes: int = 2) -> dict:
        """``{"total": int, "units": {name: int}}``: exact bytes on disk of every unit.

        A unit that is kept in float counts ``float_bytes`` per weight: 2 for a checkpoint in fp16 or bf16, 4 for fp32. What is no unit
        (norms, biases) is not counted.
        """
        per_unit = {u.name: u.numel * float_bytes if d is None else d.nbytes(*u.shape) for u,
                    d in zip(units, self.resolve(units).values(), strict=True)}
        return {"total": sum(per_unit.values()), "units": per_unit}

    def stored_bits(self, units: Sequence[Unit], float_bytes: int = 2) -> float:
        """Average stored bits per weight over all units, scales and tables included."""
        return 8 * self.predicted_bytes(units, float_bytes)["total"] / max(1, sum(u.numel for u in units))

    def counts(self, units: Sequence[Unit] | None = None) -> dict[str, int]:
        """Format name (or ``keep``) -> how many units get it, most frequent first; without ``units``, how many entries say so."""
        if units is not None:
            names = [KEEP if d is None else d.name for d in self.resolve(units).values()]
        else:
            names = [KEEP if (d := parse_entry(e)) is None else d.name for e in self.units.values()]
        return dict(Counter(names).most_common())

    def diff(self, other: Plan, units: Sequence[Unit] | None = None) -> list[tuple[str, str | dict, str | dict]]:
        """What differs: (unit, entry here, entry there), empty for plans that do the same.

        With ``units`` the two are compared unit by unit. Without, every module that either plan names is looked up in both (by name,
        pattern, default); patterns are compared as text. Rows ``default``, ``quantizer``, ``activations`` and ``kv.default``, ``kv.<layer>`` follow
        where those differ; meta never counts.
        """
        out = []
        if units is not None:
            here, there = self.resolve(units), other.resolve(units)
            out += [(n, entry_json(here[n]), entry_json(there[n])) for n in here if here[n] != there[n]]
        else:
            pa, pb = ([(n, compile_pattern(n)) for n in p.units if n.startswith(PATTERN)] for p in (self, other))
            for name in dict.fromkeys([*self.units, *other.units]):
                if name.startswith(PATTERN):
                    a, b = self.units.get(name, "absent"), other.units.get(name, "absent")
                else:
                    a, b = entry_json(self._for_names((name,), pa)), entry_json(other._for_names((name,), pb))
                if a != b:
                    out.append((name, a, b))
            if self.default != other.default:
                out.append(("default", *(KEEP if p.default is None else p.default for p in (self, other))))
        if self.quantizer != other.quantizer:
            out.append(("quantizer", dict(self.quantizer), dict(other.quantizer)))
        if (self.activations or ACTIVATIONS[0]) != (other.activations or ACTIVATIONS[0]):
            out.append(("activations", self.activations or ACTIVATIONS[0], other.activations or ACTIVATIONS[0]))
        return out + (self.kv or KVPlan()).diff(other.kv or KVPlan())
