"""Zero-shot tasks: accuracy by lm-eval, on its own tasks, on those of a folder, or on two that come with this package."""

from .builtin import BUILT_IN
from .harness import need_lm_eval, run_tasks

__all__ = ["BUILT_IN", "need_lm_eval", "run_tasks"]
