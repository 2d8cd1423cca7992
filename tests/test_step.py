"""The invariants of a step, on tiny models in float64."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from oracle import (
    ALL_LINEAR,
    everything_in_float64,
    lora,
    random_batch,
    random_pairs,
    tiny_model,
    unit_direction,
)
from steps import CONFIG, CONFIGS, every_config, gap, grads, plain_gradient, two_steps
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sap_fast
from benchmarks.common import solved
from sap_fast import SAPConfig
from sap_fast.method.flat import Flat


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


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("config", ["lagged", "fresh-store", "fresh-recompute"])
def test_checkpointing_and_dropout_change_nothing_but_memory(config: str, family: str) -> None:
    model = tiny_model(family, ALL_LINEAR, lora_dropout=0.3).train()
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
    """Storing and recomputing what lies beneath the probe would differ otherwise."""
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
        name = str(func).split(".")[1].removesuffix("_")  # in place or not
        if name.endswith("_backward") and str(func).startswith("sap_fast."):
            dy = next(a[0] if isinstance(a, (list, tuple)) else a for a in args if a is not None)
            self.seen[name, dy.shape[0]] = self.seen.get((name, dy.shape[0]), 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("family", "further_norms"), [("llama", 0), ("qwen3", 2), ("gemma3", 4)])
def test_beneath_the_lowest_probe_the_backward_carries_one_half(family: str, further_norms: int) -> None:
    model, batch = tiny_model(family, ALL_LINEAR, layers=4), random_batch()
    decoder = sap_fast.attach(model, CONFIG).decoder
    rows = sap_fast.batch.rows.pack(batch, vocab_size=decoder.vocab_size, device=decoder.device)
    u = Flat.of({name: torch.randn_like(p) for name, p in lora(model).items()})
    probe = sap_fast.method.probe.Probe.zeros((1,), 32, decoder.device, torch.float64)
    with decoder.installed(), _Halves() as halves:
        solved.dual(decoder, [sap_fast.method.passes.Micro(rows, None)], probe, u)
    # The probe sits on layer 1's output: layers 0 and 1 lie beneath it, 2 and 3 above.
    for name in ("attention_backward", "glu_backward", "rotary_backward"):
        assert halves.seen[name, 1] == 2
        assert halves.seen[name, 2] == 2
    assert halves.seen["lora_linear_backward", 1] == 2 * 4
    assert halves.seen["lora_linear_backward", 2] == 2 * 4
    # Two norms a layer but for the very first, which has no update to add; then the final norm.
    assert halves.seen["probe_rms_norm_backward", 1] == 3
    assert halves.seen["probe_rms_norm_backward", 2] == 5
    # Norms of heads and of outputs, in each layer.
    for half in (1, 2):
        assert halves.seen.get(("rms_norm_backward", half), 0) == 2 * further_norms


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
    from sap_fast.model.layer import Layer

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
        decoder = sap.decoder
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


def test_frozen_adapter_weights_take_no_part() -> None:
    model, batch, pairs = tiny_model(), random_batch(), random_pairs()
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    truth = plain_gradient(model, batch)
    found, _, _ = two_steps(model, CONFIG.replace(strength=0.0), [batch] * 2, [pairs] * 2)
    assert all("lora_B" in name for name in found)
    assert gap(found, truth) < 1e-5
