"""The probe's updates, against their formulas, and the settings."""

import pytest
import torch
from torch import nn

from sap_fast import SAPConfig
from sap_fast.config import paper_layers, released_layers
from sap_fast.method.probe import Probe

WIDTH = 16


def found(config: SAPConfig, gradient: dict, rms: dict | None = None, alpha: float = 1e-4) -> dict:
    rms = rms or {j: torch.full((5,), 2.0 + j, dtype=torch.float64) for j in gradient}
    zero = Probe.zeros(tuple(gradient), WIDTH, torch.device("cpu"), torch.float64)
    climbed = zero.climbed(stacked(gradient), stacked(rms), torch.tensor(alpha), config)
    return climbed.by_layer(climbed.vectors)


def stacked(rows: dict) -> torch.Tensor:
    return torch.stack(list(rows.values()))


def gradient(layers: tuple[int, ...] = (1, 3)) -> dict:
    return {j: torch.randn(WIDTH, dtype=torch.float64) * (j + 1) for j in layers}


def test_sign_moves_every_coordinate_by_the_same_share_of_its_layers_scale() -> None:
    g = gradient()
    v = found(SAPConfig(strength=0.01), g)
    for j in g:
        torch.testing.assert_close(v[j], 0.01 * (2.0 + j) * g[j].sign())
    v = found(SAPConfig(strength=0.01, strength_unit="absolute"), g)
    torch.testing.assert_close(v[1], 0.01 * g[1].sign())


def test_relative_scale_is_the_median_over_tokens() -> None:
    """One token with a massive activation must not set the scale."""
    rms = {1: torch.tensor([1.9, 2.0, 2.1, 100.0, 2.0], dtype=torch.float64)}
    v = found(SAPConfig(strength=1.0), gradient((1,)), rms)
    assert float(v[1].abs().max()) == 2.0


def test_normalised_absolute_is_a_vector_of_length_strength_along_the_gradient() -> None:
    g = gradient()
    v = found(SAPConfig(probe_update="normalised", strength=0.3, strength_unit="absolute"), g)
    flat_v, flat_g = torch.cat(list(v.values())), torch.cat(list(g.values()))
    torch.testing.assert_close(flat_v, 0.3 * flat_g / flat_g.norm())


def test_normalised_relative_is_the_steepest_ascent_on_its_sphere() -> None:
    g, rms = gradient(), {j: torch.full((3,), 2.0 + j, dtype=torch.float64) for j in (1, 3)}
    v = found(SAPConfig(probe_update="normalised", strength=0.3), g, rms)
    assert length(v) == pytest.approx(0.3)
    gain = sum(float(v[j] @ g[j]) for j in g)
    for _ in range(50):  # no other point of the sphere gains more
        other = {j: torch.randn(WIDTH, dtype=torch.float64) for j in g}
        scale = 0.3 / length(other)
        assert sum(float(scale * other[j] @ g[j]) for j in g) <= gain


def length(v: dict) -> float:
    """RMS of each layer's vector relative to the layer's scale, root of the sum of squares."""
    return float(sum(v[j].square().mean() / (2.0 + j) ** 2 for j in v)) ** 0.5


def test_a_zero_gradient_gives_no_probe() -> None:
    zero = {1: torch.zeros(WIDTH, dtype=torch.float64)}
    for update in ("sign", "normalised", "adamw"):
        v = found(SAPConfig(probe_update=update), zero)
        assert torch.equal(v[1], zero[1])


def test_adamw_is_torchs_own_from_zero_with_moments_that_persist() -> None:
    config = SAPConfig.released()
    ours = Probe.zeros((2,), WIDTH, torch.device("cpu"), torch.float64)
    theirs = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))
    optimizer = torch.optim.AdamW([theirs], lr=0.05)
    for alpha in (1e-4, 3e-4, 1e-9, 2e-4):
        g = torch.randn(WIDTH, dtype=torch.float64)
        ours = ours.climbed(g[None], torch.ones(1, 5), torch.tensor(alpha, dtype=torch.float64), config)
        theirs.data.zero_()
        theirs.grad = -alpha * g
        optimizer.step()
        # One formula in another order: a few roundings of float64, on entries of at most 0.05.
        torch.testing.assert_close(ours.vectors[0], theirs.detach(), rtol=1e-12, atol=1e-15)


def test_a_climb_leaves_the_old_probe_as_it_was() -> None:
    zero = Probe.zeros((1,), WIDTH, torch.device("cpu"), torch.float64)
    zero.climbed(stacked(gradient((1,))), torch.ones(1, 5), torch.tensor(1e-4), SAPConfig.released())
    assert float(zero.vectors.norm()) == 0
    assert float(zero.first_moment.norm()) == 0
    assert zero.steps == 0


def test_presets_scale_with_depth() -> None:
    assert tuple(paper_layers(32)) == tuple(range(10, 20))
    assert released_layers(32) == (3, 9)
    assert tuple(paper_layers(64)) == tuple(range(20, 40))
    assert tuple(paper_layers(30)) == tuple(range(9, 19))
    assert released_layers(16) == (2, 4)
    for depth in range(1, 100):
        assert SAPConfig().layers_of(depth)
        assert SAPConfig.released().layers_of(depth)


def test_presets_say_what_they_are() -> None:
    released, paper = SAPConfig.released(), SAPConfig.paper()
    assert (released.schedule, paper.schedule) == ("lagged", "fresh")
    assert (released.safety_loss, paper.safety_loss) == ("logsigmoid", "difference")
    assert released.probe_in_safety_pass
    assert not paper.probe_in_safety_pass
    assert (released.strength, released.strength_unit, released.radius) == (0.05, "absolute", 2e-5)
    assert SAPConfig.released(temperature=2.0).temperature == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guard": "shield"}, r"guard must be one of .*'probe\+project'.*'shield'"),
        ({"schedule": "eager"}, "schedule must be one of"),
        ({"radius": 0.0}, "radius must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive and finite"),
        ({"strength": -1.0}, "strength must be finite and not negative"),
        ({"counter": float("inf")}, "counter must be finite"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAPConfig(**changes)
