"""Captured steps without a GPU: a recorder that replays by calling again, and handles that use it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

import sap_fast
from sap_fast import SAP, SAPConfig
from sap_fast.graph import Graphs
from sap_fast.tensors import T, tensors_of


class Rerun:
    """Replays a function by calling it, and fills the tensors that it returned when it was recorded.

    Attributes:
        recorded, replayed: how often.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        self.recorded += 1
        result = function()
        outputs, kind = tensors_of(result)
        for x in outputs:  # a recording computes nothing; what is never filled must not look right
            if x.is_floating_point():
                x.fill_(torch.nan)

        def replay() -> None:
            self.replayed += 1
            again, kind_again = tensors_of(function())
            assert kind_again == kind
            for there, x in zip(outputs, again, strict=True):
                there.copy_(x)

        return result, replay


class Eager(Graphs):
    """Pads rows, and captures nothing."""

    def run(self, compute: Callable[[T], Any], given: T) -> Any:
        return compute(given)


@contextmanager
def attached(model: nn.Module, config: SAPConfig, kind: type[Graphs] = Graphs) -> Iterator[tuple[SAP, Rerun]]:
    """Attach a handle with ``graph=True`` whose steps are captured by a :class:`Rerun`; return both."""
    recorder = Rerun()
    with mock.patch.object(Graphs, "of", lambda decoder: kind(decoder, recorder)):
        sap = sap_fast.attach(model, config.replace(check="deferred", graph=True))
    with sap:
        yield sap, recorder
