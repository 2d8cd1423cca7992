"""What others' packages change when they take part in the benchmark of a whole step, and what of it is undone."""

import copy
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from test_benchmark_step import given, tiny
from torch import nn

from benchmarks.published.parts import task_loss
from benchmarks.step import peers
from benchmarks.step.suite import Suite


def test_ligers_patches_stay_with_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes to the module that all models of a kind share are undone, too."""
    from transformers.models.qwen2 import modeling_qwen2 as shared

    turn, calls = shared.apply_rotary_pos_emb, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return turn(*args, **kwargs)

    def apply(model: nn.Module) -> None:
        shared.apply_rotary_pos_emb = counted
        shared.of_liger = 1

    patched = peers.Patched(tiny(), apply)
    assert shared.apply_rotary_pos_emb is turn and not hasattr(shared, "of_liger")
    model, batch = tiny(), given().batch
    loss = task_loss(model, batch)
    assert not calls
    with patched.applied():
        assert shared.of_liger == 1
        assert torch.equal(task_loss(model, batch), loss)
    assert len(calls) == 4  # one a layer
    assert shared.apply_rotary_pos_emb is turn and not hasattr(shared, "of_liger")


def test_what_fails_in_setting_up_a_peer_is_a_reason_to_skip_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda package: "9.9")
    monkeypatch.setitem(sys.modules, "trl", ModuleType("trl"))  # without its trainer
    suite = Suite("cpu", 1, ["trl-sft", "liger-sft"], None)
    assert suite.measure(tiny(), "float32", given()) == []
    reasons = {entry["contender"]: entry["reason"] for entry in suite.skipped}
    assert reasons["trl-sft"].startswith("trl 9.9: ImportError: cannot import name 'SFTConfig'")
    assert reasons["liger-sft"] == "Liger's kernels need a GPU"
    assert not suite.refused


def test_trl_is_called_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trainer adds to the batch that it is given."""
    made: list[dict[str, Any]] = []

    class SFTConfig:
        def __init__(self, **settings: Any) -> None:
            made.append(settings)

    class SFTTrainer:
        def __init__(self, model: Any, args: Any, *, train_dataset: Any, processing_class: Any) -> None:
            assert processing_class.pad_token_id == 0 and len(train_dataset) == 4
            self.model = model

        def compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            inputs["use_cache"] = False
            return model(**inputs).loss

    stub = ModuleType("trl")
    stub.SFTConfig, stub.SFTTrainer = SFTConfig, SFTTrainer
    monkeypatch.setitem(sys.modules, "trl", stub)
    monkeypatch.setattr(peers, "installed", lambda package: "9.9")
    suite = Suite("cpu", 1, ["trl-sft"], None)
    data = given()
    before = copy.deepcopy(dict(data.batch))
    (row,) = suite.measure(tiny(), "float32", data)
    assert row["contender"] == "trl-sft" and made[0]["gradient_checkpointing"] is False
    assert data.batch.keys() == before.keys()
