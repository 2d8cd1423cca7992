"""Residual addition, probe and RMSNorm in one: the primal alone.

It is the sum ``h = residual + update + probe``, which is linear, followed by ``sap_fast.ops.rms_norm``'s primal.
"""

from torch import Tensor

from sap_fast.ops._library import compute_dtype
from sap_fast.ops.rms_norm.reference import primal as rms_norm


def primal(
    residual: Tensor, update: Tensor, probe: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``h = residual + update + probe`` rounded to its storage dtype, then ``(y, rstd) = rms_norm(h)``.

    The norm reads the rounded ``h``, which is what the residual stream carries on, so that the backward,
    which starts from the stored ``h``, differentiates exactly what was computed.

    Args:
        residual, update: ``[rows, d]``; probe: ``[d]``; weight: ``[d]``.

    Returns:
        ``h [rows, d]``, ``y [rows, d]``, ``rstd [rows]``.
    """
    dtype = compute_dtype(residual)
    h = (residual.to(dtype) + update.to(dtype) + probe.to(dtype)).to(residual.dtype)
    return (h, *rms_norm(h, weight, eps, offset))
