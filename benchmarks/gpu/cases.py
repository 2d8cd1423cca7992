"""What the smoke runs, at the widths of real models: every op in every mode and dtype, the most telling first."""

from typing import NamedTuple

import torch

from benchmarks.gpu.subjects import Subject
from sap_fast.ops._cases import Problem, every_op

MODES = {"full": lambda pair: pair, "half": Problem.half, "single": Problem.single}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Rows of a task batch of the published sizes, in sequences of that length; of the head, those that predict a token.
ROWS, LENGTH, SCORED = 768, 96, 384
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
    """As few rows as kernels are compiled for as they are for all of a subject's.

    A kernel knows widths, not the number of rows, with two exceptions: attention's tiles are chosen by the longest
    sequence, and into how many parts the sums of a captured probe gradient are cut follows from the rows.
    """
    if subject.op == "probe_rms_norm" or subject.model == "tiny":
        return subject
    return subject._replace(rows=subject.length or 16)


def subjects(size: str, model: str = "llama-2-7b") -> list[Subject]:
    """Every op at one size."""
    names = [op.name for op in every_op()]
    if size == "tiny":
        return [Subject(name, "tiny", FEW, SHORT * (name == "attention")) for name in names]
    return [
        Subject(name, model, SCORED if name == "linear_cross_entropy" else ROWS, LENGTH * (name == "attention"))
        for name in names
    ]


def smoke_cases(size: str) -> list[SmokeCase]:
    """Pairs in bfloat16 first, which is how people train; then what is left of a step; float32 last."""
    if size == "tiny":
        return [SmokeCase(subject, "float32", mode) for mode in MODES for subject in subjects(size)]
    return [
        SmokeCase(subject, dtype, mode)
        for dtype in DTYPES
        for mode in MODES
        for model in ("llama-2-7b", "smollm2-135m")
        for subject in subjects(size, model)
    ]
