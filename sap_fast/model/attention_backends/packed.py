"""Attention over packed rows by others' flash attention: the ``flash-attn`` package, and PyTorch's ``varlen_attn``.

Both leave the rows after the last sequence unwritten, in outputs and gradients alike; here those become zero. Where a
sequence has more keys than queries, the last query sees the last key: flash-attn says so since its release 2.1, and
``machine.py`` tries it on both. Keys without queries get zero there.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sap_fast.model.attention_backends.determinism import check_still_deterministic

# (q, k, v, cu_seqlens, cu_seqlens_k, longest, longest_k, scale, left) -> o: causal, and of the keys before its own a
# query sees `left`, -1 for all.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, int], Tensor]


def flash_attn() -> Kernel:
    """Import the kernel of the ``flash-attn`` package.

    Raises:
        ImportError: it is not there, or older than what is needed of it.
    """
    from flash_attn import flash_attn_varlen_func

    return flash_attn_kernel(flash_attn_varlen_func)


def flash_attn_kernel(function: Callable[..., Any]) -> Kernel:
    """Make a kernel of ``flash_attn_varlen_func``. Its backward is deterministic whatever PyTorch is set to."""
    _check_parameters("flash-attn", function, "softmax_scale", "causal", "window_size", "deterministic")

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        cu_seqlens_k: Tensor,
        longest: int,
        longest_k: int,
        scale: float,
        left: int,
    ) -> Tensor:
        return function(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens_k,
            longest,
            longest_k,
            softmax_scale=scale,
            causal=True,
            window_size=(left, -1 if left < 0 else 0),
            deterministic=True,
        )

    return kernel


def varlen_attn() -> Kernel:
    """Import PyTorch's kernel for packed attention.

    Raises:
        ImportError: this release of PyTorch has none, or one that lacks what is needed of it.
    """
    from torch.nn.attention.varlen import varlen_attn as function

    return varlen_attn_kernel(function)


def varlen_attn_kernel(function: Callable[..., Any]) -> Kernel:
    """Make a kernel of ``varlen_attn``, which has no argument for a deterministic backward."""
    _check_parameters("torch's varlen_attn", function, "scale", "window_size", "enable_gqa")

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        cu_seqlens_k: Tensor,
        longest: int,
        longest_k: int,
        scale: float,
        left: int,
    ) -> Tensor:
        check_still_deterministic("varlen_attn", q)
        return function(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens_k,
            longest,
            longest_k,
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
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """Run ``kernel`` on rows ``[rows, heads, head_dim]``; rows of no sequence are zero, in gradients too."""
    outside = outside_k = _outside(q, cu_seqlens)
    longest = longest_k = min(max_seqlen, q.shape[0])
    if cu_seqlens_k is None or max_seqlen_k is None:
        cu_seqlens_k = cu_seqlens
    else:
        outside_k, longest_k = _outside(k, cu_seqlens_k), min(max_seqlen_k, k.shape[0])
    q, k, v = _ClearGradients.apply(outside, outside_k, q, k, v)
    left = -1 if window is None or window >= longest_k else window - 1
    # Told that no sequence has more than one query, flash-attn takes each to have one, whatever its lengths say.
    longest = max(longest, 2)
    return kernel(q, k, v, cu_seqlens, cu_seqlens_k, longest, longest_k, scale, left).masked_fill(outside, 0)


def _outside(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Find, ``[rows, 1, 1]``, the rows of no sequence. Counted on the device, which is not waited for."""
    return (torch.arange(x.shape[0], device=x.device) >= cu_seqlens[-1])[:, None, None]


class _ClearGradients(torch.autograd.Function):
    """Changes nothing; its backward zeroes gradients in the rows named, of q and of k and v."""

    @staticmethod
    def forward(
        ctx: Any, outside: Tensor, outside_k: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(outside, outside_k)
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        outside, outside_k = ctx.saved_tensors
        return None, None, dq.masked_fill(outside, 0), dk.masked_fill(outside_k, 0), dv.masked_fill(outside_k, 0)
