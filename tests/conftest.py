"""What every test shares: the same random numbers on every run."""

import os
import random
from collections.abc import Iterator
from contextlib import nullcontext

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


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[None]:
    """Where kernels are interpreted, let their launchers serve key CPU as well, for one module of tests."""
    from sap_fast.ops._library import launchers_on_cpu

    with launchers_on_cpu() if INTERPRETED else nullcontext():
        yield
