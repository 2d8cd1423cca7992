"""The model families whose decoders the dual forward knows: one entry each, no copy of their code.

``sap_fast/model/families.md`` tells how to add one and how to check it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


def _window_of_attention(config: Any, attention: Any) -> int | None:
    """Read the window by transformers' convention: attention modules that know of one hold their own, or None."""
    return getattr(attention, "sliding_window", None)


@dataclass(frozen=True)
class Family:
    """Describes how the parts of one transformers model family are called and put together.

    A layer is ``norm, attention, (norm), add, norm, gated MLP, (norm), add``; norms in parentheses are optional.
    Fields that name a module or an attribute give its name in transformers' own code.
    """

    module: str
    """The Python module that defines the family's classes; their forwards must come from there."""

    prefix: str
    """How its classes begin: ``Llama`` for ``LlamaForCausalLM``, ``LlamaModel``, ``LlamaDecoderLayer``,
    ``LlamaAttention``, ``LlamaMLP``, ``LlamaRMSNorm`` and ``LlamaRotaryEmbedding``."""

    classes: Mapping[str, str] = field(default_factory=dict)
    """The exceptions to that naming, by part: ``{"Model": "Gemma3TextModel"}``. The part ``Embedding``, if it is
    named, is the class of the embeddings; else they are an ``nn.Embedding``."""

    norm_before_attention: str = "input_layernorm"
    """The layer's norm of the residual stream that attention reads."""

    norm_after_attention: str | None = None
    """The layer's norm of attention's output, before it is added to the residual stream."""

    norm_before_mlp: str = "post_attention_layernorm"
    """The layer's norm of the residual stream that the MLP reads."""

    norm_after_mlp: str | None = None
    """The layer's norm of the MLP's output, before it is added to the residual stream."""

    q_norm: str | None = None
    """The attention's norm of each query head, before rotary."""

    k_norm: str | None = None
    """The attention's norm of each key head, before rotary."""

    norm_eps: str = "variance_epsilon"
    """The attribute of a norm that is added to the mean square."""

    norm_offset: float = 0.0
    """What is added to a norm's weight; 1 in models that store ``weight - 1``."""

    embed_scale: str | None = None
    """The attribute of the embeddings, a 0-dim tensor, by which their output is multiplied."""

    rotary_by_layer_type: bool = False
    """Whether the rotary embedding takes a ``layer_type`` of ``config.layer_types``, and has a table for each."""

    window: Callable[[Any, Any], int | None] = _window_of_attention
    """``window(config, attention)``: a layer's sliding window, or None for full attention."""

    def class_of(self, part: str) -> str:
        """Return the class of the family's ``part`` (``"DecoderLayer"``, ``"MLP"``, ...)."""
        return self.classes.get(part, f"{self.prefix}{part}")

    def names(self, part: str, module: nn.Module) -> bool:
        """Tell whether ``module`` is exactly this family's ``part``."""
        return type_name(module) == f"{self.module}.{self.class_of(part)}"


def type_name(module: nn.Module) -> str:
    """Return the qualified name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


FAMILIES = (
    Family("transformers.models.llama.modeling_llama", "Llama"),
    Family(
        "transformers.models.mistral.modeling_mistral",
        "Mistral",
        window=lambda config, attention: config.sliding_window,
    ),
    Family("transformers.models.qwen2.modeling_qwen2", "Qwen2"),
    Family("transformers.models.qwen3.modeling_qwen3", "Qwen3", q_norm="q_norm", k_norm="k_norm"),
    Family(
        "transformers.models.gemma3.modeling_gemma3",
        "Gemma3",
        classes={"Model": "Gemma3TextModel", "Embedding": "Gemma3TextScaledWordEmbedding"},
        norm_after_attention="post_attention_layernorm",
        norm_before_mlp="pre_feedforward_layernorm",
        norm_after_mlp="post_feedforward_layernorm",
        q_norm="q_norm",
        k_norm="k_norm",
        norm_eps="eps",
        norm_offset=1.0,
        embed_scale="embed_scale",
        rotary_by_layer_type=True,
    ),
)

# The classes of an MLP's act_fn, by the name of the activation's rule in sap_fast.ops.glu.
ACTIVATIONS = {
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
}
