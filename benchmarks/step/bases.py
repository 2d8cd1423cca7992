"""The models that whole steps are taken on, with adapters, ready to be trained."""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import models
from benchmarks.published.parts import trained

BASES: dict[str, Callable[..., tuple[nn.Module, Any]]] = {
    "smollm2": models.smollm2_base,
    "random": models.random_base,
    "tiny": models.tiny_base,
    "smollm2-shape": models.smollm2_shape,
    "llama-2-7b": partial(models.llama_base, layers=32),
    "qwen2.5-7b": models.qwen_base,
}
# Drawn on a GPU, and too large for a float64 copy.
LARGE = ("llama-2-7b", "qwen2.5-7b")
CHECKED_LAYERS = 2


def base_of(name: str, smollm2: Path | None = None, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """Make a model of ``BASES`` and its tokenizer; a large one's weights are drawn in ``dtype``, else in float32.

    Args:
        smollm2: a folder to take SmolLM2 from.
    """
    if name in LARGE:
        return BASES[name](dtype=dtype)
    return models.smollm2_base(smollm2) if name == "smollm2" else BASES[name]()


def ready(name: str, smollm2: Path | None, dtype: torch.dtype, device: str) -> tuple[nn.Module, Any]:
    """Make a model with adapters in float32, its frozen weights in ``dtype`` on ``device``, and its tokenizer."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # of the model before it
    torch.manual_seed(0)
    base, tokenizer = base_of(name, smollm2, dtype)
    model = models.with_lora(base, seed=0).to(device)
    wake(model)
    return models.twin(model, dtype), tokenizer


def frozen_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that a model's frozen weights are stored in."""
    return next(p.dtype for p in model.parameters() if not p.requires_grad)


def shallow(name: str, model: nn.Module) -> nn.Module:
    """Make a twin of a model that a few steps take little time on."""
    return models.cut(model, CHECKED_LAYERS) if name in LARGE else models.twin(model)


def wake(model: nn.Module) -> None:
    """Move B away from zero, where A would have no gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in trained(model).items():
            if "lora_B" in name:
                p.add_(1e-2 * torch.randn(p.shape, generator=generator).to(p.device))
