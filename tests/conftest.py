"""What every test shares: the same random numbers on every run."""

import importlib
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from triton_kernels import INTERPRETED

# What deterministic matrix products need on CUDA; it must be set before the first of them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


# Tensors here are tiny: more threads would cost more than they give.
torch.set_num_threads(1)

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, so that a result that nothing was stored to cannot look right."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def formula_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Any], dict[str, torch.Tensor]]:
    """Derive the yardstick: the rules of the primal with every step in the dtype of its inputs.

    A primal widens bfloat16 to float32 (``compute_dtype``), which is what an op should do too;
    undone, it is the formula as anyone would write it in that dtype.
    """

    from sap_fast.ops._cases import OpCases, Problem, derive, every_op

    def naive(op: OpCases, problem: Problem) -> dict[str, torch.Tensor]:
        with monkeypatch.context() as patch:
            for each in every_op():
                reference = importlib.import_module(f"sap_fast.ops.{each.name}.reference")
                if hasattr(reference, "compute_dtype"):  # what only moves rows computes in none
                    patch.setattr(reference, "compute_dtype", lambda x: x.dtype)
            return derive(op, problem)

    return naive


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[None]:
    """Let the launchers serve key CPU as well, where kernels are interpreted, for one module of tests.

    The interpreter keeps bfloat16 as raw 16-bit integers, and its product would multiply those: here it widens them.
    """
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from sap_fast.ops._library import launchers_on_cpu

    product = InterpreterBuilder.create_dot

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def of_widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, wide(a), wide(b), *rest)

    with pytest.MonkeyPatch.context() as patch, launchers_on_cpu():
        patch.setattr(InterpreterBuilder, "create_dot", of_widened)
        yield
