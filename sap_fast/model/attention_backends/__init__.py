"""Serves attention in ordinary passes, which have no tangent, by what is fastest where the library runs.

``choice.py`` has the order of preference and the rules; ``machine.py`` looks at what is there.
"""

from dataclasses import replace
from typing import Literal

from sap_fast.model.attention_backends.choice import Backend, Choice, Heads, choose
from sap_fast.model.attention_backends.machine import machine_of
from sap_fast.model.attention_backends.serve import Attention, load
from sap_fast.model.decoder import Decoder
from sap_fast.model.layer import Layer

__all__ = ["Attention", "Choice", "Heads", "choose", "load", "machine_of", "with_attention"]


def with_attention(decoder: Decoder, wanted: Backend | Literal["auto"]) -> Decoder:
    """Return ``decoder`` with its ordinary passes served by a backend.

    Args:
        wanted: ``SAPConfig.attention``.

    Raises:
        ValueError: the backend wanted cannot serve this model here; the message says why, and what to do.
    """

    if wanted == "own":
        return decoder

    def served(layer: Layer) -> Layer:
        heads = Heads(layer.qkv[0].base.weight.dtype, layer.head_dim)
        backend = choose(wanted, machine_of(decoder.device, heads), heads).backend
        return layer if backend == "own" else replace(layer, attention=Attention(backend, load(backend)))

    return replace(decoder, layers=tuple(map(served, decoder.layers)))
