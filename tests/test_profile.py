"""The profiler: which phases it finds, that they are all of a step, and of how many kinds steps are."""

from collections import Counter as Multiset
from typing import Any

import pytest
import torch
from oracle import ALL_LINEAR, random_batch, random_pairs, tiny_model
from profiles import DIRECTION, DUAL, END, ORDINARY, contenders, f32, profiled
from steps import CONFIG, grads
from torch.utils._python_dispatch import TorchDispatchMode

import sap_fast
from sap_fast import SAPConfig
from sap_fast.profiling.meters import Clock
from sap_fast.profiling.phases import ignored
from sap_fast.profiling.steps import PhaseDecoder, Steps, kinds

# The phases of a step

# The head's phase lasts until the cotangents have left it.
IN_ORDER = {
    "lagged": (CONFIG, ["data", *DIRECTION, *DUAL, "update", *END]),
    "deferred": (CONFIG.replace(check="deferred"), ["data", *DIRECTION, *DUAL, "update", *END]),
    "last-layer": (
        CONFIG.replace(probe_layers=(3,)),
        ["data", *DIRECTION, "dual_forward", "dual_head", "backward_beneath", "update", *END],
    ),
    "project": (CONFIG.replace(guard="project"), ["data", *DIRECTION, *ORDINARY, *END]),
    "fresh-store": (
        CONFIG.replace(schedule="fresh", restart="store"),
        ["data", *DIRECTION, *DUAL[:3], "update", "forward", "head", *DUAL[2:], *END],
    ),
    "fresh-recompute": (
        CONFIG.replace(schedule="fresh", restart="recompute"),
        ["data", *DIRECTION, *DUAL[:3], "update", *ORDINARY, *END],
    ),
    "difference": (
        CONFIG.replace(gradient="finite_difference", radius=1e-3),
        ["data", *DIRECTION, *ORDINARY, *ORDINARY, "update", *END],
    ),
    "tangent-fraction": (
        CONFIG.replace(tangent_fraction=0.4),
        ["data", *DIRECTION, "forward", *DUAL, "update", *END],  # an ordinary pass is begun, for the other sequences
    ),
}


@pytest.mark.parametrize(("config", "expected"), IN_ORDER.values(), ids=IN_ORDER.keys())
def test_the_phases_of_a_step_in_their_order(config: SAPConfig, expected: list[str]) -> None:
    model, seen = tiny_model(), []
    with sap_fast.attach(model, config) as sap:
        contenders(model, sap)["sap"].run(random_batch(), random_pairs(), seen.append)
    assert seen == expected


def test_pairs_that_run_with_the_task_have_its_phases() -> None:
    model, seen = tiny_model(), []
    with sap_fast.attach(model, CONFIG.replace(delayed_direction=True)) as sap:
        step = contenders(model, sap)["sap"]
        step.run(random_batch(), random_pairs(), ignored)
        step.run(random_batch(), random_pairs(), seen.append)
    assert seen == ["data", "forward", *DUAL, "update", *END]  # an ordinary pass is begun, for the pairs


def test_plain_fine_tuning_has_ordinary_phases() -> None:
    model = tiny_model()
    with sap_fast.attach(model, CONFIG) as sap:
        for key, expected in (
            ("sft", ["data", *ORDINARY, *END]),
            ("peft", ["data", "forward", "backward", "optimizer"]),
        ):
            seen: list[str] = []
            contenders(model, sap)[key].run(random_batch(), random_pairs(), seen.append)
            assert seen == expected


def test_checkpointed_layers_are_recomputed_in_the_phases_that_need_them() -> None:
    model, seen = tiny_model().train(), []
    model.get_base_model()._set_gradient_checkpointing(True)
    with sap_fast.attach(model, CONFIG) as sap:
        contenders(model, sap)["sap"].run(random_batch(), random_pairs(), seen.append)
    assert seen == IN_ORDER["lagged"][1]


def test_an_observed_step_computes_what_any_step_computes() -> None:
    model, batch, pairs = tiny_model(dtype=f32, lora_dropout=0.1).train(), random_batch(), random_pairs()
    for config in (config for config, _ in IN_ORDER.values()):
        found = []
        for begin in (ignored, lambda phase: None):
            torch.manual_seed(1)
            with sap_fast.attach(model, config) as sap:
                told = (
                    sap.decoder
                    if begin is ignored
                    else PhaseDecoder.of(sap.decoder, begin, min(sap.probe_layers, default=None))
                )
                for _ in range(2):
                    model.zero_grad()
                    with sap.running_on(told):
                        sap.step(batch, pairs)
                found.append((grads(model), sap.probe if config.check == "now" else {}))
        for (a, probe_a), (b, probe_b) in [found]:
            assert all(torch.equal(a[name], b[name]) for name in a)
            assert all(torch.equal(probe_a[layer], probe_b[layer]) for layer in probe_a)


def test_the_cut_lies_at_the_lowest_probe() -> None:
    """The cut is found by the backward ops of linear maps, of which every layer has four."""

    class Ops(TorchDispatchMode):
        phase = ""

        def __init__(self) -> None:
            super().__init__()
            self.seen: Multiset[tuple[str, int]] = Multiset()

        def begin(self, phase: str) -> None:
            self.phase = phase

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name == "sap_fast::lora_linear_backward":
                self.seen[self.phase, len(args[0][0])] += 1  # by phase and halves of cotangents
            return func(*args, **(kwargs or {}))

    model = tiny_model(layers=6, targets=ALL_LINEAR)
    with sap_fast.attach(model, CONFIG.replace(probe_layers=(3, 1))) as sap, Ops() as ops:
        contenders(model, sap)["sap"].run(random_batch(), random_pairs(), ops.begin)
    assert ops.seen == {("direction_backward", 1): 24, ("backward_above", 2): 16, ("backward_beneath", 1): 8}


# What is measured


def test_every_phase_is_there_and_they_are_the_whole_step(device: str) -> None:
    model = tiny_model(dtype=f32).to(device)
    found = profiled(model=model, steps=3, peak_flops=1e12, bandwidth=1e11)
    assert list(found.totals) == list(found.memory) == ["sft", "peft", "sap"]
    assert [cost.phase for cost in found.phases["sap"]] == ["data", *DIRECTION, *DUAL, *END]
    assert [cost.phase for cost in found.phases["sft"]] == ["data", *ORDINARY, *END]
    assert [cost.phase for cost in found.phases["peft"]] == ["data", "forward", "backward", "optimizer"]
    for key, costs in found.phases.items():
        total = found.totals[key]
        assert 0 < total.lower <= total.median <= total.upper and total.rounds == 3
        assert sum(cost.share for cost in costs) == pytest.approx(1)
        for cost in costs:
            spread = cost.seconds
            assert 0 <= spread.lower <= spread.median <= spread.upper and spread.rounds == 3
            # Between the greater of both, and their sum, in which what products read and write counts, too.
            products, crossing = cost.flops / 1e12, cost.bytes / 1e11
            assert max(products, crossing) <= cost.floor_seconds <= products + crossing
            assert (cost.kernels is None) == (device == "cpu")
        assert sum(cost.ops for cost in costs) > 0
        assert found.memory[key].peak > 0
        assert (found.memory[key].added is None) == (device == "cpu")
    assert found.ratios.keys() == {"sap/sft", "sap/peft", "sft/peft"}
    assert all(spread.median > 0 for spread in found.ratios.values())
    assert found.tokens["sequences"] == 3 and found.tokens["pairs"] == 4
    assert found.tokens["tokens"] == int(random_batch()["attention_mask"].sum())
    assert found.trace is None


def test_a_clock_divides_the_time_without_a_rest(device: str) -> None:
    clock = Clock(torch.device(device))
    for phase in ("a", "b", "a"):
        clock.begin(phase)
        torch.ones(100, device=device).sum()
    first, last = clock._marks[0][1], clock._now()
    seconds = clock.seconds()
    assert list(seconds) == ["a", "b"] and min(seconds.values()) > 0
    if device == "cuda":
        torch.cuda.synchronize()
    assert sum(seconds.values()) >= clock._between(first, last)


KINDS = [(1, 1), (8, 1), (1, 4), (2, 3), (3, 3), (3, 7)]


@pytest.mark.parametrize(("probe_every", "direction_every"), KINDS)
def test_kinds_come_as_often_as_in_a_real_run(probe_every: int, direction_every: int) -> None:
    config = CONFIG.replace(probe_every=probe_every, direction_every=direction_every)
    found = kinds(config)
    assert (found[0].finds_direction, found[0].finds_probe) == (True, True)
    assert sum(kind.weight for kind in found) == pytest.approx(1)
    steps = 2 * probe_every * -(-direction_every // probe_every)
    model, batch, pairs = tiny_model(layers=2, dtype=f32), random_batch(2, 5), random_pairs(1, 5)
    seen: Multiset[tuple[bool, bool]] = Multiset()
    with sap_fast.attach(model, config.replace(probe_layers=(0,))) as sap:
        for _ in range(steps):
            report = sap.step(batch, pairs)
            seen[report.found_direction, report.found_probe] += 1
    assert {(kind.finds_direction, kind.finds_probe): kind.weight * steps for kind in found} == pytest.approx(
        dict(seen)
    )


def test_options_change_the_phases_that_appear() -> None:
    found = profiled(CONFIG.replace(probe_every=4, direction_every=8))
    assert found.weights == {"sap-1": 1 / 8, "sap-2": 6 / 8, "sap-3": 1 / 8}
    phases = {key: {cost.phase for cost in costs} for key, costs in found.phases.items()}
    assert phases["sap-1"] == {"data", *DIRECTION, *DUAL, *END}
    assert phases["sap-2"] == {"data", *ORDINARY, *END}
    assert phases["sap-3"] == {"data", *DUAL, *END}
    assert phases["sap"] == phases["sap-1"] | phases["sap-2"]
    for field in ("flops", "bytes", "ops"):
        by_phase = {key: {c.phase: getattr(c, field) for c in costs} for key, costs in found.phases.items()}
        for phase in phases["sap"]:
            parts = [weight * by_phase[key].get(phase, 0) for key, weight in found.weights.items()]
            assert by_phase["sap"][phase] == pytest.approx(sum(parts))
    total = sum(weight * found.totals[key].median for key, weight in found.weights.items())
    assert found.totals["sap"].median == pytest.approx(total)  # of one round


def test_a_model_whose_own_forward_fails_loses_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *_: Any) -> None:
        raise NotImplementedError("no such mask\nand more")

    monkeypatch.setattr(Steps, "_peft", broken)
    found = profiled()
    assert list(found.totals) == ["sft", "sap"] and list(found.ratios) == ["sap/sft"]
    assert any("left out (NotImplementedError: no such mask)" in note for note in found.notes)
    assert "PEFT on padded rows" not in found.summary()
