"""Output head and cross-entropy in one: the primal alone, and what becomes of its cotangent."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sap_fast.ops._library import compute_dtype


def primal(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Compute ``z = W x``, ``nll = log sum exp z - z[target]``, row by row in float32 (float64).

    Args:
        x: ``[rows, d]``; weight: ``[vocab, d]``; targets: ``[rows]`` int64.

    Returns:
        ``nll [rows]``.
    """
    dtype = compute_dtype(x)
    z = F.linear(x.to(dtype), weight.to(dtype))
    return (z.logsumexp(-1) - z.gather(-1, targets[:, None])[:, 0],)


def combined(dnll: Tensor, basis: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``dx_dot = dnll_dot g``, ``dx = dnll g + dnll_dot t``; g is ``basis[-1]``, of a dual t ``basis[0]``.

    Args:
        dnll: ``[n, rows]``; basis: ``[n, rows, d]``, or of two halves; both float32 (float64).
        dtype: of the result.

    Returns:
        ``dx [n, rows, d]``.
    """
    if len(dnll) > len(basis):
        raise ValueError(f"dnll has {len(dnll)} halves, but basis {len(basis)}")
    dx = torch.empty((len(dnll), *basis.shape[1:]), dtype=dtype, device=basis.device)
    dx[-1] = dnll[-1, :, None] * basis[-1]
    if len(dnll) == 2:
        dx[0] = torch.addcmul(dnll[0, :, None] * basis[1], dnll[1, :, None], basis[0])
    return dx
