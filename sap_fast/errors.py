"""The errors of the library. Each is raised before anything the caller owns has changed.

The exception is ``StepRefusedError`` under ``check="deferred"``, which comes one step late.
"""


class UnsupportedModelError(TypeError):
    """Raised where the model holds something for which there is no dual rule; the message names it."""


class BatchError(ValueError):
    """Raised for a malformed batch or pairs; the message says what was expected, what came and what to do."""


class StepRefusedError(RuntimeError):
    """Raised where a step's numbers are unusable (not finite, or without direction). Nothing was written."""


class DataError(ValueError):
    """Raised for training data that cannot be used; the message names the file and the line, or the row."""
