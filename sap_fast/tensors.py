"""Takes the tensors out of nested dataclasses, tuples, lists and dicts in one order, and puts others in."""

from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
# ``metadata`` of a dataclass field that holds no tensor and tells nothing apart: it is left where it is, unread.
LEFT_ALONE = {"holds tensors": False}


def tensors_of(x: Any) -> tuple[list[Tensor], Hashable]:
    """List the tensors in ``x``, and tell what else ``x`` is: shapes, dtypes, and all that is no tensor.

    Of two that are told alike, each can be rebuilt with the tensors of the other.
    """
    found: list[Tensor] = []
    rest: list[Hashable] = []
    _collect(x, found, rest)
    return found, tuple(rest)


def _collect(x: Any, found: list[Tensor], rest: list[Hashable]) -> None:
    if isinstance(x, Tensor):
        found.append(x)
        rest.append((x.shape, x.dtype))
        return
    if not _is_nested(x):
        rest.append(x)
        return
    parts = _parts(x)
    rest.append((type(x), *parts))
    for part in parts.values():
        _collect(part, found, rest)


def rebuilt(x: T, each: Callable[[Tensor], Tensor]) -> T:
    """Return ``x`` with other tensors in their places."""
    if isinstance(x, Tensor):
        return each(x)  # type: ignore[return-value]
    if not _is_nested(x):
        return x
    made: Any
    parts = {name: rebuilt(part, each) for name, part in _parts(x).items()}
    if isinstance(x, dict):
        made = parts
    elif isinstance(x, (tuple, list)):
        made = type(x)(*parts.values()) if hasattr(x, "_fields") else type(x)(parts.values())
    else:
        made = replace(x, **parts)  # type: ignore[type-var]
    return made


def _is_nested(x: Any) -> bool:
    return isinstance(x, (dict, tuple, list)) or (is_dataclass(x) and not isinstance(x, type))


def _parts(x: Any) -> dict[Any, Any]:
    if isinstance(x, dict):
        return x
    if isinstance(x, (tuple, list)):
        return dict(enumerate(x))
    return {field.name: getattr(x, field.name) for field in fields(x) if field.metadata != LEFT_ALONE}
