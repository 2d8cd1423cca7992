"""Frozen products in float8 (e4m3, 3 bits of mantissa), with a scale for every row of either operand.

A matrix is divided, row by row, by what makes its largest element 448, the largest that e4m3 holds, and rounded: an
element is then off by at most 2^-4 of itself, or by 2^-10 / 448 of the row's largest where that is more. Products are
summed in float32 and multiplied by both rows' scales.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from sap_fast.ops._library import architecture

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
# Tensor cores take operands of whole blocks of these.
BLOCK = 16


@functools.cache
def _kernel() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    # Imported at the first call, since it imports Triton.
    return import_module("sap_fast.ops.lora_linear.float8_kernel").rounded


class Float8Matrix(NamedTuple):
    """Holds a matrix as ``values [n, k]`` in e4m3, contiguous, times ``scale [n, 1]`` in float32."""

    values: Tensor
    scale: Tensor


class Float8Weight(NamedTuple):
    """Holds a frozen W ``[d_out, d_in]`` for both products: by its rows (``x W^T``) and by its columns (``dy W``).

    The two copies take together what one in bfloat16 does. ``emulated``: whether products are formed in float32, on
    any device, of what e4m3 holds. ``version``: where W lies, and how many writes torch has counted to it; it does
    not count those by way of ``W.data``.
    """

    by_rows: Float8Matrix
    by_columns: Float8Matrix
    emulated: bool
    version: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, weight: Tensor, *, emulated: bool) -> "Float8Weight":
        return cls(rounded(weight), rounded(weight.t()), emulated, version_of(weight))


def version_of(weight: Tensor) -> tuple[int, int]:
    """Return the version of a weight; see :class:`Float8Weight`."""
    return weight.data_ptr(), weight._version


def rounded(x: Tensor) -> Float8Matrix:
    """Round ``x [n, k]``, of any floating-point dtype, by rows; a row of zeros stays one.

    On CUDA tensors a Triton kernel serves it, else torch's ops, which would read and write more than the product saves.
    """
    if x.is_cuda and x.dtype != torch.float64 and architecture(x.device) is not None:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            return Float8Matrix(*_kernel()(x))
    x = x.float()
    # Clamped, so that a row of zeros is not divided by zero.
    scale = (x.abs().amax(1, keepdim=True) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    # The quotient of the largest element may be an eps above 448, which rounds to it; contiguous, as W^T is not.
    return Float8Matrix((x / scale).to(_E4M3).contiguous(), scale)


def product(x: Float8Matrix, weight: Float8Matrix, out: Tensor, *, emulated: bool) -> Tensor:
    """Compute ``x W^T`` of ``x [m, k]`` and ``W [n, k]`` into ``out [m, n]``, which is bfloat16 unless emulated."""
    if emulated:
        sums = x.values.float() @ weight.values.float().t()
        return out.copy_(sums * x.scale * weight.scale.t())
    if refusal_to_write(out.device) is None:
        return _scaled(x, weight, out.dtype, out)
    return out.copy_(_scaled(x, weight, out.dtype))


def _scaled(x: Float8Matrix, weight: Float8Matrix, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    operands = x.values, weight.values.t(), x.scale, weight.scale.t()
    # A tile's sums go on in float32 from one block of k to the next; what is added within one keeps 14 bits on Hopper.
    return torch._scaled_mm(*operands, out_dtype=dtype, use_fast_accum=False, out=out)


@functools.cache
def refusal_to_write(device: torch.device) -> str | None:
    """Say why torch refuses to write a product with scales by rows where it is told to; None if it does so.

    Which forms of these products there are differs between releases of torch. One is tried, once for each device;
    where it is refused, products are formed in memory of their own and copied, which costs a pass over each.
    """
    x = rounded(torch.ones(BLOCK, BLOCK, device=device))
    out = torch.empty(BLOCK, BLOCK, device=device, dtype=torch.bfloat16)
    try:
        _scaled(x, x, out.dtype, out)
    except (RuntimeError, TypeError, ValueError) as error:
        return " ".join(str(error).split())[:300]
    return None
