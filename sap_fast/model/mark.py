"""The mark of a model that is attached, so that a second handle is refused."""

import weakref

from torch import nn


class _Attached:
    """Set on the transformers model while it is attached, so that a PEFT model around it counts as attached too.

    A copy of the model, by deepcopy or pickle, is another model: the mark becomes None there.
    """

    NAME = "_sap_fast_attached"

    def __reduce__(self) -> tuple:
        return type(None), ()


def mark(base: nn.Module) -> None:
    """Mark a transformers model as attached.

    Raises:
        RuntimeError: it is attached already.
    """
    if isinstance(getattr(base, _Attached.NAME, None), _Attached):
        raise RuntimeError("this model is attached already: use that handle, or detach it first")
    setattr(base, _Attached.NAME, _Attached())


def unmark(reference: weakref.ref[nn.Module]) -> None:
    """Take the mark off, if the model still lives."""
    base = reference()
    if base is not None:
        base.__dict__.pop(_Attached.NAME, None)
