"""The published SAP step on transformers' and PEFT's own forward: what the library is up against.

Written after the authors' released code (ChengcanWu/SAP, Apache-2.0, folder SAPcode: ``train.py``,
``main.py``, ``model.py``, ``datas.py``), whose formulas it keeps. A step is three forward and
backward passes, with ``alpha = radius * |theta|``,

    1. the pairs, at theta, for the unit harmful direction u,
    2. the task batch at theta + alpha u, for grad_V L(theta + alpha u, V),
    3. the task batch at theta, for grad_theta L(theta, V) and grad_V L(theta, V),

then ``V <- 0`` and one AdamW step on ``grad_V L(theta, V) - grad_V L(theta + alpha u, V)``. The
probe found in a step acts in the next, in all three of its passes.

:class:`PublishedStep` runs it in two forms. *Tidy*, the default, is what one would write today:
answers teacher-forced, labels shifted, rows padded to the longest, dropout off, weights restored
from a copy. *As released* keeps what the released code does, to be timed and to show its faults:

- the pairs' input ends with the prompt, so their answers are never fed; an answer is a row of
  labels only, scored unshifted, where the input holds padding (``datas.py``,
  ``load_contrastive_data``; ``train.py``, ``compute_contrastive_gradients``)
- the task's input ends with the prompt too (``datas.py``, ``load_alpaca_data``); its labels are
  shifted, by the model
- every row is padded to a fixed length, 256 for pairs and 128 for the task, and the output head
  runs on all of it
- dropout is live, and passes 2 and 3, whose difference is taken, draw different masks
- the weights are moved in place by ``+alpha u`` and back by ``-alpha u``, which costs those smaller
  than the move their low bits, and leaves all moved if the pass between is interrupted
- the probe is a bias on ``mlp.down_proj`` (``model.py``): it stays in the model afterwards, and
  needs a plain ``nn.Linear`` there, so no adapter
- everything runs under bfloat16 autocast, with the model's key-value cache on
- each step prints, reads its loss from the device, and empties the allocator's cache

Batches and pairs are those of the library (``sap_fast/batch.py``), padded on the right.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = Mapping[str, Tensor]

IGNORED = -100


class PublishedStep:
    """The published step on one model; a context manager that takes everything off at its end.

    Args:
        model: a transformers model with LoRA adapters, as ``peft.get_peft_model`` makes it.
        layers: the probed layers, counted from 0.
        radius: length of the difference, relative to the norm of all trained weights (``main.py``).
        lr: learning rate of the probe's AdamW (``main.py``).
        temperature: of the safety loss ``-log sigmoid(margin / temperature)``; a margin is a sum
            over tokens.
        as_released: keep the quirks listed above.
        autocast: compute in bfloat16 autocast, else in the dtype of the weights; None is
            ``as_released``.
        task_length, pair_length: tokens to which the released form pads and cuts rows.

    Raises:
        ValueError: the released form on a model whose ``mlp.down_proj`` cannot take its bias.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int],
        *,
        radius: float = 2e-5,
        lr: float = 0.05,
        temperature: float = 1.0,
        as_released: bool = False,
        autocast: bool | None = None,
        task_length: int = 128,
        pair_length: int = 256,
    ) -> None:
        self.model, self.as_released = model, as_released
        self.radius, self.temperature = radius, temperature
        self.task_length, self.pair_length = task_length, pair_length
        self._autocast = as_released if autocast is None else autocast
        self._theta = trained(model)
        self._steps = 0
        self._undo = ExitStack()
        with ExitStack() as undo:  # nothing stays on the model if this fails half-way
            self.probe = undo.enter_context((_biases if as_released else _hooked)(model, layers))
            undo.enter_context(_training(model) if as_released else _without_dropout(model))
            self._undo = undo.pop_all()
        self._climber = torch.optim.AdamW(self.probe.values(), lr=lr)

    def step(self, batch: Batch, pairs: Batch) -> Tensor:
        """Leave grad_theta L(theta, V) in ``.grad`` of the trained weights, replacing what it held.

        Args:
            batch: ``input_ids, attention_mask, labels``, each ``[B, T]``.
            pairs: the same with ``[2P, T]``, all chosen rows first, then all rejected.

        Returns:
            The task loss, 0-dim, in nats per token.
        """
        loss = self._released(batch, pairs) if self.as_released else self._tidy(batch, pairs)
        self._steps += 1
        return loss

    def close(self) -> None:
        """Take the probe off and set the modules' training flags back."""
        self._undo.close()

    def __enter__(self) -> "PublishedStep":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _precision(self) -> AbstractContextManager:
        return bf16_autocast(self.model) if self._autocast else nullcontext()

    def _tidy(self, batch: Batch, pairs: Batch) -> Tensor:
        theta, probe = self._theta, self.probe
        with self._precision():
            margin = margins(self.model, pairs, per_token=False)
            safety = -F.logsigmoid(margin / self.temperature).mean()
        u = unit(gradients(safety, theta))

        with moved(theta, u, self.radius * norm(theta)):
            with self._precision():
                loss = task_loss(self.model, batch)
            ahead = gradients(loss, probe)

        with self._precision():
            loss = task_loss(self.model, batch)
        here = gradients(loss, {**theta, **probe})

        for name, p in theta.items():
            p.grad = here[name]
        for j, v in probe.items():
            v.grad = here[j] - ahead[j]
            v.data.zero_()
        self._climber.step()
        self._climber.zero_grad()
        return loss.detach()

    def _released(self, batch: Batch, pairs: Batch) -> Tensor:
        theta, probe = self._theta, self.probe
        pad = _pad_id(self.model)
        task = prompt_only(batch, self.task_length, pad)
        contrast = prompt_only_pairs(pairs, self.pair_length, pad)
        print(f"Batch {self._steps + 1}")
        for p in theta.values():
            p.grad = None

        _differentiate(probe, False)
        with self._precision():
            margin = prompt_only_margins(self.model, contrast)
            (-F.logsigmoid(margin / self.temperature).mean()).backward()
        u = unit({name: p.grad for name, p in theta.items() if p.grad is not None})
        alpha = self.radius * norm({name: p.clone() for name, p in theta.items()})
        for p in theta.values():
            p.grad = None

        _move(theta, u, alpha)
        _differentiate(probe, True)
        _differentiate(theta, False)
        with self._precision():
            (-self.model(**task).loss).backward()
        _move(theta, u, -alpha)

        _differentiate(theta, True)
        with self._precision():
            loss = self.model(**task).loss
            value = loss.item()
            loss.backward()
        for v in probe.values():
            v.data.zero_()
        self._climber.step()
        self._climber.zero_grad()
        torch.cuda.empty_cache()
        return torch.tensor(value)


# --- The two gradients by themselves, as the fidelity benchmark takes them ---


def harmful_direction(
    model: nn.Module, pairs: Batch, *, logsigmoid: float | None = None, autocast: bool = False
) -> dict[str, Tensor]:
    """The unit gradient of the safety loss over all trained weights; answers teacher-forced.

    Args:
        pairs: ``[2P, T]`` as above.
        logsigmoid: None for the mean of ``-(log p(chosen) - log p(rejected))``, per token, which
            does not saturate; else the published loss on summed log-probabilities, at this
            temperature.
        autocast: compute in bfloat16 autocast, else in the dtype of the weights.
    """
    theta = trained(model)
    with _without_dropout(model), bf16_autocast(model) if autocast else nullcontext():
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
    """``(grad_V L(theta + alpha u, V) - grad_V L(theta, V)) / alpha`` by radius, by layer ``[d]``.

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
    with _without_dropout(model), probes(model, leaves):
        here = gradient(0 * length)
        for radius in radii:
            ahead = gradient(radius * length)
            found[radius] = {j: (ahead[j] - here[j]) / (radius * length) for j in leaves}
    return found


# --- The model's loss and margins ---


def task_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the scored tokens, in nats; 0-dim."""
    nll, scored = _token_nll(model, batch)
    return nll.sum() / scored.sum()


def margins(model: nn.Module, pairs: Batch, *, per_token: bool) -> Tensor:
    """``log p(chosen) - log p(rejected)`` of each pair ``[P]``, answers teacher-forced."""
    nll, scored = _token_nll(model, pairs)
    totals = -nll.sum(1) / scored.sum(1) if per_token else -nll.sum(1)
    chosen, rejected = totals.chunk(2)
    return chosen - rejected


def prompt_only_margins(model: nn.Module, contrast: Batch) -> Tensor:
    """The released margin of each pair ``[P]``: labels scored on the prompt's padding, unshifted.

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
    """The released input ``[B, length]``: prompts and padding; labels stay where they were."""
    prompt = _prompt_mask(batch)
    return {
        "input_ids": _fit(torch.where(prompt, batch["input_ids"], pad), length, pad),
        "attention_mask": _fit(prompt.long(), length, 0),
        "labels": _fit(batch["labels"], length, IGNORED),
    }


def prompt_only_pairs(pairs: Batch, length: int, pad: int) -> dict[str, Tensor]:
    """The released contrastive batch ``[P, length]``: one prompt a pair and two rows of labels."""
    both = prompt_only(pairs, length, pad)
    chosen, rejected = both["labels"].chunk(2)
    return {
        "input_ids": both["input_ids"].chunk(2)[0],
        "attention_mask": both["attention_mask"].chunk(2)[0],
        "chosen_labels": chosen,
        "rejected_labels": rejected,
    }


def _token_nll(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """``(-log p of the token after each, 0 where that is not scored; whether it is scored)``."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    nll = F.cross_entropy(wide, labels.flatten(), reduction="none")
    return nll.view_as(labels), labels != IGNORED


def _prompt_mask(batch: Batch) -> Tensor:
    """True on the real tokens before the first label ``[B, T]``."""
    return ((batch["labels"] != IGNORED).cumsum(1) == 0) & (batch["attention_mask"] != 0)


def _fit(x: Tensor, length: int, value: int) -> Tensor:
    return F.pad(x[:, :length], (0, max(0, length - x.shape[1])), value=value)


def _pad_id(model: nn.Module) -> int:
    config: Any = model.config
    candidates = (config.pad_token_id, config.eos_token_id)
    return next((i for i in candidates if isinstance(i, int) and i >= 0), 0)


# --- Vectors over named tensors ---


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """theta: the weights that require grad, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(loss: Tensor, wrt: Mapping) -> dict:
    """Gradients of ``loss`` by name."""
    return dict(zip(wrt, torch.autograd.grad(loss, list(wrt.values())), strict=True))


def norm(tensors: Mapping) -> Tensor:
    """The Euclidean norm over all tensors together, 0-dim."""
    return torch.cat([t.detach().flatten() for t in tensors.values()]).norm()


def unit(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, scaled to a joint norm of 1."""
    length = norm(tensors)
    return {name: t / length for name, t in tensors.items()}


# --- Contexts ---


def bf16_autocast(model: nn.Module) -> AbstractContextManager:
    """bfloat16 autocast on the model's device."""
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
            _move(theta, u, alpha)
            yield
        finally:
            with torch.no_grad():
                for name, p in theta.items():
                    p.copy_(kept[name])


def _move(theta: Mapping[str, nn.Parameter], u: Mapping[str, Tensor], alpha: Tensor) -> None:
    for name, p in theta.items():
        p.data.add_((alpha * u[name]).to(p.dtype))


def _differentiate(tensors: Mapping, on: bool) -> None:
    for t in tensors.values():
        t.requires_grad_(on)


@contextmanager
def _constant(theta: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Build no graph for the weights, so that backward ends at the lowest probe."""
    _differentiate(theta, False)
    try:
        yield
    finally:
        _differentiate(theta, True)


@contextmanager
def _hooked(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, nn.Parameter]]:
    """A zero probe on layer outputs."""
    vectors = {j: _zero_probe(_layers(model)[j].mlp.down_proj) for j in layers}
    with probes(model, vectors):
        yield vectors


@contextmanager
def _biases(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, nn.Parameter]]:
    """A zero probe as the bias of ``mlp.down_proj``."""
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
def _training(model: nn.Module) -> Iterator[None]:
    with _flags_kept(model):
        model.train()
        yield


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout off; other modules keep their mode, as checkpointing wants them in training mode."""
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
