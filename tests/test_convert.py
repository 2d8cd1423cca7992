"""Attach and detach: what is refused, by name, and that nothing is left behind."""

import copy
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


def merged() -> nn.Module:
    model = tiny_model()
    model.merge_adapter()
    return model


def disabled() -> nn.Module:
    model = tiny_model()
    model.base_model.disable_adapter_layers()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return model


def two_adapters() -> nn.Module:
    model = tiny_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def with_trained_norm() -> nn.Module:
    model = tiny_model()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def with_hook() -> nn.Module:
    model = tiny_model()
    model.get_base_model().model.layers[2].mlp.register_forward_hook(lambda *_: None)
    return model


def patched_forward() -> nn.Module:
    model = tiny_model()
    norm = model.get_base_model().model.norm
    norm.forward = norm.forward
    return model


def with_attention_dropout() -> nn.Module:
    model = tiny_model()
    model.get_base_model().config.attention_dropout = 0.1
    return model


def with_relu() -> nn.Module:
    model = tiny_model()
    model.get_base_model().config.hidden_act = "relu"
    return model


def with_other_linear() -> nn.Module:
    class FakeQuantized(nn.Linear):
        pass

    model = tiny_model()
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.down_proj = FakeQuantized(48, 32, bias=False).double().requires_grad_(False)
    return model


def other_family() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=37, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return get_peft_model(GPT2LMHeadModel(config), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


def frozen() -> nn.Module:
    return tiny_model().requires_grad_(False)


def half_precision() -> nn.Module:
    return tiny_model(dtype=torch.float16)


def other_method() -> nn.Module:
    from peft import IA3Config

    return get_peft_model(base_model(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))


def data_parallel() -> nn.Module:
    return nn.DataParallel(tiny_model())


REFUSED = {
    "other family": (other_family, "GPT2LMHeadModel has no rule table"),
    "DoRA": (lambda: peft_model(use_dora=True), r"q_proj.*DoRA"),
    "modules_to_save": (lambda: peft_model(modules_to_save=["lm_head"]), "modules_to_save"),
    "lora_bias": (lambda: peft_model(lora_bias=True, init_lora_weights=True), r"q_proj.*lora_bias"),
    "trained bias": (
        lambda: with_trained_norm(),
        "norm.weight is trained but is not a LoRA weight",
    ),
    "merged": (merged, r"merged adapters \['default'\]"),
    "disabled": (disabled, "adapters disabled"),
    "several adapters": (two_adapters, r"several active adapters \['default', 'other'\]"),
    "LoRA on the head": (
        lambda: peft_model(target_modules=["q_proj", "lm_head"]),
        "output head carries an adapter",
    ),
    "LoRA on the embeddings": (
        lambda: peft_model(target_modules=["q_proj", "embed_tokens"]),
        "embeddings carries an adapter",
    ),
    "hook": (with_hook, r"layers.2.mlp has a hook"),
    "replaced forward": (patched_forward, r"forward of model.norm was replaced"),
    "attention dropout": (with_attention_dropout, "attention_dropout=0.1"),
    "activation": (with_relu, "hidden_act='relu' has no pair rule"),
    "unknown linear": (with_other_linear, r"layers.0.mlp.down_proj is a .*FakeQuantized"),
    "no LoRA weight": (frozen, "no trainable LoRA weight"),
    "no adapter at all": (lambda: base_model().requires_grad_(False), "no trainable LoRA weight"),
    "full fine-tuning": (base_model, "is trained but is not a LoRA weight"),
    "float16": (half_precision, "float16"),
    "other PEFT method": (other_method, "only LoRA has a pair rule"),
    "DataParallel": (data_parallel, "DataParallel is not supported"),
    "several devices": (lambda: _on_two_devices(), "several devices"),
}


def _on_two_devices() -> nn.Module:
    model = tiny_model()
    model.get_base_model().model.layers[3].to("meta")
    return model


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, about what is being refused
def test_refused_by_name_before_anything_changes(make: Any, message: str) -> None:
    model = make()
    names = {name: set(vars(m)) for name, m in model.named_modules()}
    with pytest.raises(UnsupportedModelError, match=message):
        sap_fast.attach(model, CONFIG)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch.nn.parallel.distributed.DistributedDataParallel", "DDP is not supported yet"),
        ("torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel", "FSDP"),
        ("deepspeed.runtime.engine.DeepSpeedEngine", "DeepSpeed is not supported"),
        ("torch._dynamo.eval_frame.OptimizedModule", "before torch.compile"),
    ],
)
def test_wrappers_are_refused(name: str, message: str) -> None:
    module, _, cls = name.rpartition(".")
    wrapper = type(cls, (nn.Module,), {"__module__": module})()
    with pytest.raises(UnsupportedModelError, match=message):
        sap_fast.attach(wrapper, CONFIG)


def test_real_data_parallel_wrapper_has_the_name_that_is_refused() -> None:
    from sap_fast.convert import _WRAPPERS
    from sap_fast.families import type_name

    assert type_name(nn.DataParallel(nn.Linear(1, 1))) in _WRAPPERS
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    for cls in (DistributedDataParallel, FullyShardedDataParallel):
        assert f"{cls.__module__}.{cls.__qualname__}" in _WRAPPERS


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((1, 4), "layers 0 to 3"),
        ((-1,), "layers 0 to 3"),
        ((2, 2), "repeats"),
        ((), "empty"),
        (("a",), "'a'"),
    ],
)
def test_bad_probe_layers_are_refused(layers: tuple, message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        sap_fast.attach(model, SAPConfig(probe_layers=layers))
    sap_fast.attach(model, CONFIG).detach()  # the refusal left no mark


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
    """An exception inside the k-th layer, also while a checkpointed layer is run again in backward."""
    model = tiny_model("llama", ALL_LINEAR).train()
    model.get_base_model()._set_gradient_checkpointing(True)
    names = {name: set(vars(m)) for name, m in model.named_modules()}
    sap = sap_fast.attach(model, CONFIG)
    from sap_fast.decoder import Layer

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
    from sap_fast.convert import read_decoder

    decoder = read_decoder(model)
    assert len(decoder.layers) == 4
    assert len(decoder.trained) == 4 * 2 * 2


def test_rslora_and_unadapted_layers_are_read_from_the_modules() -> None:
    model = peft_model(use_rslora=True, lora_alpha=4, layers_to_transform=[1, 3])
    from sap_fast.convert import read_decoder

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
