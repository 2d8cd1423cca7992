"""The raw ops of lora_linear and their reference rules: whole maps, and what adapters add to products already there.

A frozen product may be formed elsewhere, on the rows of several streams at once or in float8. ``lora_linear_`` and
``lora_linear_backward_`` then do the rest of ``lora_linear`` and ``lora_linear_backward``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sap_fast.dual import pullback, pushforward
from sap_fast.ops._library import compute_dtype, define
from sap_fast.ops.lora_linear.dropout import dropout_mask
from sap_fast.ops.lora_linear.reference import adapter


def _keep(x: Tensor, seed: Tensor, salt: int, p: float) -> Tensor | None:
    return dropout_mask(seed, salt, x.shape[1], x.shape[2], p) if p else None


def _adapter_stacks(
    halves_in_x: int, a: Tensor, b: Tensor, a_dot: Tensor | None, b_dot: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if halves_in_x == 1 or a_dot is None or b_dot is None:
        return a.to(dtype)[None], b.to(dtype)[None]
    return torch.stack((a.to(dtype), a_dot.to(dtype))), torch.stack((b.to(dtype), b_dot.to(dtype)))


def _forward(x: Tensor, weights: list[Tensor], *rest: Any) -> list[Tensor]:
    ys = [F.linear(x, weight) for weight in weights]  # linear: both halves alike, each weight read once
    _forward_(ys, x, *rest)
    return ys


def _forward_(
    ys: list[Tensor],
    x: Tensor,
    biases: list[Tensor | None],
    a: list[Tensor | None],
    b: list[Tensor | None],
    a_dot: list[Tensor | None],
    b_dot: list[Tensor | None],
    seed: Tensor,
    scaling: list[float],
    dropout: list[float],
    salt: list[int],
) -> None:
    """Add biases and adapters to products ``[S, rows, d_out]``."""
    for i, (y, bias) in enumerate(zip(ys, biases, strict=True)):
        if bias is not None:
            y[0] += bias  # affine: the tangent has none
        if (a_i := a[i]) is not None and (b_i := b[i]) is not None:
            adapters = _adapter_stacks(x.shape[0], a_i, b_i, a_dot[i], b_dot[i], compute_dtype(x))
            keep = _keep(x, seed, salt[i], dropout[i])
            (delta,) = pushforward(lambda x, a, b: adapter(x, a, b, scaling[i], keep), x, *adapters)  # noqa: B023
            y.copy_(y + delta)


def _backward(
    dys: list[Tensor], x: Tensor, weights: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *others, need_dx = rest
    products = [dy @ weight for dy, weight in zip(dys, weights, strict=True)] if need_dx else []
    das, dbs = _backward_(products, dys, x, *others)
    return products[0] if need_dx else x.new_empty((0, *x.shape[1:])), das, dbs


def _backward_(
    products: list[Tensor],
    dys: list[Tensor],
    x: Tensor,
    a: list[Tensor | None],
    b: list[Tensor | None],
    a_dot: list[Tensor | None],
    b_dot: list[Tensor | None],
    seed: Tensor,
    scaling: list[float],
    dropout: list[float],
    salt: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute the gradients of the adapters. The first product ``[n, rows, d_in]`` becomes dx, if there are any."""
    dtype = compute_dtype(x)
    dx = x.new_zeros((dys[0].shape[0] if products else 0, *x.shape[1:]), dtype=dtype)
    das, dbs = [], []
    for i, dy in enumerate(dys):
        if i < len(products):
            dx += products[i]
        da, db = dx.new_empty(0), dx.new_empty(0)
        if (a_i := a[i]) is not None and (b_i := b[i]) is not None:
            adapters = _adapter_stacks(dy.shape[0], a_i, b_i, a_dot[i], b_dot[i], dtype)
            keep = _keep(x, seed, salt[i], dropout[i])
            dx_i, da, db = pullback(
                lambda x, a, b: adapter(x, a, b, scaling[i], keep),  # noqa: B023
                (x.to(dtype), *adapters),
                (dy.to(dtype),),
            )
            if products:
                dx += dx_i
            # The last half is the ordinary gradient; the first, in full mode, a Hessian-vector product.
            da, db = da[-1].clone(), db[-1].clone()
        das.append(da)
        dbs.append(db)
    if products:
        products[0].copy_(dx)
    return das, dbs


def _fake_gradients(x: Tensor, a: list[Tensor | None], b: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    like = [x.new_empty(0 if t is None else t.shape, dtype=compute_dtype(x)) for t in (*a, *b)]
    return like[: len(a)], like[len(a) :]


def _fake_backward(dys: list[Tensor], x: Tensor, weights: list[Tensor], a: list, b: list, *rest: Any) -> tuple:
    dx = x.new_empty((dys[0].shape[0] if rest[-1] else 0, *x.shape[1:]))
    return dx, *_fake_gradients(x, a, b)


def _forward_flops(named: Mapping[str, Any]) -> int:
    halves, rows, _ = named["x"].shape
    frozen = 2 * halves * rows * sum(weight.numel() for weight in named["weight"])
    return frozen + _adapter_flops(named, [weight.shape[0] for weight in named["weight"]])


def _adapter_flops(named: Mapping[str, Any], widths: Sequence[int]) -> int:
    halves, rows, width = named["x"].shape
    # Of a dual: B A x; B A x_dot, B_dot A x, B A_dot x, which share their last product.
    products = 1 if halves == 1 else 3
    ranks = [0 if a is None else a.shape[0] for a in named["a"]]
    return 2 * products * rows * sum(rank * (width + d_out) for rank, d_out in zip(ranks, widths, strict=True))


def _backward_flops(named: Mapping[str, Any]) -> int:
    rows = named["x"].shape[1]
    frozen = sum(dy.shape[0] * rows * weight.numel() for dy, weight in zip(named["dy"], named["weight"], strict=True))
    return 2 * frozen * named["need_dx"] + _gradient_flops(named)


def _gradient_flops(named: Mapping[str, Any]) -> int:
    rows, width = named["x"].shape[1:]
    total = 0
    for dy, a in zip(named["dy"], named["a"], strict=True):
        full = dy.shape[0] == 2
        if a is not None:
            # dy B, its product with A, x A^T, and the gradients of A and B; in full mode the other cotangent's too.
            total += rows * a.shape[0] * ((4 if full else 2) * dy.shape[2] + (5 if full else 3) * width)
    return 2 * total


_ADAPTERS = "Tensor?[] a, Tensor?[] b, Tensor?[] a_dot, Tensor?[] b_dot"
_CONSTANTS = "Tensor seed, float[] scaling, float[] dropout, int[] salt"

define(
    f"lora_linear(Tensor x, Tensor[] weight, Tensor?[] bias, {_ADAPTERS}, {_CONSTANTS}) -> Tensor[]",
    _forward,
    lambda x, weights, *_: [x.new_empty((*x.shape[:2], weight.shape[0])) for weight in weights],
    flops=_forward_flops,
)
define(
    f"lora_linear_(Tensor(a!)[] y, Tensor x, Tensor?[] bias, {_ADAPTERS}, {_CONSTANTS}) -> ()",
    _forward_,
    lambda *_: None,
    flops=lambda named: _adapter_flops(named, [y.shape[2] for y in named["y"]]),
)
define(
    f"lora_linear_backward(Tensor[] dy, Tensor x, Tensor[] weight, {_ADAPTERS}, {_CONSTANTS}, bool need_dx) "
    "-> (Tensor, Tensor[], Tensor[])",
    _backward,
    _fake_backward,
    flops=_backward_flops,
)
define(
    f"lora_linear_backward_(Tensor(a!)[] product, Tensor[] dy, Tensor x, {_ADAPTERS}, {_CONSTANTS}) "
    "-> (Tensor[], Tensor[])",
    _backward_,
    lambda products, dys, x, a, b, *_: _fake_gradients(x, a, b),
    flops=_gradient_flops,
)
