"""Every kernel, in every configuration that ships, compiles for every architecture; no GPU is needed.

What is compiled is what the launchers launch: their own arguments, on the cases of purpose "compile". One case and
dtype of each op, for one architecture, is compiled by every run of the tests; the rest by ``-m matrix``.
"""

import json
from pathlib import Path

import pytest
import torch
from triton_kernels import INTERPRETED

from benchmarks.common.compiled import SHARED_LIMIT, Compiled, compiling
from sap_fast.ops._cases import Case, OpCases, cases_for, pose, run

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile: see the Makefile for both runs"
)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Bytes of local memory a thread, where they are not 0: the most seen with Triton 3.6.0 and 3.7.1.
LOCAL = json.loads((Path(__file__).parent / "local_memory.json").read_text(encoding="utf-8"))
# What multiplies matrices in the dtype of storage (``OpCases.multiplies``).
PRODUCTS = {"sm_80": "mma", "sm_86": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


def _cases() -> list:
    first: dict[str, Case] = {}
    params = []
    for op, case in cases_for("compile"):
        shown = first.setdefault(op.name, case) is case
        for arch in SHARED_LIMIT:
            for dtype in DTYPES:
                marks = [] if shown and (arch, dtype) == ("sm_90", "bfloat16") else [pytest.mark.matrix]
                params.append(
                    pytest.param(op, case, arch, dtype, id=f"{op.name}-{case.name}-{arch}-{dtype}", marks=marks)
                )
    return params


def compile_modes(op: OpCases, case: Case, arch: str, dtype: str) -> list[Compiled]:
    """Compile what forward and backward launch in full, half and single mode."""
    with compiling(arch) as kernels:
        pair = pose(op, case, torch.Generator().manual_seed(0), DTYPES[dtype])
        for problem in (pair, pair.half(), pair.single()):
            run(op, problem)
    return kernels


@pytest.mark.parametrize(("op", "case", "arch", "dtype"), _cases())
def test_compiles(op: OpCases, case: Case, arch: str, dtype: str) -> None:
    kernels = compile_modes(op, case, arch, dtype)
    assert len(kernels) >= 2  # a forward and a backward at the least
    assert {kernel.name for kernel in kernels} >= set(op.multiplies)
    problems = []
    for kernel in kernels:
        name = f"{op.name} {case.name} {arch} {dtype} {kernel.name}"
        if kernel.shared > 1024 * SHARED_LIMIT[arch]:
            problems.append(f"{name}: {kernel.shared} bytes of shared memory")
        if kernel.local > LOCAL.get(name, 0):
            problems.append(f"{name}: {kernel.local} bytes of local memory a thread, recorded are {LOCAL.get(name, 0)}")
        if dtype == "bfloat16" and kernel.name in op.multiplies:
            # Pairs of head dimension 256 leave no room for the wide instructions: what a sm_80 has must do.
            meant = {PRODUCTS[arch], "mma"} if case.name == "head-dim-256" else {PRODUCTS[arch]}
            if not kernel.products & meant:
                problems.append(f"{name}: {kernel.products or 'no'} tensor-core products")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_rounding_to_float8_compiles(arch: str) -> None:
    """It compiles for architectures that multiply in float8, at the widths of every map of the larger models."""
    from sap_fast.ops.lora_linear.float8_kernel import rounded

    with compiling(arch) as kernels:
        for width in (576, 4096, 14336):
            rounded(torch.zeros(3, width, dtype=torch.bfloat16))
    assert len(kernels) == 3 and all(kernel.local == 0 for kernel in kernels)


def test_recorded_local_memory_is_of_wide_or_float32_kernels() -> None:
    """In bfloat16 nothing spills at head dims up to 128 and hidden sizes up to 8192, but a few registers."""
    for name in LOCAL:
        op, case, arch, dtype, kernel = name.split()
        wide = {"attention": "256" in case, "rms_norm": "16384" in case, "probe_rms_norm": "16384" in case}
        # Two to four registers of the widest norm with capture that most models have.
        few = op == "probe_rms_norm" and case in ("3x5376", "3x8192") and LOCAL[name] <= 16
        # With Triton 3.6, in half mode, where dk and dv come from one kernel of 255 registers: twelve of them. Smaller
        # tiles would keep them and change the order of sums; with 3.7 there are none.
        few |= (op, arch, kernel) == ("attention", "sm_90", "key_kernel") and LOCAL[name] <= 48
        assert dtype == "float32" or wide.get(op, False) or few, name
