"""Safety-Aware Probing once more, in a few lines on transformers' own forward: the witness of the trajectory tests.

It shares no code with the library. The derivative along u is exact (double backward) or, with ``radius``, the
published forward difference.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from oracle import lora, margins, probes, task_loss
from torch import Tensor, nn
from torch.nn import functional as F


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).norm()


def _direction(model: nn.Module, pairs: Mapping[str, Tensor], probe: Mapping[int, Tensor], released: bool) -> dict:
    with probes(model, probe):
        margin = margins(model, pairs, per_token=not released)
    loss = -F.logsigmoid(margin).mean() if released else -margin.mean()
    grads = torch.autograd.grad(loss, list(lora(model).values()))
    return {name: g / _norm(grads) for name, g in zip(lora(model), grads, strict=True)}


def _climb_gradient(model: nn.Module, batch: Mapping, u: Mapping, probe: Mapping, radius: float | None) -> dict:
    """Compute grad_V L_dot at ``probe``."""
    theta, leaves = lora(model), {j: v.clone().requires_grad_() for j, v in probe.items()}

    def loss() -> Tensor:
        with probes(model, leaves):
            return task_loss(model, batch)

    if radius is None:
        grads = torch.autograd.grad(loss(), list(theta.values()), create_graph=True)
        slope = sum((g * u[name]).sum() for name, g in zip(theta, grads, strict=True))
        return dict(zip(leaves, torch.autograd.grad(slope, list(leaves.values())), strict=True))
    here = torch.autograd.grad(loss(), list(leaves.values()))
    kept = {name: p.detach().clone() for name, p in theta.items()}
    length = radius * _norm(list(kept.values()))
    with torch.no_grad():
        for name, p in theta.items():
            p.add_(length * u[name])
    ahead = torch.autograd.grad(loss(), list(leaves.values()))
    with torch.no_grad():
        for name, p in theta.items():
            p.copy_(kept[name])
    return {j: (b - a) / length for j, a, b in zip(leaves, here, ahead, strict=True)}


def _scales(model: nn.Module, batch: Mapping[str, Tensor], probe: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Median over real tokens of the RMS of each probed layer's output."""
    layers, states = model.get_base_model().model.layers, {}

    def record(layer: int) -> Callable:
        return lambda _, __, out: states.update({layer: out[batch["attention_mask"].bool()]})

    with torch.no_grad(), probes(model, probe):
        handles = [layers[j].register_forward_hook(record(j)) for j in probe]
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        for handle in handles:
            handle.remove()
    return {j: x.square().mean(-1).sqrt().median() for j, x in states.items()}


def trajectory(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    pairs: Sequence[Mapping[str, Tensor]],
    layers: Sequence[int],
    *,
    schedule: str = "lagged",
    released: bool = False,
    radius: float | None = None,
    lr: float = 1e-2,
) -> list[tuple[dict[str, Tensor], dict[int, Tensor]]]:
    """Train; return (theta, V) after each step. ``released``: AdamW probe at 0.05; else sign at 0.01 of the RMS."""
    theta = lora(model)
    optimizer = torch.optim.AdamW(theta.values(), lr=lr)
    width = model.get_base_model().config.hidden_size
    zero = {j: torch.zeros(width, dtype=torch.float64) for j in layers}
    probe = {j: nn.Parameter(v.clone()) for j, v in zero.items()}
    climber = torch.optim.AdamW(probe.values(), lr=0.05)
    history = []
    for batch, pair in zip(batches, pairs, strict=True):
        at = {j: v.detach().clone() for j, v in probe.items()} if schedule == "lagged" else zero
        u = _direction(model, pair, at if released else {}, released)
        climb = _climb_gradient(model, batch, u, at, radius)
        if released:
            alpha = 2e-5 * _norm([p.detach() for p in theta.values()])
            for j, v in probe.items():
                v.data.zero_()
                v.grad = -alpha * climb[j]
            climber.step()
            found = {j: v.detach().clone() for j, v in probe.items()}
        else:
            scales = _scales(model, batch, at)
            found = {j: 0.01 * scales[j] * climb[j].sign() for j in layers}
            for j, v in probe.items():
                v.data.copy_(found[j])
        optimizer.zero_grad()
        with probes(model, at if schedule == "lagged" else found):
            task_loss(model, batch).backward()
        optimizer.step()
        history.append(({name: p.detach().clone() for name, p in theta.items()}, found))
    return history
