"""Causal self-attention of a dual over packed or padded sequences; grouped heads, sliding window."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sap_fast.dual import halves, pullback, pushforward, stacked
from sap_fast.ops._library import (
    Mode,
    check_device,
    check_dtype,
    check_dual,
    check_shape,
    compute_dtype,
    define,
    split_cotangent,
    stacked_cotangent,
)
from sap_fast.ops.attention.reference import primal

__all__ = ["attention"]


def attention(
    q: Tensor,
    q_dot: Tensor | None,
    k: Tensor,
    k_dot: Tensor | None,
    v: Tensor,
    v_dot: Tensor | None,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    scale: float,
    window: int | None = None,
    seqused: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``o = softmax(scale q k^T + causal mask) v`` within each sequence, and its tangent ``o_dot``.

    With ``cu_seqlens_k`` a sequence has keys before those of its queries: its last query sees its last key, query i
    of n sees key ``i + n_k - n`` and those before it.

    Args:
        q, q_dot: ``[rows, heads, head_dim]``; k, k_dot, v, v_dot: ``[rows, kv_heads, head_dim]``, or of any number of
            rows with ``cu_seqlens_k``, with heads a multiple of kv_heads; float32, bfloat16 or float64; all tangents
            None is an ordinary pass.
        cu_seqlens: ``[B + 1]`` int32, from 0: sequence b holds rows ``cu_seqlens[b]`` up to
            ``cu_seqlens[b + 1]``. Rows after the last belong to no sequence.
        max_seqlen: an upper bound of the sequence lengths, padding included.
        scale: of the scores, usually ``head_dim ** -0.5``.
        window: a query sees its own key and the ``window - 1`` keys before it; None for all of them.
        seqused: ``[B]`` int32: how many rows of each sequence are real, for batches padded on the right
            (``cu_seqlens = arange(B + 1) * T``); None if all are.
        cu_seqlens_k: ``[B + 1]`` int32, from 0: the rows of k and v that sequence b holds, at least as many as it has
            queries; ``cu_seqlens`` is then of q alone. A sequence may have keys and no query. None: q, k and v are cut
            alike. Not together with ``seqused``.
        max_seqlen_k: an upper bound of their number in a sequence, given with ``cu_seqlens_k``.

    Returns:
        ``(o, o_dot)`` of the shape and dtype of ``q``; zero in rows of padding or of no sequence.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit. A sequence with fewer keys than queries is
            refused on a CPU alone: a GPU would have to be waited for, and there its queries that see no key give NaN.
    """
    rows_k = q.shape[0] if cu_seqlens_k is None else k.shape[0]
    for name, x, x_dot in (("q", q, q_dot), ("k", k, k_dot), ("v", v, v_dot)):
        check_dual(name, x, x_dot, 3)
        check_dtype(name, x, "q", q)
        check_device(name, x, "q", q)
        check_shape(name, x, (q.shape[0] if name == "q" else rows_k, x.shape[1], q.shape[2]))
        if (x_dot is None) != (q_dot is None):
            raise ValueError("q, k and v must all have a tangent, or none; pass zeros where it is zero")
    check_shape("v", v, tuple(k.shape))
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"heads must be a multiple of kv_heads, but are {q.shape[1]} and {k.shape[1]}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1:
        raise TypeError(f"cu_seqlens must be int32 [B + 1], but is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    check_device("cu_seqlens", cu_seqlens, "q", q)
    if seqused is not None:
        check_shape("seqused", seqused, (cu_seqlens.shape[0] - 1,))
        check_dtype("seqused", seqused, "cu_seqlens", cu_seqlens)
        check_device("seqused", seqused, "q", q)
    if (cu_seqlens_k is None) != (max_seqlen_k is None):
        missing = "cu_seqlens_k" if cu_seqlens_k is None else "max_seqlen_k"
        raise ValueError(f"cu_seqlens_k and max_seqlen_k are given together or not at all, but {missing} is missing")
    if cu_seqlens_k is not None:
        if seqused is not None:
            raise ValueError("seqused does not go together with cu_seqlens_k: pack the rows, so that none is padding")
        check_shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens.shape))
        check_dtype("cu_seqlens_k", cu_seqlens_k, "cu_seqlens", cu_seqlens)
        check_device("cu_seqlens_k", cu_seqlens_k, "q", q)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None for full attention, but is {window}")
    longest_k = max_seqlen if max_seqlen_k is None else max_seqlen_k
    lengths = cu_seqlens, seqused, cu_seqlens_k, max_seqlen, longest_k
    return _Attention.apply(q, q_dot, k, k_dot, v, v_dot, *lengths, scale, window or 0)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        q_dot: Tensor | None,
        k: Tensor,
        k_dot: Tensor | None,
        v: Tensor,
        v_dot: Tensor | None,
        cu_seqlens: Tensor,
        seqused: Tensor | None,
        cu_seqlens_k: Tensor | None,
        max_seqlen: int,
        max_seqlen_k: int,
        scale: float,
        window: int,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.mode = Mode.of(q_dot, any(ctx.needs_input_grad[0:6:2]))
        ctx.constants = max_seqlen, max_seqlen_k, scale, window
        qkv = stacked(q, q_dot), stacked(k, k_dot), stacked(v, v_dot)
        o, lse = torch.ops.sap_fast.attention(*qkv, cu_seqlens, seqused, cu_seqlens_k, *ctx.constants)
        ctx.save_for_backward(*qkv, o, lse, cu_seqlens, seqused, cu_seqlens_k)
        o, o_dot = halves(o)
        if ctx.mode is Mode.HALF:
            ctx.mark_non_differentiable(o)
        return o, o_dot

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, do_dot: Tensor | None) -> tuple:
        q, k, v, o, lse, *lengths = ctx.saved_tensors
        do = stacked_cotangent(ctx.mode, do, do_dot, q[0])
        grads = torch.ops.sap_fast.attention_backward(do, q, k, v, o, lse, *lengths, *ctx.constants)
        duals = (half for grad in grads for half in split_cotangent(ctx.mode, grad))
        return *duals, *[None] * 7


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    seqused: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *constants: Any,
) -> tuple[Tensor, ...]:
    lengths = cu_seqlens, seqused, cu_seqlens_k
    if cu_seqlens_k is not None and q.device.type == "cpu" and bool((cu_seqlens_k.diff() < cu_seqlens.diff()).any()):
        raise ValueError("every sequence must have at least as many keys (cu_seqlens_k) as queries (cu_seqlens)")
    return pushforward(lambda q, k, v: primal(q, k, v, *lengths, *constants), q, k, v)


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *constants: Any,
) -> tuple[Tensor, ...]:
    # o and lse (and their tangents) are what a kernel reads; the reference derives them again.
    return pullback(lambda q, k, v: primal(q, k, v, *constants)[:1], (q, k, v), (do,))


def _fake_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty((do.shape[0], *x.shape[1:])) for x in (q, k, v))


def _flops(products: int, of_pair: int, count: str) -> Callable[[Mapping[str, Any]], int]:
    """Count so many products of an ordinary pass, or of a dual, which it is if ``count`` has two halves."""

    def flops(named: Mapping[str, Any]) -> int:
        heads, head_dim = named["q"].shape[2:]
        return 2 * (of_pair if named[count].shape[0] == 2 else products) * _attended(named) * heads * head_dim

    return flops


def _attended(named: Mapping[str, Any]) -> int:
    """Count the scores that the mask leaves, over all sequences."""
    used, window, ends_k = named["seqused"], named["window"], named["cu_seqlens_k"]
    lengths = _lengths(named["cu_seqlens"]) if used is None else used.tolist()
    lengths_k = lengths if ends_k is None else _lengths(ends_k)
    # The queries that would stand before the first are those of as many keys.
    return sum(_causal(n_k, window) - _causal(n_k - n, window) for n, n_k in zip(lengths, lengths_k, strict=True))


def _lengths(ends: Tensor) -> list[int]:
    return [end - start for start, end in pairwise(ends.tolist())]


def _causal(n: int, window: int) -> int:
    """Count the scores that the mask leaves of ``n`` rows by ``n``."""
    seen = min(n, window) if window else n
    # The first rows see all before them, each of the others `seen` keys.
    return seen * (seen + 1) // 2 + (n - seen) * seen


# Without cu_seqlens_k, max_seqlen_k is max_seqlen.
_CONSTANTS = (
    "Tensor cu_seqlens, Tensor? seqused, Tensor? cu_seqlens_k, int max_seqlen, int max_seqlen_k, float scale, "
    "int window"
)

define(
    f"attention(Tensor q, Tensor k, Tensor v, {_CONSTANTS}) -> (Tensor, Tensor)",
    _forward,
    lambda q, k, v, *_: (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(q.shape[:3], dtype=compute_dtype(q)),
    ),
    # q k^T and p v; of a dual also those with a tangent on each side.
    flops=_flops(2, 6, "q"),
)
define(
    f"attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_CONSTANTS}) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    # The scores again, and those of dp, dq, dk, dv.
    flops=_flops(5, 15, "do"),
)
