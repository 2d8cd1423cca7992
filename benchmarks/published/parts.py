"""Holds the published step's parts: losses, direction, difference, and how a model is moved and put back.

Each stands alone, so that the fidelity and steering benchmarks can take the published gradient without the step.
Sources as in ``step.py``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = Mapping[str, Tensor]

IGNORED = -100


def harmful_direction(
    model: nn.Module, pairs: Batch, *, logsigmoid: float | None = None, autocast: bool = False
) -> dict[str, Tensor]:
    """Compute the unit gradient of the safety loss over all trained weights; answers teacher-forced.

    Args:
        pairs: ``[2P, T]`` as above.
        logsigmoid: None for the mean of ``-(log p(chosen) - log p(rejected))``, per token, which
            does not saturate; else the published loss on summed log-probabilities, at this
            temperature.
        autocast: compute in bfloat16 autocast, else in the dtype of the weights.
    """
    theta = trained(model)
    with without_dropout(model), bf16_autocast(model) if autocast else nullcontext():
        margin = margins(model, pairs, per_token=logsigmoid is None)
        loss = -margin.mean() if logsigmoid is None else -F.logsigmoid(margin / logsigmoid).mean()
        return unit(gradients(loss, theta))


def finite_differences(
    model: nn.Module,
    batch: Batch,
    u: Mapping[str, Tensor],
    probe: Mapping[int, Tensor],
    radii: Sequence[float],
    *,
    autocast: bool = False,
) -> dict[float, dict[int, Tensor]]:
    """Compute ``(grad_V L(theta + alpha u, V) - grad_V L(theta, V)) / alpha`` by radius, by layer ``[d]``.

    Args:
        batch: ``[B, T]`` as above.
        u: a unit direction by parameter name.
        probe: V by layer ``[d]``.
        radii: alpha relative to the norm of all trained weights; ``[2e-5]`` as published.
        autocast: compute in bfloat16 autocast, as published, else in the dtype of the weights.
            (In a float64 model transformers still computes its norms in float32, and so the
            difference of a small radius carries their rounding.)
    """
    theta = trained(model)
    leaves = {j: v.detach().clone().requires_grad_() for j, v in probe.items()}
    length = norm(theta)

    def gradient(alpha: Tensor) -> dict[int, Tensor]:
        with moved(theta, u, alpha):
            with bf16_autocast(model) if autocast else nullcontext():
                loss = task_loss(model, batch)
            return gradients(loss, leaves)

    found = {}
    with without_dropout(model), probes(model, leaves):
        here = gradient(0 * length)
        for radius in radii:
            ahead = gradient(radius * length)
            found[radius] = {j: (ahead[j] - here[j]) / (radius * length) for j in leaves}
    return found


# --- The model's loss and margins ---


def task_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the mean negative log-likelihood of the scored tokens, in nats; 0-dim."""
    nll, scored = _token_nll(model, batch)
    return nll.sum() / scored.sum()


def margins(model: nn.Module, pairs: Batch, *, per_token: bool) -> Tensor:
    """Compute ``log p(chosen) - log p(rejected)`` of each pair ``[P]``, answers teacher-forced."""
    nll, scored = _token_nll(model, pairs)
    totals = -nll.sum(1) / scored.sum(1) if per_token else -nll.sum(1)
    chosen, rejected = totals.chunk(2)
    return chosen - rejected


def prompt_only_margins(model: nn.Module, contrast: Batch) -> Tensor:
    """Compute each pair's released margin ``[P]``: labels scored on the prompt's padding, unshifted.

    Args:
        contrast: as :func:`prompt_only_pairs` makes it.
    """
    logits = model(input_ids=contrast["input_ids"], attention_mask=contrast["attention_mask"]).logits.flatten(0, 1)
    chosen, rejected = (
        F.cross_entropy(logits, contrast[side].flatten(), reduction="none").view_as(contrast[side]).sum(1)
        for side in ("chosen_labels", "rejected_labels")
    )
    return rejected - chosen


def prompt_only(batch: Batch, length: int, pad: int) -> dict[str, Tensor]:
    """Make the released input ``[B, length]``: prompts and padding; labels stay where they were."""
    prompt = _prompt_mask(batch)
    return {
        "input_ids": _fit(torch.where(prompt, batch["input_ids"], pad), length, pad),
        "attention_mask": _fit(prompt.long(), length, 0),
        "labels": _fit(batch["labels"], length, IGNORED),
    }


def prompt_only_pairs(pairs: Batch, length: int, pad: int) -> dict[str, Tensor]:
    """Make the released contrastive batch ``[P, length]``: one prompt a pair and two rows of labels."""
    both = prompt_only(pairs, length, pad)
    chosen, rejected = both["labels"].chunk(2)
    return {
        "input_ids": both["input_ids"].chunk(2)[0],
        "attention_mask": both["attention_mask"].chunk(2)[0],
        "chosen_labels": chosen,
        "rejected_labels": rejected,
    }


def _token_nll(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute ``(-log p of the token after each, 0 where that is not scored; whether it is scored)``."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    nll = F.cross_entropy(wide, labels.flatten(), reduction="none")
    return nll.view_as(labels), labels != IGNORED


def _prompt_mask(batch: Batch) -> Tensor:
    """Mark the real tokens before the first label ``[B, T]`` with True."""
    return ((batch["labels"] != IGNORED).cumsum(1) == 0) & (batch["attention_mask"] != 0)


def _fit(x: Tensor, length: int, value: int) -> Tensor:
    return F.pad(x[:, :length], (0, max(0, length - x.shape[1])), value=value)


def pad_id(model: nn.Module) -> int:
    config: Any = model.config
    candidates = (config.pad_token_id, config.eos_token_id)
    return next((i for i in candidates if isinstance(i, int) and i >= 0), 0)


# --- Vectors over named tensors ---


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return theta: the weights that require grad, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(loss: Tensor, wrt: Mapping) -> dict:
    """Compute the gradients of ``loss`` by name."""
    return dict(zip(wrt, torch.autograd.grad(loss, list(wrt.values())), strict=True))


def norm(tensors: Mapping) -> Tensor:
    """Compute the Euclidean norm over all tensors together, 0-dim."""
    return torch.cat([t.detach().flatten() for t in tensors.values()]).norm()


def unit(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scale the tensors to a joint norm of 1."""
    length = norm(tensors)
    return {name: t / length for name, t in tensors.items()}


# --- Contexts ---


def bf16_autocast(model: nn.Module) -> AbstractContextManager:
    """Enter bfloat16 autocast on the model's device."""
    return torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16)


@contextmanager
def probes(model: nn.Module, vectors: Mapping[int, Tensor]) -> Iterator[None]:
    """Add ``vectors`` ``[d]`` to the outputs of the model's layers, in the dtype of those."""
    handles = [
        _layers(model)[j].register_forward_hook(lambda _, __, out, v=v: out + v.to(out.dtype))
        for j, v in vectors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def moved(theta: Mapping[str, nn.Parameter], u: Mapping[str, Tensor], alpha: Tensor) -> Iterator[None]:
    """Move the weights by ``alpha u``, as constants; a copy brings them back whatever happens."""
    kept = {name: p.detach().clone() for name, p in theta.items()}
    with _constant(theta):
        try:
            move(theta, u, alpha)
            yield
        finally:
            with torch.no_grad():
                for name, p in theta.items():
                    p.copy_(kept[name])


def move(theta: Mapping[str, nn.Parameter], u: Mapping[str, Tensor], alpha: Tensor) -> None:
    for name, p in theta.items():
        p.data.add_((alpha * u[name]).to(p.dtype))


def differentiate(tensors: Mapping, on: bool) -> None:
    for t in tensors.values():
        t.requires_grad_(on)


@contextmanager
def _constant(theta: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Build no graph for the weights, so that backward ends at the lowest probe."""
    differentiate(theta, False)
    try:
        yield
    finally:
        differentiate(theta, True)


@contextmanager
def hooked(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, nn.Parameter]]:
    """Add a zero probe to layer outputs."""
    vectors = {j: _zero_probe(_layers(model)[j].mlp.down_proj) for j in layers}
    with probes(model, vectors):
        yield vectors


@contextmanager
def biases(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, nn.Parameter]]:
    """Add a zero probe as the bias of ``mlp.down_proj``."""
    sites = {j: _layers(model)[j].mlp.down_proj for j in layers}
    for j, site in sites.items():
        if type(site) is not nn.Linear or site.bias is not None:
            raise ValueError(
                f"layer {j}: the released code puts its probe into the bias of mlp.down_proj, "
                f"which must be an nn.Linear without one, but is a {type(site).__name__}; use "
                "as_released=False"
            )
    vectors = {j: _zero_probe(site) for j, site in sites.items()}
    try:
        for j, site in sites.items():
            site.bias = vectors[j]
        yield vectors
    finally:
        for site in sites.values():
            site.bias = None


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    with _flags_kept(model):
        model.train()
        yield


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch dropout off; other modules keep their mode, as checkpointing wants them in training mode."""
    with _flags_kept(model):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.training = False
        yield


def _zero_probe(down_proj: Any) -> nn.Parameter:
    weight = down_proj.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return nn.Parameter(torch.zeros(weight.shape[0], dtype=dtype, device=weight.device))


def _layers(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model.layers
