"""Twenty steps of training against an independent reimplementation, in float64."""

import copy

import pytest
import torch
from oracle import everything_in_float64, lora, random_batch, random_pairs, tiny_model
from reimplementation import trajectory
from torch import nn

import sap_fast
from sap_fast import SAPConfig

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
    """The largest relative distance of theta or V over the steps."""
    gaps = []
    for (theta_a, probe_a), (theta_b, probe_b) in zip(a, b, strict=True):
        for x, y in ((theta_a, theta_b), (probe_a, probe_b)):
            gap = sum(float((x[k] - y[k]).square().sum()) for k in y)
            gaps.append((gap / sum(float(y[k].square().sum()) for k in y)) ** 0.5)
    return max(gaps)


def data() -> tuple[list, list]:
    return [random_batch() for _ in range(STEPS)], [random_pairs() for _ in range(STEPS)]


@pytest.mark.parametrize("released", [False, True], ids=["sign", "released"])
@pytest.mark.parametrize("schedule", ["lagged", "fresh"])
def test_twenty_steps_equal_the_reimplementation(schedule: str, released: bool) -> None:
    model = tiny_model("llama", ("q_proj", "v_proj", "down_proj"))
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


def test_finite_difference_converges_to_the_dual_gradient() -> None:
    """A forward difference is wrong by O(radius): halving the exponent's decade must shrink the error tenfold."""
    model, batch, pairs = tiny_model("llama"), random_batch(), random_pairs()
    errors = []
    from sap_fast import passes
    from sap_fast.batch import pack
    from sap_fast.convert import read_decoder
    from sap_fast.probe import Probe

    decoder = read_decoder(model)
    rows = pack(batch, vocab_size=decoder.vocab_size, device=decoder.device)
    from oracle import unit_direction

    u = unit_direction(model, pairs)
    probe = Probe({j: 0.1 * torch.randn(32, dtype=torch.float64) for j in LAYERS}, {}, {})
    micros = [passes.Micro(rows, None)]
    with decoder.installed():
        truth = passes.dual(decoder, micros, probe, u)
        for radius in (1e-2, 1e-3, 1e-4):
            found = passes.finite_difference(decoder, micros, probe, u, torch.tensor(radius, dtype=torch.float64))
            gap = sum(float((found.probe_dot[j] - truth.probe_dot[j]).square().sum()) for j in LAYERS) ** 0.5
            size = sum(float(truth.probe_dot[j].square().sum()) for j in LAYERS) ** 0.5
            errors.append(gap / size)
    assert errors[2] < 1e-3
    assert 5 < errors[0] / errors[1] < 20
    assert 5 < errors[1] / errors[2] < 20
