"""START HERE: the idea of the library on one page.

Safety-Aware Probing (arXiv 2505.16737) needs, at weights ``theta``, with a unit direction ``u`` in weight
space that makes the model less safe and a probe ``V`` added to hidden states, two gradients:

    grad_theta L(theta, V)                         which the optimizer takes, and
    grad_V L_dot,   L_dot = d/de L(theta + e u, V) at e = 0,      which the probe climbs.

Carry every activation ``x`` together with its tangent ``x_dot`` along ``u``, as the two halves of one
stacked batch ``[2, rows, d]``: half 0 the primal, half 1 the tangent. A linear map acts on both halves
alike, so the frozen weights, residual additions and the head run once on the stacked batch. Only nonlinear
operations, and LoRA (where ``u`` enters), need a rule. The last op returns the dual ``(L, L_dot)``.

Then one ordinary reverse pass over the scalar ``L_dot`` yields everything. Since L_dot is linear in the
tangents, its derivative with respect to a tangent is L's derivative with respect to the primal:

    cotangent of the *tangent* half  = dL/dx               -> grad_theta L, grad_V L
    cotangent of the *primal*  half  = d/de dL/dx          -> grad_V L_dot

Nothing is perturbed, nothing has to be restored, and no difference of nearly equal numbers is taken.

A stream of activations is therefore one of two things, told apart by the leading dimension S of a stack:

    S = 2   a dual (x, x_dot);          S = 1   an ordinary pass, ``x`` alone (``x_dot is None``).

and its backward carries n halves of cotangents:

    n = 2   *full*: both halves. Needed from the loss down to the lowest probe.
    n = 1   *half*: one half, the ordinary gradient. Needed beneath the lowest probe, and when S = 1.

Half mode costs what an ordinary backward costs and never looks at the tangents.

``pushforward`` and ``pullback`` derive both rules of an op from its primal alone. They are the reference
implementation of every op and the oracle of every test; kernels write the same rules out by hand.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Primal = Callable[..., tuple[Tensor, ...]]


def pushforward(primal: Primal, *xs: Tensor) -> tuple[Tensor, ...]:
    """Apply ``primal`` to stacked inputs ``[S, ...]``: its values, and for S = 2 their tangents.

    Args:
        primal: takes unstacked tensors and returns a tuple of tensors.
        xs: stacked inputs, all with the same S.

    Returns:
        The stacked outputs ``[S, ...]``.
    """
    if xs[0].shape[0] == 1:
        return tuple(y[None] for y in primal(*(x[0] for x in xs)))
    ys, y_dots = torch.func.jvp(primal, tuple(x[0] for x in xs), tuple(x[1] for x in xs))[:2]
    return tuple(torch.stack(dual) for dual in zip(ys, y_dots, strict=True))


def pullback(primal: Primal, xs: tuple[Tensor, ...], dys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Pull stacked cotangents ``[n, ...]`` of the outputs of ``primal`` back to its inputs.

    Args:
        primal: as for :func:`pushforward`.
        xs: stacked inputs ``[S, ...]``; half mode (n = 1) reads their primal halves alone.
        dys: stacked cotangents ``[n, ...]``, one for each output.

    Returns:
        Stacked cotangents ``[n, ...]`` of the inputs. For n = 2: of the primal inputs, then of their tangents.
    """
    primals = tuple(x[0] for x in xs)
    if dys[0].shape[0] == 1:
        vjp = torch.func.vjp(primal, *primals)[1]
        return tuple(dx[None] for dx in vjp(tuple(dy[0] for dy in dys)))

    def dual(primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple:
        return torch.func.jvp(primal, primals, tangents)

    vjp = torch.func.vjp(dual, primals, tuple(x[1] for x in xs))[1]
    dxs, dx_dots = vjp((tuple(dy[0] for dy in dys), tuple(dy[1] for dy in dys)))
    return tuple(torch.stack(dual) for dual in zip(dxs, dx_dots, strict=True))


def stacked(x: Tensor, x_dot: Tensor | None) -> Tensor:
    """View ``x`` (and ``x_dot``) as one stack ``[S, ...]``, without a copy where they are halves of one buffer."""
    if x_dot is None:
        return x[None]
    if torch.compiler.is_compiling():
        return torch.stack((x, x_dot))  # a compiler sees no addresses
    if (
        x.is_contiguous()
        and x_dot.is_contiguous()
        and x.dtype == x_dot.dtype
        and x.untyped_storage()._cdata == x_dot.untyped_storage()._cdata
        and x_dot.storage_offset() == x.storage_offset() + x.numel()
    ):
        return x.as_strided((2, *x.shape), (x.numel(), *x.stride()), x.storage_offset())
    return torch.stack((x, x_dot))


def halves(stack: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split a stack ``[S, ...]`` into ``(x, x_dot)``; ``x_dot`` is None for S = 1. Both are views."""
    return stack[0], (stack[1] if stack.shape[0] == 2 else None)
