"""Times every op's C++ kernels on the CPU against the rules they replace and against the dual's formula in PyTorch.

    python -m benchmarks.cpu --json result.json     # all of it, as a table
    pytest benchmarks/ops/bench_cpu.py -k "glu and float32"

At the widths of the demonstration's model and of Llama-2-7B, 1024 rows, as ``cases.py`` has them for benchmarks. A
contender is timed only where its results are right: each is first compared with the rules derived from the op's primal.
"""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.gpu.subjects import has_formula
from benchmarks.ops.contenders import PASSES, OpContender, check, contender
from sap_fast import _C
from sap_fast.ops._cases import Case, OpCases, Problem, cases_for, derive, pose
from sap_fast.ops._library import references_on_cpu

CONTENDERS = ("ours", "reference", "eager")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = {f"{op.name} {case.name}": (op, case) for op, case in cases_for("bench")}

# A visit lasts this long, within these rounds; two visits, one in each order, make a median.
SECONDS, FEWEST, MOST = 0.3, 3, 100
# What takes longer is timed twice a visit, and has been warmed up by being checked.
LONG = 0.5
# The oracle is float64 where that takes seconds, counted by the products of one half.
LARGE = 1e10

pytestmark = [
    pytest.mark.benchmark(disable_gc=True),
    pytest.mark.skipif(not _C.loaded, reason=f"the C++ kernels are not loaded: {_C.status}"),
]


class CpuStage:
    """Holds one case at a time: its problem, the truth about it, and its contenders."""

    def __init__(self) -> None:
        self.key: tuple[str, str] | None = None

    def checked(self, case_name: str, dtype: torch.dtype, pass_: str, name: str) -> OpContender:
        """Return a contender whose results in this pass are right.

        Raises:
            AssertionError: they are not.
        """
        op, case = CASES[case_name]
        if self.key != (case_name, str(dtype)):
            self.key = None
            self.contenders: dict[str, OpContender] = {}
            self.right: set[tuple[str, str]] = set()
            with references_on_cpu():
                self.problem = pose(op, case, torch.Generator().manual_seed(0), dtype)
            self.truth = truth(op, case, self.problem)
            self.key = (case_name, str(dtype))
        if name not in self.contenders:
            self.contenders[name] = contender(name, op, self.problem)
        if (name, pass_) not in self.right:
            check(op, self.contenders[name], pass_, self.truth, dtype)
            self.right.add((name, pass_))
        return self.contenders[name]


def truth(op: OpCases, case: Case, problem: Problem) -> dict[str, Tensor]:
    """Derive what is right, from the primal."""
    return derive(op, problem.to(torch.float64 if case.flops < LARGE else torch.float32))


@pytest.fixture(scope="module")
def stage() -> Iterator[CpuStage]:
    yield CpuStage()


def contenders_of(case: str) -> tuple[str, ...]:
    op, _ = CASES[case]
    return tuple(name for name in CONTENDERS if name != "eager" or has_formula(op.name))


def visits() -> list[Any]:
    """List every pass of every case by each contender, in both orders."""
    return [
        pytest.param(case, dtype, pass_, name, id=f"{case} {dtype} {pass_} {name} {order}")
        for dtype in DTYPES
        for case in CASES
        for pass_ in PASSES
        for order, names in enumerate((contenders_of(case), contenders_of(case)[::-1]), 1)
        for name in names
    ]


@pytest.mark.parametrize(("case", "dtype", "pass_", "name"), visits())
def test_op(benchmark: BenchmarkFixture, stage: CpuStage, case: str, dtype: str, pass_: str, name: str) -> None:
    found = stage.checked(case, DTYPES[dtype], pass_, name)
    function = found.functions[pass_]
    start = time.perf_counter()
    function()
    once = time.perf_counter() - start
    rounds = 2 if once > LONG else min(max(round(SECONDS / once), FEWEST), MOST)
    benchmark.pedantic(function, rounds=rounds, warmup_rounds=0 if once > LONG else 1)
    benchmark.extra_info["bytes"] = found.moved[pass_]
