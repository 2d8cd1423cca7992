"""Gated linear units: the primal alone."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from sap_fast.ops._library import compute_dtype

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def primal(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor]:
    """Compute ``y = s(gate) up`` with s the activation; all ``[rows, d]``."""
    dtype = compute_dtype(gate)
    return ((ACTIVATIONS[activation](gate.to(dtype)) * up.to(dtype)).to(gate.dtype),)
