"""Times every op and its contenders on a device, each found right before it is timed: a stage of ``benchmarks.gpu``."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.common.device_timer import DeviceTimer, Flush
from benchmarks.gpu import subjects
from benchmarks.gpu.subjects import GpuStage, Subject, Visit
from benchmarks.ops.peers import AbsentError
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

Measure = Callable[..., None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    size = metafunc.config.getoption("--size", None)
    if "visit" in metafunc.fixturenames:
        visits = subjects.visits(size == "tiny") if size else []
        metafunc.parametrize("visit", visits, ids=str)
    if "length" in metafunc.fixturenames:
        metafunc.parametrize("length", (TINY_LENGTHS if size == "tiny" else LENGTHS) if size else [])


@pytest.fixture
def size(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--size", None) or pytest.skip("benchmarks.gpu runs this")


@pytest.fixture(scope="module")
def stage() -> Iterator[GpuStage]:
    with nullcontext() if DEVICE == "cuda" else launchers_on_cpu():
        # Triton's interpreter cannot multiply bfloat16 tiles.
        yield GpuStage(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)


@pytest.fixture(scope="module")
def flush() -> Flush:
    return Flush(DEVICE)


@pytest.fixture
def measure(benchmark: BenchmarkFixture, flush: Flush, record_property: Callable[[str, object], None]) -> Measure:
    """Times a function whose kernels are compiled, and records its seconds, and the bytes that it moves."""

    def measured(function: Callable[[], Any], moved: int | None = None) -> None:
        timed_by(benchmark, flush, function)
        record_property("seconds", list(benchmark.stats.stats.data))
        record_property("bytes", moved)

    return measured


def timed_by(benchmark: BenchmarkFixture, flush: Flush, function: Callable[[], Any]) -> None:
    """Let pytest-benchmark time a function in as many rounds as fit into ``SECONDS``."""

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


def copy(measure: Measure) -> None:
    source = torch.zeros(COPIED[DEVICE], dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    measure(lambda: target.copy_(source), 2 * source.numel())


def test_copy_first(measure: Measure, size: str) -> None:
    """Measure what a device can do: the bandwidth of a copy, bytes read and written."""
    copy(measure)


def test_memory(stage: GpuStage, length: int, record_property: Callable[[str, object], None]) -> None:
    """Measure what attention allocates for one sequence: it may grow with its length, not its square."""
    if DEVICE == "cpu":
        pytest.skip("a CPU does not count what is allocated")
    subject = Subject("attention", "llama-2-7b", length, length)
    problem = subjects.posed(subject, stage.device, stage.dtype)
    functions = subjects.contender("ours", subjects.op_named(subject.op), problem).functions
    for name, function in functions.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        record_property(name, torch.cuda.max_memory_allocated() - before)


def test_op(measure: Measure, stage: GpuStage, visit: Visit, request: pytest.FixtureRequest) -> None:
    deadline = request.config.getoption("--deadline")
    if visit.contender == "compiled" and deadline is not None and time.time() > deadline - COMPILATION:
        pytest.skip("time")
    try:
        contender = stage.checked(visit)
    except AbsentError as absent:
        pytest.skip(str(absent))
    measure(contender.functions[visit.pass_], contender.moved.get(visit.pass_))


def test_copy_last(measure: Measure, size: str) -> None:
    """Measure the copy once more at the end, since a device may have slowed down."""
    copy(measure)
