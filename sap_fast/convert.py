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
# Attention implementations that compute softmax attention; a registered one of another name may not.
_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention")
# Rotary embeddings that keep state between calls: frequencies then depend on what was run before.
_STATEFUL_ROPE = ("dynamic", "longrope")


def read_decoder(model: nn.Module) -> Decoder:
    """Read ``model`` into a decoder.

    Args:
        model: a transformers causal language model of a known family with LoRA adapters, as
            ``peft.get_peft_model`` or ``model.add_adapter`` makes it.

    Raises:
        UnsupportedModelError: naming the first thing for which there is no rule.
    """
    _check_wrappers(model)
    base = _base_model(model)
    family = _family_of(base)
    trunk = _find(base, family, "Model")
    config = base.config
    _check_config(config)
    if len(trunk.layers) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"the model holds {len(trunk.layers)} layers, but config.num_hidden_layers is {config.num_hidden_layers}"
        )
    _check_weights(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    reader = _ProjectionReader(names)
    layers = tuple(_read_layer(f"layers.{i}", m, family, config, reader) for i, m in enumerate(trunk.layers))
    _check_plain("the output head", base.lm_head, nn.Linear)
    _check_plain("the embeddings", trunk.embed_tokens, nn.Embedding)
    if base.lm_head.bias is not None:
        raise UnsupportedModelError("the output head has a bias, for which there is no rule")
    decoder = Decoder(
        layers=layers,
        embedding=trunk.embed_tokens,
        norm=_read_norm("norm", trunk.norm, family),
        head=base.lm_head,
        rotary_embedding=_read_rotary(trunk.rotary_emb, family),
        adapters=reader.adapters,
        trained={name: p for name, p in reader.adapters.items() if p.requires_grad},
    )
    _check_trained(model, decoder)
    _check_one_dtype(decoder)
    return decoder


def check_adapters(decoder: Decoder) -> None:
    """Refuse adapters that were merged, disabled, switched or activated since ``attach``.

    Raises:
        UnsupportedModelError: naming the layer.
    """
    for i, layer in enumerate(decoder.layers):
        for projection in layer.projections:
            lora = projection.lora
            if lora is not None and _adapter_of(lora, f"layers.{i}") != (projection.adapter or None):
                raise UnsupportedModelError(f"the active adapter of layers.{i} has changed; detach and attach again")


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _check_wrappers(model: nn.Module) -> None:
    if message := _WRAPPERS.get(type_name(model)):
        raise UnsupportedModelError(f"{type(model).__name__}: {message}")
    for name, module in model.named_modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            raise UnsupportedModelError(f"{name or 'the model'} is sharded by FSDP2, which is not supported yet")
        if type(module).__name__ in ("ModulesToSaveWrapper", "TrainableTokensWrapper"):
            raise UnsupportedModelError(f"{name} is a {type(module).__name__} (modules_to_save): only LoRA is trained")


def _base_model(model: nn.Module) -> Any:
    from peft import PeftModel
    from peft.utils import PeftType

    if isinstance(model, PeftModel):
        kinds = {config.peft_type for config in model.peft_config.values()}
        if kinds != {PeftType.LORA}:
            raise UnsupportedModelError(f"PEFT methods {sorted(kinds)}: only LoRA has a pair rule")
    return base_model(model)


def _family_of(base: nn.Module) -> Family:
    family = next((f for f in FAMILIES if f.names("ForCausalLM", base)), None)
    if family is None:
        known = ", ".join(f"{f.prefix}ForCausalLM" for f in FAMILIES)
        raise UnsupportedModelError(
            f"{type_name(base)} has no rule table; there are tables for {known} (exact classes, of transformers). "
            "sap_fast/families.py says how to add a family"
        )
    return family


def _find(base: nn.Module, family: Family, part: str) -> Any:
    found = [module for module in base.modules() if family.names(part, module)]
    if len(found) != 1:
        raise UnsupportedModelError(f"expected one {family.prefix}{part} in the model, but found {len(found)}")
    return _expect(found[0], family, part, "the model")


def _expect(module: nn.Module, family: Family, part: str, name: str) -> Any:
    if not family.names(part, module):
        raise UnsupportedModelError(
            f"{name} is a {type_name(module)}, not a {family.prefix}{part}: it has no pair rule"
        )
    _check_own_forward(name, module, family.module)
    return module


def _check_own_forward(name: str, module: nn.Module, home: str) -> None:
    """Refuse a class whose forward was patched for the whole process."""
    found = type(module).forward.__module__
    if found != home:
        raise UnsupportedModelError(
            f"the forward of {type(module).__name__} ({name}) was replaced by one from {found}; the pair forward would "
            "bypass it. Undo the patch"
        )


def _check_config(config: Any) -> None:
    attention = config._attn_implementation
    from_hub = attention is not None and attention.startswith("kernels-community/") and "flash-attn" in attention
    if attention is not None and not attention.startswith(_ATTENTION) and not from_hub:
        raise UnsupportedModelError(
            f"attn_implementation={attention!r} is not known to be softmax attention; known are {list(_ATTENTION)}"
        )
    if getattr(config, "is_causal", True) is False:
        raise UnsupportedModelError("is_causal=False has no pair rule: attention here is causal")


def _check_weights(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        kind = type(parameter)
        if kind.__name__ == "DTensor" or hasattr(parameter, "ds_id"):
            raise UnsupportedModelError(
                f"{name} is sharded ({kind.__name__}): FSDP, tensor parallelism and ZeRO-3 are not supported yet"
            )
        if kind is not nn.Parameter:
            raise UnsupportedModelError(
                f"{name} is a {kind.__module__}.{kind.__qualname__}, for which there is no rule"
            )
        if parameter.dtype not in _DTYPES:
            raise UnsupportedModelError(
                f"{name} is {parameter.dtype}; supported are float32 and bfloat16 (float16 overflows in second "
                "derivatives; load the model with dtype=torch.bfloat16)"
            )
    devices = {parameter.device for parameter in parameters.values()}
    if len(devices) > 1:
        raise UnsupportedModelError(f"the model lies on several devices ({sorted(map(str, devices))}); use one")
    if devices == {torch.device("meta")}:
        raise UnsupportedModelError("the model has no weights (meta device); load them first")


def _check_trained(model: nn.Module, decoder: Decoder) -> None:
    active = {p.adapter for layer in decoder.layers for p in layer.projections if p.adapter}
    if len(active) > 1:
        raise UnsupportedModelError(f"several active adapters {sorted(active)}; set one (model.set_adapter)")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in decoder.trained:
            raise UnsupportedModelError(
                f"{name} is trained but is not a LoRA weight of a decoder layer; freeze it (requires_grad_(False))"
            )
    if not decoder.trained:
        raise UnsupportedModelError(
            "no trainable LoRA weight in the decoder: wrap the model with peft.get_peft_model(model, LoraConfig(...)), "
            "or load the adapter with is_trainable=True"
        )


def _check_one_dtype(decoder: Decoder) -> None:
    """The stacked batch has one dtype, that of the frozen weights; adapters may have another."""
    norms = [norm for layer in decoder.layers for norm in (layer.input_norm, layer.post_norm)]
    weights = [decoder.embedding.weight, decoder.head.weight, *(norm.weight for norm in (*norms, decoder.norm))]
    weights += [p.base.weight for layer in decoder.layers for p in layer.projections]
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) > 1:
        raise UnsupportedModelError(
            f"the model's own weights have several dtypes ({sorted(map(str, dtypes))}); use one"
        )


def _check_plain(what: str, module: nn.Module, expected: type) -> None:
    if "peft" in type(module).__module__:
        raise UnsupportedModelError(f"{what} carries an adapter ({type_name(module)}); leave it out of target_modules")
    if type(module) is not expected:
        raise UnsupportedModelError(f"{what} is a {type_name(module)}, not a {expected.__name__}: it has no pair rule")


def _read_norm(name: str, module: nn.Module, family: Family) -> Norm:
    return Norm(_expect(module, family, "RMSNorm", name), family.norm_offset)


def _read_rotary(module: nn.Module, family: Family) -> Any:
    rotary = _expect(module, family, "RotaryEmbedding", "rotary_emb")
    if rotary.rope_type in _STATEFUL_ROPE:
        raise UnsupportedModelError(
            f"rope_type={rotary.rope_type!r} changes with the longest sequence seen so far, so the passes of a step "
            "would disagree: it has no pair rule"
        )
    return rotary


def _read_layer(name: str, module: nn.Module, family: Family, config: Any, reader: "_ProjectionReader") -> Layer:
    layer: Any = _expect(module, family, "DecoderLayer", name)
    attn: Any = _expect(layer.self_attn, family, "Attention", f"{name}.self_attn")
    mlp: Any = _expect(layer.mlp, family, "MLP", f"{name}.mlp")
    if attn.attention_dropout:
        raise UnsupportedModelError(
            f"{name}.self_attn has attention_dropout={attn.attention_dropout}, which has no pair rule; set "
            "attention_dropout to 0 in the config and in each layer's self_attn"
        )
    if not attn.is_causal:
        raise UnsupportedModelError(f"{name}.self_attn is not causal: it has no pair rule")
    activation = ACTIVATIONS.get(type_name(mlp.act_fn))
    if activation is None:
        raise UnsupportedModelError(
            f"{name}.mlp.act_fn is a {type_name(mlp.act_fn)}, an activation without a pair rule"
        )
    return Layer(
        module=layer,
        input_norm=_read_norm(f"{name}.input_layernorm", layer.input_layernorm, family),
        post_norm=_read_norm(f"{name}.post_attention_layernorm", layer.post_attention_layernorm, family),
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
        activation=activation,
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
            _check_own_forward(name, module, "torch.nn.modules.linear")
            return Projection(module)
        if type(module) is not LoraLinear:
            raise UnsupportedModelError(
                f"{name} is a {type_name(module)}, for which there is no pair rule; nn.Linear and PEFT's LoRA Linear "
                "have one"
            )
        _check_own_forward(name, module, "peft.tuners.lora.layer")
        lora: Any = module
        if type(lora.base_layer) is not nn.Linear:
            raise UnsupportedModelError(
                f"{name} adapts a {type_name(lora.base_layer)}, for which there is no pair rule; nn.Linear has one, "
                "quantized and twice adapted layers not yet"
            )
        adapter = _adapter_of(lora, name)
        if adapter is None:
            return Projection(lora.base_layer, lora)
        _check_vanilla(name, lora, adapter)
        a, b = lora.lora_A[adapter].weight, lora.lora_B[adapter].weight
        names = self._names[id(a)], self._names[id(b)]
        self.adapters |= {names[0]: a, names[1]: b}
        return Projection(lora.base_layer, lora, adapter, *names, salt=next(self._salts))


def _check_vanilla(name: str, lora: Any, adapter: str) -> None:
    """Refuse every LoRA but ``y += scaling B A dropout(x)``."""
    if lora.use_dora.get(adapter) or adapter in lora.lora_magnitude_vector:
        raise UnsupportedModelError(f"{name} uses DoRA, for which there is no pair rule; set use_dora=False")
    if adapter in lora.lora_variant:
        variant = type(lora.lora_variant[adapter]).__name__
        raise UnsupportedModelError(f"{name} uses the LoRA variant {variant}, which has no pair rule")
    a, b = lora.lora_A[adapter], lora.lora_B[adapter]
    for part, factor in (("lora_A", a), ("lora_B", b)):
        if type(factor) is not nn.Linear:
            raise UnsupportedModelError(f"{name}.{part} is a {type_name(factor)}, for which there is no pair rule")
        if factor.bias is not None:
            raise UnsupportedModelError(f"{name}.{part} has a bias (lora_bias); set lora_bias=False")
    if type(lora.lora_dropout[adapter]) not in (nn.Dropout, nn.Identity):
        raise UnsupportedModelError(f"{name} has {type_name(lora.lora_dropout[adapter])} as its dropout")
