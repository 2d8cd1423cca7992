"""What the smoke runs, at the widths of real models: every op in every mode and dtype, the most telling first."""

from typing import NamedTuple

import torch

from benchmarks.gpu.subjects import Subject, op_named
from sap_fast.ops._cases import REAL_MODELS, Problem, every_op

MODES = {"full": lambda dual: dual, "half": Problem.half, "single": Problem.single}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FEW, SHORT = 8, 4


class SmokeCase(NamedTuple):
    """One op at one size, in one dtype and mode."""

    subject: Subject
    dtype: str
    mode: str

    def __str__(self) -> str:
        s = self.subject
        return "-".join((s.op, self.mode, self.dtype, s.model, s.shape))


def smallest(subject: Subject) -> Subject:
    """Return the subject on the fewest rows for which its kernels are compiled as they are for all of its rows.

    A kernel knows widths, not the number of rows, unless its op says so (``Sizes``), or the longest sequence.
    """
    if op_named(subject.op).sizes.rows_matter or subject.model == "tiny":
        return subject
    return subject._replace(rows=subject.length or 16)


def subjects(size: str, model: str = "llama-2-7b") -> list[Subject]:
    """List every op at one size."""
    if size == "tiny":
        return [Subject.of(op, "tiny", FEW, SHORT) for op in every_op()]
    return [Subject(op.name, model, op.sizes.rows, op.sizes.length) for op in every_op()]


def smoke_cases(size: str) -> list[SmokeCase]:
    """Order the cases: duals in bfloat16, which is how people train; then what is left of a step; float32 last."""
    if size == "tiny":
        return [SmokeCase(subject, "float32", mode) for mode in MODES for subject in subjects(size)]
    return [
        SmokeCase(subject, dtype, mode)
        for dtype in DTYPES
        for mode in MODES
        for model in REAL_MODELS
        for subject in subjects(size, model)
    ]
