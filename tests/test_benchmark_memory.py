"""The memory of a step: every byte that is allocated, also within an op, and no other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.common import models
from benchmarks.step.bases import wake
from benchmarks.step.batches import Shapes, rows
from benchmarks.step.contenders import CONTENDERS
from benchmarks.step.counts import Allocations, Counting, weights_of

MIB = 2**20


def followed(work) -> Allocations:
    allocations = Allocations("cpu")
    with allocations.recording():
        work()
    return allocations


def test_the_peak_is_what_was_held_at_once() -> None:
    x = torch.ones(MIB // 4)
    kept: list[Tensor] = []

    def work() -> None:
        first = x.clone()
        second = torch.cat((first, first))  # three MiB
        del first
        kept.append(second.clone())  # four
        del second

    found = followed(work)
    assert (found.peak, found.held) == (4 * MIB, 2 * MIB)


def test_what_autograd_saves_is_held_until_its_backward() -> None:
    x = torch.ones(MIB // 4, requires_grad=True)
    ys = []

    def forward() -> None:
        ys.append(x.exp().exp().exp())

    def backward() -> None:
        torch.autograd.backward(ys.pop(), torch.ones(()).expand_as(x))

    assert followed(forward).held == 3 * MIB
    found = Allocations("cpu")
    for work in (forward, backward):
        with found.recording():
            work()
    assert found.held == MIB  # the gradient
    # Three results, two of them saved and one held by its caller; one cotangent made from another; their first number.
    assert found.peak == 5 * MIB + 4


def test_what_ops_allocate_for_themselves_is_seen() -> None:
    """An op's own temporary has no name outside of it."""
    x = torch.ones(1024, 256)
    assert x.logsumexp(1).numel() == 1024
    assert followed(lambda: x.logsumexp(1)).peak >= MIB


def test_what_others_hold_does_not_count() -> None:
    allocations, others = Allocations("cpu"), []
    with allocations.recording():
        kept = torch.zeros(MIB // 4)
    others.append(torch.zeros(MIB))
    with allocations.recording():
        torch.zeros(MIB // 2)
    others.clear()
    with allocations.recording():
        del kept
    assert (allocations.peak, allocations.held) == (3 * MIB, 0)


@pytest.mark.parametrize("name", ["tidy", "plain-sft", "own-sft", "lagged", "fresh", "probe-every"])
def test_counting_ops_changes_no_peak(name: str) -> None:
    """Counting ops leaves the peak alone, so that both are counted in the same steps."""
    model = models.with_lora(models.tiny_base()[0])
    wake(model)
    given = rows(models.WordTokenizer(), models.examples(), Shapes(4, 40, 2, 40), "real", "cpu")
    peaks = []
    for counted in (True, False):
        allocations = Allocations("cpu")
        with CONTENDERS[name].opened(models.twin(model), given) as run:
            counting = Counting(run.step, "cpu", allocations)
            for _ in range(2):
                counting() if counted else recorded(allocations, run.step)
        peaks.append(allocations.peak)
    assert peaks[0] == peaks[1] > 0


def recorded(allocations: Allocations, work: Callable[[], Tensor]) -> Tensor:
    with allocations.recording():
        return work()


def test_weights_are_counted_in_their_dtypes() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2).bfloat16())
    assert weights_of(model) == 4 * (15 + 5) + 2 * (10 + 2)
