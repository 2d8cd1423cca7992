"""Counts what a step's phases do: calls of ops, bytes, FLOPs."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sap_fast.profiling.flops import matrix_flops

# Ops that cannot be counted by their operands: these allocate or ask, and move nothing; the next only write; and the
# last read no more of their first argument than the rows that they are asked for.
_IDLE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "promote_types"}
_FILLS = {
    "zeros",
    "zeros_like",
    "new_zeros",
    "ones",
    "ones_like",
    "new_ones",
    "full",
    "full_like",
    "new_full",
    "arange",
}
_GATHERS = {"embedding", "index_select", "gather", "index"}


@dataclass
class Work:
    """Holds how much was done in a phase of a step.

    Attributes:
        ops: calls of ops by the dispatcher, views and allocations aside; each of the library's ops counts as one.
        bytes: what these ops read and wrote, every operand once, by its shape.
        rowwise_bytes: those of ops without a matrix product.
        flops: the floating-point operations of their matrix products.
    """

    ops: float = 0
    bytes: float = 0
    rowwise_bytes: float = 0
    flops: float = 0

    def add(self, other: "Work", weight: float = 1.0) -> None:
        """Add another phase's work, multiplied by ``weight``."""
        self.ops += weight * other.ops
        self.bytes += weight * other.bytes
        self.rowwise_bytes += weight * other.rowwise_bytes
        self.flops += weight * other.flops


class Counter(TorchDispatchMode):
    """Counts the ops that are called while it is active; ``work`` holds what was counted, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = {}
        self._phase = ""

    def begin(self, phase: str) -> None:
        """Count what follows as work of ``phase``."""
        self._phase = phase
        self.work.setdefault(phase, Work())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if self._phase and not func.is_view and name not in _IDLE:
            work = self.work[self._phase]
            work.ops += 1
            flops, crossing = matrix_flops(func, args, kwargs, out), _bytes(func, args, kwargs, out)
            work.flops += flops
            work.bytes += crossing
            work.rowwise_bytes += 0 if flops else crossing
        return out


def _bytes(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    name = func._schema.name.partition("::")[2]
    read = [] if name in _FILLS else _tensors((args, kwargs))
    # Ops that write to their arguments may return nothing.
    written = _tensors(out) or _tensors(
        [arg for arg, how in zip(args, func._schema.arguments, strict=False) if _changed(how)]
    )
    if name in _GATHERS:
        # Of what they gather from, they read what they write.
        read = read[1:] + written
    return sum(x.numel() * x.element_size() for x in (*read, *written))


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _changed(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
