"""The errors that mxq_ext raises on purpose.

Every message says what was asked (with the values), which rule failed, and what to do about it. The command line prints
these without a traceback and exits with code 2; anything else that escapes is a bug.
"""


class MxqError(Exception):
    """Base of all errors that a user can cause and mend."""

    def __init__(self, asked: str, rule: str, fix: str):
        self.asked, self.rule, self.fix = asked, rule, fix
        super().__init__(f"{asked}: {rule}; {fix}")


class FormatError(MxqError, ValueError):
    """A number format that cannot be parsed, or that does not fit the tensor."""


class ShapeError(MxqError, ValueError):
    """Shapes, dtypes or devices that do not go together."""


class PlanError(MxqError, ValueError):
    """A plan that is malformed, or that does not match the model."""


class BudgetError(MxqError, ValueError):
    """A byte budget that no choice of candidates can meet."""


class CheckpointError(MxqError, ValueError):
    """A file that is missing, cut short, edited, or of another version."""


class ModelError(MxqError, ValueError):
    """A model, tokenizer or text that cannot be read or is not supported."""


class NativeError(MxqError, RuntimeError):
    """The compiled extension is missing, or does not support what was asked."""


class QuantizationError(MxqError, RuntimeError):
    """A quantizer that could not finish (for example a Hessian that no damping makes positive definite)."""


class MxqWarning(UserWarning):
    """A fallback that was taken; ``MXQ_STRICT=1`` turns it into an error."""
