"""Attach and detach: what is found, what is noticed later, and that nothing is left behind."""

import copy
import dataclasses
import gc
import pickle
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import ALL_LINEAR, base_model, lora, random_batch, random_pairs, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

import sap_fast
from sap_fast import SAPConfig, UnsupportedModelError

CONFIG = SAPConfig(probe_layers=(1,))


def peft_model(**settings: Any) -> nn.Module:
    return get_peft_model(base_model(), LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **settings}))


def test_attach_twice_is_refused_and_detach_frees_the_model() -> None:
    model = tiny_model()
    sap = sap_fast.attach(model, CONFIG)
    with pytest.raises(RuntimeError, match="attached already"):
        sap_fast.attach(model, CONFIG)
    sap_fast.attach(copy.deepcopy(model), CONFIG).detach()  # a copy is another model
    sap.detach()
    sap.detach()  # twice is once
    with sap_fast.attach(model, CONFIG):
        pass
    with pytest.raises(RuntimeError, match="step after detach"):
        sap.step(random_batch(), random_pairs())


def test_detach_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama", ALL_LINEAR)
    state = copy.deepcopy(model.state_dict())
    names = {name: set(vars(m)) for name, m in model.named_modules()}
    sap = sap_fast.attach(model, CONFIG)
    sap.step(random_batch(), random_pairs())
    sap.detach()
    assert {name: set(vars(m)) for name, m in model.named_modules()} == names
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("where", [0, 2, 3])
def test_an_error_anywhere_takes_everything_off(where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception is raised inside the k-th layer, also while a checkpointed layer is run again in backward."""
    model = tiny_model("llama", ALL_LINEAR).train()
    model.get_base_model()._set_gradient_checkpointing(True)
    names = {name: set(vars(m)) for name, m in model.named_modules()}
    sap = sap_fast.attach(model, CONFIG)
    from sap_fast.model.layer import Layer

    real, calls = Layer.forward, [0]

    def failing(self: Layer, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4 * where + 2:
            raise MemoryError("no room")
        return real(self, *args)

    monkeypatch.setattr(Layer, "forward", failing)
    with pytest.raises(MemoryError):
        sap.step(random_batch(), random_pairs())
    assert all(p.grad is None for p in lora(model).values())
    assert all("forward" not in vars(m) for m in model.modules())
    monkeypatch.undo()
    sap.step(random_batch(), random_pairs())  # and the handle still works
    sap.detach()
    assert {name: set(vars(m)) for name, m in model.named_modules()} == names


def test_changes_after_attach_are_noticed() -> None:
    model, batch = tiny_model(), random_batch()
    with sap_fast.attach(model, CONFIG) as sap:
        model.merge_adapter()
        with pytest.raises(UnsupportedModelError, match="merged"):
            sap.step(batch)
        model.unmerge_adapter()
        handle = model.get_base_model().model.layers[1].self_attn.register_forward_hook(lambda *_: None)
        with pytest.raises(UnsupportedModelError, match=r"layers.1.self_attn has a hook"):
            sap.step(batch)
        handle.remove()
        sap.step(batch)


def half(model: Any) -> None:
    model.half()


def unload(model: Any) -> None:
    model.unload()


def resize(model: Any) -> None:
    model.get_base_model().resize_token_embeddings(40)


def hook_embeddings(model: Any) -> None:
    model.get_base_model().model.embed_tokens.register_forward_hook(print)


def replace_forward(model: Any) -> None:
    layer = model.get_base_model().model.layers[0]
    layer.forward = layer.forward


def unfreeze(model: Any) -> None:
    model.get_base_model().lm_head.weight.requires_grad_(True)


def freeze(model: Any) -> None:
    next(iter(lora(model).values())).requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (half, r"has moved to torch\.float16"),
        (unload, "holds other modules"),
        (resize, "holds other modules"),
        (hook_embeddings, "embed_tokens has a hook"),
        (replace_forward, "layers.0 was replaced"),
        (unfreeze, "lm_head.weight is trained since attach"),
        (freeze, "is frozen since attach"),
    ],
)
def test_a_model_that_is_no_longer_what_it_was_is_refused(change: Callable, message: str) -> None:
    model = tiny_model()
    with sap_fast.attach(model, CONFIG) as sap:
        change(model)
        with pytest.raises(UnsupportedModelError, match=message):
            sap.step(random_batch(), random_pairs())


def test_a_class_patched_for_the_whole_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: x)
    with pytest.raises(UnsupportedModelError, match=r"forward of LlamaMLP \(layers.0.mlp\) was replaced"):
        sap_fast.attach(tiny_model(), CONFIG)


def test_frozen_and_inactive_adapters_may_have_another_dtype() -> None:
    model = tiny_model(dtype=torch.bfloat16, adapter_dtype=torch.float32)
    model.add_adapter("idle", LoraConfig(r=2, target_modules=["q_proj"]))
    for name, p in model.named_parameters():
        if "lora_A" in name or "idle" in name:
            p.requires_grad_(False)
    with sap_fast.attach(model, CONFIG) as sap:
        sap.step(random_batch(), random_pairs())


def test_a_dropped_handle_frees_the_model() -> None:
    model = tiny_model()
    sap = sap_fast.attach(model, CONFIG)
    with pytest.raises(RuntimeError, match="attached already"):
        sap_fast.attach(model.get_base_model(), CONFIG)  # the same weights
    del sap
    gc.collect()
    sap_fast.attach(model, CONFIG).detach()


def test_a_copy_of_an_attached_model_is_another_model() -> None:
    model = tiny_model()
    with sap_fast.attach(model, CONFIG):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            sap_fast.attach(twin, CONFIG).detach()


def test_a_detached_handle_keeps_no_weights_alive() -> None:
    model = tiny_model()
    sap = sap_fast.attach(model, CONFIG)
    sap.step(random_batch(), random_pairs())
    alive = weakref.ref(model.get_base_model().lm_head)
    sap.detach()
    del model
    gc.collect()
    assert alive() is None
    assert sap.probe.keys() == {1}


def test_an_adapter_activated_later_is_noticed() -> None:
    model = peft_model(target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    with sap_fast.attach(model, CONFIG) as sap:
        model.base_model.set_adapter(["default", "other"])
        for name, p in model.named_parameters():
            p.requires_grad_(wanted[name])
        with pytest.raises(UnsupportedModelError, match=r"active adapter of layers\.0 has changed"):
            sap.step(random_batch(), random_pairs())


def test_hooks_that_transformers_leaves_behind_are_not_in_the_way() -> None:
    model, batch = tiny_model(), random_batch()
    model(input_ids=batch["input_ids"], output_hidden_states=True)
    with sap_fast.attach(model, CONFIG) as sap:
        sap.step(batch, random_pairs())


def test_inference_mode_is_refused() -> None:
    sap = sap_fast.attach(tiny_model(), CONFIG)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        sap.step(random_batch(), random_pairs())


def test_adapters_injected_by_transformers_are_found() -> None:
    model = base_model().requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with sap_fast.attach(model, CONFIG) as sap:
        sap.step(random_batch(), random_pairs())
    assert all(p.grad is not None for p in lora(model).values())


def test_layers_are_found_wherever_they_lie() -> None:
    """The hard-coded path of the published code fails on a model inside another."""
    model = tiny_model()
    base = model.get_base_model()
    base.trunk = base.model
    del base.model
    from sap_fast.model.read import read_decoder

    decoder = read_decoder(model)
    assert len(decoder.layers) == 4
    assert len(decoder.trained) == 4 * 2 * 2


def test_rslora_and_unadapted_layers_are_read_from_the_modules() -> None:
    model = peft_model(use_rslora=True, lora_alpha=4, layers_to_transform=[1, 3])
    from sap_fast.model.read import read_decoder

    decoder = read_decoder(model)
    assert [layer.qkv[0].lora is not None for layer in decoder.layers] == [False, True, False, True]
    assert decoder.layers[1].qkv[0].lora.scaling["default"] == pytest.approx(4 / 2**0.5)


def test_input_require_grads_hook_is_not_in_the_way() -> None:
    """What Trainer sets for checkpointing: a hook on the embeddings that computes nothing."""
    model = tiny_model()
    model.enable_input_require_grads()
    with sap_fast.attach(model, CONFIG) as sap:
        sap.step(random_batch(), random_pairs())


def test_autocast_is_refused_with_the_way_out() -> None:
    model = tiny_model(dtype=torch.float32)
    sap = sap_fast.attach(model, CONFIG)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"dtype=torch\.bfloat16"):
        sap.step(random_batch(), random_pairs())


def test_the_page_on_families_lists_the_fields_of_an_entry() -> None:
    from sap_fast.model.families import Family

    page = (Path(sap_fast.__file__).parent / "model" / "families.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|(?: `(.*?)`)?", page, re.M)
    assert [name for name, _ in listed] == [field.name for field in dataclasses.fields(Family)]
    entry = Family("", "")
    assert all(eval(default) == getattr(entry, name) for name, default in listed if default)


@pytest.mark.parametrize(
    ("family", "wrong", "message"),
    [
        ("gemma3", {"norm_after_mlp": None}, r"layers\.0 .*does not name: \['post_feedforward_layernorm'\]"),
        ("qwen3", {"k_norm": None}, r"layers\.0\.self_attn .*does not name: \['k_norm'\]"),
        ("gemma3", {"embed_scale": None}, "the embeddings is a .*Gemma3TextScaledWordEmbedding, not a Embedding"),
        ("gemma3", {"rotary_by_layer_type": False}, "a table for each layer type"),
        ("qwen3", {"rotary_by_layer_type": True}, "one table for all layers"),
        ("gemma3", {"classes": {}}, "expected one Gemma3Model in the model, but found 0"),
    ],
    ids=str,
)
def test_an_entry_that_leaves_something_out_is_refused(
    family: str, wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sap_fast.model import families
    from sap_fast.model import read as convert

    entries = [dataclasses.replace(f, **wrong) if f.prefix.lower() == family else f for f in families.FAMILIES]
    monkeypatch.setattr(convert, "FAMILIES", entries)
    with pytest.raises(UnsupportedModelError, match=message):
        sap_fast.attach(tiny_model(family), CONFIG)


def test_rotary_tables_are_computed_once_a_pass_and_layer_type(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    from sap_fast.batch.rows import pack
    from sap_fast.model.read import read_decoder

    real, seen = Gemma3RotaryEmbedding.forward, []

    def counted(self: nn.Module, x: Any, position_ids: Any, layer_type: str) -> Any:
        seen.append(layer_type)
        return real(self, x, position_ids, layer_type)

    decoder = read_decoder(tiny_model("gemma3"))
    rows = pack(random_batch(), vocab_size=decoder.vocab_size, device=decoder.device)
    monkeypatch.setattr(Gemma3RotaryEmbedding, "forward", counted)
    with decoder.installed():
        decoder.forward(decoder.start(rows, None))
    assert sorted(seen) == ["full_attention", "sliding_attention"]
