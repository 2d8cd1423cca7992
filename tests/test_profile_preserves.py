"""The profiler leaves a model as it was, whatever happens, and refuses what it cannot use."""

from typing import Any

import pytest
import torch
from oracle import lora, random_batch, random_pairs, tiny_model
from profiles import f32, profiled, stopping
from steps import CONFIG
from torch import nn

import sap_fast
from sap_fast import BatchError
from sap_fast.profiling.meters import Clock

# What is left of the model


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and its surroundings that a caller could notice, tensors by identity and version."""
    dicts = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_buffers", "_modules")
    return {
        "weights": [(id(p), p.data_ptr(), p._version, p.requires_grad) for p in model.parameters()],
        "bits": [p.detach().clone() for p in model.parameters()],
        "gradients": [(id(p.grad), p.grad is not None and p.grad._version) for p in model.parameters()],
        "gradient_bits": [p.grad.clone() for p in model.parameters() if p.grad is not None],
        "weight_hooks": [p._backward_hooks for p in model.parameters()],
        "modules": [
            (name, module.training, sorted(module.__dict__), [list(getattr(module, d)) for d in dicts])
            for name, module in model.named_modules()
        ],
        "random": torch.get_rng_state(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def changed(model: nn.Module, before: dict[str, Any]) -> list[str]:
    after = state(model)
    return [what for what in before if not same(after[what], before[what])]


def prepared() -> nn.Module:
    """Make a model whose flags and gradients are not the usual ones."""
    model = tiny_model(dtype=f32, lora_dropout=0.1)
    next(module for name, module in model.named_modules() if name.endswith("layers.1")).train()
    for i, p in enumerate(lora(model).values()):
        p.grad = torch.randn_like(p) if i % 3 else None
    return model


def test_the_model_is_left_as_it_was() -> None:
    model = prepared()
    before = state(model)
    profiled(CONFIG.replace(probe_every=2, tangent_fraction=0.4), model=model, steps=2)
    assert changed(model, before) == []


# A round has three steps: warm-up, totals, phases, counts.
@pytest.mark.parametrize("at", [1, 3, 6, 7, 9, 12])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["interrupt", "error"])
def test_the_model_is_left_as_it_was_whatever_happens(
    monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException
) -> None:
    model = prepared()
    before = state(model)
    stopping(monkeypatch, at, error)
    with pytest.raises(type(error)):
        profiled(model=model)
    assert changed(model, before) == []
    with sap_fast.attach(model, CONFIG) as sap:  # it is attached no more
        sap.step(random_batch(), random_pairs())


def test_the_model_is_left_as_it_was_by_an_interrupt_in_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(self: Clock, phase: str) -> None:
        if phase == "backward_beneath":
            raise KeyboardInterrupt

    monkeypatch.setattr(Clock, "begin", begin)
    model = prepared()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        profiled(model=model)
    assert changed(model, before) == []


def test_a_refused_step_leaves_the_model_as_it_was() -> None:
    model = prepared()
    with torch.no_grad():
        next(p for name, p in lora(model).items() if "lora_B" in name).fill_(float("inf"))
    before = state(model)
    with pytest.raises(sap_fast.StepRefusedError):
        profiled(model=model)
    assert changed(model, before) == []


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, but is 0"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"warmup": 0}, "warmup must be a whole number of at least 1, but is 0"),
        ({"warmup": True}, "warmup must be a whole number"),
        ({"peak_flops": 0.0}, "peak_flops must be positive and finite"),
        ({"bandwidth": float("inf")}, "bandwidth must be positive and finite"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profiled(**settings)


@pytest.mark.parametrize(
    ("batches", "pairs", "message"),
    [
        ([], None, "batches is empty"),
        (None, [], "pairs is empty"),
        (7, None, "batches must be a dict of tensors, or several of them, but is a int"),
        ([[random_batch()]], None, r"batches\[0\] must be a dict of tensors, but is a list; .* not with several"),
        ([random_batch(), {"input_ids": torch.ones(1, 2)}], None, r"batches\[1\] lacks \['labels'\]"),
        ([{**random_batch(), "note": "x"}], None, r"batches\[0\] holds \['note'\], which are no tensors"),
        (None, random_batch(3), "pairs has 3 rows; it must be even"),
    ],
)
def test_bad_batches(batches: Any, pairs: Any, message: str) -> None:
    model, batch, pair = prepared(), random_batch(), random_pairs()
    before = state(model)
    seen: list[str] = []
    with pytest.raises(BatchError, match=message) as caught:
        sap_fast.profile(
            model,
            batch if batches is None else batches,
            pair if pairs is None else pairs,
            CONFIG,
            tell=seen.append,
        )
    assert not seen  # nothing was run
    assert changed(model, before) == []
    assert "even" not in message or caught.value.__notes__ == ["This is of pairs[0]."]


def test_only_as_much_is_drawn_as_is_used() -> None:
    drawn = []

    def endless() -> Any:
        while True:
            drawn.append(random_batch())
            yield drawn[-1]

    found = sap_fast.profile(tiny_model(dtype=f32), endless(), random_pairs(), CONFIG, steps=2, warmup=1)
    assert len(drawn) == 3
    assert found.settings["steps"] == 2


def test_an_attached_model() -> None:
    model = tiny_model()
    with sap_fast.attach(model, CONFIG), pytest.raises(RuntimeError, match="attached already"):
        profiled(model=model)
