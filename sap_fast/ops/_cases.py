"""Holds what an op is tried on, read by its tests and by its benchmarks alike.

Every op folder fills one :class:`OpCases` in its ``cases.py``; ``tests/test_ops.py``,
``benchmarks/ops/bench_ops.py`` and ``benchmarks.gpu`` find it there, and an op without that file has none of them.

A :class:`Problem` is one case made concrete, as stacks (see ``sap_fast/dual.py``). The leading
dimensions of its inputs ``[S, ...]`` and cotangents ``[n, ...]`` say what is asked for: a full dual
(2, 2), a dual in half mode (2, 1) or an ordinary pass (1, 1). It has two answers: that of the op,
:func:`run`, and that of the rules derived from the op's primal, :func:`derive`. Both are flat
dictionaries in the notation of ``dual.py``: ``y``, ``y_dot``, ``dx``, ``dx_dot``.
"""

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sap_fast.dual import pullback, pushforward

Dual = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Case:
    """Describes one set of inputs.

    Attributes:
        name: tells it from the op's other cases; readable.
        make: draws ``(inputs, constants)`` by name from a generator, on its device. Inputs are
            float64 stacks ``[2, ...]`` of what is differentiated; constants are everything else:
            frozen tensors in float64, index tensors, numbers.
        purpose: ``"contract"``, small, for all tests of the op; ``"reference"``, what only the reference has a limit
            at, for all but the tests of kernels; ``"tiles"``, more than one tile of a kernel in some direction,
            for those alone; ``"compile"``, the widths of a model with few rows, for which kernels are compiled
            and not run; ``"bench"``, a size of a real model, for the benchmarks.
        flops: of one of the matrix products that :class:`Products` counts; 0 if there are none.
    """

    name: str
    make: Callable[[torch.Generator], tuple[dict[str, Tensor], dict[str, Any]]]
    purpose: str = "contract"
    flops: float = 0.0


@dataclass(frozen=True)
class Products:
    """Counts the matrix products of one size that each pass must form; recomputed ones do not count.

    By default those of a linear map: each half has one forward and, its weight being frozen, one
    backward. ``backward`` is that of an ordinary pass and of half mode, which do the same.
    """

    forward: int = 1
    backward: int = 1
    dual_forward: int = 2
    dual_backward: int = 2


class Widths(NamedTuple):
    """Holds the widths of a model."""

    hidden: int
    inner: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Size:
    """Describes a size at which an op is timed on a GPU.

    Attributes:
        model: by its name in ``benchmarks/gpu/subjects.py``.
        rows: tokens.
        length: of the sequences of tokens; 0 for an op that knows of none.
        target: what its time is held to, if anything: a copy of as many bytes, or flash attention run twice. Such
            sizes are timed first: time may run out.
        compiled: whether the formula is also timed as ``torch.compile`` makes it, for which each shape takes seconds,
            attention's much longer.
    """

    model: str
    rows: int
    length: int = 0
    target: Literal["copy", "flash"] | None = None
    compiled: bool = False


# 16k rows, where bandwidth counts, and what a step has: there, tensors fit a GPU's cache, and time is what counts.
MANY, FEW = 16384, (2048, 768)
REAL_MODELS = ("llama-2-7b", "smollm2-135m")
# Of an op that only reads and writes rows.
STREAMED = (
    *(Size(model, MANY, target="copy", compiled=True) for model in REAL_MODELS),
    *(Size(model, rows) for rows in FEW for model in REAL_MODELS),
)


@dataclass(frozen=True)
class Sizes:
    """Describes an op at the widths of a model, as ``benchmarks.gpu`` runs, compiles and times it.

    Attributes:
        case: of a model's widths, a number of rows and the length of their sequences, which is 0 where :attr:`length`
            is.
        timed: the sizes at which it is timed.
        rows: those on which it is tried for the first time: by default the tokens of a task batch of the published
            sizes.
        length: of the sequences of these; 0 for an op that knows of none.
        rows_matter: whether other kernels are compiled for other numbers of rows, not for other widths alone.
        parts: cuts a problem into problems whose results, one after another, are its own, for an op whose oracle could
            not hold all of it.
    """

    case: Callable[[Widths, int, int], Case]
    timed: Sequence[Size]
    rows: int = 768
    length: int = 0
    rows_matter: bool = False
    parts: "Callable[[Problem], list[Problem]] | None" = None


@dataclass(frozen=True)
class OpCases:
    """Holds an op and what it is tried on.

    Attributes:
        name: of the op and of its folder.
        outputs: names of the outputs that carry gradient; a case may have only the first of them.
        call: runs the public function on duals by name (``(x, None)`` in an ordinary pass) and
            returns the output duals.
        primal: the plain function of the inputs by name: one half in, one half of each output out.
        cases: at least one for ``"contract"``, ``"compile"`` and ``"bench"``.
        sizes: for ``benchmarks.gpu``.
        typical: name of the ``"contract"`` case that has no feature to spare: several rows, every input.
        wide: names of inputs that stay float32 where the others are bfloat16.
        tangent_only: names of inputs that are constants of a dual although their tangents are not:
            there the op has no cotangent for their primal half.
        whole: names of inputs that the op takes as one stack: their halves require grad together or
            not at all, and in half mode not at all.
        products: for the benchmarks' count of floating-point operations.
        returned: takes the inputs' names; returns those whose cotangents the raw backward returns, in its order.
        multiplies: names of its Triton kernels that multiply matrices in the dtype of its inputs.
        reordered: whether its C++ kernels leave sums to torch, whose order follows from the number of threads.
        any_width: names of arguments of its raw ops whose last dimension may have any size, ``[halves, rows, ...]``.
        any_shape: names of those that fit with any shape, or that no C++ kernel reads.
    """

    name: str
    outputs: tuple[str, ...]
    call: Callable[[dict[str, Dual], dict[str, Any]], Sequence[Dual]]
    primal: Callable[[dict[str, Tensor], dict[str, Any]], tuple[Tensor, ...]]
    cases: Sequence[Case]
    sizes: Sizes
    typical: str
    wide: Collection[str] = ()
    tangent_only: Collection[str] = ()
    whole: Collection[str] = ()
    products: Products = Products()
    returned: Callable[[list[str]], list[str]] = list
    multiplies: Collection[str] = ()
    reordered: bool = False
    any_width: Collection[str] = ()
    any_shape: Collection[str] = ()


@dataclass(frozen=True)
class Problem:
    """Holds concrete inputs ``[S, ...]``, constants, and cotangents ``[n, ...]``, all by name."""

    inputs: dict[str, Tensor]
    constants: dict[str, Any]
    cotangents: dict[str, Tensor]

    @property
    def is_dual(self) -> bool:
        return len(next(iter(self.inputs.values()))) == 2

    def map(self, change: Callable[[str, Tensor], Tensor]) -> "Problem":
        """Apply ``change(name, tensor)`` to every floating-point tensor."""

        def changed(values: Mapping[str, Any]) -> dict[str, Any]:
            floating = {k: v for k, v in values.items() if torch.is_tensor(v)}
            floating = {k: v for k, v in floating.items() if v.is_floating_point()}
            return {**values, **{name: change(name, value) for name, value in floating.items()}}

        return Problem(changed(self.inputs), changed(self.constants), changed(self.cotangents))

    def to(self, dtype: torch.dtype) -> "Problem":
        return self.map(lambda name, x: x.to(dtype))

    def half(self) -> "Problem":
        """Return the dual in half mode: only the cotangent of the tangent half, the ordinary gradient."""
        return Problem(self.inputs, self.constants, {name: dy[-1:] for name, dy in self.cotangents.items()})

    def single(self) -> "Problem":
        """Return the ordinary pass, whose gradient the half mode's is."""
        return Problem(
            {name: x[:1] for name, x in self.inputs.items()},
            self.constants,
            self.half().cotangents,
        )


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    """Draw standard normal numbers in float64 on the generator's device."""
    return torch.randn(shape, generator=rng, dtype=torch.float64, device=rng.device)


def cases_for(*purposes: str) -> list[tuple[OpCases, Case]]:
    """List every op with each of its cases of these purposes."""
    return [(op, case) for op in every_op() for case in op.cases if case.purpose in purposes]


def every_op() -> list[OpCases]:
    """Collect ``CASES`` from the ``cases.py`` of every op folder."""
    ops = importlib.import_module("sap_fast.ops")
    folders = [module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg]
    return [importlib.import_module(f"sap_fast.ops.{name}.cases").CASES for name in folders]


def pose(op: OpCases, case: Case, rng: torch.Generator, dtype: torch.dtype = torch.float64) -> Problem:
    """Draw a case's inputs, rounded to ``dtype``, and cotangents of both halves of every output."""

    def rounded(name: str, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(dtype, torch.float32) if name in op.wide else dtype)

    problem = Problem(*case.make(rng), {}).map(rounded)
    with torch.no_grad():
        ys = op.call(duals_of(split(problem.inputs, True)), problem.constants)
    cotangents = {name: normal(rng, 2, *y.shape).to(y.dtype) for name, (y, _) in zip(op.outputs, ys, strict=False)}
    return Problem(problem.inputs, problem.constants, cotangents)


def differentiated(op: OpCases, problem: Problem) -> list[str]:
    """Name the halves for which the op gives a cotangent, such as ``["x", "x_dot"]``."""
    half_mode = problem.is_dual and len(next(iter(problem.cotangents.values()))) == 1
    names = []
    for name in problem.inputs:
        if not (half_mode or (problem.is_dual and name in op.tangent_only)):
            names.append(name)
        if problem.is_dual and not (half_mode and name in op.whole):
            names.append(f"{name}_dot")
    return names


def run(
    op: OpCases,
    problem: Problem,
    wanted: Sequence[str] | None = None,
    used: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Solve a problem by the public op and autograd.

    Args:
        wanted: the input halves that require grad; by default all of :func:`differentiated`.
        used: the output halves that cotangents come from; by default all that have one.
    """
    wanted = differentiated(op, problem) if wanted is None else wanted
    leaves = {
        name: half.detach().requires_grad_(name in wanted)
        for name, half in split(problem.inputs, problem.is_dual).items()
    }
    duals = op.call(duals_of(leaves), problem.constants)
    ys: dict[str, Tensor] = {}
    for name, (y, y_dot) in zip(op.outputs, duals, strict=False):
        ys |= {name: y} if y_dot is None else {name: y, f"{name}_dot": y_dot}
    dys = split(problem.cotangents, problem.is_dual)
    through = [name for name in used or dys if ys[name].requires_grad]
    dxs = torch.autograd.grad(
        [ys[name] for name in through],
        [leaves[name] for name in wanted],
        [dys[name] for name in through],
        materialize_grads=True,
    )
    gradients = {f"d{name}": dx for name, dx in zip(wanted, dxs, strict=True)}
    return {name: y.detach() for name, y in ys.items()} | gradients


def derive(op: OpCases, problem: Problem) -> dict[str, Tensor]:
    """Solve a problem by the rules that follow from the op's primal: the oracle."""

    def primal(*xs: Tensor) -> tuple[Tensor, ...]:
        return op.primal(dict(zip(problem.inputs, xs, strict=True)), problem.constants)

    xs = tuple(problem.inputs.values())
    ys = dict(zip(op.outputs, pushforward(primal, *xs), strict=False))
    dys = tuple(problem.cotangents.values())
    dxs = dict(zip(problem.inputs, pullback(primal, xs, dys), strict=True))
    gradients = {f"d{name}": dx for name, dx in split(dxs, problem.is_dual).items()}
    wanted = {f"d{name}" for name in differentiated(op, problem)}
    return split(ys, problem.is_dual) | {k: dx for k, dx in gradients.items() if k in wanted}


def split(stacks: Mapping[str, Tensor], is_dual: bool) -> dict[str, Tensor]:
    """Name the halves of stacks: ``{x, x_dot}``; of a cotangent in half mode ``{x_dot}`` alone."""
    result: dict[str, Tensor] = {}
    for name, stack in stacks.items():
        names = (name, f"{name}_dot") if is_dual else (name,)
        result |= dict(zip(names[-len(stack) :], stack, strict=True))
    return result


def duals_of(halves: Mapping[str, Tensor]) -> dict[str, Dual]:
    """Undo :func:`split`: ``{x: (x, x_dot)}``."""
    names = [name for name in halves if not name.endswith("_dot")]
    return {name: (halves[name], halves.get(f"{name}_dot")) for name in names}
