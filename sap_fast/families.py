"""The model families whose decoders the pair forward knows: one entry each, no copy of their code.

To add a family whose layers are ``norm, attention, norm, gated MLP``: name its classes here and, if something
differs, the field that says so. What no field can say needs a field of its own, and a rule in ``decoder.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Family:
    """How the parts of one transformers model family are called and put together.

    ``module`` and ``prefix`` name its classes: ``LlamaForCausalLM``, ``LlamaModel``, ``LlamaDecoderLayer``,
    ``LlamaAttention``, ``LlamaMLP``, ``LlamaRMSNorm``, ``LlamaRotaryEmbedding``. ``window(config, attention)``
    is the sliding window of a layer, or None. ``norm_offset`` is added to norm weights.
    """

    module: str
    prefix: str
    window: Callable[[Any, Any], int | None]
    norm_offset: float = 0.0

    def names(self, part: str, module: nn.Module) -> bool:
        """Whether ``module`` is exactly this family's ``part`` (``"DecoderLayer"``, ``"MLP"``, ...)."""
        return type_name(module) == f"{self.module}.{self.prefix}{part}"


def type_name(module: nn.Module) -> str:
    """The qualified name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


FAMILIES = (
    Family("transformers.models.llama.modeling_llama", "Llama", lambda config, attention: None),
    Family(
        "transformers.models.mistral.modeling_mistral",
        "Mistral",
        lambda config, attention: getattr(config, "sliding_window", None),
    ),
    Family(
        "transformers.models.qwen2.modeling_qwen2",
        "Qwen2",
        lambda config, attention: attention.sliding_window,
    ),
)

# The classes of an MLP's act_fn, by the name of the activation's rule in sap_fast.ops.glu.
ACTIVATIONS = {
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
}
