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

Batches and pairs are those of the library (``sap_fast/batch/rows.py``), padded on the right.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.published.parts import (
    Batch,
    bf16_autocast,
    biases,
    differentiate,
    gradients,
    hooked,
    margins,
    move,
    moved,
    norm,
    pad_id,
    prompt_only,
    prompt_only_margins,
    prompt_only_pairs,
    task_loss,
    trained,
    training,
    unit,
    without_dropout,
)


class PublishedStep:
    """Runs the published step on one model; a context manager that takes everything off at its end.

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
            self.probe = undo.enter_context((biases if as_released else hooked)(model, layers))
            undo.enter_context(training(model) if as_released else without_dropout(model))
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
        pad = pad_id(self.model)
        task = prompt_only(batch, self.task_length, pad)
        contrast = prompt_only_pairs(pairs, self.pair_length, pad)
        print(f"Batch {self._steps + 1}")
        for p in theta.values():
            p.grad = None

        differentiate(probe, False)
        with self._precision():
            margin = prompt_only_margins(self.model, contrast)
            (-F.logsigmoid(margin / self.temperature).mean()).backward()
        u = unit({name: p.grad for name, p in theta.items() if p.grad is not None})
        alpha = self.radius * norm({name: p.clone() for name, p in theta.items()})
        for p in theta.values():
            p.grad = None

        move(theta, u, alpha)
        differentiate(probe, True)
        differentiate(theta, False)
        with self._precision():
            (-self.model(**task).loss).backward()
        move(theta, u, -alpha)

        differentiate(theta, True)
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
