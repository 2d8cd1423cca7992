"""The options that save passes: what each computes, what it leaves exact, and what it refuses."""

import copy
from itertools import combinations
from typing import Any

import pytest
import torch
from oracle import lora, random_batch, random_pairs, tiny_model, unit_direction
from steps import CONFIG, gap, grads, plain_gradient
from torch import Tensor, nn

import sap_fast
from benchmarks.common import solved
from sap_fast import SAPConfig, StepRefusedError
from sap_fast.batch.rows import pack, packed, read
from sap_fast.method.flat import Flat
from sap_fast.method.passes import Dual, Micro, Ordinary, solve
from sap_fast.method.probe import Probe
from sap_fast.method.reduce import along, total
from sap_fast.method.rhythm import Rhythm
from sap_fast.model.read import read_decoder

SCHEDULES = pytest.mark.parametrize("schedule", ["lagged", "fresh"])


def run(model: nn.Module, config: SAPConfig, batches: list, pairs: list) -> list[tuple[dict, dict, Any]]:
    """Steps without an optimizer: gradient, next probe and report of each."""
    found = []
    with sap_fast.attach(model, config) as sap:
        for batch, pair in zip(batches, pairs, strict=True):
            model.zero_grad()
            report = sap.step(batch, pair)
            found.append((grads(model), sap.probe, report))
    return found


def data(steps: int) -> tuple[list, list]:
    return [random_batch() for _ in range(steps)], [random_pairs() for _ in range(steps)]


# probe_every


@SCHEDULES
def test_between_probes_steps_are_ordinary_in_their_presence(schedule: str) -> None:
    model, (batches, pairs) = tiny_model(), data(4)
    steps = run(model, CONFIG.replace(schedule=schedule, probe_every=3), batches, pairs)
    assert [report.found_probe for *_, report in steps] == [True, False, False, True]
    assert [report.found_direction for *_, report in steps] == [True, False, False, True]
    (_, first, _), (gradient, second, report), (_, third, _), (_, fourth, _) = steps
    assert gap(first, second) == gap(first, third) == 0 and gap(first, fourth) > 0
    decoder = read_decoder(model)
    rows = pack(batches[1], vocab_size=decoder.vocab_size, device=decoder.device)
    zero = torch.zeros(2, decoder.hidden_size, dtype=torch.float64)
    probe = Probe((1, 2), torch.stack([first[1], first[2]]), zero, zero)
    with decoder.installed():
        expected = solved.ordinary(decoder, [Micro(rows, None)], probe)
    assert gap(gradient, dict(expected.theta)) == 0
    assert gap(gradient, plain_gradient(model, batches[1])) > 1e-3  # so it matters that the probe is there
    assert report.loss == expected.loss
    assert (report.safety_margin, report.safety_tokens, report.steering) == (0, 0, 0)


def test_the_next_lagged_probe_is_found_at_the_one_in_use() -> None:
    """A probe found in step 0 acts in all steps up to and including the next that finds one."""
    model, (batches, pairs) = tiny_model(), data(3)
    *_, (gradient, probe, _) = run(model, CONFIG.replace(probe_every=2), batches, pairs)
    # The same without the step in between, which finds nothing.
    *_, (expected, expected_probe, _) = run(model, CONFIG, batches[::2], pairs[::2])
    assert gap(gradient, expected) == gap(probe, expected_probe) == 0


# direction_every


@SCHEDULES
def test_a_direction_is_used_until_the_next(schedule: str) -> None:
    model, (batches, pairs) = tiny_model(), data(3)
    config = CONFIG.replace(schedule=schedule, direction_every=2)
    steps = run(model, config, batches, pairs)
    assert [report.found_direction for *_, report in steps] == [True, False, True]
    assert all(report.found_probe for *_, report in steps)
    assert steps[1][2].safety_tokens == 0 and steps[2][2].direction_cosine != 0
    # Without an optimizer the direction of pairs[0] is the same in step 1 as in step 0.
    again = run(model, config.replace(direction_every=1), batches, [pairs[0], pairs[0], pairs[2]])
    for (gradient, probe, _), (expected, expected_probe, _) in zip(steps, again, strict=True):
        assert gap(gradient, expected) == gap(probe, expected_probe) == 0


def test_guards_use_the_last_direction() -> None:
    model, (batches, pairs) = tiny_model(), data(2)
    steps = run(model, CONFIG.replace(guard="counter", direction_every=2), batches, pairs)
    assert [report.found_direction for *_, report in steps] == [True, False]
    again = run(model, CONFIG.replace(guard="counter"), batches, [pairs[0], pairs[0]])
    assert gap(steps[1][0], again[1][0]) == 0


def test_a_direction_that_turns_is_found_more_often() -> None:
    config = CONFIG.replace(direction_every=8, direction_min_cosine=0.9)
    rhythm = Rhythm.of(config)
    intervals = []
    for cosine in (0.5, 0.5, 0.5, 0.5, 0.95, 0.9, 0.95, 0.95):
        rhythm = rhythm.adapted(cosine, config)
        intervals.append(rhythm.interval)
    assert intervals == [4, 2, 1, 1, 2, 4, 8, 8]
    assert Rhythm.of(CONFIG).adapted(-1.0, CONFIG) == Rhythm.of(CONFIG)


def test_the_interval_follows_the_cosine_of_the_step() -> None:
    model, (batches, pairs) = tiny_model(), data(9)
    config = CONFIG.replace(direction_every=4, direction_min_cosine=1.0)  # never reached by other pairs
    steps = run(model, config, batches, pairs)
    assert [report.found_direction for *_, report in steps] == [True, *3 * [False], True, False, True, True, True]


# tangent_fraction


def test_a_fraction_is_of_all_sequences_of_a_step() -> None:
    """Micro-batches of one sequence count together, too: some carry tangents, and the others none."""
    model = tiny_model(targets=("q_proj", "v_proj", "down_proj"))
    whole = random_batch()
    singles = [{key: x[i : i + 1] for key, x in whole.items()} for i in range(len(whole["input_ids"]))]
    found = []
    for batch, fraction in ((whole, 0.25), (singles, 0.25), (whole, 1.0)):
        with sap_fast.attach(model, CONFIG.replace(tangent_fraction=fraction)) as sap:
            torch.manual_seed(3)
            model.zero_grad()
            report = sap.step(batch, random_pairs())
            found.append((grads(model), sap.probe, report.loss))
    (together, probe, _), (apart, other, _), (exact, all_of_them, _) = found
    assert gap(together, exact) < 1e-10 and gap(apart, exact) < 1e-10
    # The same sequence was drawn, and the probe found from it alone.
    assert gap(dict(other), dict(probe)) < 1e-10
    assert gap(dict(probe), dict(all_of_them)) > 1e-3


@pytest.mark.parametrize("chosen", [1, 2])
def test_over_all_draws_the_estimate_is_exact(chosen: int) -> None:
    model, batch = tiny_model(targets=("q_proj", "v_proj", "down_proj")), random_batch()
    decoder = read_decoder(model)
    sizes: dict[str, Any] = {"vocab_size": decoder.vocab_size, "device": decoder.device}
    direction = unit_direction(model, random_pairs())
    u = Flat.of(decoder.trained, [direction[name] for name in decoder.trained])
    generator = torch.Generator().manual_seed(0)
    zero = torch.zeros(2, decoder.hidden_size, dtype=torch.float64)
    vectors = 0.1 * torch.randn(zero.shape, generator=generator, dtype=torch.float64)
    probe, host = Probe((1, 2), vectors, zero, zero), read(batch, **sizes)
    whole = packed(host)
    count = whole.sequences
    assert count > 2
    estimates = []
    with decoder.installed():
        expected = solved.dual(decoder, [Micro(whole, None)], probe, u)
        for some in combinations(range(count), chosen):
            others = [i for i in range(count) if i not in some]
            parts = (
                Micro(packed(host.select_sequences(some)), None, count / chosen),
                Micro(packed(host.select_sequences(others)), None),
            )
            dual = Dual(decoder, parts[0], whole.scored, probe, u)
            ordinary = Ordinary(decoder, parts[1], whole.scored, probe)
            found = along(total(solve(decoder, [dual, ordinary])), u)
            estimates.append(found.probe_dot)
            assert distance(found.theta.vector, expected.theta.vector) < 1e-12
            assert distance(found.loss, expected.loss) < 1e-12
            assert distance(found.loss_dot, expected.loss_dot) < 1e-10
            assert distance(found.rms.sort(1).values, expected.rms.sort(1).values) < 1e-12
    assert distance(torch.stack(estimates).mean(0), expected.probe_dot) < 1e-12
    assert distance(estimates[0], expected.probe_dot) > 1e-2  # each draw is but an estimate


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@SCHEDULES
@pytest.mark.parametrize("micros", [1, 2])
def test_the_weights_gradient_stays_exact(schedule: str, micros: int) -> None:
    model, (batches, pairs) = tiny_model(), data(2 * micros)
    # At a probe of its own each run differs, so none is in use: strength 0.
    config = CONFIG.replace(schedule=schedule, strength=0.0)
    given = [batches[i * micros : (i + 1) * micros] for i in range(2)]
    torch.manual_seed(3)
    exact = run(model, config, given, pairs[:2])
    some = run(model, config.replace(tangent_fraction=0.4), given, pairs[:2])
    for (gradient, _, report), (expected, _, other) in zip(some, exact, strict=True):
        assert gap(gradient, expected) < 1e-12
        assert float(abs(report.loss - other.loss)) < 1e-12
        assert report.found_probe and report.tokens == other.tokens


def test_draws_follow_the_seed() -> None:
    model, (batches, pairs) = tiny_model(), data(3)
    config = CONFIG.replace(tangent_fraction=0.4)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(run(copy.deepcopy(model), config, batches, pairs)[-1])
    assert gap(runs[0][1], runs[1][1]) == 0 and gap(runs[0][1], runs[2][1]) > 0


def test_a_fraction_that_rounds_to_all_is_all() -> None:
    model, (batches, pairs) = tiny_model(), data(2)
    exact, same = (
        run(model, CONFIG.replace(tangent_fraction=fraction), batches, pairs)[-1] for fraction in (1.0, 0.99)
    )
    assert gap(exact[0], same[0]) == gap(exact[1], same[1]) == 0


# pairs_per_step


def test_the_direction_is_that_of_the_pairs_drawn() -> None:
    model, (batches, pairs) = tiny_model(), data(1)
    half = len(pairs[0]["input_ids"]) // 2
    assert half > 1
    torch.manual_seed(5)
    (_, probe, report), *_ = run(model, CONFIG.replace(pairs_per_step=1), batches, pairs)
    candidates = []
    for i in range(half):
        torch.manual_seed(5)
        candidates.append(run(model, CONFIG, batches, [{key: x[[i, half + i]] for key, x in pairs[0].items()}])[0])
    gaps = [gap(probe, other) for _, other, _ in candidates]
    assert sorted(gaps)[0] == 0 < sorted(gaps)[1]
    assert report.safety_margin == candidates[gaps.index(0.0)][2].safety_margin


def test_more_pairs_than_there_are_is_all() -> None:
    model, (batches, pairs) = tiny_model(), data(1)
    (_, probe, _), *_ = run(model, CONFIG.replace(pairs_per_step=100), batches, pairs)
    (_, expected, _), *_ = run(model, CONFIG, batches, pairs)
    assert gap(probe, expected) == 0


# Refusals


@pytest.mark.parametrize("check", ["now", "deferred"])
def test_a_refused_step_counts_for_nothing(check: str) -> None:
    model, (batches, pairs) = tiny_model(), data(3)
    config = CONFIG.replace(probe_every=2, check=check)
    with sap_fast.attach(model, config) as sap:
        sap.step(batches[0], pairs[0])
        name, weight = next(iter(lora(model).items()))
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(torch.nan)
        if check == "deferred":
            sap.step(batches[1], pairs[1])
        with torch.no_grad():
            weight.copy_(torch.full_like(weight, torch.nan) if check == "now" else kept)
        with pytest.raises(StepRefusedError):
            sap.step(batches[1], pairs[1])
        with torch.no_grad():
            weight.copy_(kept)
        assert name in lora(model)
        assert not sap.step(batches[1], pairs[1]).found_probe  # the step in between is still to come
        assert sap.step(batches[2], pairs[2]).found_probe


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"probe_every": 0}, "probe_every must be a whole number of at least 1, but is 0"),
        ({"probe_every": 2.0}, "probe_every must be a whole number"),
        ({"direction_every": True}, "direction_every must be a whole number"),
        ({"pairs_per_step": 0}, "pairs_per_step must be a whole number"),
        ({"tangent_fraction": 0.0}, "tangent_fraction must be more than 0 and at most 1, but is 0.0"),
        ({"tangent_fraction": 1.5}, "tangent_fraction must be more than 0"),
        ({"tangent_fraction": float("nan")}, "tangent_fraction must be more than 0"),
        ({"direction_min_cosine": 2.0}, "direction_min_cosine must lie between -1 and 1"),
        ({"guard": "project", "probe_every": 2}, "guard='project' has no probe"),
        ({"guard": "counter", "tangent_fraction": 0.5}, "guard='counter' has no probe"),
        ({"gradient": "finite_difference", "tangent_fraction": 0.5}, "a finite difference has no tangents"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SAPConfig(**settings)
