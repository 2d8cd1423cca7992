"""The tensors inside nested dataclasses, tuples, lists and dicts: taken out in one order, and put in again."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor

from sap_fast.method.flat import Flat

T = TypeVar("T")


def tensors_of(x: Any) -> tuple[list[Tensor], Hashable]:
    """The tensors in ``x``, and what tells ``x`` from another of their kind: shapes, dtypes, and all that is no tensor.

    Of two that are told alike, each can be rebuilt with the tensors of the other. The names in a ``Flat`` are left out.
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
    """``x`` with other tensors in their places."""
    if isinstance(x, Tensor):
        return each(x)  # type: ignore[return-value]
    if not _is_nested(x):
        return x
    made: Any
    parts = {name: rebuilt(part, each) for name, part in _parts(x).items()}
    if isinstance(x, Flat):
        made = Flat(parts["vector"], x.layout)
    elif isinstance(x, Mapping):
        made = parts
    elif isinstance(x, (tuple, list)):
        made = type(x)(*parts.values()) if hasattr(x, "_fields") else type(x)(parts.values())
    else:
        made = type(x)(**parts)
    return made


def _is_nested(x: Any) -> bool:
    return isinstance(x, (dict, tuple, list)) or (is_dataclass(x) and not isinstance(x, type))


def _parts(x: Any) -> dict[Any, Any]:
    if isinstance(x, Flat):
        return {"vector": x.vector}
    if isinstance(x, dict):
        return x
    if isinstance(x, (tuple, list)):
        return dict(enumerate(x))
    return {field.name: getattr(x, field.name) for field in fields(x)}
