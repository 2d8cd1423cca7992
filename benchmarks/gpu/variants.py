"""Compiles the kernels that the smoke launches, op by op: run by ``python -m benchmarks.gpu``, in as many processes.

Compiling takes a second or two for each of some hundred variants, and no GPU: the raw ops run on a CPU's tensors, and
what they would launch is compiled alone, for as few rows as there are variants to see.
"""

import pytest
import torch

from benchmarks.common.compiled import compiling
from benchmarks.gpu import subjects
from benchmarks.gpu.cases import DTYPES, MODES, smallest, smoke_cases
from benchmarks.gpu.subjects import Subject
from sap_fast.ops._cases import run
from sap_fast.ops._library import architecture


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    size = metafunc.config.getoption("--size", None)
    # All modes of an op in one test: they share kernels.
    kinds = dict.fromkeys((case.subject, case.dtype) for case in ([] if size is None else smoke_cases(size)))
    ids = [f"{subject.op}-{dtype}-{subject.model}" for subject, dtype in kinds]
    metafunc.parametrize(("subject", "dtype"), list(kinds), ids=ids)


def test_compiles(subject: Subject, dtype: str, request: pytest.FixtureRequest, record_property) -> None:
    arch = request.config.getoption("--arch") or architecture(torch.device("cuda"))
    assert arch is not None, "no kernels were made for this GPU: see the README's table of devices"
    problem = subjects.posed(smallest(subject), "cpu", DTYPES[dtype])
    with compiling(arch) as kernels:
        for mode in MODES.values():
            run(subjects.op_named(subject.op), mode(problem))
    assert kernels, "nothing was launched"
    record_property("kernels", len(kernels))
    record_property("local", max(kernel.local for kernel in kernels))
