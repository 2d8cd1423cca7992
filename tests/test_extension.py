"""The C++ kernels as a module: what is loaded, what stands in where it cannot be, and how many threads may run."""

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from agreement import assert_agrees
from torch import Tensor

from benchmarks.gpu import subjects
from benchmarks.gpu.subjects import Subject
from benchmarks.ops.contenders import Recorder
from sap_fast import _C
from sap_fast.ops._cases import OpCases, Problem, Widths, derive, every_op, pose, run
from sap_fast.ops._tolerances import REORDERED, ROUGH

# Ops without a C++ kernel are served by their reference rules.
HAVE_KERNEL = [op for op in every_op() if torch._C._dispatch_has_kernel_for_dispatch_key(f"sap_fast::{op.name}", "CPU")]
every_op_with_a_kernel = pytest.mark.parametrize("op", HAVE_KERNEL, ids=lambda op: op.name)
needs_extension = pytest.mark.skipif(not _C.loaded, reason=f"the C++ kernels are not loaded: {_C.status}")

RELEASE = re.sub(r"\W", "_", torch.__version__)

LOAD = """
import importlib.util, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    folder = sys.argv[1]
    spec = importlib.util.spec_from_file_location(
        "sap_fast._C", folder + "/__init__.py", submodule_search_locations=[folder]
    )
    module = sys.modules["sap_fast._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
print(module.loaded, "|", module.status, "|", len(caught))
"""


def load_from(folder: Path) -> str:
    """Load a copy of the loader from a folder in a process of its own: ``loaded | status | number of warnings``."""
    shutil.copy(Path(_C.__file__), folder)
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_without_modules_the_reference_serves(tmp_path: Path) -> None:
    loaded, status, warned = load_from(tmp_path).split(" | ")
    assert (loaded, warned) == ("False", "0") and "not built" in status


@pytest.mark.parametrize(
    ("release", "said"),
    [("2_0_0", "built for another torch"), (RELEASE, "could not be loaded")],
    ids=["other", "broken"],
)
def test_modules_that_cannot_serve_are_left_alone_with_one_warning(tmp_path: Path, release: str, said: str) -> None:
    for name in ("avx2", "avx512"):
        (tmp_path / f"{name}_{release}{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    loaded, status, warned = load_from(tmp_path).split(" | ")
    assert (loaded, warned) == ("False", "1")
    assert said in status and release in status


@needs_extension
def test_an_op_has_the_kernel_that_csrc_has_for_it() -> None:
    sources = Path(__file__).parents[1] / "csrc"
    assert [op for op in every_op() if (sources / f"{op.name}.cpp").exists()] == HAVE_KERNEL


@pytest.fixture
def many_rows(monkeypatch: pytest.MonkeyPatch, op: OpCases, dtype: torch.dtype) -> Problem:
    """Make inputs large enough for every loop of a kernel to be shared between threads: the least share is 16384."""
    monkeypatch.setitem(subjects.MODELS, "middling", Widths(272, 517, 301, 4, 2, 68))
    return subjects.posed(Subject.of(op, "middling", 203, 29), "cpu", dtype)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_op_with_a_kernel
def test_threads_change_no_bit(op: OpCases, dtype: torch.dtype, many_rows: Problem) -> None:
    """Only where a product of torch's sums over the vocabulary do they differ, by roundings."""
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(run(op, many_rows))
    finally:
        torch.set_num_threads(before)
    alone, first, again = found
    assert all(torch.equal(first[name], again[name]) for name in alone)
    if op.reordered:
        assert_agrees(first, alone, tolerance=REORDERED * torch.finfo(dtype).eps)
    else:
        assert all(torch.equal(alone[name], first[name]) for name in alone)
    assert_agrees(first, derive(op, many_rows.to(torch.float64)), tolerance=ROUGH[dtype])


@needs_extension
def test_threads_change_no_bit_of_keys_before_the_queries() -> None:
    """Sequences of a prefix, of which the first has the queries: more of them than threads, in several blocks."""
    (op,) = (op for op in every_op() if op.name == "attention")
    (case,) = (case for case in op.cases if case.name == "smollm2-135m-at-the-end")
    problem = pose(op, case, torch.Generator().manual_seed(0), torch.float32)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(op, problem))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


@needs_extension
def test_the_tail_of_a_vocabulary_counts() -> None:
    """A confident token's loss is the sum of very many very small terms beside a 1, in several chunks of rows."""
    vocab, rows = 2**18 + 7, 70
    weight = torch.zeros(vocab, 2, dtype=torch.float64)
    weight[5, 0] = 1.0
    x = torch.zeros(2, rows, 2, dtype=torch.float64)
    x[0, :, 0] = torch.linspace(16.0, 19.0, rows)
    x[1, :, 0] = 1.0
    targets = torch.full((rows,), 5)
    expected, _ = torch.ops.sap_fast.linear_cross_entropy(x, weight, targets, 0)
    found, _ = torch.ops.sap_fast.linear_cross_entropy(x.float(), weight.float(), targets, 0)
    # In float32: the few terms that share a lane with the 1 lose up to half an eps each, here of a sum of 1e-3.
    assert float(((found - expected) / expected).abs().max()) < 3e-4
    # The yardstick is right itself: the loss in closed form. In float64 it is the difference of two numbers below 20,
    # so off by 1e-14 at most, and at least 1e-3 large.
    closed = torch.log1p((vocab - 1) * torch.exp(-x[0, :, 0]))
    # The closed form has a few roundings of float64 of its own.
    assert torch.allclose(expected[0], closed, rtol=1e-10)


@needs_extension
@every_op_with_a_kernel
def test_autocast_changes_nothing_inside(op: OpCases) -> None:
    case = next(case for case in op.cases if case.purpose == "contract" and "0" not in case.name)
    problem = pose(op, case, torch.Generator().manual_seed(0), torch.float32)
    expected = run(op, problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(op, problem)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_modules_for_other_processors_are_named(tmp_path: Path) -> None:
    (tmp_path / f"avx7_{RELEASE}{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    loaded, status, warned = load_from(tmp_path).split(" | ")
    assert (loaded, warned) == ("False", "1") and "another capability" in status


@needs_extension
def test_a_module_that_works_is_tried_after_one_that_does_not(tmp_path: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("needs a processor that can run both modules, which is one with AVX-512")
    suffix = EXTENSION_SUFFIXES[0]
    (tmp_path / f"avx512_{RELEASE}{suffix}").write_bytes(b"no library")
    shutil.copy(Path(_C.__file__).parent / f"avx2_{RELEASE}{suffix}", tmp_path)
    assert load_from(tmp_path) == f"True | avx2_{RELEASE} | 0"


@pytest.mark.skipif("avx512" not in _C.status, reason="the other tests use AVX2 here, or no module is loaded")
def test_the_smaller_capability_keeps_the_contract() -> None:
    tests = ["tests/test_ops.py", "-k", "test_agrees_with_the_oracle and cpu or test_rounding and cpu", "-q"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    code = "from sap_fast import _C; print(_C.status)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("avx2")
    done = subprocess.run([sys.executable, "-m", "pytest", *tests], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 100


@needs_extension
@every_op_with_a_kernel
def test_tensors_that_do_not_fit_are_refused(op: OpCases) -> None:
    """The raw ops are called themselves: a kernel must not read what lies behind a tensor."""
    case = next(case for case in op.cases if case.purpose == "contract" and "0" not in case.name)
    problem = pose(op, case, torch.Generator().manual_seed(0))
    with Recorder() as recorder:
        run(op, problem)
    assert len(recorder.calls) == 2
    for function, args, _ in recorder.calls:
        for i, (argument, given) in enumerate(zip(function._schema.arguments, args, strict=True)):
            listed = isinstance(given, list) and given and isinstance(given[0], Tensor)
            x = given[0] if listed else given
            if not isinstance(x, Tensor) or argument.name in op.any_shape:
                continue
            dim = 1 if argument.name in op.any_width else -1
            wrong = torch.cat((x, x.narrow(dim, 0, 1)), dim)
            with pytest.raises((RuntimeError, IndexError)):
                function(*args[:i], [wrong, *given[1:]] if listed else wrong, *args[i + 1 :])
                pytest.fail(f"{function} took {argument.name} {list(wrong.shape)}")


@needs_extension
@pytest.mark.parametrize("row", [-1, 3, 2**40])
def test_rows_that_are_not_there_are_not_taken(row: int) -> None:
    x, rows = torch.randn(2, 3, 4), torch.tensor([0, row])
    with pytest.raises(IndexError, match=f"place 1 takes row {row} of 3"):
        torch.ops.sap_fast.take_rows([x], rows)
    with pytest.raises(IndexError, match=f"taker 1 is {row}, but there are 2 places"):
        torch.ops.sap_fast.take_rows_backward([x[:, :2]], torch.tensor([0, 2, 2, 2]), rows)


@needs_extension
@pytest.mark.parametrize(("window", "heads", "said"), [(-1, 2, "window must be"), (0, 0, "heads must be")])
def test_attention_that_makes_no_sense_is_refused(window: int, heads: int, said: str) -> None:
    q, k = torch.randn(2, 5, heads, 4), torch.randn(2, 5, 1, 4)
    lengths = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=said):
        torch.ops.sap_fast.attention(q, k, k, lengths, None, None, 5, 5, 0.5, window)


@needs_extension
@pytest.mark.parametrize(
    ("queries", "keys", "rows_k", "longest_k", "said"),
    [
        ([0, 3, 5], [0, 4, 7], 6, 4, "cu_seqlens_k must not decrease nor exceed the 6 rows.* 1 is from 4 to 7"),
        ([0, 3, 5], [0, 4, 7], 7, 3, "max_seqlen_k is 3, but sequence 0 has 4 rows"),
        ([0, 3, 5], [0, 7], 7, 7, "cu_seqlens_k has 1 sequences, but cu_seqlens 2"),
        ([0, 3, 5], [1, 4, 7], 7, 4, "cu_seqlens_k must begin with 0, but begins with 1"),
        ([0, 3, 5], None, 7, 3, "k must have the 5 rows of q, but has 7"),
    ],
)
def test_keys_that_are_not_there_are_refused(
    queries: list[int], keys: list[int] | None, rows_k: int, longest_k: int, said: str
) -> None:
    q, k = torch.randn(2, 5, 2, 4), torch.randn(2, rows_k, 1, 4)
    starts, starts_k = (None if x is None else torch.tensor(x, dtype=torch.int32) for x in (queries, keys))
    raw = torch.ops.sap_fast
    lengths = starts, None, starts_k, 3, longest_k, 0.5, 0
    with pytest.raises(RuntimeError, match=said):
        raw.attention(q, k, k, *lengths)
    with pytest.raises(RuntimeError, match=said):
        raw.attention_backward(q, q, k, k, q, q[..., 0], *lengths)


@needs_extension
def test_an_error_leaves_what_is_written_in_place_alone() -> None:
    gate, up = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    before = gate.clone(), up.clone()
    with pytest.raises(RuntimeError, match=r"gate must be Float, 2 to 2 halves of \[5, 9\], but is Float \[2, 5, 8\]"):
        torch.ops.sap_fast.glu_backward_(torch.randn(2, 5, 9), gate, up, "silu")
    with pytest.raises(RuntimeError, match="activation must be silu, gelu or gelu_tanh, but is softmax"):
        torch.ops.sap_fast.glu_backward_(torch.randn(2, 5, 8), gate, up, "softmax")
    apart, expanded = torch.randn(2, 8, 5).mT, torch.randn(2, 1, 8).expand(2, 5, 8)
    kept = apart.clone()
    with pytest.raises(RuntimeError, match="single memory location"):
        torch.ops.sap_fast.glu_backward_(torch.randn(2, 5, 8), apart, expanded, "silu")
    assert torch.equal(apart, kept)
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])
