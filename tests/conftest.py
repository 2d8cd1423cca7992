"""What every test shares: the same random numbers on every run."""

import os
import random

import numpy
import pytest
import torch

# What deterministic matrix products need on CUDA; it must be set before the first of them.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
