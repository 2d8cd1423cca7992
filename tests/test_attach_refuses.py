"""What attach refuses, by name, before anything changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import base_model, lora, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

import sap_fast
from sap_fast import SAPConfig, UnsupportedModelError

CONFIG = SAPConfig(probe_layers=(1,))
TINY = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


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


def changed(change: Callable[[Any], None], family: str = "llama") -> Callable[[], nn.Module]:
    """Make a model that attach accepts, but for one change to the transformers model in it."""

    def make() -> nn.Module:
        model = tiny_model(family)
        change(model.get_base_model())
        return model

    return make


def set_attention_dropout(base: Any) -> None:
    base.model.layers[1].self_attn.attention_dropout = 0.1


def set_relu(base: Any) -> None:
    base.model.layers[2].mlp.act_fn = nn.ReLU()


def prepared_by_accelerate() -> nn.Module:
    """Do what Accelerator.prepare does for mixed precision: an autocast around the outermost forward."""
    model = tiny_model()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


def twice_adapted() -> nn.Module:
    model = tiny_model()
    q_proj = model.get_base_model().model.layers[0].self_attn.q_proj
    q_proj.base_layer = tiny_model().get_base_model().model.layers[0].self_attn.q_proj.requires_grad_(False)
    return model


def inactive_layers(base: Any) -> None:
    base.config.num_hidden_layers = 3


def tensor_subclass() -> nn.Module:
    class Quantized(nn.Parameter):
        pass

    model = tiny_model()
    norm = model.get_base_model().model.norm
    norm.weight = Quantized(norm.weight.data, requires_grad=False)
    return model


def gradient_hook() -> nn.Module:
    model = tiny_model()
    next(iter(lora(model).values())).register_hook(lambda g: g)
    return model


def optimizer_in_backward() -> nn.Module:
    model = tiny_model()
    next(iter(lora(model).values())).register_post_accumulate_grad_hook(lambda p: None)
    return model


def dynamic_rope() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=37,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"]))


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


def further_family(name: str) -> Callable[[], nn.Module]:
    """Make a tiny model of a family that transformers has and the rule tables do not."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(pad_token_id=0, **TINY)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        return get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"]))

    return make


def images_too() -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config={**TINY, "head_dim": 8}, vision_config=vision, mm_tokens_per_image=4)
    return get_peft_model(Gemma3ForConditionalGeneration(config), LoraConfig(r=2, target_modules=["o_proj"]))


def set_config(**settings: Any) -> Callable[[Any], None]:
    def change(base: Any) -> None:
        for name, value in settings.items():
            setattr(base.config, name, value)

    return change


def norm_of_values(base: Any) -> None:
    """Add what a family may have that its table does not name."""
    attention = base.model.layers[1].self_attn
    attention.v_norm = type(attention.q_norm)(6).double().requires_grad_(False)


def norm_over_all_heads(base: Any) -> None:
    attention = base.model.layers[1].self_attn
    attention.q_norm = type(attention.q_norm)(24).double().requires_grad_(False)


def longrope_in_full_layers(base: Any) -> None:
    base.model.rotary_emb.rope_type["full_attention"] = "longrope"


def layers_exchanged(base: Any) -> None:
    first, second, *rest = base.model.layers
    base.model.layers = nn.ModuleList((second, first, *rest))


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
    "Gemma2": (further_family("Gemma2"), r"Gemma2ForCausalLM has no rule table.*Gemma3ForCausalLM.*families\.md"),
    "Phi3": (further_family("Phi3"), r"Phi3ForCausalLM has no rule table.*Qwen3ForCausalLM.*families\.md"),
    "images too": (images_too, r"Gemma3ForConditionalGeneration has no rule table.*families\.md"),
    "softcapped scores": (
        changed(set_config(attn_logit_softcapping=50.0), "gemma3"),
        r"config\.attn_logit_softcapping=50\.0 has no dual rule",
    ),
    "softcapped logits": (
        changed(set_config(final_logit_softcapping=30.0), "gemma3"),
        r"config\.final_logit_softcapping=30\.0 has no dual rule",
    ),
    "bidirectional": (
        changed(set_config(use_bidirectional_attention=True), "gemma3"),
        r"config\.use_bidirectional_attention=True has no dual rule",
    ),
    "unnamed norm": (
        changed(norm_of_values, "qwen3"),
        r"layers\.1\.self_attn .*Qwen3Attention.* does not name: \['v_norm'\]",
    ),
    "norm over all heads": (
        changed(norm_over_all_heads, "qwen3"),
        r"layers\.1\.self_attn\.q_norm is over 24 channels",
    ),
    "layers exchanged": (changed(layers_exchanged, "gemma3"), r"layers\.0\.self_attn was built for 'full_attention'"),
    "stateful rotary embedding of one layer type": (changed(longrope_in_full_layers, "gemma3"), "rope_type='longrope'"),
    "LoRA on scaled embeddings": (
        lambda: tiny_model("gemma3", ("q_proj", "embed_tokens")),
        "embeddings carries an adapter",
    ),
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
    "replaced forward": (patched_forward, r"forward of .*model.norm was replaced"),
    "attention dropout": (changed(set_attention_dropout), r"layers.1.self_attn has attention_dropout=0.1"),
    "activation": (changed(set_relu), r"layers.2.mlp.act_fn is a .*ReLU"),
    "hook on a layer": (changed(lambda base: base.model.layers[0].register_forward_hook(print)), "layers.0 has a hook"),
    "hook on the trunk": (changed(lambda base: base.model.register_forward_pre_hook(print)), "model has a hook"),
    "backward pre-hook": (
        changed(lambda base: base.model.layers[1].mlp.register_full_backward_pre_hook(print)),
        "layers.1.mlp has a hook",
    ),
    "hook on a gradient": (gradient_hook, "has a hook on its gradient"),
    "optimizer in backward": (optimizer_in_backward, "has a hook on its gradient"),
    "mixed precision by accelerate": (
        prepared_by_accelerate,
        "forward of PeftModel.* was replaced",
    ),
    "compiled layer": (changed(lambda base: base.model.layers[0].compile()), "layers.0 is compiled"),
    "attention implementation": (
        changed(lambda base: setattr(base.config, "_attn_implementation_internal", "my_attention")),
        "attn_implementation='my_attention'",
    ),
    "not causal": (changed(lambda base: setattr(base.config, "is_causal", False)), "is_causal=False"),
    "not causal in one layer": (
        changed(lambda base: setattr(base.model.layers[3].self_attn, "is_causal", False)),
        "layers.3.self_attn is not causal",
    ),
    "twice adapted": (twice_adapted, r"q_proj adapts a .*lora.*twice adapted"),
    "fewer layers in the config": (changed(inactive_layers), "holds 4 layers, but config.num_hidden_layers is 3"),
    "tensor subclass": (tensor_subclass, r"norm.weight is a .*Quantized"),
    "stateful rotary embedding": (dynamic_rope, "rope_type='dynamic'"),
    "bias on the head": (
        changed(lambda base: setattr(base.lm_head, "bias", nn.Parameter(torch.zeros(37).double(), False))),
        "output head has a bias",
    ),
    "unknown linear": (with_other_linear, r"layers.0.mlp.down_proj is a .*FakeQuantized"),
    "no LoRA weight": (frozen, "no trainable LoRA weight"),
    "no adapter at all": (lambda: base_model().requires_grad_(False), "no trainable LoRA weight"),
    "full fine-tuning": (base_model, "is trained but is not a LoRA weight"),
    "float16": (half_precision, "float16"),
    "other PEFT method": (other_method, "only LoRA has a dual rule"),
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
    from sap_fast.model.families import type_name
    from sap_fast.model.read import _WRAPPERS

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
        (2, "a sequence"),
    ],
)
def test_bad_probe_layers_are_refused(layers: Any, message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        sap_fast.attach(model, SAPConfig(probe_layers=layers))
    sap_fast.attach(model, CONFIG).detach()  # the refusal left no mark
