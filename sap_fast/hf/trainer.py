"""``SAPTrainer``: transformers' Trainer whose training step is a step of Safety-Aware Probing."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from sap_fast.config import SAPConfig
from sap_fast.data.collate import Collator
from sap_fast.data.encode import Encoded, encode_pairs, encode_tasks
from sap_fast.errors import DataError
from sap_fast.hf.arguments import check_arguments
from sap_fast.report import StepReport
from sap_fast.step import SAP, attach

logger = logging.get_logger(__name__)

# What is logged of a step, as sap/<name>; the mean over the steps since the last log.
_LOGGED = ("steering", "safety_margin", "safety_loss", "direction_cosine", "loss_dot")
# What only a step that found a direction, or a probe, has measured.
_MEASURED_BY = {
    "safety_margin": "found_direction",
    "safety_loss": "found_direction",
    "direction_cosine": "found_direction",
    "steering": "found_probe",
}


class SAPTrainer(Trainer):
    """transformers' ``Trainer`` with Safety-Aware Probing (arXiv 2505.16737) in its training step.

    Logging, progress bar, gradient accumulation, clipping, schedules, evaluation, checkpoints and ``report_to`` are
    the Trainer's. However many micro-batches are accumulated, there is one direction and one probe update for
    each optimizer step. A checkpoint is a plain PEFT adapter: the probe is never a part of the model. Evaluation runs
    the model's own forward, without a probe.

    The log gains ``sap/steering``, ``sap/safety_margin``, ``sap/safety_loss``, ``sap/direction_cosine``,
    ``sap/loss_dot`` (see :class:`sap_fast.StepReport`) and ``sap/probe_norm``, over all probed layers together; means
    since the last log.

    Args:
        model: a transformers causal language model with LoRA adapters, as ``peft.get_peft_model`` makes it.
        args: ``transformers.TrainingArguments``.
        train_dataset: rows in one of the formats of ``sap_fast.data.formats``, or tokenized ones with
            ``input_ids`` and ``labels`` (unshifted, -100 = not scored).
        safety_dataset: pairs of safe and unsafe answers: rows with ``prompt``, ``chosen``, ``rejected``.
        sap: the method's settings; defaults if None.
        processing_class: the model's tokenizer; with a chat template, but for plain texts.
        safety_batch_size: pairs in each step.
        max_length: longer rows are cut at their end (tokens); how many is logged as a warning, and counted in
            ``task_data`` and ``safety_data``.
        eval_dataset: as ``train_dataset``, or a dict of such.
        more: what else ``transformers.Trainer`` takes.

    Raises:
        DataError: data that cannot be used, with its line or row.
        UnsupportedModelError: the model holds something without a dual rule.
        ValueError: arguments that a step would have to ignore, by name.
    """

    # The step's loss is the mean over the scored tokens of all micro-batches: nothing is left to divide.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        train_dataset: Any,
        safety_dataset: Any,
        sap: SAPConfig | None = None,
        processing_class: Any = None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        safety_batch_size: int = 8,
        max_length: int | None = 1024,
        **more: Any,
    ) -> None:
        for name in ("model_init", "compute_loss_func"):
            if more.get(name) is not None:
                raise ValueError(f"SAPTrainer does not support {name}: a step takes one model, and computes its loss")
        if safety_batch_size < 1:
            raise ValueError(f"safety_batch_size must be at least 1, but is {safety_batch_size}")
        if args is None:
            raise ValueError("args is missing: pass transformers.TrainingArguments(output_dir=...)")
        check_arguments(args, model)
        self.sap_config = sap or SAPConfig()
        # Refuse now what a step would refuse; what asks for a device, once the Trainer has moved the model there.
        anywhere = self.sap_config.replace(attention="auto", float8=False, graph=False)
        with _unpatched(model):
            attach(model, anywhere).detach()

        read = _Reader(processing_class, max_length)
        self.task_data = read.tasks(train_dataset, "train_dataset")
        self.safety_data = read.pairs(safety_dataset)
        if data_collator is None:
            data_collator = Collator.of(processing_class) if processing_class is not None else Collator(0)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=_as_dicts(self.task_data),
            eval_dataset=read.evaluation(eval_dataset),
            processing_class=processing_class,
            **more,
        )
        with _unpatched(model):
            attach(model, self.sap_config).detach()
        self._collate_pairs = Collator.of(processing_class) if processing_class is not None else Collator(0)
        self._safety_batch_size = min(safety_batch_size, len(self.safety_data))
        self._sap: SAP | None = None
        self._micros: list[dict[str, Tensor]] = []  # of the optimizer step under way
        self._reports: list[StepReport] = []  # since the last log
        self.add_callback(_Forget(self._micros))

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, **more: Any) -> Any:
        """Train as ``Trainer.train`` does, with the model attached meanwhile.

        Raises:
            ValueError: ``resume_from_checkpoint`` or ``trial``, which are not supported.
            StepRefusedError: a step's numbers are unusable; the weights are those of the step before.
        """
        if resume_from_checkpoint or trial:
            raise ValueError("exact resuming and hyperparameter search are not supported yet; start anew")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._pairs = shuffled_rounds(self.safety_data, self._safety_batch_size, seed)
        self._micros.clear()
        self._reports.clear()
        with _unpatched(self.model):
            self._sap = attach(self.model, self.sap_config)
        try:
            with self._sap:
                return super().train(**more)
        finally:
            self._sap = None
            self._micros.clear()

    def get_train_dataloader(self) -> DataLoader:
        """Make the Trainer's loader, whose batches stay on the host: packing there waits for no device."""
        accelerator, placing = self.accelerator, self.accelerator.device_placement
        # Unless asked to dispatch batches itself (accelerator_config): it does so from the device alone.
        accelerator.device_placement = placing and bool(accelerator.dispatch_batches)
        try:
            return super().get_train_dataloader()
        finally:
            accelerator.device_placement = placing

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Take the Trainer's batches; their count of scored tokens, which no step reads, stays on the host."""
        return super().get_batch_samples(epoch_iterator, num_batches, torch.device("cpu"))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Collect micro-batches; with the last of an optimizer step, compute its gradient.

        Returns:
            The step's loss, the mean over the scored tokens of all its micro-batches; 0 for all but the last.
        """
        if self._sap is None:
            raise RuntimeError("training_step outside train(): SAPTrainer attaches to the model there")
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free optimizers
        self._micros.append(inputs)  # on the host, where a step packs it
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        micros = self._micros.copy()
        self._micros.clear()
        pairs = self._collate_pairs(next(self._pairs))
        with _unpatched(model):
            report = self._sap.step(micros, pairs)
            # The optimizer comes next: with check="deferred", too, it must not be given what is not finite.
            self._sap.settle()
        self._reports.append(report)
        return report.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the Trainer logs, and what the steps since the last log measured."""
        if "loss" in logs and self._reports:
            logs = {**logs, **_means([report.to_dict() for report in self._reports])}
            self._reports.clear()
        super().log(logs, start_time)


def shuffled_rounds(rows: Sequence[Any], size: int, seed: int) -> Iterator[list[Any]]:
    """Yield batches of ``size`` rows without end: every row once in a round, each round in a new order."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(len(rows), generator=generator).tolist()
        batch, waiting = waiting[:size], waiting[size:]
        yield [rows[i] for i in batch]


class _Forget(TrainerCallback):
    """Forgets what was collected of a step that an epoch's early end has cut off."""

    def __init__(self, micros: list[Any]) -> None:
        self._micros = micros

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._micros.clear()


class _Reader:
    """Reads the trainer's datasets with one tokenizer and one length, and says what was cut."""

    def __init__(self, tokenizer: Any, max_length: int | None) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length

    def tasks(self, source: Any, name: str) -> Encoded:
        if source is None:
            raise DataError(f"{name} is missing")
        if isinstance(source, Encoded):
            return source
        return self._said(encode_tasks(self._tokenizer, source, self._max_length, name=name), name)

    def pairs(self, source: Any) -> Encoded:
        name = "safety_dataset"
        if source is None:
            raise DataError(
                "safety_dataset is missing: pairs with prompt, chosen and rejected. For plain fine-tuning use "
                "transformers' Trainer"
            )
        if isinstance(source, Encoded):
            return source
        return self._said(encode_pairs(self._tokenizer, source, self._max_length, name=name), name)

    def evaluation(self, source: Any) -> Any:
        if source is None:
            return None
        if isinstance(source, Mapping):
            return {key: _as_dicts(self.tasks(part, f"eval_dataset[{key!r}]")) for key, part in source.items()}
        return _as_dicts(self.tasks(source, "eval_dataset"))

    def _said(self, encoded: Encoded, name: str) -> Encoded:
        if encoded.cut:
            logger.warning(
                f"{name}: {encoded.cut} of {len(encoded) + encoded.dropped} rows were cut at max_length="
                f"{self._max_length} tokens, and {encoded.dropped} of them dropped: nothing of their answer was left"
            )
        return encoded


def _as_dicts(data: Encoded) -> list[dict[str, list[int]]]:
    """Turn encoded rows into rows as the Trainer knows them, by name."""
    return [row._asdict() for row in data]


def _means(reports: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Take means over the steps that measured a thing."""
    rows = [r | {"probe_norm": _norm(r["probe_norm"].values())} for r in reports]
    means = {}
    for name in (*_LOGGED, "probe_norm"):
        found = [row[name] for row in rows if name not in _MEASURED_BY or row[_MEASURED_BY[name]]]
        if found:
            means[f"sap/{name}"] = sum(found) / len(found)
    return means


def _norm(norms: Any) -> float:
    return sum(norm**2 for norm in norms) ** 0.5


@contextmanager
def _unpatched(model: nn.Module) -> Iterator[None]:
    """Take accelerate's autocast off ``model.forward`` meanwhile.

    ``Accelerator.prepare`` puts it on the instance under ``bf16=True``. The step does not run that forward, and
    refuses a replaced one, since it cannot know what it does; this one it knows. Evaluation goes on using it.
    """
    patched = model.__dict__.pop("forward", None) if "_original_forward" in model.__dict__ else None
    try:
        yield
    finally:
        if patched is not None:
            model.forward = patched
