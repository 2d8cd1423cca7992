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

from benchmarks.contenders import Recorder
from sap_fast import _C
from sap_fast.ops._cases import Case, OpCases, cases_for, every_op, pose, run

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, case, id=f"{op.name}-{case.name}") for op, case in cases_for("contract", "tiles")],
)
def test_threads_change_no_bit(op: OpCases, case: Case, dtype: torch.dtype) -> None:
    """... but in the sums over the vocabulary, which are a matrix product of torch's. That differs by roundings."""
    problem = pose(op, case, torch.Generator().manual_seed(0), dtype)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(run(op, problem))
    finally:
        torch.set_num_threads(before)
    alone, first, again = found
    assert all(torch.equal(first[name], again[name]) for name in alone)
    if op.name == "linear_cross_entropy":
        assert_agrees(first, alone, tolerance=4 * torch.finfo(dtype).eps)
    else:
        assert all(torch.equal(alone[name], first[name]) for name in alone)


@pytest.mark.skipif("avx512" not in _C.status, reason="there is one capability here, which every test uses")
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
@pytest.mark.parametrize("op", every_op(), ids=lambda op: op.name)
def test_tensors_that_do_not_fit_are_refused(op: OpCases) -> None:
    """... by the raw ops themselves: a kernel must not read what lies behind a tensor."""
    case = next(case for case in op.cases if case.purpose == "contract" and "0" not in case.name)
    problem = pose(op, case, torch.Generator().manual_seed(0))
    with Recorder() as recorder:
        run(op, problem)
    assert len(recorder.calls) == 2
    for function, args, _ in recorder.calls:
        for i, (argument, given) in enumerate(zip(function._schema.arguments, args, strict=True)):
            listed = isinstance(given, list) and given and isinstance(given[0], Tensor)
            x = given[0] if listed else given
            # The seed is a number; attention's o is what only GPUs need of it.
            if not isinstance(x, Tensor) or argument.name in ("seed", "o"):
                continue
            # Rotation leaves channels beyond those of cos and sin alone, however many there are.
            dim = 1 if op.name == "rotary" and x.dim() == 4 else -1
            wrong = torch.cat((x, x.narrow(dim, 0, 1)), dim)
            with pytest.raises(RuntimeError):
                function(*args[:i], [wrong, *given[1:]] if listed else wrong, *args[i + 1 :])
                pytest.fail(f"{function} took {argument.name} {list(wrong.shape)}")


@needs_extension
def test_an_error_leaves_what_is_written_in_place_alone() -> None:
    gate, up = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    before = gate.clone(), up.clone()
    with pytest.raises(RuntimeError, match=r"gate must be Float, 2 to 2 halves of \[5, 9\], but is Float \[2, 5, 8\]"):
        torch.ops.sap_fast.glu_backward_(torch.randn(2, 5, 9), gate, up, "silu")
    with pytest.raises(RuntimeError, match="activation must be silu, gelu or gelu_tanh, but is softmax"):
        torch.ops.sap_fast.glu_backward_(torch.randn(2, 5, 8), gate, up, "softmax")
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])
