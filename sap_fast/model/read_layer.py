"""Reads the parts of a decoder by a family's rule table: layers, norms, rotary embedding, linear maps.

Parts are recognised by their exact classes, and what a table does not name is refused, never skipped.
"""

import itertools
from typing import Any

from torch import nn

from sap_fast.errors import UnsupportedModelError
from sap_fast.model.families import ACTIVATIONS, Family, type_name
from sap_fast.model.layer import Layer, Norm, Projection

# Rotary embeddings that keep state between calls: frequencies then depend on what was run before.
_STATEFUL_ROPE = ("dynamic", "longrope")


def expect(module: nn.Module, family: Family, part: str, name: str) -> Any:
    """Return ``module``, if it is exactly the family's ``part`` and runs the forward of its class; else refuse it."""
    if not family.names(part, module):
        raise UnsupportedModelError(
            f"{name} is a {type_name(module)}, not a {family.class_of(part)}: it has no dual rule"
        )
    _check_own_forward(name, module, family.module)
    return module


def check_all_read(name: str, module: nn.Module, *read: str) -> None:
    """Refuse weights of ``module`` that lie in no part named in ``read``: its forward does more than is known."""
    parts = {part.partition(".")[0] for part, _ in module.named_parameters()}
    if unread := sorted(parts - set(read)):
        raise UnsupportedModelError(
            f"{name} ({type_name(module)}) has weights that its family's rule table does not name: {unread}"
        )


def _check_own_forward(name: str, module: nn.Module, home: str) -> None:
    """Refuse a class whose forward was patched for the whole process."""
    found = type(module).forward.__module__
    if found != home:
        raise UnsupportedModelError(
            f"the forward of {type(module).__name__} ({name}) was replaced by one from {found}; the dual forward would "
            "bypass it. Undo the patch"
        )


def read_norm(name: str, module: nn.Module, family: Family) -> Norm:
    return Norm(expect(module, family, "RMSNorm", name), family.norm_offset, family.norm_eps)


def read_rotary(module: nn.Module, family: Family) -> Any:
    rotary = expect(module, family, "RotaryEmbedding", "rotary_emb")
    by_type = isinstance(rotary.rope_type, dict)
    if by_type != family.rotary_by_layer_type:
        raise UnsupportedModelError(
            f"rotary_emb has {'a table for each layer type' if by_type else 'one table for all layers'}, which its "
            "family's rule table does not say"
        )
    for kind in rotary.rope_type.values() if by_type else [rotary.rope_type]:
        if kind in _STATEFUL_ROPE:
            raise UnsupportedModelError(
                f"rope_type={kind!r} changes with the longest sequence seen so far, so the passes of a step would "
                "disagree: it has no dual rule"
            )
    return rotary


def read_layer(index: int, module: nn.Module, family: Family, config: Any, reader: "ProjectionReader") -> Layer:
    """Read layer ``index`` of the decoder; the tensors of its adapters are gathered in ``reader``."""
    name = f"layers.{index}"
    layer: Any = expect(module, family, "DecoderLayer", name)
    attn: Any = expect(layer.self_attn, family, "Attention", f"{name}.self_attn")
    mlp: Any = expect(layer.mlp, family, "MLP", f"{name}.mlp")
    stream_norms = (
        family.norm_before_attention,
        family.norm_after_attention,
        family.norm_before_mlp,
        family.norm_after_mlp,
    )
    head_norms = family.q_norm, family.k_norm
    check_all_read(name, layer, "self_attn", "mlp", *filter(None, stream_norms))
    check_all_read(f"{name}.self_attn", attn, "q_proj", "k_proj", "v_proj", "o_proj", *filter(None, head_norms))
    check_all_read(f"{name}.mlp", mlp, "gate_proj", "up_proj", "down_proj")
    _check_attention(f"{name}.self_attn", attn, config, index)
    activation = ACTIVATIONS.get(type_name(mlp.act_fn))
    if activation is None:
        raise UnsupportedModelError(
            f"{name}.mlp.act_fn is a {type_name(mlp.act_fn)}, an activation without a dual rule"
        )

    def norm(part: str) -> Norm:
        return read_norm(f"{name}.{part}", getattr(layer, part), family)

    def head_norm(part: str | None) -> Norm | None:
        if part is None:
            return None
        found = read_norm(f"{name}.self_attn.{part}", getattr(attn, part), family)
        if (width := found.weight.shape[0]) != attn.head_dim:
            raise UnsupportedModelError(
                f"{name}.self_attn.{part} is over {width} channels, not over a head's {attn.head_dim}: it has no dual "
                "rule"
            )
        return found

    before_attention, after_attention, before_mlp, after_mlp = stream_norms
    return Layer(
        module=layer,
        norm_before_attention=norm(before_attention),
        norm_after_attention=None if after_attention is None else norm(after_attention),
        norm_before_mlp=norm(before_mlp),
        norm_after_mlp=None if after_mlp is None else norm(after_mlp),
        qkv=(
            reader.read(f"{name}.self_attn.q_proj", attn.q_proj),
            reader.read(f"{name}.self_attn.k_proj", attn.k_proj),
            reader.read(f"{name}.self_attn.v_proj", attn.v_proj),
        ),
        q_norm=head_norm(family.q_norm),
        k_norm=head_norm(family.k_norm),
        o=reader.read(f"{name}.self_attn.o_proj", attn.o_proj),
        gate_up=(
            reader.read(f"{name}.mlp.gate_proj", mlp.gate_proj),
            reader.read(f"{name}.mlp.up_proj", mlp.up_proj),
        ),
        down=reader.read(f"{name}.mlp.down_proj", mlp.down_proj),
        head_dim=attn.head_dim,
        scale=attn.scaling,
        window=family.window(config, attn),
        rotary_type=config.layer_types[index] if family.rotary_by_layer_type else None,
        activation=activation,
    )


def _check_attention(name: str, attn: Any, config: Any, index: int) -> None:
    if attn.attention_dropout:
        raise UnsupportedModelError(
            f"{name} has attention_dropout={attn.attention_dropout}, which has no dual rule; set attention_dropout to "
            "0 in the config and in each layer's self_attn"
        )
    if not attn.is_causal:
        raise UnsupportedModelError(f"{name} is not causal: it has no dual rule")
    # Layers that were moved or taken out: transformers masks by the config, but the window is the module's.
    built = getattr(attn, "layer_type", None)
    if built is not None and config.layer_types[index] != built:
        raise UnsupportedModelError(
            f"{name} was built for {built!r}, but config.layer_types[{index}] is {config.layer_types[index]!r}; make "
            "them agree"
        )


def adapter_of(lora: Any, name: str) -> str | None:
    """Return the one active adapter of a PEFT layer that it holds, or None; refuse every other state."""
    if lora.merged:
        raise UnsupportedModelError(f"{name} has merged adapters {lora.merged_adapters}; unmerge them first")
    if lora.disable_adapters:
        raise UnsupportedModelError(f"{name} has its adapters disabled; enable them first")
    active = [key for key in lora.active_adapters if key in lora.lora_A]
    if len(active) > 1:
        raise UnsupportedModelError(f"{name} has several active adapters {active}; set one (model.set_adapter)")
    return active[0] if active else None


class ProjectionReader:
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
                f"{name} is a {type_name(module)}, for which there is no dual rule; nn.Linear and PEFT's LoRA Linear "
                "have one"
            )
        _check_own_forward(name, module, "peft.tuners.lora.layer")
        lora: Any = module
        if type(lora.base_layer) is not nn.Linear:
            raise UnsupportedModelError(
                f"{name} adapts a {type_name(lora.base_layer)}, for which there is no dual rule; nn.Linear has one, "
                "quantized and twice adapted layers not yet"
            )
        adapter = adapter_of(lora, name)
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
        raise UnsupportedModelError(f"{name} uses DoRA, for which there is no dual rule; set use_dora=False")
    if adapter in lora.lora_variant:
        variant = type(lora.lora_variant[adapter]).__name__
        raise UnsupportedModelError(f"{name} uses the LoRA variant {variant}, which has no dual rule")
    a, b = lora.lora_A[adapter], lora.lora_B[adapter]
    for part, factor in (("lora_A", a), ("lora_B", b)):
        if type(factor) is not nn.Linear:
            raise UnsupportedModelError(f"{name}.{part} is a {type_name(factor)}, for which there is no dual rule")
        if factor.bias is not None:
            raise UnsupportedModelError(f"{name}.{part} has a bias (lora_bias); set lora_bias=False")
    if type(lora.lora_dropout[adapter]) not in (nn.Dropout, nn.Identity):
        raise UnsupportedModelError(f"{name} has {type_name(lora.lora_dropout[adapter])} as its dropout")
