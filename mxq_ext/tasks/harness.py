"""A model through lm-eval (Gao et al., EleutherAI), as it is in memory: what is measured are the kernels that it runs on."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence

from torch import nn

from .. import hf  # noqa: F401  registers the format of a quantized model with transformers, where lm-eval looks for it
from ..errors import ModelError, MxqError
from .builtin import BUILT_IN

BATCH = 16  #: requests that are read at once
BOOTSTRAP = 200  #: samples for the standard error of metrics that have no formula for it


def need_lm_eval(what: str) -> None:
    """Raises MxqError if it is not installed; for those who compute for long before they ask for it."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as e:
        raise MxqError(what, f"lm-eval is not installed ({e})", "pip install 'mxq_ext[tasks]'") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's remarks on how it was called; its warnings on tasks are among them, its errors are raised."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def run_tasks(model: nn.Module, tokenizer, tasks: Sequence[str], *, include: str | os.PathLike | None = None, limit: int | None = None) -> dict[str, dict]:
    """Accuracy of ``model`` without examples in the prompt.

    Every request is read in one call, so a packed KV cache is not what is measured here.

    Args:
        tasks: names of ``BUILT_IN``, of the folder ``include``, or of lm-eval's own tasks and groups. The data of the latter comes from where Hugging Face's
            ``datasets`` finds it: its cache, or the network unless HF_HUB_OFFLINE is set.
        include: folder of tasks as lm-eval describes them, in YAML.
        limit: the first so many documents of each task.

    Returns:
        task (a group's members and the group) -> ``{"acc": share, "acc_se": its standard error, ..., "documents": count}``, with all metrics of the task.

    Raises MxqError without lm-eval, ModelError for no tasks and for names that lm-eval does not know.
    """
    need_lm_eval("running tasks")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise ModelError("running no tasks", "at least one is needed", f"name some of {', '.join(BUILT_IN)}, or of lm-eval's")
    with _quiet():
        others = any(t not in BUILT_IN for t in tasks)  # without them lm-eval need not read its thousands of descriptions, which takes seconds
        manager = TaskManager(include_path=None if include is None else str(include), include_defaults=others)
        if unknown := [t for t in tasks if t not in BUILT_IN and t not in manager.all_tasks]:
            raise ModelError(f"task {unknown[0]!r}", "lm-eval does not know it", f"there are {', '.join(BUILT_IN)}; `lm-eval ls tasks` lists lm-eval's own; "
                             "--include names a folder of others")
        result = lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH), tasks=[BUILT_IN.get(t, t) for t in tasks], limit=limit,
                                         bootstrap_iters=BOOTSTRAP, log_samples=False, task_manager=manager)
    return {name: _scores(values) | {"documents": _documents(result, name)} for name, values in result["results"].items()}


def _scores(values: dict) -> dict[str, float]:
    """Metrics of a task of lm-eval's result: ``acc,none`` -> ``acc``, ``acc_stderr,none`` -> ``acc_se``; what has no number is left out."""
    out = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and isinstance(value, int | float):
            name = metric.replace("_stderr", "_se")
            out[name if kind == "none" else f"{name} {kind}"] = float(value)
    return out


def _documents(result: dict, name: str) -> int:
    """How many were read, over the members of a group."""
    members = result.get("group_subtasks", {}).get(name) or [name]
    return sum(result["n-samples"][m]["effective"] for m in members if m in result["n-samples"])
