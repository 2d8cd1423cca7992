"""What a step reports, and which numbers it refuses."""

import copy
from unittest import mock

import pytest
import torch
from oracle import (
    ALL_LINEAR,
    everything_in_float64,
    exact,
    lora,
    margins,
    random_batch,
    random_pairs,
    tiny_model,
    unit_direction,
)
from steps import CONFIG, CONFIGS, gap, grads, two_steps
from torch import nn

import sap_fast
from sap_fast import StepRefusedError
from sap_fast.method.schedule import Schedule


def test_report_says_what_the_probe_does() -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    with sap_fast.attach(model, CONFIG) as sap:
        first = sap.step(batch, pairs)
        used = sap.probe
        second = sap.step(batch, pairs)
    assert float(first.steering) == 0
    assert float(first.direction_cosine) == 0
    assert all(float(n) == 0 for n in first.probe_norm.values())
    # Same batch, same weights, same pairs: the direction is the last one's, and the probe climbs.
    assert float(second.direction_cosine) == pytest.approx(1, abs=1e-12)
    assert float(second.steering) > 0
    assert 0 < float(second.probe_cosine) <= 1
    for j, v in used.items():
        assert float(second.probe_norm[j]) == pytest.approx(float(v.norm()), rel=1e-14)
    numbers = second.to_dict()
    assert numbers["loss"] == float(second.loss)
    assert numbers["tokens"] == int(batch["attention_mask"].sum())
    assert numbers["safety_tokens"] == int(pairs["attention_mask"].sum())
    assert numbers["probe_norm"].keys() == {1, 2}


@pytest.mark.parametrize("schedule", ["lagged", "fresh"])
@pytest.mark.parametrize("loss", ["difference", "logsigmoid"])
def test_every_number_of_the_report_is_the_oracles(schedule: str, loss: str) -> None:
    """Other pairs in the second step, so that the two directions differ, and a probe at work."""
    model, batch, pairs = tiny_model("llama", ALL_LINEAR), random_batch(), [random_pairs(), random_pairs()]
    config = CONFIG.replace(schedule=schedule, safety_loss=loss, per_token=loss == "difference", temperature=0.5)
    with sap_fast.attach(model, config) as sap:
        sap.step(batch, pairs[0])
        used = sap.probe
        report = sap.step(batch, pairs[1])
        if schedule == "fresh":
            used = sap.probe
    at = used if schedule == "lagged" else {j: torch.zeros_like(v) for j, v in used.items()}
    settings = {"per_token": config.per_token}
    with everything_in_float64(model):
        us = [unit_direction(model, p, **settings, logsigmoid=None if loss == "difference" else 0.5) for p in pairs]
        margin = margins(model, pairs[1], **settings).detach()
        value, slope, theta, _, _ = exact(model, batch, us[1], used)
        climb = exact(model, batch, us[1], at)[4]
    steering = sum(float(used[j] @ climb[j]) for j in used)
    length = sum(float(v.square().sum()) for v in used.values()) ** 0.5
    steepness = sum(float(g.square().sum()) for g in climb.values()) ** 0.5
    safety = -margin if loss == "difference" else -torch.nn.functional.logsigmoid(margin / 0.5)
    for name, truth in {
        "loss": float(value),
        "loss_dot": float(slope),
        "safety_loss": float(safety.mean()),
        "safety_margin": float(margin.mean()),
        "direction_cosine": sum(float((us[0][k] * us[1][k]).sum()) for k in us[0]),
        "steering": steering,
        "probe_cosine": steering / (length * steepness),
    }.items():
        assert float(getattr(report, name)) == pytest.approx(truth, rel=1e-8), name
    assert gap(grads(model), theta) > 1e-3  # two steps have accumulated


def test_saturation_is_the_share_of_pairs_without_weight() -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs(6)
    margin = margins(model, pairs, per_token=False).detach()
    temperature = float(margin.abs().median()) / 9.2  # sigmoid(-9.2) = 1e-4: the border lies amid the pairs
    weight = torch.sigmoid(-margin / temperature)
    share = float((weight < 1e-4).double().mean())
    assert 0 < share < 1
    config = CONFIG.replace(safety_loss="logsigmoid", per_token=False, temperature=temperature)
    with sap_fast.attach(model, config) as sap:
        assert float(sap.step(batch, pairs).saturated) == pytest.approx(share)


def test_steering_is_the_first_order_change_of_the_slope() -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    slopes, steering = [], 0.0
    for strength in (0.0, 1e-4):
        _, _, report = two_steps(model, CONFIG.replace(strength=strength), [batch] * 2, [pairs] * 2)
        slopes.append(float(report.loss_dot))
        steering = float(report.steering)
    assert slopes[1] - slopes[0] == pytest.approx(steering, rel=1e-3)


def test_interrupt_while_writing_changes_nothing() -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    with sap_fast.attach(model, CONFIG) as sap:
        sap.step(batch, pairs)
        before, probe = grads(model), sap.probe
        state = copy.deepcopy(model.state_dict())
        with (
            mock.patch.object(Schedule, "passes", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            sap.step(batch, pairs)
        assert gap(grads(model), before) == 0
        # A weight whose gradient is missing fails the writing when all others have been written.
        outcome = sap.compute(batch, pairs)
        with (
            mock.patch.dict(sap.decoder.trained, {"broken": mock.Mock(grad=None)}),
            pytest.raises(KeyError),
        ):
            sap.commit(outcome)
        assert gap(grads(model), before) == 0
        assert gap(sap.probe, probe) == 0
        assert not any("forward" in vars(m) for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("config", ["lagged", "fresh-store", "project"])
def test_non_finite_loss_is_refused_before_anything_is_written(config: str) -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    with sap_fast.attach(model, CONFIGS[config]) as sap:
        sap.step(batch, pairs)
        before, probe = grads(model), sap.probe
        weight = next(iter(lora(model).values()))
        kept = weight.data.clone()
        weight.data.fill_(float("nan"))
        with pytest.raises(StepRefusedError, match=r"not finite|the loss is nan"):
            sap.step(batch, pairs)
        with pytest.raises(StepRefusedError, match="the loss is nan"):
            sap.step(batch)
        assert gap(grads(model), before) == 0
        if probe:
            assert gap(sap.probe, probe) == 0
        weight.data.copy_(kept)
        sap.step(batch, pairs)  # the handle is as good as before


def test_deferred_check_raises_at_the_next_step() -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    with sap_fast.attach(model, CONFIG.replace(check="deferred")) as sap:
        weight = next(iter(lora(model).values()))
        kept = weight.data.clone()
        weight.data.fill_(float("nan"))
        sap.step(batch, pairs)
        weight.data.copy_(kept)
        with pytest.raises(StepRefusedError, match="not finite"):
            sap.step(batch, pairs)
        # The step was not stopped, but its probe is given up: from here on all is as before.
        model.zero_grad()
        assert torch.isfinite(sap.step(batch, pairs).loss)
        assert torch.isfinite(sap.step(batch, pairs).loss)
        assert all(torch.isfinite(g).all() for g in grads(model).values())


def test_a_deferred_refusal_of_the_last_step_comes_at_detach() -> None:
    model, batch = tiny_model(), random_batch()
    sap = sap_fast.attach(model, CONFIG.replace(check="deferred"))
    weight = next(iter(lora(model).values()))
    weight.data.fill_(float("nan"))
    sap.step(batch)
    with pytest.raises(StepRefusedError, match=r"the loss is nan\. Its gradient was written"):
        sap.detach()
    weight.data.zero_()
    sap_fast.attach(model, CONFIG).detach()  # it was let go all the same


def test_a_zero_direction_without_saturation_names_its_cause() -> None:
    model = tiny_model()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
            p.requires_grad_(False)
    with sap_fast.attach(model, CONFIG) as sap, pytest.raises(StepRefusedError, match="Is lora_B zero and frozen"):
        sap.step(random_batch(), random_pairs())


def test_saturated_pairs_are_reported_and_refused_with_the_way_out() -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    # A temperature this small makes margins of thousands of units: sigmoid underflows, the gradient is 0.
    config = CONFIG.replace(safety_loss="logsigmoid", per_token=False, temperature=1e-5)
    chosen_first = _preferred_first(model, pairs)
    with sap_fast.attach(model, config) as sap:
        with pytest.raises(StepRefusedError, match=r"saturated.*safety_loss='difference'"):
            sap.step(batch, chosen_first)
        assert all(p.grad is None for p in lora(model).values())
    with sap_fast.attach(model, config.replace(temperature=0.1)) as sap:
        report = sap.step(batch, chosen_first)
        assert 0 <= float(report.saturated) <= 1


def _preferred_first(model: nn.Module, pairs: dict) -> dict:
    """Exchange the pairs' sides where the model prefers the rejected one."""
    wrong = (margins(model, pairs, per_token=False) < 0).nonzero()[:, 0].tolist()
    order = list(range(4))
    for i in wrong:
        order[i], order[i + 2] = order[i + 2], order[i]
    return {key: value[order] for key, value in pairs.items()}
