"""RMSNorm over the last dimension: the primal alone; its tangent and its backward follow from it."""

import torch
from torch import Tensor

from sap_fast.ops._library import compute_dtype


def primal(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Compute ``rstd = (mean x^2 + eps)^(-1/2)``, ``y = (offset + weight) x rstd``.

    Args:
        x: ``[rows, d]``; weight: ``[d]``.

    Returns:
        ``y [rows, d]`` in the dtype of ``x`` and ``rstd [rows]`` in float32 (float64 for float64).
    """
    dtype = compute_dtype(x)
    wide = x.to(dtype)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = (offset + weight.to(dtype)) * wide * rstd[:, None]
    return y.to(x.dtype), rstd
