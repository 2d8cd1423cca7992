"""A step that several processes take together is the step that one takes on all of their micro-batches.

Two threads stand in for two processes: each has a handle of its own, and ``Threads`` adds and gathers between them.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from oracle import ALL_LINEAR, random_batch, random_pairs, tiny_model
from steps import CONFIG
from torch import Tensor, nn

import sap_fast
from sap_fast import SAP, SAPConfig
from sap_fast.method.flat import Flat
from sap_fast.method.outcome import Outcome
from sap_fast.method.reduce import Ranks

Batch = dict[str, Tensor]
CONFIGS = {
    "lagged": CONFIG,
    "fresh": CONFIG.replace(schedule="fresh", restart="store"),
    "recomputed": CONFIG.replace(schedule="fresh", restart="recompute"),
    "difference": CONFIG.replace(gradient="finite_difference", radius=1e-3),
    "project": CONFIG.replace(guard="project"),
    "normalised": CONFIG.replace(probe_update="normalised"),
    "adamw": CONFIG.replace(probe_update="adamw"),
    "logsigmoid": CONFIG.replace(safety_loss="logsigmoid"),
    "delayed": CONFIG.replace(delayed_direction=True),
}


class Threads(Ranks):
    """Stands for one of two threads that take each step together."""

    def __init__(self, rank: int, shared: list[Any], barrier: Barrier) -> None:
        self.rank, self.shared, self.barrier = rank, shared, barrier

    def _all(self, mine: Any) -> list[Any]:
        self.shared[self.rank] = mine
        self.barrier.wait(30)
        found = list(self.shared)
        self.barrier.wait(30)
        return found

    def count(self, n: Any) -> Any:
        return sum(self._all(n))

    def add(self, x: Tensor) -> Tensor:
        first, second = self._all(x)
        return first + second

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._all(x), -1)


def taken_apart(
    model: nn.Module, config: SAPConfig, given: list[list[tuple[list[Batch], Batch | None]]], u: Flat | None
) -> list[list[Outcome]]:
    """Take each rank's steps, and return their outcomes; ``given`` is what each rank is given in each step."""
    shared, barrier = [None, None], Barrier(2)

    def rank(number: int, own: nn.Module) -> list[Outcome]:
        with SAP(own, config, Threads(number, shared, barrier)) as sap:
            return [taken(sap, own, *step[number], u) for step in given]

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(rank, number, copy.deepcopy(model)) for number in range(2)]
        return [future.result(120) for future in futures]


def taken(sap: SAP, model: nn.Module, batches: list[Batch], pairs: Batch | None, u: Flat | None) -> Outcome:
    """Take a step, and one of gradient descent."""
    outcome = sap.compute(batches, pairs, direction=u)
    model.zero_grad()
    sap.commit(outcome)
    with torch.no_grad():
        for p in sap.decoder.trained.values():
            p.sub_(0.05 * p.grad)
    return outcome


def numbers(outcome: Outcome) -> dict[str, Tensor]:
    """Collect what a step hands on and writes, and what may refuse it."""
    probe = outcome.state.probe
    found = {"theta": outcome.theta.vector, "probe": probe.vectors, "vitals": outcome.vitals, "loss": outcome.loss}
    found |= {"slope": outcome.loss_dot, "G": outcome.probe_dot, "moment": probe.second_moment}
    report = outcome.report.to_dict()
    told = {name: torch.tensor(report[name]) for name in ("safety_loss", "safety_margin", "steering", "probe_cosine")}
    return found | told | ({} if outcome.u is None else {"u": outcome.u.vector})


def compared(config: SAPConfig, shares: tuple[int, int], same: Callable[..., None], *, pairs: bool) -> None:
    """Take three steps apart and together.

    Args:
        shares: how many micro-batches each rank has.
        pairs: whether each rank finds its share of the direction by pairs of its own; else the direction is given.
    """
    torch.manual_seed(0)
    model = tiny_model(targets=ALL_LINEAR)
    batches = [[random_batch(2 + i % 3, 9 + i) for i in range(sum(shares))] for _ in range(3)]
    contrasts = [random_pairs(5) for _ in range(3)]
    trained = [p for p in model.parameters() if p.requires_grad]
    with sap_fast.attach(copy.deepcopy(model), config) as sap:
        names = sap.decoder.trained
        u = None if pairs else Flat.of(names, [torch.randn_like(p) for p in trained])
        u = None if u is None else u / u.norm()
        whole = copy.deepcopy(model)
    with sap_fast.attach(whole, config) as sap:
        together = [taken(sap, whole, b, c if pairs else None, u) for b, c in zip(batches, contrasts, strict=True)]
    given = []
    for b, c in zip(batches, contrasts, strict=True):
        # Chosen rows first, then rejected ones: two pairs for one rank, three for the other.
        rows = torch.tensor([0, 1, 5, 6]), torch.tensor([2, 3, 4, 7, 8, 9])
        own = [{key: x[some] for key, x in c.items()} if pairs else None for some in rows]
        given.append([(b[: shares[0]], own[0]), (b[shares[0] :], own[1])])
    for rank in taken_apart(model, config, given, u):
        for step, expected in zip(rank, together, strict=True):
            found, right = numbers(step), numbers(expected)
            assert found.keys() == right.keys()
            for name in right:
                same(found[name], right[name], name)


def equal(found: Tensor, right: Tensor, name: str) -> None:
    assert torch.equal(found, right), name


def close(found: Tensor, right: Tensor, name: str) -> None:
    assert found.dtype == right.dtype and found.shape == right.shape
    assert float((found - right).norm()) <= 1e-12 * max(1.0, float(right.norm())), name


every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@every
def test_two_ranks_of_one_micro_batch_each_are_one_process_in_every_bit(config: SAPConfig) -> None:
    compared(config, (1, 1), equal, pairs=False)


@every
def test_three_and_five_micro_batches_and_pairs_spread_over_the_ranks(config: SAPConfig) -> None:
    compared(config, (3, 5), close, pairs=True)


def test_both_ranks_refuse_what_one_of_them_sees() -> None:
    model = tiny_model(targets=ALL_LINEAR)
    batches, pairs = [[random_batch()], [random_batch()]], random_pairs()
    shared, barrier = [None, None], Barrier(2)

    def rank(number: int, own: nn.Module) -> str:
        if number:
            with torch.no_grad():
                own.get_base_model().model.norm.weight.fill_(torch.nan)
        with SAP(own, CONFIG, Threads(number, shared, barrier)) as sap:
            with pytest.raises(sap_fast.StepRefusedError) as refused:
                sap.step(batches[number], pairs)
            assert all(p.grad is None for p in own.parameters())
            return str(refused.value)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(rank, number, copy.deepcopy(model)) for number in range(2)]
        first, second = (future.result(60) for future in futures)
    assert first == second
