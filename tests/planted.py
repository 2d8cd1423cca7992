"""Failures of every kind, planted: what ``benchmarks.gpu`` must survive and show. Run by ``test_gpu_runs.py``."""

import os
import signal
import time

import pytest
import torch


def test_before() -> None:
    """Nothing is wrong with what comes before the failures."""


def test_wrong_number(record_property) -> None:
    record_property("off", {"dx": (0.5, 0.25), "y": (0.1, 0.4)})
    raise AssertionError("off by more than allowed: dx 0.5 (2.00 x)")


@pytest.mark.parametrize("case", ["glu-full-bfloat16-3x5", "glu-half-bfloat16-3x5"])
def test_exception(case: str) -> None:
    raise ValueError(f"the launcher of {case.partition('-')[0]} was given what it does not take")


def test_hang() -> None:
    time.sleep(1e6)


def test_out_of_memory() -> None:
    torch.empty(2**60, dtype=torch.int8)


def test_death_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_after() -> None:
    """This test passes, whatever the one before it did."""
