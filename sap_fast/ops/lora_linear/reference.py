"""A frozen linear map with a LoRA adapter: the primal alone, and the part of it that is not linear in the dual."""

from torch import Tensor
from torch.nn import functional as F

from sap_fast.ops._library import compute_dtype


def adapter(x: Tensor, a: Tensor, b: Tensor, scaling: float, keep: Tensor | None) -> tuple[Tensor]:
    """Compute ``scaling B A (keep x)`` in float32 (float64 for float64): adapters are small, rounding is not free.

    Args:
        x: ``[rows, d_in]``; a: ``[rank, d_in]``; b: ``[d_out, rank]``; keep: dropout factors ``[rows, d_in]`` or None.
    """
    dtype = compute_dtype(x)
    wide = x.to(dtype) if keep is None else x.to(dtype) * keep
    return (scaling * F.linear(F.linear(wide, a.to(dtype)), b.to(dtype)),)


def primal(
    x: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, scaling: float, keep: Tensor | None
) -> tuple[Tensor]:
    """Compute ``y = W x + bias + scaling B A (keep x)``: the whole map, from which the oracle derives its rules."""
    (delta,) = adapter(x, a, b, scaling, keep)
    return ((F.linear(x, weight, bias) + delta).to(x.dtype),)
