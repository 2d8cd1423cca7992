"""Output head and cross-entropy in one: the primal alone."""

from torch import Tensor
from torch.nn import functional as F

from sap_fast.ops._library import compute_dtype


def primal(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``z = W x``, ``lse = log sum exp z``, ``nll = lse - z[target]``, row by row in float32 (float64).

    The tangent of lse is ``sum softmax(z) z_dot``, the row statistic of the pair's backward.

    Args:
        x: ``[rows, d]``; weight: ``[vocab, d]``; targets: ``[rows]`` int64.

    Returns:
        ``nll [rows]``, ``lse [rows]``.
    """
    dtype = compute_dtype(x)
    z = F.linear(x.to(dtype), weight.to(dtype))
    lse = z.logsumexp(-1)
    return lse - z.gather(-1, targets[:, None])[:, 0], lse
