"""Every op at the sizes of real models: a dual against the two ordinary passes it stands for.

    pytest benchmarks/ops/bench_ops.py -k "attention and llama"

On a GPU in bfloat16, else in float32. An op is timed only where its results are right: each case is
first compared with the rules derived from its primal. ``--benchmark-disable`` does that alone.
"""

import platform
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from sap_fast.ops._cases import (
    Case,
    OpCases,
    Problem,
    cases_for,
    derive,
    differentiated,
    duals_of,
    pose,
    run,
    split,
)
from sap_fast.ops._tolerances import OF_NORM

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
ROUNDS, WARMUP_ROUNDS = (50, 5) if CUDA else (5, 1)

# The oracle is float64 where that takes seconds, counted by the products of one half.
LARGE = 1e13 if CUDA else 1e10

CASES = {f"{op.name}-{case.name}": (op, case) for op, case in cases_for("bench")}
# What is timed, as a problem and how often. Half mode differs from full mode only in its backward.
PASSES: dict[str, tuple[Callable[[Problem], Problem], int]] = {
    "dual": (lambda dual: dual, 1),
    "half": (Problem.half, 1),
    "twice": (Problem.single, 2),
}


def clock() -> float:
    """Return the seconds, once the device has done what it was given before."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


pytestmark = pytest.mark.benchmark(timer=clock, disable_gc=True)


class Posed(NamedTuple):
    """What is timed."""

    name: str
    op: OpCases
    case: Case
    problem: Problem


@pytest.fixture(scope="module", params=CASES)
def subject(request: pytest.FixtureRequest) -> Posed:
    """Pose a case, and refuse to time an op that gets it wrong in any mode."""
    op, case = CASES[request.param]
    problem = pose(op, case, torch.Generator(DEVICE).manual_seed(0), DTYPE)
    truth = derive(op, problem.to(torch.float64 if case.flops < LARGE else torch.float32))
    for change, _ in PASSES.values():
        changed = change(problem)
        for name, actual in run(op, changed).items():
            # The gradient in an ordinary pass is a dual's cotangent of the tangent half.
            ordinary = not changed.is_dual and name not in changed.cotangents
            expected = truth[f"{name}_dot" if ordinary else name]
            error = float((actual - expected).norm() / expected.norm())
            assert error <= OF_NORM[DTYPE], f"{name} is off by {error:.2g} of its norm"
    return Posed(request.param, op, case, problem)


def leaves_of(op: OpCases, problem: Problem) -> dict[str, Tensor]:
    wanted = differentiated(op, problem)
    return {
        name: half.detach().requires_grad_(name in wanted)
        for name, half in split(problem.inputs, problem.is_dual).items()
    }


def flush_cache() -> None:
    """Overwrite what a GPU's cache holds of the last round: inside a model, it holds none of it."""
    if CUDA:
        torch.empty(256 * 2**20, dtype=torch.int8, device="cuda").zero_()


def measure(
    benchmark: BenchmarkFixture,
    function: Callable[[], object],
    times: int,
    group: str,
    moved: Iterable[Tensor],
    flops: float,
) -> None:
    """Time ``times`` calls of a function.

    Args:
        moved: what one call has to read and write at least once.
        flops: of the matrix products of one call; 0 if it has none.
    """

    def timed() -> None:
        for _ in range(times):
            function()

    benchmark.group = group
    benchmark.pedantic(timed, setup=flush_cache, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
    info = benchmark.extra_info
    info["device"] = torch.cuda.get_device_name() if CUDA else platform.machine()
    info["threads"] = torch.get_num_threads()
    info["dtype"] = str(DTYPE)
    info["torch"] = torch.__version__
    info["bytes"] = times * sum(x.numel() * x.element_size() for x in moved)
    if flops:
        info["flops"] = times * flops
    if benchmark.stats is not None:  # not with --benchmark-disable
        seconds = benchmark.stats.stats.median
        info["GB/s"] = info["bytes"] / seconds / 1e9
        if flops:
            info["TFLOP/s"] = info["flops"] / seconds / 1e12


def constants_of(problem: Problem) -> list[Tensor]:
    return [value for value in problem.constants.values() if torch.is_tensor(value)]


@pytest.mark.parametrize("which", ["dual", "twice"])
def test_forward(benchmark: BenchmarkFixture, subject: Posed, which: str) -> None:
    name, op, case, dual = subject
    change, times = PASSES[which]
    problem = change(dual)
    duals = duals_of(leaves_of(op, problem))
    measure(
        benchmark,
        lambda: op.call(duals, problem.constants),
        times,
        group=f"{name} forward",
        # Cotangents have the shapes and dtypes of the outputs.
        moved=[*problem.inputs.values(), *constants_of(problem), *problem.cotangents.values()],
        flops=case.flops * (op.products.dual_forward if problem.is_dual else op.products.forward),
    )


@pytest.mark.parametrize("which", PASSES)
def test_backward(benchmark: BenchmarkFixture, subject: Posed, which: str) -> None:
    name, op, case, dual = subject
    change, times = PASSES[which]
    problem = change(dual)
    leaves = leaves_of(op, problem)
    ys = [y for dual in op.call(duals_of(leaves), problem.constants) for y in dual if y is not None]
    ys = [y for y in ys if y.requires_grad]
    xs = [x for x in leaves.values() if x.requires_grad]
    dys = list(split(problem.cotangents, problem.is_dual).values())
    n = len(next(iter(problem.cotangents.values())))
    measure(
        benchmark,
        lambda: torch.autograd.grad(ys, xs, dys, retain_graph=True),
        times,
        group=f"{name} backward",
        # Half mode does not look at tangents. Gradients have the shapes of what they belong to.
        moved=[*(x[:n] for x in problem.inputs.values()), *constants_of(problem), *dys, *xs],
        flops=case.flops * (op.products.dual_backward if n == 2 else op.products.backward),
    )
