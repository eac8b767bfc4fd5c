"""What the rows of a comparison say about each other: of each budget the best plan against the best control, of each of llama.cpp's files the best of ours that
is no larger, and the bits at which quality begins to fall; and the same as Markdown tables.

A row is a dict: ``name``, ``family`` (``ours``, ``frameworks``, ``controls``, ``llama.cpp``, ``float``), its bits and bytes, and for each text what
``Evaluation.to_dict`` gives; or ``refused``, the reason why there is nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .evaluate import Evaluation, paired
from .report import Column, markdown_table, table

RISES = (0.01, 0.05, 0.10)  #: of the perplexity, whose stored bits are told
FLOAT, LLAMA_CPP = "float32", "llama.cpp"


def measured(rows: Sequence[dict]) -> list[dict]:
    """Rows of quantized models that were not refused."""
    return [r for r in rows if "refused" not in r and r["name"] != FLOAT]


def verdicts(rows: Sequence[dict], kinds: Sequence[str]) -> list[dict]:
    """Of each budget and text: the plan with the least KL within it, and the uniform control with the least KL within it; how they differ, paired."""
    out, done = [], measured(rows)
    for bits in sorted({r["bits"] for r in done if "bits" in r}):
        fitting = [r for r in done if r["stored_bits"] <= bits * (1 + 1e-9)]
        for kind in kinds:
            sides = [[r for r in fitting if r["family"] in family] for family in (("ours", "frameworks"), ("controls",))]
            if all(sides):
                best, rival = (min(side, key=lambda r: r[kind]["kl"]) for side in sides)
                out.append({"bits": bits, "text": kind, "best": best["name"], "stored_bits": best["stored_bits"], "best_kl": best[kind]["kl"],
                            "control": rival["name"], "control_bits": rival["stored_bits"], "control_kl": rival[kind]["kl"],
                            **paired(Evaluation.from_dict(best[kind]), Evaluation.from_dict(rival[kind]))})
    return out


def rivals(rows: Sequence[dict], kinds: Sequence[str]) -> list[dict]:
    """Each file of llama.cpp, and of our checkpoints that are no larger as a whole the one with the least KL; how they differ, paired."""
    out, done = [], measured(rows)
    for other in (r for r in done if r["family"] == LLAMA_CPP):
        fitting = [r for r in done if r["family"] != LLAMA_CPP and r["checkpoint_bytes"] <= other["checkpoint_bytes"]]
        for kind in kinds if fitting else ():
            best = min(fitting, key=lambda r: r[kind]["kl"])
            out.append({"rival": other["name"], "text": kind, "rival_bytes": other["checkpoint_bytes"], "rival_kl": other[kind]["kl"], "best": best["name"],
                        "best_bytes": best["checkpoint_bytes"], "best_kl": best[kind]["kl"],
                        **paired(Evaluation.from_dict(best[kind]), Evaluation.from_dict(other[kind]))})
    return out


def bits_at(rows: Sequence[dict], kinds: Sequence[str], rises: Sequence[float] = RISES) -> list[dict]:
    """Of each family and text: the stored bits of the decoder's linears at which perplexity lies ``rises`` above the float model's.

    Read off the best row of each size, between the two that enclose the rise: linear in bits, logarithmic in the rise. None where no two rows do.
    """
    base = next(r for r in rows if r["name"] == FLOAT)
    out = []
    for family in dict.fromkeys(r["family"] for r in measured(rows)):
        for kind in kinds:
            found = sorted((r["linear_bits"], r[kind]["perplexity"] / base[kind]["perplexity"] - 1) for r in measured(rows) if r["family"] == family)
            best: list[tuple[float, float]] = []
            for bits, rise in found:  # more bits and no better: not on the front
                if not best or rise < best[-1][1]:
                    best = [*best[:-1], (bits, rise)] if best and best[-1][0] == bits else [*best, (bits, rise)]
            out.append({"family": family, "text": kind, **{f"{rise:.0%}": _crossing(best, rise) for rise in rises}})
    return out


def _crossing(front: Sequence[tuple[float, float]], rise: float) -> float | None:
    """Bits at which a falling front of (bits, rise) passes ``rise``, or None."""
    for (b0, r0), (b1, r1) in zip(front, front[1:], strict=False):
        if r0 >= rise >= r1 and r1 > 0:
            return b0 + (b1 - b0) * (math.log(r0 / rise) / math.log(r0 / r1))
    return None


def flat(rows: Sequence[dict], kinds: Sequence[str]) -> list[dict]:
    """Rows that were not refused as a table reads them: with ``mb``, and with ``perplexity <text>``, ``kl <text>`` and ``task <name>`` beside the rest."""
    return [{**r, "mb": r["checkpoint_bytes"] / 1e6, **{f"{what} {k}": r[k][what] for k in kinds for what in ("perplexity", "kl")},
             **{f"task {t}": v.get("acc") for t, v in r.get("tasks", {}).items()}} for r in rows if "refused" not in r]


def task_columns(rows: Sequence[dict]) -> list[Column]:
    """Accuracy on each task that some of the rows has, of ``flat`` rows."""
    return [Column(f"task {t}", t, ".3f") for t in dict.fromkeys(t for r in rows for t in r.get("tasks", ()))]


def quality_columns(kinds: Sequence[str]) -> list[Column]:
    """Perplexity and KL on each text, of ``flat`` rows."""
    return [c for k in kinds for c in (Column(f"perplexity {k}", f"ppl {k}", ".2f"), Column(f"kl {k}", f"KL {k}", ".4f"))]


def rows_table(rows: Sequence[dict], kinds: Sequence[str]) -> str:
    """Markdown of all rows, by budget and KL; refusals behind them."""
    shown = sorted(flat(rows, kinds), key=lambda r: (-1 if r["name"] == FLOAT else r.get("bits", r["stored_bits"]), r[f"kl {kinds[0]}"]))
    columns = [Column("name", "plan"), Column("stored_bits", "stored bits", ".3f"), Column("linear_bits", "of linears", ".3f"),
               Column("mb", "checkpoint MB", ".1f"),
               *quality_columns(kinds), *task_columns(rows),
               Column("decode_tokens_per_s", "decode tok/s", ".1f"), Column("minutes", None, ".1f")]
    refused = [f"- {r['name']}: {r['refused']}" for r in rows if "refused" in r]
    return "\n".join([table(shown, columns).markdown(), *(["", "Refused:", "", *refused] if refused else [])])


def verdicts_table(found: Sequence[dict]) -> str:
    """Markdown of :func:`verdicts`."""
    return table(found, [Column("bits"), Column("text"), Column("best", "best plan"), Column("best_kl", "KL", ".4f"), Column("control", "best uniform"),
                         Column("control_bits", "its bits", ".3f"), Column("control_kl", "its KL", ".4f"), Column("kl", "difference", "+.4f"),
                         Column("kl_se", "error", ".4f")]).markdown()


def rivals_table(found: Sequence[dict]) -> str:
    """Markdown of :func:`rivals`."""
    rows = [{**r, "rival_mb": r["rival_bytes"] / 1e6, "best_mb": r["best_bytes"] / 1e6} for r in found]
    return table(rows, [Column("rival", "file"), Column("text"), Column("rival_mb", "MB", ".1f"), Column("rival_kl", "KL", ".4f"),
                        Column("best", "best of ours"), Column("best_mb", "its MB", ".1f"), Column("best_kl", "its KL", ".4f"),
                        Column("kl", "difference", "+.4f"), Column("kl_se", "error", ".4f")]).markdown()


def bits_table(found: Sequence[dict]) -> str:
    """Markdown of :func:`bits_at`."""
    rises = [k for k in (found[0] if found else {}) if k.endswith("%")]
    return markdown_table(["family", "text", *rises], [[r["family"], r["text"], *("-" if r[k] is None else f"{r[k]:.2f}" for k in rises)] for r in found])
