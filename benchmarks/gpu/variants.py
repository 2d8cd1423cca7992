"""Compiles the kernels that the smoke launches, op by op: run by ``python -m benchmarks.gpu``, in as many processes.

Compiling takes a second or two for each of some hundred variants, and no GPU: the raw ops run on a CPU's tensors, and
what they would launch is compiled alone. A kernel is compiled for widths, never for a number of rows: few do.
"""

import pytest
import torch

from benchmarks.compiled import compiling
from benchmarks.gpu import subjects
from benchmarks.gpu.cases import DTYPES, FEW, MODES, SHORT, smoke_cases
from benchmarks.gpu.subjects import Subject
from sap_fast.ops._cases import run
from sap_fast.ops._library import architecture


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    size = metafunc.config.getoption("--size", None)
    cases = [] if size is None else smoke_cases(size)
    # A tenth of the rows, in multiples of 16: integers of which 16 is a factor are compiled for apart.
    of = {(case.subject.op, case.subject.model, case.dtype): case.subject for case in cases}
    metafunc.parametrize(("op", "model", "dtype"), list(of), ids=["-".join(key) for key in of])


def test_compiles(op: str, model: str, dtype: str, request: pytest.FixtureRequest, record_property) -> None:
    arch = request.config.getoption("--arch") or architecture(torch.device("cuda"))
    assert arch is not None, "no kernels were made for this GPU: see the README's table of devices"
    few, length = (FEW, SHORT) if model == "tiny" else (16, 16)
    subject = Subject(op, model, few, length * (op == "attention"))
    problem = subjects.posed(subject, "cpu", DTYPES[dtype])
    with compiling(arch) as kernels:
        for mode in MODES.values():
            run(subjects.op_named(op), mode(problem))
    assert kernels, "nothing was launched"
    record_property("kernels", len(kernels))
    record_property("local", max(kernel.local for kernel in kernels))
