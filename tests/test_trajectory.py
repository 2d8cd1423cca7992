"""Twenty steps of training against an independent reimplementation, in float64."""

import copy

import pytest
import torch
from oracle import everything_in_float64, lora, random_batch, random_pairs, tiny_model, unit_direction
from reimplementation import trajectory
from torch import nn

import sap_fast
from benchmarks.common import solved
from sap_fast import SAPConfig
from sap_fast.batch.rows import pack
from sap_fast.method.flat import Flat
from sap_fast.method.passes import Micro
from sap_fast.method.probe import Probe
from sap_fast.model.read import read_decoder

STEPS, LAYERS = 20, (1, 2)


def train(model: nn.Module, batches: list, pairs: list, config: SAPConfig) -> list:
    optimizer = torch.optim.AdamW(lora(model).values(), lr=1e-2)
    history = []
    with sap_fast.attach(model, config) as sap:
        for batch, pair in zip(batches, pairs, strict=True):
            sap.step(batch, pair)
            optimizer.step()
            optimizer.zero_grad()
            history.append(({name: p.detach().clone() for name, p in lora(model).items()}, sap.probe))
    return history


def distance(a: list, b: list) -> float:
    """Compute the largest relative distance of theta or V over the steps."""
    gaps = []
    for (theta_a, probe_a), (theta_b, probe_b) in zip(a, b, strict=True):
        for x, y in ((theta_a, theta_b), (probe_a, probe_b)):
            gap = sum(float((x[k] - y[k]).square().sum()) for k in y)
            gaps.append((gap / sum(float(y[k].square().sum()) for k in y)) ** 0.5)
    return max(gaps)


def data(steps: int = STEPS) -> tuple[list, list]:
    return [random_batch() for _ in range(steps)], [random_pairs() for _ in range(steps)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("released", [False, True], ids=["sign", "released"])
@pytest.mark.parametrize("schedule", ["lagged", "fresh"])
def test_twenty_steps_equal_the_reimplementation(schedule: str, released: bool, family: str) -> None:
    model = tiny_model(family, ("q_proj", "v_proj", "down_proj"))
    twin, (batches, pairs) = copy.deepcopy(model), data()
    config = SAPConfig.released() if released else SAPConfig(strength=0.01)
    config = config.replace(schedule=schedule, probe_layers=LAYERS)
    if schedule == "fresh":
        config = config.replace(probe_in_safety_pass=False)
    ours = train(model, batches, pairs, config)
    with everything_in_float64(twin):
        theirs = trajectory(twin, batches, pairs, LAYERS, schedule=schedule, released=released)
    assert distance(ours, theirs) < 1e-6


def test_published_difference_agrees_with_the_reimplementation_of_it() -> None:
    model = tiny_model("qwen2")
    twin, (batches, pairs) = copy.deepcopy(model), data()
    config = SAPConfig(probe_layers=LAYERS, gradient="finite_difference", radius=1e-4)
    ours = train(model, batches, pairs, config)
    with everything_in_float64(twin):
        theirs = trajectory(twin, batches, pairs, LAYERS, radius=1e-4)
    # A difference at radius 1e-4 carries rounding of 1e-16 / 1e-4; signs then agree except at near-zeros.
    assert distance(ours, theirs) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("layers", [(3,), (0, 3)], ids=str)
def test_a_probe_on_the_last_layer_takes_its_scale_from_all_tokens(layers: tuple[int, ...], family: str) -> None:
    model = tiny_model(family)
    twin, (batches, pairs) = copy.deepcopy(model), data(4)
    ours = train(model, batches, pairs, SAPConfig(probe_layers=layers))
    with everything_in_float64(twin):
        theirs = trajectory(twin, batches, pairs, layers)
    assert distance(ours, theirs) < 1e-6


def test_finite_difference_gradient_converges_to_the_dual_one() -> None:
    """A forward difference is wrong by O(radius): a tenth of the radius, a tenth of the error."""
    model, batch, pairs = tiny_model("llama"), random_batch(), random_pairs()
    decoder = read_decoder(model)
    rows = pack(batch, vocab_size=decoder.vocab_size, device=decoder.device)
    with everything_in_float64(model):
        u = Flat.of(unit_direction(model, pairs))
    probe = Probe.of({j: 0.1 * torch.randn(32, dtype=torch.float64) for j in LAYERS})
    micros, errors = [Micro(rows, None)], []
    with decoder.installed():
        truth = solved.dual(decoder, micros, probe, u).probe_dot
        for radius in (1e-2, 1e-3, 1e-4):
            length = torch.tensor(radius, dtype=torch.float64)
            found = solved.finite_difference(decoder, micros, probe, u, length).probe_dot
            errors.append(float((found - truth).norm() / truth.norm()))
    assert errors[2] < 1e-3
    assert 5 < errors[0] / errors[1] < 20
    assert 5 < errors[1] / errors[2] < 20


@pytest.mark.parametrize("schedule", ["lagged", "fresh"])
def test_finite_difference_trajectory_converges_to_the_dual_one(schedule: str) -> None:
    # A smooth update: signs would jump where a coordinate of the gradient is near zero.
    config = SAPConfig(probe_layers=LAYERS, schedule=schedule, probe_update="normalised", strength=0.05)
    model = tiny_model("llama")
    batches, pairs = data(6)
    truth = train(copy.deepcopy(model), batches, pairs, config)
    gaps = []
    for radius in (1e-3, 1e-4, 1e-5):
        moved = config.replace(gradient="finite_difference", radius=radius)
        gaps.append(distance(train(copy.deepcopy(model), batches, pairs, moved), truth))
    # The ratios are the claim. The size, seen at 1.5e-4 and 2.4e-4, is that of 1e-5 amplified by AdamW over six steps.
    assert gaps[2] < 1e-3
    assert 5 < gaps[0] / gaps[1] < 20
    assert 5 < gaps[1] / gaps[2] < 20
