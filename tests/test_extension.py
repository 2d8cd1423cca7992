"""The C++ kernels as a module: what is loaded, what stands in where it cannot be, and how many threads may run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sap_fast import _C
from sap_fast.ops._cases import Case, OpCases, cases_for, pose, run

needs_extension = pytest.mark.skipif(not _C.loaded, reason=f"the C++ kernels are not loaded: {_C.status}")

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
    folder.mkdir(exist_ok=True)
    shutil.copy(Path(_C.__file__), folder)
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_without_modules_the_reference_serves(tmp_path: Path) -> None:
    loaded, status, warned = load_from(tmp_path / "none").split(" | ")
    assert (loaded, warned) == ("False", "0") and "not built" in status


def test_modules_of_another_torch_are_left_alone_with_one_warning(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("avx2", "avx512"):
        (folder / f"{name}.cpython-311-x86_64-linux-gnu.so").write_bytes(b"loading this would fail")
    (folder / "built_with.json").write_text(json.dumps({"torch": "2.0.0"}))
    loaded, status, warned = load_from(folder).split(" | ")
    assert (loaded, warned) == ("False", "1")
    assert "built with torch 2.0.0" in status and torch.__version__ in status


def test_a_broken_module_is_left_alone_with_one_warning(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("avx2", "avx512"):
        (folder / f"{name}.cpython-311-x86_64-linux-gnu.so").write_bytes(b"no library")
    (folder / "built_with.json").write_text(json.dumps({"torch": torch.__version__}))
    loaded, status, warned = load_from(folder).split(" | ")
    assert (loaded, warned) == ("False", "1") and "could not be loaded" in status


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, case, id=f"{op.name}-{case.name}") for op, case in cases_for("contract", "tiles")],
)
def test_threads_change_no_bit(op: OpCases, case: Case, dtype: torch.dtype) -> None:
    problem = pose(op, case, torch.Generator().manual_seed(0), dtype)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(run(op, problem))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)
