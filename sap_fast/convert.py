"""Reads a transformers + PEFT model instance into a :class:`Decoder`, or refuses it by name.

Parts are found by structure and recognised by their exact classes; nothing is ever treated as linear because it
looks so. Nothing on the model changes here.
"""

import itertools
from typing import Any

import torch
from torch import nn

from sap_fast.decoder import Decoder, Layer, Norm, Projection
from sap_fast.errors import UnsupportedModelError
from sap_fast.families import ACTIVATIONS, FAMILIES, Family, type_name

_WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "DDP is not supported yet; attach to the model itself",
    "torch.nn.parallel.data_parallel.DataParallel": "DataParallel is not supported; attach to the model itself",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "FSDP is not supported yet",
    "deepspeed.runtime.engine.DeepSpeedEngine": "DeepSpeed is not supported: its backward runs the optimizer",
    "torch._dynamo.eval_frame.OptimizedModule": "attach to the model itself, before torch.compile",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def read_decoder(model: nn.Module) -> Decoder:
    """Read ``model`` into a decoder.

    Args:
        model: a transformers causal language model of a known family with LoRA adapters, as
            ``peft.get_peft_model`` or ``model.add_adapter`` makes it.

    Raises:
        UnsupportedModelError: naming the first thing for which there is no rule.
    """
    if message := _WRAPPERS.get(type_name(model)):
        raise UnsupportedModelError(f"{type(model).__name__}: {message}")
    base = _base_model(model)
    family = next((f for f in FAMILIES if f.names("ForCausalLM", base)), None)
    if family is None:
        known = ", ".join(f"{f.prefix}ForCausalLM" for f in FAMILIES)
        raise UnsupportedModelError(
            f"{type_name(base)} has no rule table; there are tables for {known} (exact classes, of transformers). "
            "sap_fast/families.py says how to add a family"
        )
    trunk = _find(base, family, "Model")
    config = base.config
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _check_config(config)
    _check_modules(base, trunk)
    reader = _ProjectionReader(names)
    layers = tuple(
        _read_layer(f"layers.{i}", module, family, config, reader)
        for i, module in enumerate(trunk.layers[: config.num_hidden_layers])
    )
    head = base.lm_head
    _check_frozen_part("the output head", head, nn.Linear)
    _check_frozen_part("the embeddings", trunk.embed_tokens, nn.Embedding)
    if head.bias is not None:
        raise UnsupportedModelError("the output head has a bias, for which there is no rule")
    active = sorted({p.adapter for layer in layers for p in layer.projections if p.lora is not None})
    if len(active) > 1:
        raise UnsupportedModelError(f"several active adapters {active}; set one (model.set_adapter)")
    adapters = reader.adapters
    trained = {name: p for name, p in adapters.items() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in trained:
            raise UnsupportedModelError(
                f"{name} is trained but is not a LoRA weight of a decoder layer; freeze it (requires_grad_(False))"
            )
    if not trained:
        raise UnsupportedModelError(
            "no trainable LoRA weight in the decoder: wrap the model with peft.get_peft_model(model, LoraConfig(...)), "
            "or load the adapter with is_trainable=True"
        )
    _check_tensors(model, trunk)
    return Decoder(
        layers=layers,
        embedding=trunk.embed_tokens,
        norm=_read_norm("norm", trunk.norm, family),
        head=head,
        rotary_embedding=_expect(trunk.rotary_emb, family, "RotaryEmbedding", "rotary_emb"),
        adapters=adapters,
        trained=trained,
    )


def check_state(decoder: Decoder) -> None:
    """Refuse what may have changed since ``attach``: merged, disabled or switched adapters, new hooks.

    Raises:
        UnsupportedModelError: naming the module.
    """
    for i, layer in enumerate(decoder.layers):
        for projection in layer.projections:
            lora = projection.lora
            if lora is not None and _adapter_of(lora, f"layers.{i}") != projection.adapter:
                raise UnsupportedModelError(f"the active adapter of layers.{i} has changed; detach and attach again")
        for name, module in layer.module.named_modules():
            _check_hooks(f"layers.{i}.{name}" if name else "", module)


def _base_model(model: nn.Module) -> Any:
    from peft import PeftModel
    from peft.utils import PeftType

    if not isinstance(model, PeftModel):
        return model
    kinds = {config.peft_type for config in model.peft_config.values()}
    if kinds != {PeftType.LORA}:
        raise UnsupportedModelError(f"PEFT methods {sorted(kinds)}: only LoRA has a pair rule")
    return model.get_base_model()


def _find(base: nn.Module, family: Family, part: str) -> Any:
    found = [module for module in base.modules() if family.names(part, module)]
    if len(found) != 1:
        raise UnsupportedModelError(f"expected one {family.prefix}{part} in the model, but found {len(found)}")
    return found[0]


def _expect(module: nn.Module, family: Family, part: str, name: str) -> Any:
    if not family.names(part, module):
        raise UnsupportedModelError(
            f"{name} is a {type_name(module)}, not a {family.prefix}{part}: it has no pair rule"
        )
    return module


def _check_config(config: Any) -> None:
    if config.hidden_act not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"hidden_act={config.hidden_act!r} has no pair rule; those with one are {sorted(ACTIVATIONS)}"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise UnsupportedModelError(
            f"attention_dropout={config.attention_dropout} has no pair rule; set model.config.attention_dropout "
            "and each layer's self_attn.attention_dropout to 0"
        )


def _check_modules(base: nn.Module, trunk: Any) -> None:
    """Refuse what would be bypassed: replaced forwards, hooks, compiled modules, unknown PEFT wrappers."""
    decoder_layers = {id(layer) for layer in trunk.layers}
    for name, module in base.named_modules():
        kind = type_name(module)
        if kind.endswith(("ModulesToSaveWrapper", "TrainableTokensWrapper")):
            raise UnsupportedModelError(f"{name} is a {type(module).__name__} (modules_to_save): only LoRA is trained")
        if "forward" in module.__dict__:
            raise UnsupportedModelError(
                f"the forward of {name or 'the model'} was replaced on the instance (kernel patch, device map?); "
                "the pair forward would bypass it. Load the model without the patch"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise UnsupportedModelError(f"{name or 'the model'} is compiled; attach before compiling")
        if module not in (base, trunk) and id(module) not in decoder_layers:
            _check_hooks(name, module)


def _check_hooks(name: str, module: nn.Module) -> None:
    if not name:
        return
    hooks = [
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
    ]
    for hook in hooks:
        # enable_input_require_grads: it makes embeddings require grad, and computes nothing.
        if getattr(hook, "__name__", "") != "make_inputs_require_grads":
            raise UnsupportedModelError(
                f"{name} has a hook ({getattr(hook, '__qualname__', hook)}), which the pair forward would not run; "
                "remove it"
            )


def _check_frozen_part(what: str, module: nn.Module, expected: type) -> None:
    if "peft" in type(module).__module__:
        raise UnsupportedModelError(f"{what} carries an adapter ({type_name(module)}); leave it out of target_modules")
    if type(module) is not expected:
        raise UnsupportedModelError(f"{what} is a {type_name(module)}, not a {expected.__name__}: it has no pair rule")


def _check_tensors(model: nn.Module, trunk: nn.Module) -> None:
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModelError(f"the model lies on several devices ({sorted(map(str, devices))}); use one")
    if devices == {torch.device("meta")}:
        raise UnsupportedModelError("the model has no weights (meta device); load them first")
    for name, parameter in model.named_parameters():
        kind = type(parameter).__name__
        if kind == "DTensor" or hasattr(parameter, "ds_id"):
            raise UnsupportedModelError(f"{name} is sharded ({kind}): FSDP and DeepSpeed ZeRO-3 are not supported yet")
        if parameter.dtype not in _DTYPES:
            raise UnsupportedModelError(
                f"{name} is {parameter.dtype}; supported are float32 and bfloat16 (float16 overflows in second "
                "derivatives; load the model with dtype=torch.bfloat16)"
            )
    frozen = {p.dtype for p in trunk.parameters() if not p.requires_grad}
    if len(frozen) > 1:
        raise UnsupportedModelError(f"the frozen weights have several dtypes ({sorted(map(str, frozen))}); use one")


def _read_norm(name: str, module: nn.Module, family: Family) -> Norm:
    return Norm(_expect(module, family, "RMSNorm", name), family.norm_offset)


def _read_layer(name: str, module: Any, family: Family, config: Any, reader: "_ProjectionReader") -> Layer:
    _expect(module, family, "DecoderLayer", name)
    attn: Any = _expect(module.self_attn, family, "Attention", f"{name}.self_attn")
    mlp: Any = _expect(module.mlp, family, "MLP", f"{name}.mlp")
    return Layer(
        module=module,
        input_norm=_read_norm(f"{name}.input_layernorm", module.input_layernorm, family),
        post_norm=_read_norm(f"{name}.post_attention_layernorm", module.post_attention_layernorm, family),
        qkv=(
            reader.read(f"{name}.self_attn.q_proj", attn.q_proj),
            reader.read(f"{name}.self_attn.k_proj", attn.k_proj),
            reader.read(f"{name}.self_attn.v_proj", attn.v_proj),
        ),
        o=reader.read(f"{name}.self_attn.o_proj", attn.o_proj),
        gate_up=(
            reader.read(f"{name}.mlp.gate_proj", mlp.gate_proj),
            reader.read(f"{name}.mlp.up_proj", mlp.up_proj),
        ),
        down=reader.read(f"{name}.mlp.down_proj", mlp.down_proj),
        head_dim=attn.head_dim,
        scale=attn.scaling,
        window=family.window(config, attn),
        activation=ACTIVATIONS[config.hidden_act],
    )


def _adapter_of(lora: Any, name: str) -> str | None:
    """The one active adapter of a PEFT layer that it holds, or None; refuses every other state."""
    if lora.merged:
        raise UnsupportedModelError(f"{name} has merged adapters {lora.merged_adapters}; unmerge them first")
    if lora.disable_adapters:
        raise UnsupportedModelError(f"{name} has its adapters disabled; enable them first")
    active = [key for key in lora.active_adapters if key in lora.lora_A]
    if len(active) > 1:
        raise UnsupportedModelError(f"{name} has several active adapters {active}; set one (model.set_adapter)")
    return active[0] if active else None


class _ProjectionReader:
    """Reads linear modules and gathers their LoRA tensors by parameter name."""

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names
        self._salts = itertools.count(1)
        self.adapters: dict[str, nn.Parameter] = {}

    def read(self, name: str, module: nn.Module) -> Projection:
        from peft.tuners.lora.layer import Linear as LoraLinear

        if type(module) is nn.Linear:
            return Projection(module)
        if type(module) is not LoraLinear:
            raise UnsupportedModelError(
                f"{name} is a {type_name(module)}, for which there is no pair rule; nn.Linear and PEFT's "
                "LoRA Linear have one"
            )
        lora: Any = module
        base = lora.get_base_layer()
        if type(base) is not nn.Linear:
            raise UnsupportedModelError(
                f"{name} adapts a {type_name(base)}, for which there is no pair rule; nn.Linear has one, "
                "quantized layers not yet"
            )
        adapter = _adapter_of(lora, name)
        if adapter is None:
            return Projection(base)
        if lora.use_dora.get(adapter) or adapter in lora.lora_magnitude_vector:
            raise UnsupportedModelError(f"{name} uses DoRA, for which there is no pair rule; set use_dora=False")
        if adapter in getattr(lora, "lora_variant", {}):
            variant = lora.lora_variant[adapter]
            raise UnsupportedModelError(
                f"{name} uses the LoRA variant {type(variant).__name__}, which has no pair rule"
            )
        a, b = lora.lora_A[adapter], lora.lora_B[adapter]
        if type(a) is not nn.Linear or type(b) is not nn.Linear or a.bias is not None or b.bias is not None:
            raise UnsupportedModelError(f"{name} has a bias in its adapter (lora_bias); set lora_bias=False")
        if type(lora.lora_dropout[adapter]) not in (nn.Dropout, nn.Identity):
            raise UnsupportedModelError(f"{name} has {type_name(lora.lora_dropout[adapter])} as its dropout")
        names = self._names[id(a.weight)], self._names[id(b.weight)]
        self.adapters |= {names[0]: a.weight, names[1]: b.weight}
        return Projection(base, lora, adapter, *names, salt=next(self._salts))
