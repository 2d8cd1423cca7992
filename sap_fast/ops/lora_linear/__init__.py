"""Frozen linear maps with LoRA adapters on a dual; all maps that share an input in one op (q, k, v; gate, up)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sap_fast.dual import halves, stacked
from sap_fast.ops._library import (
    Mode,
    check_device,
    check_dtype,
    check_dual,
    check_shape,
    split_cotangent,
    stacked_cotangent,
)
from sap_fast.ops.lora_linear import rules  # noqa: F401  (defines the raw ops)
from sap_fast.ops.lora_linear.dropout import dropout_mask
from sap_fast.ops.lora_linear.float8 import Float8Weight

__all__ = ["LoRATarget", "dropout_mask", "lora_linear"]


class LoRATarget(NamedTuple):
    """Holds one frozen map ``W x + bias`` and its adapter ``scaling B A dropout(x)``, if it has one.

    ``weight [d_out, d_in]``, ``bias [d_out]`` or None, ``a [rank, d_in]`` and ``b [d_out, rank]`` or None;
    ``a_dot, b_dot``: the direction u in the space of a and b (float32), or None in an ordinary pass. ``scaling``
    is alpha / rank, or alpha / sqrt(rank) for rsLoRA. ``dropout`` is its probability, ``salt`` tells the masks
    of different modules apart. ``float8``: the weight in float8, where some of its products are to be formed in that;
    :func:`lora_linear` itself does not look at it (see ``grouped.py``).
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
    float8: Float8Weight | None = None


def lora_linear(
    x: Tensor, x_dot: Tensor | None, targets: Sequence[LoRATarget], *, seed: Tensor | None = None
) -> list[tuple[Tensor, Tensor | None]]:
    """Compute ``y = W x + bias + s B A x`` and its tangent ``y_dot`` for each target.

    ``y_dot = W x_dot + s (B A x_dot + B_dot A x + B A_dot x)``.

    In a dual, the gradient of L_dot with respect to ``a_dot`` and ``b_dot`` is ``grad_A L`` and ``grad_B L``, the
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
    check_targets(x, x_dot, targets, seed)
    if seed is None:
        seed = torch.empty((), dtype=torch.int64, device=x.device)  # its value does not matter
    flat = [tensor for target in targets for tensor in target[:6]]
    constants = (
        [float(target.scaling) for target in targets],
        [float(target.dropout) for target in targets],
        [target.salt for target in targets],
    )
    ys = _LoRALinear.apply(x, x_dot, seed, constants, *flat)
    return list(zip(ys[0::2], ys[1::2], strict=True))


def check_targets(x: Tensor, x_dot: Tensor | None, targets: Sequence[LoRATarget], seed: Tensor | None) -> None:
    """Refuse what :func:`lora_linear` cannot take."""
    check_dual("x", x, x_dot, 2)
    for target in targets:
        _check_target(x, x_dot, target)
    if seed is None and any(target.dropout for target in targets):
        raise ValueError("dropout needs a seed: an int64 scalar tensor on the device of x")


def needed_of(x: Tensor, a: Sequence[Tensor | None]) -> Tensor | None:
    """Return what a backward needs of x beside its shape: nothing where no map has an adapter."""
    return x if any(matrix is not None for matrix in a) else None


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
            raise ValueError("a_dot and b_dot belong to a dual: give both with x_dot, and neither without")
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
        ctx.shape = x_stack.shape
        ctx.save_for_backward(needed_of(x_stack, adapters[0]), seed, *flat)
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
        x = weights[0].new_empty(()).expand(ctx.shape) if x is None else x
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
            # The ordinary gradient: of the adapter in an ordinary pass, of its direction in a dual.
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
