"""Between computing a step and writing it: what ``SAP.compute`` finds, ``commit`` takes, and ``settle`` looks at."""

import copy
from dataclasses import replace

import pytest
import torch
from oracle import ALL_LINEAR, random_batch, random_pairs, tiny_model
from steps import CONFIG, every_config, grads
from torch import nn

import sap_fast
from sap_fast import SAPConfig, StepRefusedError
from sap_fast.method.flat import Flat


@every_config
def test_to_compute_and_to_commit_is_to_step(config: SAPConfig) -> None:
    model, batch, pairs = tiny_model(targets=ALL_LINEAR), random_batch(), random_pairs()
    own = copy.deepcopy(model)
    with sap_fast.attach(model, config) as sap, sap_fast.attach(own, config) as other:
        for _ in range(2):
            report = sap.step(batch, pairs)
            before, state = [p.grad for p in own.parameters()], other.state
            outcome = other.compute(batch, pairs)
            # Nothing is written yet, and computing again finds the same.
            assert other.state is state
            assert all(p.grad is old for p, old in zip(own.parameters(), before, strict=True))
            assert torch.equal(outcome.theta.vector, other.compute(batch, pairs).theta.vector)
            other.commit(outcome)
            assert other.state is outcome.state
            assert outcome.report.to_dict() == report.to_dict()
            assert all(torch.equal(g, grads(model)[name]) for name, g in grads(own).items())
            assert all(torch.equal(v, sap.probe[layer]) for layer, v in other.probe.items())


def test_a_direction_that_is_given_takes_the_place_of_one_that_is_found() -> None:
    model, batch, pairs = tiny_model(targets=ALL_LINEAR), random_batch(), random_pairs()
    with sap_fast.attach(model, CONFIG.replace(direction_every=3)) as sap:
        found = sap.compute(batch, pairs)
        u = found.u
        given = sap.compute(batch, direction=u)
        assert u is not None and given.u is u is given.state.direction
        assert given.direction is None and not given.report.found_direction
        assert torch.equal(given.theta.vector, found.theta.vector)
        assert torch.equal(given.probe_dot, found.probe_dot)
        sap.commit(given)
        assert sap.compute(batch, pairs).u is u  # it counts as found: the next two steps go on with it


def test_a_direction_that_does_not_fit_is_refused() -> None:
    model, batch = tiny_model(targets=ALL_LINEAR), random_batch()
    with sap_fast.attach(model, CONFIG) as sap:
        own = Flat.of(sap.decoder.trained)
        some = Flat.of(dict([*sap.decoder.trained.items()][1:]))
        for u, message in ((some, "over the trained weights"), (replace(own, vector=own.vector.float()), "dtype")):
            with pytest.raises(ValueError, match=message):
                sap.compute(batch, direction=u)


def test_a_state_that_is_given_takes_the_place_of_the_handles() -> None:
    model, batch, pairs = tiny_model(targets=ALL_LINEAR), random_batch(), random_pairs()
    with sap_fast.attach(model, CONFIG) as sap:
        start = sap.state
        first = sap.compute(batch, pairs)
        sap.commit(first)
        again, second = sap.compute(batch, pairs, state=start), sap.compute(batch, pairs)
    assert torch.equal(again.theta.vector, first.theta.vector)
    assert not torch.equal(second.theta.vector, first.theta.vector)  # the probe of the first step acts


def poisoned(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.get_base_model().model.norm.weight.fill_(torch.nan)
    return model


def test_no_deferred_numbers_are_lost_whatever_the_order() -> None:
    model, batch, pairs = poisoned(tiny_model(targets=ALL_LINEAR)), random_batch(), random_pairs()
    with sap_fast.attach(model, CONFIG.replace(check="deferred")) as sap:
        before = sap.state
        one, two = sap.compute(batch, pairs), sap.compute(batch, pairs)
        sap.commit(one)
        with pytest.raises(StepRefusedError, match="was written"):
            sap.commit(two)
        assert sap.state is before
        sap.settle()  # there is nothing left to look at


def test_steps_run_on_another_decoder_meanwhile() -> None:
    model, batch, pairs = tiny_model(targets=ALL_LINEAR), random_batch(), random_pairs()
    entered = []

    class Told(type(sap_fast.attach(copy.deepcopy(model), CONFIG).decoder)):  # type: ignore[misc]
        def enter(self, part: str) -> None:
            entered.append(part)

    with sap_fast.attach(model, CONFIG) as sap:
        own = sap.decoder
        with sap.running_on(Told(**vars(own))):
            sap.step(batch, pairs)
        assert sap.decoder is own
        assert entered == ["direction", "task", "update", "update", "write"]
        with sap.running_on(own):
            sap.detach()
        with pytest.raises(RuntimeError, match="after detach"):
            sap.running_on(own).__enter__()
