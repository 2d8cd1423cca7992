"""Attention over packed rows by others' flash attention: the ``flash-attn`` package, and PyTorch's ``varlen_attn``.

Both leave the rows after the last sequence unwritten, in outputs and gradients alike; here those become zero.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sap_fast.attention_backends.determinism import check_still_deterministic

# (q, k, v, cu_seqlens, longest, scale, left) -> o: causal, and of the keys before a query it sees `left`, -1 for all.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int], Tensor]


def flash_attn() -> Kernel:
    """The kernel of the ``flash-attn`` package.

    Raises:
        ImportError: it is not there, or older than what is needed of it.
    """
    from flash_attn import flash_attn_varlen_func

    return flash_attn_kernel(flash_attn_varlen_func)


def flash_attn_kernel(function: Callable[..., Any]) -> Kernel:
    """``flash_attn_varlen_func`` as a kernel. Its backward is deterministic whatever PyTorch is set to."""
    _check_parameters("flash-attn", function, "softmax_scale", "causal", "window_size", "deterministic")

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float, left: int) -> Tensor:
        return function(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            softmax_scale=scale,
            causal=True,
            window_size=(left, -1 if left < 0 else 0),
            deterministic=True,
        )

    return kernel


def varlen_attn() -> Kernel:
    """PyTorch's kernel.

    Raises:
        ImportError: this release of PyTorch has none, or one that lacks what is needed of it.
    """
    from torch.nn.attention.varlen import varlen_attn as function

    return varlen_attn_kernel(function)


def varlen_attn_kernel(function: Callable[..., Any]) -> Kernel:
    """``torch.nn.attention.varlen.varlen_attn`` as a kernel, which has no argument for a deterministic backward."""
    _check_parameters("torch's varlen_attn", function, "scale", "window_size", "enable_gqa")

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float, left: int) -> Tensor:
        check_still_deterministic("varlen_attn", q)
        return function(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            scale=scale,
            window_size=(left, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )

    return kernel


def _check_parameters(name: str, function: Callable[..., Any], *needed: str) -> None:
    if missing := sorted(set(needed) - inspect.signature(function).parameters.keys()):
        raise ImportError(f"the release of {name} here is too old: its function takes no {', '.join(missing)}")


def packed_attention(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """``kernel`` on rows ``[rows, heads, head_dim]``, with zeros in rows of no sequence, in gradients too."""
    rows = q.shape[0]
    # Counted on the device, which is not waited for.
    outside = (torch.arange(rows, device=q.device) >= cu_seqlens[-1])[:, None, None]
    q, k, v = _ClearGradients.apply(outside, q, k, v)
    longest = min(max_seqlen, rows)
    left = -1 if window is None or window >= longest else window - 1
    return kernel(q, k, v, cu_seqlens, longest, scale, left).masked_fill(outside, 0)


class _ClearGradients(torch.autograd.Function):
    """Changes nothing; its backward zeroes gradients in the rows named."""

    @staticmethod
    def forward(ctx: Any, outside: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(outside)
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dxs: Tensor) -> tuple[Tensor | None, ...]:
        (outside,) = ctx.saved_tensors
        return None, *(dx.masked_fill(outside, 0) for dx in dxs)
