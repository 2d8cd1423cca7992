"""Floating-point operations of one op's matrix products, from the shapes of what it is given.

The library's own ops are counted by the products that their rules ask for (``sap_fast/dual.py``), a multiply and an
add as two; ops that only read and write rows count nothing. For PyTorch's ops its own formulas are used
(``torch.utils.flop_counter``), which count a causal attention's masked half as well.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

Named = dict[str, Any]


def matrix_flops(op: Any, args: Sequence[Any], kwargs: Named, out: Any) -> int:
    """FLOPs of one call.

    Args:
        op: an ``OpOverload``, as a dispatch mode is given it.

    Raises:
        KeyError: an op of the library's for which there is no formula here.
    """
    from torch.utils.flop_counter import flop_registry, sdpa_flop_count  # which imports Triton

    library, _, name = op._schema.name.partition("::")
    if library == "sap_fast":
        names = [argument.name for argument in op._schema.arguments]
        return _OWN[name](dict(zip(names, args, strict=False)) | kwargs)
    if name.startswith("_scaled_dot_product"):
        is_backward = name.endswith("backward")
        q, k, v = (x.shape for x in args[is_backward : 3 + is_backward])
        # Heads of queries that share one of keys each multiply with it; torch 2.11 refuses to count that.
        grouped = [(x[0], q[1], *x[2:]) for x in (k, v)]
        # Backward: the scores again, and four products more.
        return (5 if is_backward else 2) * sdpa_flop_count(q, *grouped) // 2
    formula = flop_registry.get(op._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _lora_linear(named: Named) -> int:
    halves, rows, _ = named["x"].shape
    frozen = 2 * halves * rows * sum(weight.numel() for weight in named["weight"])
    return frozen + _adapters(named, [weight.shape[0] for weight in named["weight"]])


def _lora_linear_(named: Named) -> int:
    return _adapters(named, [y.shape[2] for y in named["y"]])


def _adapters(named: Named, widths: Sequence[int]) -> int:
    halves, rows, width = named["x"].shape
    # Of a pair: B A x; B A x_dot, B_dot A x, B A_dot x, which share their last product.
    products = 1 if halves == 1 else 3
    ranks = [0 if a is None else a.shape[0] for a in named["a"]]
    return 2 * products * rows * sum(rank * (width + d_out) for rank, d_out in zip(ranks, widths, strict=True))


def _lora_linear_backward(named: Named) -> int:
    rows = named["x"].shape[1]
    frozen = sum(dy.shape[0] * rows * weight.numel() for dy, weight in zip(named["dy"], named["weight"], strict=True))
    return 2 * frozen * named["need_dx"] + _lora_linear_backward_(named)


def _lora_linear_backward_(named: Named) -> int:
    rows, width = named["x"].shape[1:]
    total = 0
    for dy, a in zip(named["dy"], named["a"], strict=True):
        full = dy.shape[0] == 2
        if a is not None:
            # dy B, its product with A, x A^T, and the gradients of A and B; in full mode the other cotangent's too.
            total += rows * a.shape[0] * ((4 if full else 2) * dy.shape[2] + (5 if full else 3) * width)
    return 2 * total


def _attended(named: Named) -> int:
    """How many scores the mask leaves, over all sequences."""
    used, window, ends_k = named["seqused"], named["window"], named["cu_seqlens_k"]
    lengths = _lengths(named["cu_seqlens"]) if used is None else used.tolist()
    lengths_k = lengths if ends_k is None else _lengths(ends_k)
    # The queries that would stand before the first are those of as many keys.
    return sum(_causal(n_k, window) - _causal(n_k - n, window) for n, n_k in zip(lengths, lengths_k, strict=True))


def _lengths(ends: Tensor) -> list[int]:
    return [end - start for start, end in pairwise(ends.tolist())]


def _causal(n: int, window: int) -> int:
    """How many scores the mask leaves of ``n`` rows by ``n``."""
    seen = min(n, window) if window else n
    # The first rows see all before them, each of the others `seen` keys.
    return seen * (seen + 1) // 2 + (n - seen) * seen


def _attention(products: int, of_pair: int, count: str) -> Callable[[Named], int]:
    def flops(named: Named) -> int:
        heads, head_dim = named["q"].shape[2:]
        return 2 * (of_pair if named[count].shape[0] == 2 else products) * _attended(named) * heads * head_dim

    return flops


def _head(named: Named) -> int:
    # The logits of each half, and the products with their cotangents that the backward weights row by row.
    return 2 * (named["x"].shape[0] + named["grads"]) * named["x"].shape[1] * named["weight"].numel()


def _none(named: Named) -> int:
    return 0


_ROW_WISE = (
    "glu",
    "glu_backward",
    "glu_backward_",
    "linear_cross_entropy_backward",
    "probe_rms_norm",
    "probe_rms_norm_backward",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "rotary_backward",
    "take_rows",
    "take_rows_backward",
)
_OWN: dict[str, Callable[[Named], int]] = {
    **dict.fromkeys(_ROW_WISE, _none),
    "lora_linear": _lora_linear,
    "lora_linear_": _lora_linear_,
    "lora_linear_backward": _lora_linear_backward,
    "lora_linear_backward_": _lora_linear_backward_,
    # q k^T and p v; of a pair also those with a tangent on each side.
    "attention": _attention(2, 6, "q"),
    # The scores again, and those of dp, dq, dk, dv.
    "attention_backward": _attention(5, 15, "do"),
    "linear_cross_entropy": _head,
}
