"""Reads a transformers + PEFT model instance into a :class:`Decoder`, or refuses it by name.

Parts are found by structure and recognised by their exact classes; nothing is ever treated as linear because it
looks so. Nothing on the model changes here. ``families.py`` says how a family's parts are put together.
"""

from typing import Any

import torch
from torch import nn

from sap_fast.errors import UnsupportedModelError
from sap_fast.model.decoder import Decoder
from sap_fast.model.families import FAMILIES, Family, type_name
from sap_fast.model.read_layer import (
    ProjectionReader,
    adapter_of,
    check_all_read,
    expect,
    read_layer,
    read_norm,
    read_rotary,
)

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
# Settings, of whatever family, that change a forward in a way for which there is no rule.
_UNSET = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")


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
    check_all_read("the decoder", trunk, "embed_tokens", "layers", "norm")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    reader = ProjectionReader(names)
    layers = tuple(read_layer(i, m, family, config, reader) for i, m in enumerate(trunk.layers))
    _check_plain("the output head", base.lm_head, nn.Linear)
    _check_embedding(trunk.embed_tokens, family)
    if base.lm_head.bias is not None:
        raise UnsupportedModelError("the output head has a bias, for which there is no rule")
    decoder = Decoder(
        layers=layers,
        embedding=trunk.embed_tokens,
        embed_scale=family.embed_scale,
        norm=read_norm("norm", trunk.norm, family),
        head=base.lm_head,
        rotary_embedding=read_rotary(trunk.rotary_emb, family),
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
            if lora is not None and adapter_of(lora, f"layers.{i}") != (projection.adapter or None):
                raise UnsupportedModelError(f"the active adapter of layers.{i} has changed; detach and attach again")


def base_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT model, or the model itself."""
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
            raise UnsupportedModelError(f"PEFT methods {sorted(kinds)}: only LoRA has a dual rule")
    return base_model(model)


def _family_of(base: nn.Module) -> Family:
    family = next((f for f in FAMILIES if f.names("ForCausalLM", base)), None)
    if family is None:
        known = ", ".join(f.class_of("ForCausalLM") for f in FAMILIES)
        raise UnsupportedModelError(
            f"{type_name(base)} has no rule table; there are tables for {known} (exact classes, of transformers). "
            "Adding a family takes one entry in a table: sap_fast/model/families.md in the installed package says how"
        )
    return family


def _find(base: nn.Module, family: Family, part: str) -> Any:
    found = [module for module in base.modules() if family.names(part, module)]
    if len(found) != 1:
        raise UnsupportedModelError(f"expected one {family.class_of(part)} in the model, but found {len(found)}")
    return expect(found[0], family, part, "the model")


def _check_config(config: Any) -> None:
    attention = config._attn_implementation
    from_hub = attention is not None and attention.startswith("kernels-community/") and "flash-attn" in attention
    if attention is not None and not attention.startswith(_ATTENTION) and not from_hub:
        raise UnsupportedModelError(
            f"attn_implementation={attention!r} is not known to be softmax attention; known are {list(_ATTENTION)}"
        )
    if getattr(config, "is_causal", True) is False:
        raise UnsupportedModelError("is_causal=False has no dual rule: attention here is causal")
    for name in _UNSET:
        value = getattr(config, name, None)
        if value is not None and value is not False:
            raise UnsupportedModelError(f"config.{name}={value} has no dual rule")


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
    """Refuse frozen weights of several dtypes: the stacked batch has one. Adapters may have another."""
    norms = [norm for layer in decoder.layers for norm in layer.norms]
    weights = [decoder.embedding.weight, decoder.head.weight, *(norm.weight for norm in (*norms, decoder.norm))]
    weights += [p.base.weight for layer in decoder.layers for p in layer.projections]
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) > 1:
        raise UnsupportedModelError(
            f"the model's own weights have several dtypes ({sorted(map(str, dtypes))}); use one"
        )


def _check_embedding(module: nn.Module, family: Family) -> None:
    if family.embed_scale is None:
        _check_plain("the embeddings", module, nn.Embedding)
    else:
        _check_unadapted("the embeddings", module)
        expect(module, family, "Embedding", "the embeddings")


def _check_plain(what: str, module: nn.Module, expected: type) -> None:
    _check_unadapted(what, module)
    if type(module) is not expected:
        raise UnsupportedModelError(f"{what} is a {type_name(module)}, not a {expected.__name__}: it has no dual rule")


def _check_unadapted(what: str, module: nn.Module) -> None:
    if "peft" in type(module).__module__:
        raise UnsupportedModelError(f"{what} carries an adapter ({type_name(module)}); leave it out of target_modules")
