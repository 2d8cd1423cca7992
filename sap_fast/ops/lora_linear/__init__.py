"""Frozen linear maps with LoRA adapters on a pair; all maps that share an input in one op (q, k, v; gate, up)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sap_fast.dual import halves, pullback, pushforward, stacked
from sap_fast.ops._library import (
    Mode,
    check_device,
    check_dtype,
    check_pair,
    check_shape,
    compute_dtype,
    define,
    split_cotangent,
    stacked_cotangent,
)
from sap_fast.ops.lora_linear.dropout import dropout_mask
from sap_fast.ops.lora_linear.reference import adapter

__all__ = ["LoRATarget", "dropout_mask", "lora_linear"]


class LoRATarget(NamedTuple):
    """One frozen map ``W x + bias`` and its adapter ``scaling B A dropout(x)``, if it has one.

    ``weight [d_out, d_in]``, ``bias [d_out]`` or None, ``a [rank, d_in]`` and ``b [d_out, rank]`` or None;
    ``a_dot, b_dot``: the direction u in the space of a and b (float32), or None in an ordinary pass. ``scaling``
    is alpha / rank, or alpha / sqrt(rank) for rsLoRA. ``dropout`` is its probability, ``salt`` tells the masks
    of different modules apart.
    """

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    a_dot: Tensor | None = None
    b_dot: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    salt: int = 0


def lora_linear(
    x: Tensor, x_dot: Tensor | None, targets: Sequence[LoRATarget], *, seed: Tensor | None = None
) -> list[tuple[Tensor, Tensor | None]]:
    """``y = W x + bias + s B A x`` and ``y_dot = W x_dot + s (B A x_dot + B_dot A x + B A_dot x)`` for each target.

    In a pair, the gradient of L_dot with respect to ``a_dot`` and ``b_dot`` is ``grad_A L`` and ``grad_B L``, the
    ordinary gradients; ``a`` and ``b`` themselves are constants there, since SAP has no use for their cotangent
    (a Hessian-vector product). In an ordinary pass the gradients go to ``a`` and ``b``. W and bias are frozen.

    Args:
        x, x_dot: ``[rows, d_in]``, float32, bfloat16 or float64, the dtype of every W; ``x_dot=None`` is an
            ordinary pass.
        targets: maps that read the same x. Adapters may be float32 beside a bfloat16 W.
        seed: int64 scalar tensor on the device of x, for dropout; the same seed draws the same masks.

    Returns:
        ``[(y, y_dot), ...]``, each ``[rows, d_out]`` in the dtype of x.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; dropout without a seed.
    """
    check_pair("x", x, x_dot, 2)
    for target in targets:
        _check_target(x, x_dot, target)
    if seed is None:
        if any(target.dropout for target in targets):
            raise ValueError("dropout needs a seed: an int64 scalar tensor on the device of x")
        seed = torch.empty((), dtype=torch.int64, device=x.device)  # its value does not matter
    flat = [tensor for target in targets for tensor in target[:6]]
    constants = (
        [float(target.scaling) for target in targets],
        [float(target.dropout) for target in targets],
        [target.salt for target in targets],
    )
    ys = _LoRALinear.apply(x, x_dot, seed, constants, *flat)
    return list(zip(ys[0::2], ys[1::2], strict=True))


def _check_target(x: Tensor, x_dot: Tensor | None, target: LoRATarget) -> None:
    weight, bias, a, b, a_dot, b_dot = target[:6]
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must be [d_out, {x.shape[1]}], but has shape {tuple(weight.shape)}")
    check_dtype("weight", weight, "x", x)
    check_device("weight", weight, "x", x)
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
        check_device("bias", bias, "x", x)
    if (a is None) != (b is None):
        raise ValueError("an adapter needs both a and b")
    if a is not None and b is not None:
        check_shape("a", a, (a.shape[0], x.shape[1]))
        check_shape("b", b, (weight.shape[0], a.shape[0]))
        check_device("a", a, "x", x)
        check_device("b", b, "x", x)
        if (x_dot is None) != (a_dot is None) or (x_dot is None) != (b_dot is None):
            raise ValueError("a_dot and b_dot belong to a pair: give both with x_dot, and neither without")
        if a_dot is not None and b_dot is not None:
            check_shape("a_dot", a_dot, tuple(a.shape))
            check_shape("b_dot", b_dot, tuple(b.shape))
    if not 0.0 <= target.dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), but is {target.dropout}")


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_dot: Tensor | None,
        seed: Tensor,
        constants: tuple[list, ...],
        *flat: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.mode, ctx.constants = Mode.of(x_dot, ctx.needs_input_grad[0]), constants
        x_stack = stacked(x, x_dot)
        weights, biases, *adapters = (list(flat[i::6]) for i in range(6))
        ys = torch.ops.sap_fast.lora_linear(x_stack, weights, biases, *adapters, seed, *constants)
        ctx.save_for_backward(x_stack, seed, *flat)
        outputs = tuple(half for y in ys for half in halves(y))
        if ctx.mode is Mode.HALF:
            ctx.mark_non_differentiable(*outputs[0::2])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple:
        x, seed, *flat = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        weights, _, *adapters = (flat[i::6] for i in range(6))
        dy_stacks = [
            stacked_cotangent(ctx.mode, dy, dy_dot, x.new_empty(()).expand(x.shape[1], weight.shape[0]))
            for dy, dy_dot, weight in zip(dys[0::2], dys[1::2], weights, strict=True)
        ]
        dx, das, dbs = torch.ops.sap_fast.lora_linear_backward(
            dy_stacks, x, weights, *adapters, seed, *ctx.constants, need_x
        )
        dx, dx_dot = split_cotangent(ctx.mode, dx) if need_x else (None, None)
        grads: list[Tensor | None] = []
        for i, (da, db) in enumerate(zip(das, dbs, strict=True)):
            need_a, need_b, need_a_dot, need_b_dot = ctx.needs_input_grad[4 + 6 * i + 2 : 4 + 6 * i + 6]
            # The ordinary gradient: of the adapter in an ordinary pass, of its direction in a pair.
            if ctx.mode is Mode.SINGLE:
                grads += [None, None, da if need_a else None, db if need_b else None, None, None]
            else:
                grads += [None, None, None, None, da if need_a_dot else None, db if need_b_dot else None]
        return (
            dx if ctx.needs_input_grad[0] else None,
            dx_dot if ctx.needs_input_grad[1] else None,
            None,
            None,
            *grads,
        )


def _keep(x: Tensor, seed: Tensor, salt: int, p: float) -> Tensor | None:
    return dropout_mask(seed, salt, x.shape[1], x.shape[2], p) if p else None


def _adapter_stacks(
    halves_in_x: int, a: Tensor, b: Tensor, a_dot: Tensor | None, b_dot: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if halves_in_x == 1 or a_dot is None or b_dot is None:
        return a.to(dtype)[None], b.to(dtype)[None]
    return torch.stack((a.to(dtype), a_dot.to(dtype))), torch.stack((b.to(dtype), b_dot.to(dtype)))


def _forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: list[Tensor | None],
    b: list[Tensor | None],
    a_dot: list[Tensor | None],
    b_dot: list[Tensor | None],
    seed: Tensor,
    scaling: list[float],
    dropout: list[float],
    salt: list[int],
) -> list[Tensor]:
    ys = []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = F.linear(x, weight)  # linear: both halves alike, the weight read once
        if bias is not None:
            y[0] += bias  # affine: the tangent has none
        if (a_i := a[i]) is not None and (b_i := b[i]) is not None:
            adapters = _adapter_stacks(x.shape[0], a_i, b_i, a_dot[i], b_dot[i], compute_dtype(x))
            keep = _keep(x, seed, salt[i], dropout[i])
            (delta,) = pushforward(lambda x, a, b: adapter(x, a, b, scaling[i], keep), x, *adapters)  # noqa: B023
            y = (y + delta).to(x.dtype)
        ys.append(y)
    return ys


def _backward(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor | None],
    b: list[Tensor | None],
    a_dot: list[Tensor | None],
    b_dot: list[Tensor | None],
    seed: Tensor,
    scaling: list[float],
    dropout: list[float],
    salt: list[int],
    need_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dtype = compute_dtype(x)
    dx = x.new_zeros((dys[0].shape[0] if need_dx else 0, *x.shape[1:]), dtype=dtype)
    das, dbs = [], []
    for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
        if need_dx:
            dx += dy @ weight
        da, db = dx.new_empty(0), dx.new_empty(0)
        if (a_i := a[i]) is not None and (b_i := b[i]) is not None:
            adapters = _adapter_stacks(dy.shape[0], a_i, b_i, a_dot[i], b_dot[i], dtype)
            keep = _keep(x, seed, salt[i], dropout[i])
            dx_i, da, db = pullback(
                lambda x, a, b: adapter(x, a, b, scaling[i], keep),  # noqa: B023
                (x.to(dtype), *adapters),
                (dy.to(dtype),),
            )
            if need_dx:
                dx += dx_i
            # The last half is the ordinary gradient; the first, in full mode, a Hessian-vector product.
            da, db = da[-1].clone(), db[-1].clone()
        das.append(da)
        dbs.append(db)
    return dx.to(x.dtype), das, dbs


def _fake_backward(dys: list[Tensor], x: Tensor, weights: list[Tensor], a: list, b: list, *rest: Any) -> tuple:
    dtype, need_dx = compute_dtype(x), rest[-1]
    like = [(x.new_empty(0 if t is None else t.shape, dtype=dtype)) for t in (*a, *b)]
    dx = x.new_empty((dys[0].shape[0] if need_dx else 0, *x.shape[1:]))
    return dx, like[: len(a)], like[len(a) :]


_ADAPTERS = "Tensor?[] a, Tensor?[] b, Tensor?[] a_dot, Tensor?[] b_dot"
_CONSTANTS = "Tensor seed, float[] scaling, float[] dropout, int[] salt"

define(
    f"lora_linear(Tensor x, Tensor[] weight, Tensor?[] bias, {_ADAPTERS}, {_CONSTANTS}) -> Tensor[]",
    _forward,
    lambda x, weights, *_: [x.new_empty((*x.shape[:2], weight.shape[0])) for weight in weights],
)
define(
    f"lora_linear_backward(Tensor[] dy, Tensor x, Tensor[] weight, {_ADAPTERS}, {_CONSTANTS}, bool need_dx) "
    "-> (Tensor, Tensor[], Tensor[])",
    _backward,
    _fake_backward,
)
