"""A contender of ``benchmarks.step`` at work on one batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.step.batches import Batch


@dataclass(frozen=True)
class Run:
    """Holds a contender at work on a batch.

    Attributes:
        step: leaves the task's gradient in ``.grad``, replacing what it held; returns the loss, 0-dim.
        scored: the batch whose loss that is, as the model's own forward takes it.
        task_lengths, pair_lengths: tokens of each sequence that is computed on, padding included if it is; empty: none.
        task_rows, pair_rows: rows that the linear maps run on, fewer than tokens where sequences share some; None is
            the sum of the lengths.
        head_on_scored: whether the head runs on rows that predict a scored token alone, else on all.
        lowest_probe: the lowest probed layer, counted from 0; None without a probe.
        probe: the probe that acts now, by layer ``[d]``.
        fresh: whether a step's gradient is taken at the probe found in it, else at the one before.
        settle: if there is one, called when the contender was found right, before it is timed; it changes the step.
        empties_cache: whether a step gives back the memory that the allocator keeps, which those after it then lack.
    """

    step: Callable[[], Tensor]
    scored: Batch
    task_lengths: list[int]
    pair_lengths: list[int] = field(default_factory=list)
    task_rows: int | None = None
    pair_rows: int | None = None
    head_on_scored: bool = False
    lowest_probe: int | None = None
    probe: Callable[[], Mapping[int, Tensor]] = dict
    fresh: bool = False
    settle: Callable[[], None] | None = None
    empties_cache: bool = False


def padded_lengths(batch: Batch) -> list[int]:
    """Count all tokens of each row, padding included."""
    count, length = batch["input_ids"].shape
    return [length] * count
