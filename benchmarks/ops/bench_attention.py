"""Attention of an ordinary pass by every backend that can serve here, at several lengths of sequence.

    pytest benchmarks/ops/bench_attention.py --benchmark-group-by=param:length

On a GPU in bfloat16 with Llama-2-7B's heads, else in float32 with SmolLM2's. A backend is timed only where its
results are right: they are first compared with the library's own in a wider dtype. One that cannot serve skips, and
says why. ``--benchmark-disable`` does the comparison alone.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.common.device_timer import DeviceTimer, Flush
from sap_fast.model.attention_backends import Heads, choose, load, machine_of
from sap_fast.model.attention_backends.choice import BACKENDS, Backend
from sap_fast.model.attention_backends.serve import Ordinary, own_attention
from sap_fast.ops._tolerances import OF_NORM

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
WIDER = torch.float32 if CUDA else torch.float64
HEADS, KV_HEADS, HEAD_DIM = (32, 32, 128) if CUDA else (9, 3, 64)
ROWS, ROUNDS, WARMUP_ROUNDS = (8192, 30, 5) if CUDA else (2048, 3, 1)
LENGTHS = (128, 256, 2048)
TIMER = DeviceTimer(DEVICE.type)
pytestmark = pytest.mark.benchmark(timer=TIMER, disable_gc=True)


@pytest.fixture(scope="module", autouse=True)
def same_bits() -> Iterator[None]:
    """Set the switch that PyTorch's backends need, and not what else it does: it also fills fresh memory."""
    before, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def flush() -> Flush:
    return Flush(DEVICE.type)


@pytest.fixture(scope="module", params=LENGTHS)
def length(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture(scope="module")
def forward(backend: Backend, length: int) -> Callable[[], tuple[Tensor, list[Tensor], Tensor]]:
    """Make a forward that is right: it gives its result, what it is differentiated by, and a cotangent."""
    heads = Heads(DTYPE, HEAD_DIM)
    try:
        choose(backend, machine_of(DEVICE, heads), heads)
    except ValueError as problem:
        pytest.skip(str(problem))
    rng = torch.Generator(DEVICE).manual_seed(0)
    cu_seqlens = torch.arange(0, ROWS + 1, length, dtype=torch.int32, device=DEVICE)
    shapes = [(ROWS, n, HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    *leaves, do = (torch.randn(shape, generator=rng, device=DEVICE).to(DTYPE) for shape in shapes)

    def run(ordinary: Ordinary, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
        xs = [x.to(dtype, copy=True).requires_grad_() for x in leaves]
        return ordinary(*xs, cu_seqlens, length, HEAD_DIM**-0.5, None), xs, do.to(dtype)

    def results(ordinary: Ordinary, dtype: torch.dtype) -> list[Tensor]:
        o, xs, dy = run(ordinary, dtype)
        return [o.detach(), *torch.autograd.grad(o, xs, dy)]

    ordinary = load(backend)
    found, truth = results(ordinary, DTYPE), results(own_attention, WIDER)
    for name, x, expected in zip(("o", "dq", "dk", "dv"), found, truth, strict=True):
        error = float((x - expected).norm() / expected.norm())
        assert error <= OF_NORM[DTYPE], f"{name} is off by {error:.2g} of its norm"
    xs = [x.clone().requires_grad_() for x in leaves]
    return lambda: (ordinary(*xs, cu_seqlens, length, HEAD_DIM**-0.5, None), xs, do)


def measure(benchmark: BenchmarkFixture, flush: Flush, function: Callable[[], object]) -> None:
    def timed() -> None:
        with TIMER.region():
            function()

    benchmark.pedantic(timed, setup=flush, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
    benchmark.extra_info["device"] = torch.cuda.get_device_name(DEVICE) if CUDA else "cpu"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["dtype"] = str(DTYPE)
    benchmark.extra_info["heads"] = HEADS, KV_HEADS, HEAD_DIM
    benchmark.extra_info["rows"] = ROWS
    benchmark.extra_info["torch"] = torch.__version__


def test_forward(
    benchmark: BenchmarkFixture, flush: Flush, forward: Callable[[], tuple[Tensor, list[Tensor], Tensor]], length: int
) -> None:
    benchmark.group = f"forward, sequences of {length}"
    measure(benchmark, flush, forward)


def test_backward(
    benchmark: BenchmarkFixture, flush: Flush, forward: Callable[[], tuple[Tensor, list[Tensor], Tensor]], length: int
) -> None:
    benchmark.group = f"backward, sequences of {length}"
    o, xs, do = forward()
    measure(benchmark, flush, lambda: torch.autograd.grad(o, xs, do, retain_graph=True))
