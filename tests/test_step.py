"""The invariants of a step, on tiny models in float64."""

import copy
from typing import Any
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
    task_loss,
    tiny_model,
    unit_direction,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sap_fast
from sap_fast import SAPConfig, StepRefusedError, passes

CONFIG = SAPConfig(probe_layers=(1, 2), strength=0.05)
CONFIGS = {
    "lagged": CONFIG,
    "fresh-store": CONFIG.replace(schedule="fresh", restart="store"),
    "fresh-recompute": CONFIG.replace(schedule="fresh", restart="recompute"),
    "difference": CONFIG.replace(gradient="finite_difference", radius=1e-3),
    "fresh-difference": CONFIG.replace(schedule="fresh", gradient="finite_difference", radius=1e-3),
    "project": CONFIG.replace(guard="project"),
    "counter": CONFIG.replace(guard="counter"),
    "probe+project": CONFIG.replace(guard="probe+project"),
    "normalised": CONFIG.replace(probe_update="normalised"),
    "released": SAPConfig.released(probe_layers=(1, 2)),
    "paper": SAPConfig.paper(probe_layers=(1, 2)),
    "last-layer": CONFIG.replace(probe_layers=(3,)),
    "every-layer": CONFIG.replace(probe_layers=(0, 1, 2, 3), schedule="fresh"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in lora(model).items()}


def gap(a: dict, b: dict) -> float:
    """Relative distance of two dicts of tensors, taken together."""
    assert a.keys() == b.keys()
    distance = sum(float((a[k] - b[k]).square().sum()) for k in b)
    return (distance / sum(float(b[k].square().sum()) for k in b)) ** 0.5


def plain_gradient(model: nn.Module, batch: dict) -> dict[str, Tensor]:
    found = torch.autograd.grad(task_loss(model, batch), list(lora(model).values()))
    return dict(zip(lora(model), found, strict=True))


def two_steps(model: nn.Module, config: SAPConfig, batches: list, pairs: list) -> tuple[dict, dict, Any]:
    """Two steps without an optimizer, so that a lagged probe is in use: gradients and probe of the second."""
    with sap_fast.attach(model, config) as sap:
        for batch, pair in zip(batches, pairs, strict=True):
            model.zero_grad()
            report = sap.step(batch, pair)
        return grads(model), sap.probe, report


@every_config
def test_step_writes_no_weight_and_leaves_no_trace(config: SAPConfig) -> None:
    model = tiny_model("llama", ALL_LINEAR)
    before, keys = copy.deepcopy(model.state_dict()), set(vars(model))
    modules = {name: set(vars(m)) for name, m in model.named_modules()}
    two_steps(model, config, [random_batch(), random_batch()], [random_pairs(), random_pairs()])
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert set(vars(model)) == keys
    assert {name: set(vars(m)) for name, m in model.named_modules()} == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@every_config
def test_without_pairs_a_step_is_plain_fine_tuning(config: SAPConfig) -> None:
    model, batch = tiny_model("qwen2", ALL_LINEAR), random_batch(ragged=False)
    truth = plain_gradient(model, batch)
    with sap_fast.attach(model, config) as sap:
        sap.step(batch, random_pairs())  # a probe is found: it must not act on the next step
        model.zero_grad()
        report = sap.step(batch)
    assert gap(grads(model), truth) < 1e-5  # transformers casts to float32
    assert float(report.steering) == 0
    assert all(float(norm) == 0 for norm in report.probe_norm.values())


@pytest.mark.parametrize("schedule", ["lagged", "fresh"])
def test_zero_strength_is_plain_fine_tuning(schedule: str) -> None:
    model, batch = tiny_model(), random_batch()
    config = CONFIG.replace(schedule=schedule, strength=0.0)
    found, _, _ = two_steps(model, config, [batch, batch], [random_pairs(), random_pairs()])
    with sap_fast.attach(model, config) as sap:
        model.zero_grad()
        sap.step(batch)
    assert gap(found, grads(model)) < 1e-12


@every_config
def test_micro_batches_equal_one_big_batch(config: SAPConfig) -> None:
    model, big, pairs = tiny_model("mistral"), random_batch(5, 9), random_pairs()
    parts = [
        {k: v[:1] for k, v in big.items()},
        {k: v[1:3] for k, v in big.items()},
        {k: v[3:] for k, v in big.items()},
    ]
    whole = two_steps(model, config, [big, big], [pairs, pairs])
    split = two_steps(model, config, [parts, parts], [pairs, pairs])
    assert gap(split[0], whole[0]) < 1e-10
    if split[1]:
        # A finite difference divides rounding of 1e-16 by its radius.
        assert gap(split[1], whole[1]) < (1e-8 if config.gradient == "finite_difference" else 1e-10)
    assert float(split[2].loss) == pytest.approx(float(whole[2].loss), rel=1e-12)
    assert split[2].tokens == whole[2].tokens


@pytest.mark.parametrize("targets", [ALL_LINEAR, ("q_proj",), ("down_proj",)], ids=len)
@pytest.mark.parametrize("layers", [(0, 2), (2, 3), (3,)], ids=str)
def test_fresh_restart_stores_or_recomputes_to_the_same_gradient(layers: tuple, targets: tuple) -> None:
    model, batch, pairs = tiny_model("qwen2", targets), random_batch(), random_pairs()
    store, recompute = (
        two_steps(model, CONFIGS[name].replace(probe_layers=layers), [batch] * 2, [pairs] * 2)
        for name in ("fresh-store", "fresh-recompute")
    )
    assert gap(store[0], recompute[0]) < 1e-12


@pytest.mark.parametrize("config", ["lagged", "fresh-store", "fresh-recompute"])
def test_checkpointing_and_dropout_change_nothing_but_memory(config: str) -> None:
    model = tiny_model("llama", ALL_LINEAR, lora_dropout=0.3).train()
    batch, pairs = random_batch(), random_pairs()

    def run() -> tuple[dict, dict, Any]:
        torch.manual_seed(7)
        return two_steps(model, CONFIGS[config], [[batch, batch]] * 2, [pairs] * 2)

    plain = run()
    model.get_base_model()._set_gradient_checkpointing(True)
    checkpointed = run()
    assert gap(checkpointed[0], plain[0]) < 1e-12
    assert gap(checkpointed[1], plain[1]) < 1e-12
    model.eval()
    assert gap(run()[0], plain[0]) > 1e-3  # dropout was live


def test_inner_and_outer_pass_share_their_dropout_masks() -> None:
    """Else storing and recomputing what lies beneath the probe would differ."""
    model = tiny_model("llama", ALL_LINEAR, lora_dropout=0.3).train()
    batch, pairs, found = random_batch(), random_pairs(), []
    for restart in ("store", "recompute"):
        torch.manual_seed(7)
        found.append(two_steps(model, CONFIG.replace(schedule="fresh", restart=restart), [batch] * 2, [pairs] * 2))
    assert gap(found[0][0], found[1][0]) < 1e-12


class _Halves(TorchDispatchMode):
    """Counts the backward ops by how many halves of cotangents they carry."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[str, int], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name.endswith("_backward") and str(func).startswith("sap_fast."):
            dy = next(a[0] if isinstance(a, (list, tuple)) else a for a in args if a is not None)
            self.seen[name, dy.shape[0]] = self.seen.get((name, dy.shape[0]), 0) + 1
        return func(*args, **(kwargs or {}))


def test_beneath_the_lowest_probe_the_backward_carries_one_half() -> None:
    model, batch = tiny_model("llama", ALL_LINEAR, layers=4), random_batch()
    decoder = sap_fast.attach(model, CONFIG)._decoder
    rows = sap_fast.batch.pack(batch, vocab_size=decoder.vocab_size, device=decoder.device)
    u = {name: torch.randn_like(p) for name, p in lora(model).items()}
    probe = sap_fast.probe.Probe.zeros((1,), 32, decoder.device, torch.float64)
    with decoder.installed(), _Halves() as halves:
        passes.dual(decoder, [passes.Micro(rows, None)], probe, u)
    # The probe sits on layer 1's output: layers 0 and 1 lie beneath it, 2 and 3 above.
    for name in ("attention_backward", "glu_backward", "rotary_backward"):
        assert halves.seen[name, 1] == 2
        assert halves.seen[name, 2] == 2
    assert halves.seen["lora_linear_backward", 1] == 2 * 4
    assert halves.seen["lora_linear_backward", 2] == 2 * 4
    # Two norms a layer but for the very first, which has no update to add; then the final norm.
    assert halves.seen["probe_rms_norm_backward", 1] == 3
    assert halves.seen["probe_rms_norm_backward", 2] == 5


def test_project_takes_away_the_component_toward_harm_and_nothing_else() -> None:
    model, pairs = tiny_model(), random_pairs()
    seen = set()
    for _ in range(6):
        batch = random_batch()
        truth = plain_gradient(model, batch)
        found, _, report = two_steps(model, CONFIG.replace(guard="project"), [batch, batch], [pairs, pairs])
        slope = float(report.loss_dot)
        u = _direction_of(model, pairs)
        if slope < 0:
            expected = {k: truth[k] - slope * u[k] for k in truth}
            assert abs(sum(float((found[k] * u[k]).sum()) for k in u)) < 1e-5
        else:
            expected = truth
        seen.add(slope < 0)
        assert gap(found, expected) < 1e-5
    assert seen == {True, False}, "the data showed only one of the two cases"


def test_counter_adds_its_share_of_the_direction() -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    truth, u = plain_gradient(model, batch), _direction_of(model, pairs)
    norm = sum(float(g.square().sum()) for g in truth.values()) ** 0.5
    found, _, _ = two_steps(model, CONFIG.replace(guard="counter", counter=0.3), [batch] * 2, [pairs] * 2)
    assert gap(found, {k: truth[k] + 0.3 * norm * u[k] for k in truth}) < 1e-5


def _direction_of(model: nn.Module, pairs: dict) -> dict[str, Tensor]:
    with everything_in_float64(model):
        return unit_direction(model, pairs)


def test_gradients_accumulate_as_in_pytorch() -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    config = CONFIG.replace(guard="counter")
    with sap_fast.attach(model, config) as sap:
        sap.step(batch, pairs)
        once = grads(model)
        sap.step(batch, pairs)
    assert gap(grads(model), {k: 2 * g for k, g in once.items()}) < 1e-12


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
    assert {j: float(n) for j, n in second.probe_norm.items()} == {j: float(v.norm()) for j, v in used.items()}
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


@pytest.mark.parametrize(
    ("restart", "micros", "calls"),
    [
        ("store", 1, 4 + 2),
        ("store", 2, 2 * (4 + 2)),
        ("recompute", 1, 4 + 4),
        ("auto", 1, 4 + 2),
        ("auto", 2, 2 * (4 + 4)),
    ],
)
def test_the_outer_pass_restarts_above_the_probe(restart: str, micros: int, calls: int) -> None:
    """Layers 0 and 1 lie beneath the probe on layer 1: stored, they are not run again."""
    from sap_fast.decoder import Layer

    model, real, seen = tiny_model(), Layer.forward, [0]

    def counted(self: Layer, *args: Any) -> Any:
        seen[0] += 1
        return real(self, *args)

    config = CONFIG.replace(schedule="fresh", restart=restart, probe_layers=(1,))
    with sap_fast.attach(model, config) as sap, mock.patch.object(Layer, "forward", counted):
        sap.step([random_batch()] * micros, random_pairs())
    assert seen[0] == 4 + calls  # the pairs' pass runs every layer once


def test_dropout_gradients_are_those_of_peft_with_the_same_masks() -> None:
    from sap_fast.ops import dropout_mask

    model, batch = tiny_model("llama", ALL_LINEAR, lora_dropout=0.3).train(), random_batch(ragged=False)
    with sap_fast.attach(model, CONFIG) as sap:
        torch.manual_seed(5)
        sap.step(batch)
        decoder = sap._decoder
    torch.manual_seed(5)
    seed = torch.randint(2**31, ())
    rows = batch["input_ids"].numel()

    def masked(salt: int) -> Any:
        def forward(x: Tensor) -> Tensor:
            return x * dropout_mask(seed, salt, rows, x.shape[-1], 0.3).view(*x.shape)

        return forward

    for layer in decoder.layers:
        for projection in layer.projections:
            projection.lora.lora_dropout["default"].forward = masked(projection.salt)
    with everything_in_float64(model):
        truth = plain_gradient(model, batch)
    assert gap(grads(model), truth) < 1e-12


def test_steering_is_the_first_order_change_of_the_slope() -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    slopes, steering = [], 0.0
    for strength in (0.0, 1e-4):
        _, _, report = two_steps(model, CONFIG.replace(strength=strength), [batch] * 2, [pairs] * 2)
        slopes.append(float(report.loss_dot))
        steering = float(report.steering)
    assert slopes[1] - slopes[0] == pytest.approx(steering, rel=1e-3)


@every_config
def test_evaluation_and_checkpoints_know_no_probe(config: SAPConfig, tmp_path: Any) -> None:
    from safetensors import safe_open

    model, batch = tiny_model(), random_batch()
    ids = {k: batch[k] for k in ("input_ids", "attention_mask")}
    before = model(**ids).logits
    with sap_fast.attach(model, config) as sap:
        sap.step(batch, random_pairs())
        assert torch.equal(model(**ids).logits, before)
        model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) == len(lora(model))
        assert all("lora_" in key for key in file.keys())  # noqa: SIM118


def test_interrupt_while_writing_changes_nothing() -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    with sap_fast.attach(model, CONFIG) as sap:
        sap.step(batch, pairs)
        before, probe = grads(model), sap.probe
        state = copy.deepcopy(model.state_dict())
        with (
            mock.patch.object(passes, "dual", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            sap.step(batch, pairs)
        assert gap(grads(model), before) == 0
        # A weight whose gradient is missing fails the writing when all others have been written.
        with (
            mock.patch.dict(sap._decoder.trained, {"broken": mock.Mock(grad=None)}),
            pytest.raises(KeyError),
        ):
            sap._commit(mock.Mock(theta={k: torch.ones_like(g) for k, g in before.items()}))
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
    """The pairs with the sides exchanged where the model prefers the rejected one."""
    wrong = (margins(model, pairs, per_token=False) < 0).nonzero()[:, 0].tolist()
    order = list(range(4))
    for i in wrong:
        order[i], order[i + 2] = order[i + 2], order[i]
    return {key: value[order] for key, value in pairs.items()}


def test_frozen_adapter_weights_take_no_part() -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    truth = plain_gradient(model, batch)
    found, _, _ = two_steps(model, CONFIG.replace(strength=0.0), [batch] * 2, [pairs] * 2)
    assert all("lora_B" in name for name in found)
    assert gap(found, truth) < 1e-5
