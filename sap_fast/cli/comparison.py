"""The same model fine-tuned on the same data from the same start by several methods, and what each cost in safety."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from sap_fast.cli.models import load_model, quiet
from sap_fast.cli.train import Data, Stopwatch, add_adapter, make_trainer
from sap_fast.config import SAPConfig
from sap_fast.evaluation.likelihood import margins, task_loss
from sap_fast.evaluation.measure import Suite, measure


@dataclass(frozen=True)
class Settings:
    """Holds the settings that all methods share."""

    steps: int
    batch: int
    pairs: int
    learning_rate: float
    seed: int
    eval_every: int
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Point:
    """Holds the figures of a model on its way: both on held-out data, nats per token."""

    step: int
    task_loss: float
    margin: float


@dataclass(frozen=True)
class Run:
    """Holds what one method did: its way from the start, its figures at the end, its median seconds per step."""

    way: list[Point]
    figures: dict[str, float]
    seconds_per_step: float
    log: list[dict[str, Any]]


class _Watch(TrainerCallback):
    """Measures every so many steps on the way, and tells of it. The end is measured after it, with everything else."""

    def __init__(self, model: nn.Module, suite: Suite, every: int, tell: Callable[[Point], None]) -> None:
        self._model, self._suite, self._every, self._tell = model, suite, every, tell
        self.way: list[Point] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            margin = float(margins(self._model, self._suite.unseen).mean())
            self.way.append(Point(state.global_step, task_loss(self._model, self._suite.tasks), margin))
            self._tell(self.way[-1])


def point(step: int, figures: Mapping[str, float]) -> Point:
    """Make a point of the way from all the figures of a model there."""
    return Point(step, figures["task_loss"], figures["margin_unseen"])


def fine_tune(
    base: Path,
    tokenizer: Any,
    data: Data,
    suite: Suite,
    settings: Settings,
    config: SAPConfig | None,
    start: Point,
    folder: Path,
    tell: Callable[[Point], None],
    max_new_tokens: int = 0,
) -> tuple[nn.Module, Run]:
    """Fine-tune ``base`` by one method; None for ``config`` is plain fine-tuning, by transformers' own Trainer.

    Args:
        start: ``base`` as it was measured; fresh adapters change nothing.
        folder: what the Trainer is given as its output folder; nothing is saved there.
        tell: called with each point on the way.
        max_new_tokens: of the greedy answers at the end; 0 for none.
    """
    model = add_adapter(load_model(str(base), dtype="float32"), settings, settings.seed)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=settings.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    stopwatch, watch = Stopwatch(), _Watch(model, suite, settings.eval_every, tell)
    trainer = make_trainer(model, args, data, tokenizer, config, settings.pairs, [stopwatch, watch])
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    with quiet():
        trainer.train()
        found = measure(model, tokenizer, suite, max_new_tokens)
    end = point(settings.steps, found.figures)
    tell(end)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return model, Run([start, *watch.way, end], found.figures, stopwatch.median, log)


def at_equal_loss(ways: Mapping[str, Sequence[Point]]) -> tuple[float, dict[str, float]]:
    """Return each method's margin where it first reaches the lowest task loss that all of them reach.

    Between two measured points the margin is taken on the straight line. All ways start at the same point.

    Returns:
        That task loss, and the margins by method.
    """
    loss = max(min(p.task_loss for p in way) for way in ways.values())
    return loss, {name: _margin_at(way, loss) for name, way in ways.items()}


def _margin_at(way: Sequence[Point], loss: float) -> float:
    for i, here in enumerate(way):
        if here.task_loss > loss:
            continue
        if i == 0 or here.task_loss == loss:
            return here.margin
        before = way[i - 1]
        share = (before.task_loss - loss) / (before.task_loss - here.task_loss)
        return before.margin + share * (here.margin - before.margin)
    raise ValueError(f"no point of the way reaches a task loss of {loss}")
