"""The language of presets: unit x candidates x metric x allocator x quantizer x transform x reconstruction x distillation x activations x KV x solver
budget, as one frozen value.

A preset holds names only, which ``pipeline.py`` resolves, since metrics lie below this folder and quantizers above it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ..errors import PlanError
from .rules import METHODS
from .schema import ACTIVATIONS

#: What one decision of a preset covers: a whole linear, a band of output rows or of input columns, a tile of both, or single elements that stay in fp16.
UNITS = ("linear", "rows", "cols", "tiles", "element")
#: Allocators beside ``rules.METHODS``: one format for all units; SliM-LLM's search; one format with as many exact elements as the budget pays for.
OTHER_ALLOCATORS = ("uniform", "double_pointer", "share")
TRANSFORMS = ("none", "rotate", "awq")  #: of the float model, its function kept
#: Limits of a plan. tolerance: one of fewer stored bits than asked by more than this is refused (absent: it is not). Of the allocator ``share``: least
#: and most share of the elements that are kept exactly, and which part of them is chosen by sensitivity. Of the unit ``tiles``: rows and columns of one.
SOLVER = ("tolerance", "least_share", "most_share", "sensitive", "tile_rows", "tile_cols")


@dataclass(frozen=True)
class Preset:
    """One choice for each step of the line.

    Attributes:
        candidates: format names that the plan may mix, least bits first.
        metric: a name of ``sensitivity.METRICS``; of ``LINE_METRICS`` where the unit is a row, a column, a tile or an element.
        method: a quantizer, or ``"auto"``.
        weighting: which second moments the quantizer minimizes the error under: ``none``, ``attention`` or ``gradient``.
        options: further options of the quantizer, as pairs.
        about: one sentence.
        unit: of ``UNITS``.
        allocator: a name of ``rules.METHODS`` or of ``OTHER_ALLOCATORS``.
        scope: ``"model"``: one budget for all units; ``"unit"``: each linear keeps to the same stored bits.
        transform: of ``TRANSFORMS``.
        reconstruct: steps that each decoder block is trained for on its output after the quantizer; 0: quantized again on its real inputs alone; None: neither.
        distill: steps that the constants of all weights, and the norms, are then trained for on the KL to the float model; None: not.
        activations: ``"a16"``, ``"a8"``, or None: exactly.
        kv: how keys and values are cached, as ``find_kv`` reads it; None: as the model does.
        solver: limits as pairs, of ``SOLVER``.
        source, formula: the paper, and the rule in one line. departures: where ours differs, and why. missing: what a preset that cannot run needs.

    Raises PlanError for a part of another type, for no candidates, and for an unknown unit, scope, allocator, transform or activations.
    """

    candidates: tuple[str, ...]
    metric: str = "fisher"
    method: str = "gptq"
    weighting: str = "attention"
    options: tuple[tuple[str, object], ...] = ()
    about: str = ""
    unit: str = "linear"
    allocator: str = "dp"
    scope: str = "model"
    transform: str = "none"
    reconstruct: int | None = None
    distill: int | None = None
    activations: str | None = None
    kv: str | None = None
    solver: tuple[tuple[str, object], ...] = ()
    source: str = "ours"
    formula: str = ""
    departures: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def __post_init__(self):
        for parts, kind, said in ((("metric", "method", "weighting"), str, "a name"), (("kv",), str | None, "a name"),
                                  (("reconstruct", "distill"), int | None, "a number of steps"), (("options", "solver"), tuple, "pairs of name and value")):
            for part in parts:
                value = getattr(self, part)
                right = isinstance(value, kind) and not isinstance(value, bool)
                if not right or (kind is tuple and not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in value)):
                    raise PlanError(f"{part} {value!r} of a preset", f"it is {said}", "correct or remove it")
        if not self.candidates:
            raise PlanError("a preset without candidates", "at least one format is needed to choose from", "name some, for example w2g64_asym, w4g64 and w8")
        for part, value, known in (("unit", self.unit, UNITS), ("scope", self.scope, ("model", "unit")), ("transform", self.transform, TRANSFORMS),
                                   ("allocator", self.allocator, (*METHODS, *OTHER_ALLOCATORS)), ("activations", self.activations, (None, *ACTIVATIONS))):
            if value not in known:
                close = difflib.get_close_matches(str(value), [str(k) for k in known], n=1)
                raise PlanError(f"{part} {value!r} of a preset", f"it is one of {', '.join(str(k).lower() for k in known)}",
                                f"did you mean {close[0]!r}?" if close else "choose one of them")

        if self.scope == "unit" and self.unit not in ("rows", "cols", "tiles"):
            raise PlanError(f"scope unit of a preset by {self.unit}", "only rows, columns and tiles share a budget within their linear", "use the scope model")
        for name, value in self.solver:
            if name not in SOLVER or isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise PlanError(f"solver limit {name}={value!r} of a preset", f"it is a number >= 0 for one of {', '.join(SOLVER)}", "correct or remove it")

    def quantizer(self) -> dict:
        """The ``quantizer`` section of a Plan."""
        return {"name": self.method, "weighting": self.weighting, **dict(self.options)}

    @property
    def tolerance(self) -> float | None:
        return dict(self.solver).get("tolerance")


#: What the solver takes at 2.5 to 4 stored bits when it is offered everything: integer zero points, since a symmetric grid loses a level that
#: 2 bits cannot spare; groups of 128, which leave more bytes for code bits than groups of 32 bring; at 3 bits a symmetric g64 between them. Above 4 bits
#: every width counts: a mix of 4 and 8 bits has about twice the KL of one with 5 and 6 between them (docs/quality.md).
DEFAULT_CANDIDATES = ("w2g64_asym", "w3g128_asym", "w3g64", "w4g128_asym", "w4g64_asym", "w5g128_asym", "w6g128_asym", "w8g128_asym")
