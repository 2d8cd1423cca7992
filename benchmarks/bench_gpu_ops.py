"""Times every op and its contenders on a device: what ``python -m benchmarks.gpu --part ops`` runs.

By itself this file has nothing to time; ``benchmarks.gpu`` says on what, and until when.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import gpu_ops, gpu_session
from benchmarks.device_timer import DeviceTimer, Flush
from benchmarks.gpu_ops import Stage, Subject, Visit
from benchmarks.peers import AbsentError
from sap_fast.ops._library import launchers_on_cpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIMER = DeviceTimer(DEVICE)
pytestmark = pytest.mark.benchmark(timer=TIMER, disable_gc=True)

# A visit takes this long on the device, within these rounds; two visits make a median.
SECONDS, FEWEST, MOST = 0.05, 5, 25
# Seconds that a compilation may well take: with less left, none begins.
COMPILATION = 30.0
COPIED = {"cuda": 2**30, "cpu": 2**20}
# Tokens of the one sequence whose attention must not keep a T x T matrix.
LENGTHS, TINY_LENGTHS = (2048, 4096, 8192), (16, 32)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    size = metafunc.config.getoption(gpu_session.SIZE, None)
    if "visit" in metafunc.fixturenames:
        visits = gpu_ops.visits(size == "tiny") if size else []
        metafunc.parametrize("visit", visits, ids=str)
    if "length" in metafunc.fixturenames:
        metafunc.parametrize("length", (TINY_LENGTHS if size == "tiny" else LENGTHS) if size else [])


@pytest.fixture
def size(request: pytest.FixtureRequest) -> str:
    return request.config.getoption(gpu_session.SIZE, None) or pytest.skip("benchmarks.gpu runs this")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with nullcontext() if DEVICE == "cuda" else launchers_on_cpu():
        # Triton's interpreter cannot multiply bfloat16 tiles.
        yield Stage(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)


@pytest.fixture(scope="module")
def flush() -> Flush:
    return Flush(DEVICE)


def measure(benchmark: BenchmarkFixture, flush: Flush, function: Callable[[], Any], moved: int | None = None) -> None:
    """Time a function whose kernels are compiled."""

    def timed() -> None:
        with TIMER.region():
            function()

    def once() -> float:
        flush()
        before = TIMER()
        timed()
        return TIMER() - before

    rounds = 2
    if DEVICE == "cuda":
        once()
        rounds = min(max(round(SECONDS / once()), FEWEST), MOST)
    benchmark.pedantic(timed, setup=flush, rounds=rounds)
    benchmark.extra_info["bytes"] = moved


def copy(benchmark: BenchmarkFixture, flush: Flush) -> None:
    source = torch.zeros(COPIED[DEVICE], dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    measure(benchmark, flush, lambda: target.copy_(source), 2 * source.numel())


def test_copy_first(benchmark: BenchmarkFixture, flush: Flush, size: str) -> None:
    """What a device can do: the bandwidth of a copy, bytes read and written."""
    copy(benchmark, flush)


def test_memory(stage: Stage, length: int, record_property: Callable[[str, object], None]) -> None:
    """What attention allocates for one sequence, results included: it may grow with its length, not its square."""
    if DEVICE == "cpu":
        pytest.skip("a CPU does not count what is allocated")
    subject = Subject("attention", "llama-2-7b", length, length)
    problem = gpu_ops.posed(subject, stage.device, stage.dtype)
    functions = gpu_ops.contender("ours", gpu_ops.op_named(subject.op), problem).functions
    for name, function in functions.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        record_property(name, torch.cuda.max_memory_allocated() - before)


def test_op(
    benchmark: BenchmarkFixture, stage: Stage, flush: Flush, visit: Visit, request: pytest.FixtureRequest
) -> None:
    deadline = request.config.getoption(gpu_session.DEADLINE)
    if visit.contender == "compiled" and deadline is not None and time.time() > deadline - COMPILATION:
        pytest.skip(gpu_session.OUT_OF_TIME)
    try:
        contender = stage.checked(visit)
    except AbsentError as absent:
        pytest.skip(str(absent))
    measure(benchmark, flush, contender.functions[visit.pass_], contender.moved.get(visit.pass_))


def test_copy_last(benchmark: BenchmarkFixture, flush: Flush, size: str) -> None:
    """The same at the end, since a device may have slowed down."""
    copy(benchmark, flush)
