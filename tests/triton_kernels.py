"""Runs the Triton kernels in a test: on a GPU, or, with ``TRITON_INTERPRET=1``, on the CPU."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

needs_kernels = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="Triton kernels need a GPU, or TRITON_INTERPRET=1 in a process of its own: see the Makefile",
    ),
    pytest.mark.usefixtures("on_cpu"),
]
