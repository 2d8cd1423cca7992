"""Runs lora_linear on several streams at once: their frozen products are one, whatever each of them carries.

The rows of all streams lie one after another, and each weight is multiplied by all of them in one product, forward and
backward. Adapters, which take other rules in an ordinary pass than in a dual, are added to each stream by itself.

Where targets hold a weight in float8, two products take the place of one: in float8 are all rows of ordinary streams,
the tangent halves in the forward and, in the backward, the cotangents of primal halves. So the values of a dual, and
the cotangents of its tangents, which are the ordinary gradient, are those of a pass without float8: in every bit, where
the order of a product's sums does not depend on how many rows there are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sap_fast.dual import halves, stacked
from sap_fast.ops._library import Mode, compute_dtype, split_cotangent, stacked_cotangent
from sap_fast.ops.lora_linear import LoRATarget, check_targets, lora_linear, needed_of
from sap_fast.ops.lora_linear.float8 import Float8Weight, product, rounded

Dual = tuple[Tensor, Tensor | None]


class Group(NamedTuple):
    """Holds one stream: its rows, its targets and the seed of its dropout, as :func:`lora_linear` takes them."""

    x: Tensor
    x_dot: Tensor | None
    targets: Sequence[LoRATarget]
    seed: Tensor | None = None


def lora_linear_grouped(groups: Sequence[Group]) -> list[list[Dual]]:
    """What :func:`lora_linear` gives of every group, with one product for each weight.

    Args:
        groups: of one width, dtype and device; the i-th targets of all hold the same weight. A dual comes before
            ordinary streams, of which there may be none.

    Returns:
        Of each group, ``[(y, y_dot), ...]`` of its targets.

    Raises:
        ValueError, TypeError: as :func:`lora_linear`; other weights, or a dual behind another group.
    """
    first = groups[0]
    weights = [target.weight for target in first.targets]
    float8 = [target.float8 for target in first.targets if target.float8 is not None]
    if len(groups) == 1 and not float8:
        return [lora_linear(*first[:3], seed=first.seed)]
    if len(float8) not in (0, len(weights)):
        raise ValueError(f"{len(float8)} of {len(weights)} targets have a weight in float8; give it to all or none")
    for i, group in enumerate(groups):
        check_targets(group.x, group.x_dot, group.targets, group.seed)
        if i and group.x_dot is not None:
            raise ValueError(f"groups[{i}] is a dual; the one dual must come first")
        held = [target.weight for target in group.targets]
        if len(held) != len(weights) or any(map(_differ, held, weights)):
            raise ValueError(f"groups[{i}] has other weights than groups[0]; all must read the same maps")
    none = torch.zeros((), dtype=torch.int64, device=first.x.device)
    seeds = [none if group.seed is None else group.seed for group in groups]
    flat: list[Tensor | None] = []
    for group in groups:
        flat += [group.x, group.x_dot, *(tensor for target in group.targets for tensor in target[2:6])]
    ys = iter(_Grouped.apply(_Maps(weights, float8, groups, seeds), *flat))
    return [[(next(ys), next(ys)) for _ in group.targets] for group in groups]


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or a.data_ptr() != b.data_ptr()


class _Maps:
    """Holds what a call is made of beside the tensors that gradients may go to. The streams themselves are let go."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        float8: Sequence[Float8Weight],
        groups: Sequence[Group],
        seeds: Sequence[Tensor],
    ) -> None:
        self.weights, self.float8, self.seeds = weights, float8, seeds
        self.biases = [[target.bias for target in group.targets] for group in groups]
        self.constants = [
            (
                [float(target.scaling) for target in group.targets],
                [float(target.dropout) for target in group.targets],
                [target.salt for target in group.targets],
            )
            for group in groups
        ]

    def forward(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """Compute ``x W^T`` of all rows of stacks ``[S, rows, d_in]``, for each weight."""
        rows = torch.cat([stack.flatten(0, 1) for stack in stacks]) if len(stacks) > 1 else stacks[0].flatten(0, 1)
        if not self.float8:
            return [rows @ weight.t() for weight in self.weights]
        # The primal half of a dual leads; its tangents and all ordinary streams follow.
        exact = stacks[0].shape[1] if stacks[0].shape[0] == 2 else 0
        quick = rounded(rows[exact:])
        ys = [rows.new_empty(len(rows), len(weight)) for weight in self.weights]
        for y, weight, float8 in zip(ys, self.weights, self.float8, strict=True):
            if exact:
                torch.mm(rows[:exact], weight.t(), out=y[:exact])
            product(quick, float8.by_rows, y[exact:], emulated=float8.emulated)
        return ys

    def backward(self, modes: Sequence[Mode], dys: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Compute ``dy W`` of all rows of stacks ``[n, rows, d_out]``, by stream and target; their sum is due.

        The result is that sum or, for a CPU's bfloat16, its terms: there the raw op adds them up in float32.
        """
        # An ordinary gradient, that of tangents, ends the first stack; turned round, it comes last of all.
        columns = [torch.cat([dy.flatten(0, 1) for dy in reversed(of)]) for of in zip(*dys, strict=True)]
        rows = len(columns[0])
        exact = 0 if modes[0] is Mode.SINGLE else dys[0][0].shape[1]
        quick = rows - exact if self.float8 else 0
        apart = columns[0].device.type == "cpu" and columns[0].dtype != compute_dtype(columns[0])
        found: list[Tensor] = []
        for i, (dy, weight) in enumerate(zip(columns, self.weights, strict=True)):
            if apart or not found:
                found.append(dy.new_empty(rows, weight.shape[1]))
            beta = int(i > 0 and not apart)
            if quick:
                out = found[-1][:quick]
                term = torch.empty_like(out) if beta else out
                product(rounded(dy[:quick]), self.float8[i].by_columns, term, emulated=self.float8[i].emulated)
                if beta:
                    out += term
            if quick < rows:
                out = found[-1][quick:]
                torch.addmm(out, dy[quick:], weight, beta=beta, out=out)
        return found


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: _Maps, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.maps, count = maps, len(maps.weights)
        ctx.stride = stride = 2 + 4 * count
        groups: list[Any] = [flat[i : i + stride] for i in range(0, len(flat), stride)]
        ctx.modes = [Mode.of(group[1], ctx.needs_input_grad[1 + stride * i]) for i, group in enumerate(groups)]
        stacks = [stacked(group[0], group[1]) for group in groups]
        ys = maps.forward(stacks)
        outputs: list[Tensor | None] = []
        constant: list[Tensor | None] = []
        begin = 0
        for stack, group, biases, seed, constants, mode in zip(
            stacks, groups, maps.biases, maps.seeds, maps.constants, ctx.modes, strict=True
        ):
            size = stack.shape[0] * stack.shape[1]
            own = [y[begin : begin + size].view(*stack.shape[:2], y.shape[1]) for y in ys]
            begin += size
            torch.ops.sap_fast.lora_linear_(own, stack, biases, *_adapters(group), seed, *constants)
            found = [half for y in own for half in halves(y)]
            outputs += found
            constant += found[0::2] if mode is Mode.HALF else []
        ctx.mark_non_differentiable(*constant)
        ctx.shapes = [stack.shape for stack in stacks]
        needed = [needed_of(stack, group[2::4]) for stack, group in zip(stacks, groups, strict=True)]
        ctx.save_for_backward(*needed, *(tensor for group in groups for tensor in group[2:]))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple:
        maps, modes, stride = ctx.maps, ctx.modes, ctx.stride
        count, needs = len(maps.weights), ctx.needs_input_grad[1:]
        saved = ctx.saved_tensors  # once: a checkpointed layer's can be unpacked no more often
        rest = saved[len(modes) :]
        stacks = [
            maps.weights[0].new_empty(()).expand(shape) if x is None else x
            for x, shape in zip(saved, ctx.shapes, strict=False)
        ]
        adapters = [rest[i : i + 4 * count] for i in range(0, len(rest), 4 * count)]
        cotangents = []
        for i, (mode, stack) in enumerate(zip(modes, stacks, strict=True)):
            own = dys[2 * count * i : 2 * count * (i + 1)]
            likes = [stack.new_empty(()).expand(stack.shape[1], len(weight)) for weight in maps.weights]
            cotangents.append([stacked_cotangent(mode, *of) for of in zip(own[0::2], own[1::2], likes, strict=True)])
        wanted = [i for i in range(len(modes)) if needs[stride * i] or needs[stride * i + 1]]
        products = _by_part(maps, modes, cotangents, wanted)
        grads: list[Tensor | None] = []
        for i, (mode, stack) in enumerate(zip(modes, stacks, strict=True)):
            own_products = products.get(i, [])
            das, dbs = torch.ops.sap_fast.lora_linear_backward_(
                own_products,
                cotangents[i],
                stack,
                *(list(adapters[i][j::4]) for j in range(4)),
                maps.seeds[i],
                *maps.constants[i],
            )
            dx, dx_dot = split_cotangent(mode, own_products[0]) if own_products else (None, None)
            grads += [dx if needs[stride * i] else None, dx_dot if needs[stride * i + 1] else None]
            for j, (da, db) in enumerate(zip(das, dbs, strict=True)):
                need = needs[stride * i + 2 + 4 * j : stride * i + 6 + 4 * j]
                # The ordinary gradient: of the adapter in an ordinary pass, of its direction in a dual.
                found = (da, db, None, None) if mode is Mode.SINGLE else (None, None, da, db)
                grads += [grad if needed else None for grad, needed in zip(found, need, strict=True)]
        return None, *grads


def _adapters(group: Sequence[Tensor | None]) -> tuple[list[Tensor | None], ...]:
    """``a, b, a_dot, b_dot`` of all targets."""
    return tuple(list(group[2 + j :: 4]) for j in range(4))


def _by_part(
    maps: _Maps, modes: Sequence[Mode], cotangents: Sequence[Sequence[Tensor]], wanted: Sequence[int]
) -> dict[int, list[Tensor]]:
    """The products of the groups whose dx is wanted, as stacks ``[n, rows, d_in]``."""
    if not wanted:
        return {}
    found = maps.backward([modes[i] for i in wanted], [cotangents[i] for i in wanted])
    result, end = {}, len(found[0])
    for i in wanted:
        n, rows, _ = cotangents[i][0].shape
        result[i] = [x[end - n * rows : end].view(n, rows, x.shape[1]) for x in found]
        end -= n * rows
    return result
