"""Captured steps on the CPU: their buffers, when they are recorded, and what makes a step run eagerly.

The recorder here replays by calling again; everything around the calls of CUDA graphs is what runs on a GPU.
"""

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from oracle import ALL_LINEAR, lora, random_batch, random_pairs, tiny_model
from recorders import Eager, Rerun, attached
from steps import CONFIG, CONFIGS, gap, grads
from test_launches import WAITING, Ops
from test_prefixes import alike
from torch import nn

import sap_fast
from sap_fast import SAPConfig, StepRefusedError
from sap_fast.graph import Graphs
from sap_fast.model.read import read_decoder
from sap_fast.tensors import rebuilt, tensors_of

OPTIONS = {
    "delayed": CONFIG.replace(delayed_direction=True),
    "delayed-tangents": CONFIG.replace(delayed_direction=True, tangent_fraction=0.5),
    "float8": CONFIG.replace(float8="emulated"),
    "tangents": CONFIG.replace(tangent_fraction=0.5),
    "half-the-pairs": CONFIG.replace(pairs_per_step=1),
    "probe-every": CONFIG.replace(probe_every=2),
    "direction-every": CONFIG.replace(direction_every=2),
    "apart": CONFIG.replace(share_prefixes=False),
}


def steps(model: nn.Module, config: SAPConfig, given: list, kind: type[Graphs]) -> tuple[list, Rerun]:
    """Steps with a weight written in place after each: gradient, probe and report of every step."""
    torch.manual_seed(4)
    found = []
    with attached(model, config, kind) as (sap, recorder):
        for batch, pairs in given:
            model.zero_grad()
            report = sap.step(batch, pairs)
            found.append((grads(model), sap.probe, report))
            with torch.no_grad():
                for p in lora(model).values():
                    p.sub_(0.05 * p.grad)
        # What a step gave stays what it was, whatever is replayed after it.
        told = [(report.to_dict(), {j: v.clone() for j, v in probe.items()}) for _, probe, report in found]
    return [(g, probe, told) for (g, *_), (told, probe) in zip(found, told, strict=True)], recorder


def equal(found: list, expected: list) -> None:
    """See that two runs are equal in every bit."""
    assert len(found) == len(expected)
    for (gradients, probe, told), (expected_gradients, expected_probe, expected_told) in zip(
        found, expected, strict=True
    ):
        assert all(torch.equal(g, expected_gradients[name]) for name, g in gradients.items())
        assert all(torch.equal(v, expected_probe[j]) for j, v in probe.items())
        assert told == expected_told


@pytest.mark.parametrize("name", [*CONFIGS, *OPTIONS])
def test_replays_equal_eager_steps_in_every_bit(name: str) -> None:
    model, config = tiny_model(targets=ALL_LINEAR), {**CONFIGS, **OPTIONS}[name]
    given = [(random_batch(3 + i % 2, 9 + i % 3), random_pairs()) for i in range(7)]
    expected, _ = steps(copy.deepcopy(model), config, given, Eager)
    found, recorder = steps(model, config, given, Graphs)
    equal(found, expected)
    assert recorder.recorded and recorder.replayed > recorder.recorded


def test_two_buckets_in_turn() -> None:
    model = tiny_model()
    small, large = (lambda: random_batch(3, 9)), (lambda: random_batch(9, 30))
    given = [(make(), random_pairs()) for _ in range(4) for make in (small, large)]
    expected, _ = steps(copy.deepcopy(model), CONFIG, given, Eager)
    found, recorder = steps(model, CONFIG, given, Graphs)
    equal(found, expected)
    # The first step has no earlier direction: it is of a kind of its own.
    assert (recorder.recorded, recorder.replayed) == (2, 8 - 3)


def test_micro_batches_shared_rows_and_dropout() -> None:
    model = tiny_model(targets=ALL_LINEAR, lora_dropout=0.2).train()
    given: list = [([alike(), random_batch()], random_pairs()) for _ in range(5)]
    expected, _ = steps(copy.deepcopy(model), CONFIG, given, Eager)
    found, recorder = steps(model, CONFIG, given, Graphs)
    equal(found, expected)
    assert recorder.replayed == 3
    assert gap(found[-1][0], found[-2][0]) > 0


def test_steps_with_and_without_pairs() -> None:
    model = tiny_model()
    given: list = [(random_batch(), random_pairs() if i % 2 else None) for i in range(8)]
    expected, _ = steps(copy.deepcopy(model), CONFIG, given, Eager)
    found, recorder = steps(model, CONFIG, given, Graphs)
    equal(found, expected)
    assert recorder.recorded >= 2
    assert [bool(told["safety_tokens"]) for *_, told in found] == [False, True] * 4


def test_a_bucket_is_recorded_when_it_comes_again() -> None:
    model = tiny_model()
    with attached(model, CONFIG) as (sap, recorder):
        counts = []
        for _ in range(5):
            sap.step(random_batch())
            counts.append((recorder.recorded, recorder.replayed))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3), (1, 4)]


def test_the_handle_goes_with_its_captured_steps() -> None:
    model = tiny_model()
    with attached(model, CONFIG) as (sap, recorder):
        sap.step(random_batch())
        sap.step(random_batch())
        captured = weakref.ref(sap._graphs)
        del sap
    gc.collect()
    assert captured() is None and recorder.recorded == 1


@pytest.mark.parametrize("change", ["place", "mode", "scaling", "dropout"])
def test_what_a_replay_cannot_follow_is_recorded_anew(change: str) -> None:
    model = tiny_model(lora_dropout=0.3).train(change == "dropout")
    own, batch = copy.deepcopy(model), random_batch()

    def changed(model: nn.Module) -> None:
        layers: list[Any] = [m for m in model.modules() if hasattr(m, "lora_dropout")]
        if change == "place":
            for p in lora(model).values():
                p.data = 1.5 * p.data
        elif change == "mode":
            model.train()
        for layer in layers:
            if change == "scaling":
                layer.scaling["default"] *= 2
            elif change == "dropout":
                layer.lora_dropout["default"].p = 0.1

    results = []
    for each, kind in ((own, Eager), (model, Graphs)):
        torch.manual_seed(3)
        with attached(each, CONFIG, kind) as (sap, recorder):
            for _ in range(3):
                sap.step(batch)
            changed(each)
            for _ in range(3):
                each.zero_grad()
                sap.step(batch)
            results.append(grads(each))
    assert all(torch.equal(g, results[0][name]) for name, g in results[1].items())
    assert recorder.recorded == 2


def test_a_deferred_refusal_of_a_replay() -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    with attached(model, CONFIG) as (sap, recorder):
        for _ in range(3):
            sap.step(batch, pairs)
        probe, weight = sap.probe, next(iter(lora(model).values()))
        kept = weight.detach().clone()
        weight.data.fill_(torch.nan)
        sap.step(batch, pairs)
        weight.data.copy_(kept)
        with pytest.raises(StepRefusedError, match="not finite"):
            sap.step(batch, pairs)
        assert gap(dict(sap.probe), dict(probe)) == 0
        model.zero_grad()
        assert torch.isfinite(sap.step(batch, pairs).loss)
        assert all(torch.isfinite(g).all() for g in grads(model).values())
    assert recorder.replayed == 3


class Failing(Rerun):
    """Fails in the middle of recording."""

    def record(self, function: Any) -> Any:
        function()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_a_failed_recording_leaves_an_eager_step() -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    own = copy.deepcopy(model)
    results = []
    for each, fails in ((own, False), (model, True)):
        with attached(each, CONFIG.replace(direction_every=1)) as (sap, _):
            if fails:
                assert sap._graphs is not None
                sap._graphs._recorder = Failing()
            else:
                sap._graphs = None
            sap.step(batch, pairs)
            sap.step(batch, pairs)
            each.zero_grad()
            if fails:
                with pytest.warns(
                    UserWarning, match=r"recording a step failed \(RuntimeError: operation not permitted"
                ):
                    sap.step(batch, pairs)
                assert not sap._graphs.active
            else:
                sap.step(batch, pairs)
            first = grads(each)
            each.zero_grad()
            sap.step(batch, pairs)  # says nothing more: a warning would be an error here
            results.append((first, grads(each), sap.probe))
    for found, expected in zip(results[1], results[0], strict=True):
        assert gap(dict(found), dict(expected)) < 1e-12  # one of the two on padded rows


def test_a_warning_raised_as_an_error_leaves_everything_as_it_was() -> None:
    model, batch = tiny_model(), random_batch()
    with attached(model, CONFIG) as (sap, _):
        assert sap._graphs is not None
        sap._graphs._recorder = Failing()
        sap.step(batch)
        before, probe = grads(model), sap.probe
        with pytest.raises(UserWarning, match="recording a step failed"):
            sap.step(batch)
        assert gap(grads(model), before) == 0 and all(torch.equal(v, probe[j]) for j, v in sap.probe.items())
        assert not any("forward" in vars(m) for m in model.modules())
        sap.step(batch)
        assert gap(grads(model), {name: 2 * g for name, g in before.items()}) < 1e-12


def test_more_sizes_than_are_kept_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sap_fast.graph._MOST", 1)
    model, small, large = tiny_model(), random_batch(3, 9), random_batch(9, 30)
    with attached(model, CONFIG) as (sap, recorder):
        sap.step(small)
        sap.step(small)
        sap.step(large)
        with pytest.warns(UserWarning, match="more than 1 sizes"):
            sap.step(large)
        sap.step(large)
        sap.step(small)
    assert (recorder.recorded, recorder.replayed) == (1, 2)


def test_without_a_gpu_steps_are_eager_and_say_so_once() -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    own = copy.deepcopy(model)
    config = CONFIG.replace(check="deferred")
    with pytest.warns(
        UserWarning, match=r"the model is on cpu, and CUDA graphs need a CUDA device\. Steps run eagerly"
    ):
        sap = sap_fast.attach(model, config.replace(graph=True))
    with sap, sap_fast.attach(own, config) as other:
        for _ in range(3):
            sap.step(batch, pairs)
            other.step(batch, pairs)
        # On rows as packed, so equal in every bit.
        assert all(torch.equal(g, grads(own)[name]) for name, g in grads(model).items())
        assert all(torch.equal(v, other.probe[j]) for j, v in sap.probe.items())


def test_the_warning_points_at_the_caller() -> None:
    model, batch = tiny_model(), random_batch()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        sap_fast.attach(model, CONFIG.replace(check="deferred", graph=True)).detach()
    assert [w.filename for w in seen] == [__file__]
    with attached(model, CONFIG) as (sap, _), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert sap._graphs is not None
        sap._graphs._recorder = Failing()
        sap.step(batch)
        sap.step(batch)
    assert [w.filename for w in seen] == [__file__]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"graph": True}, "graph=True needs check='deferred', but check is 'now'"),
        ({"graph": 1, "check": "deferred"}, "graph must be True or False, but is 1"),
        (
            {"graph": True, "check": "deferred", "direction_min_cosine": 0.5},
            "direction_min_cosine do not go together: the cosine is read from the device",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_be_captured_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SAPConfig(**settings)


def test_tensors_are_found_and_put_back_in_one_order() -> None:
    x: dict[str, Any] = {"a": (torch.zeros(2), [torch.ones(3), None]), "b": torch.full((), 2.0), "c": "name"}
    found, kind = tensors_of(x)
    assert [t.tolist() for t in found] == [[0, 0], [1, 1, 1], 2]
    again = rebuilt(x, lambda t: t + 1)
    assert [t.tolist() for t in tensors_of(again)[0]] == [[1, 1], [2, 2, 2], 3]
    assert tensors_of(again)[1] == kind and again["c"] == "name" and again["a"][1][1] is None
    others: list[Any] = [{**x, "b": torch.zeros(1)}, {**x, "b": torch.zeros((), dtype=torch.int64)}, {**x, "c": "b"}]
    others += [{**x, "a": (torch.zeros(2), [torch.ones(3), torch.ones(3)])}, {**x, "b": None}]
    assert all(tensors_of(other)[1] != kind for other in others)


def test_nothing_in_a_step_waits_for_the_device_after_packing() -> None:
    """A replay could not read a number, or make a tensor whose size depends on one."""
    model, batch, pairs = tiny_model(targets=ALL_LINEAR), alike(), random_pairs()
    graphs = Graphs(read_decoder(model), Rerun())
    seen: list[set[str]] = []

    class Watched(Graphs):
        def run(self, compute: Any, given: Any) -> Any:
            with Ops() as ops:
                found = graphs.run(compute, given)
            seen.append({name.rpartition(".")[0] for name in ops.seen})
            return found

    with attached(model, SAPConfig.released(probe_layers=(1, 2)), Watched) as (sap, _):
        for _ in range(4):
            sap.step(batch, pairs)
    assert len(seen) == 4
    assert not any(names & WAITING for names in seen), [names & WAITING for names in seen]
