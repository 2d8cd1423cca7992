"""A model's frozen weights in float8, for ``SAPConfig(float8=...)``: what that needs, and the copies that it takes."""

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from sap_fast.errors import UnsupportedModelError
from sap_fast.model.decoder import Decoder
from sap_fast.ops.lora_linear.float8 import BLOCK, Float8Weight, product, refusal_to_write, rounded, version_of

# Hopper. The chips of 8.9 multiply in float8 too, by other kernels than these, on which nothing here was tried.
CAPABILITY = (9, 0)
# stacklevel: the frames from the warning here up to the caller of ``attach``.
_ATTACH = 5


def float8_weights(decoder: Decoder, *, emulated: bool) -> Mapping[nn.Module, Float8Weight]:
    """Copy the weight of every linear map of the decoder's layers to float8, by module.

    Raises:
        ValueError: the model's device has no float8 products.
        UnsupportedModelError: weights in another dtype than bfloat16, or of sizes that float8 products do not take.
    """
    if not emulated:
        _check_device(decoder.device)
        for name, module in _linears(decoder):
            weight = module.weight
            if weight.dtype != torch.bfloat16:
                raise UnsupportedModelError(
                    f"{name} is {weight.dtype}, but float8=True takes the place of bfloat16 products: load the model "
                    "with dtype=torch.bfloat16 (LoRA weights may stay float32)"
                )
            if any(size % BLOCK for size in weight.shape):
                raise UnsupportedModelError(
                    f"{name} is {tuple(weight.shape)}: float8 products take sizes that are multiples of {BLOCK}; leave "
                    "float8 off"
                )
        _try(decoder.device)
    with torch.no_grad():
        return {module: Float8Weight.of(module.weight, emulated=emulated) for _, module in _linears(decoder)}


def check_unchanged(decoder: Decoder) -> None:
    """Refuse frozen weights that were written to, or replaced, since their copies in float8 were made.

    Writes in place by way of ``weight.data`` cannot be seen.

    Raises:
        UnsupportedModelError: naming the layer.
    """
    if decoder.float8 is None:
        return
    for name, module in _linears(decoder):
        if decoder.float8[module].version != version_of(module.weight):
            raise UnsupportedModelError(
                f"{name} has changed since attach, and its copies in float8 have not; detach and attach again"
            )


def _linears(decoder: Decoder) -> Iterator[tuple[str, nn.Linear]]:
    for i, layer in enumerate(decoder.layers):
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        for name, projection in zip(names, layer.projections, strict=True):
            yield f"layers.{i}.{name}", projection.base


_WAY_OUT = "float8='emulated' has the same rounding on any device, and saves nothing"


def _check_device(device: torch.device) -> None:
    if device.type != "cuda" or torch.version.hip:
        kind = "an AMD GPU" if torch.version.hip else str(device)
        raise ValueError(f"float8=True needs an NVIDIA GPU, but the model is on {kind}; {_WAY_OUT}")
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise ValueError(
            f"float8=True needs compute capability {'.'.join(map(str, CAPABILITY))} (Hopper) or newer, but "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}; {_WAY_OUT}"
        )


def _try(device: torch.device) -> None:
    """Form a small product: which devices have those with scales by rows differs between releases of torch."""
    x = rounded(torch.ones(BLOCK, BLOCK, device=device))
    try:
        product(x, x, torch.empty(BLOCK, BLOCK, device=device, dtype=torch.bfloat16), emulated=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"float8=True: torch {torch.__version__} forms no such product on {torch.cuda.get_device_name(device)} "
            f"({reason}); {_WAY_OUT}"
        ) from error
    if (refusal := refusal_to_write(device)) is not None:
        warnings.warn(
            f"float8=True: torch {torch.__version__} does not write such products where it is told to ({refusal}); "
            "each is copied, with the same results",
            stacklevel=_ATTACH,
        )
