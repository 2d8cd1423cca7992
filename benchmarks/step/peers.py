"""Plain fine-tuning as others do it: by transformers and PEFT alone, by trl's trainer, with Liger's kernels."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from benchmarks.ops.peers import AbsentError, installed
from benchmarks.published.parts import trained, training
from benchmarks.step.batches import Batch, Given
from benchmarks.step.run import Run, padded_lengths


@contextmanager
def plain(model: nn.Module, given: Given) -> Iterator[Run]:
    with training(model):
        yield _descending(model, given, lambda batch: model(**batch, use_cache=False).loss)


@contextmanager
def trl(model: nn.Module, given: Given) -> Iterator[Run]:
    if installed("trl") is None:
        raise AbsentError("trl is not installed")
    with tempfile.TemporaryDirectory() as folder, training(model):
        with _naming("trl"):
            trainer = _sft_trainer(model, given, folder)
        # It adds to the batch what it wants the forward to be given.
        run = _descending(model, given, lambda batch: trainer.compute_loss(trainer.model, dict(batch)))
        # Its default loss, chunked_nll, drops rows that are not scored before the head.
        yield replace(run, head_on_scored=True)


def _sft_trainer(model: nn.Module, given: Given, folder: str) -> Any:
    """Make a trainer that is given token ids, so that its tokenizer need not know more than padding."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    arguments = SFTConfig(
        output_dir=folder,
        report_to="none",
        use_cpu=given.batch["input_ids"].device.type == "cpu",
        bf16=False,  # the model is stored in its dtype
        gradient_checkpointing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = {key: given.batch[key].tolist() for key in ("input_ids", "labels")}
    return SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>"),
    )


@contextmanager
def liger(model: nn.Module, given: Given) -> Iterator[Run]:
    if installed("liger_kernel") is None:
        raise AbsentError("liger_kernel is not installed")
    if given.batch["input_ids"].device.type != "cuda":
        raise AbsentError("Liger's kernels need a GPU")
    with _naming("liger_kernel"):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        patched = Patched(model, _apply_liger_kernel_to_instance)

    def loss_of(batch: Batch) -> Tensor:
        return model(**batch, use_cache=False).loss

    with training(model):
        run = _descending(model, given, loss_of)

        def step() -> Tensor:
            with patched.applied():
                return run.step()

        yield replace(run, step=step)


class Patched:
    """Holds what a patch of one model changes for all of its kind: names in their module of transformers.

    They are put back at once, and changed only while the patched model runs, so that the others run what they did.
    """

    def __init__(self, model: Any, patch: Callable[..., None]) -> None:
        base = model.get_base_model()
        names = self._names = vars(import_module(type(base).__module__))
        before = dict(names)
        patch(model=base)
        self._new = {name: x for name, x in names.items() if name not in before or before[name] is not x}
        self._old = {name: before[name] for name in self._new if name in before}
        self._put_back()

    @contextmanager
    def applied(self) -> Iterator[None]:
        self._names.update(self._new)
        try:
            yield
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for name in self._new.keys() - self._old.keys():
            del self._names[name]
        self._names.update(self._old)


@contextmanager
def _naming(package: str) -> Iterator[None]:
    """Turn what fails in setting up another's package into a reason to go on without it."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise AbsentError(f"{package} {installed(package)}: {type(error).__name__}: {reason}"[:300]) from error


def _descending(model: nn.Module, given: Given, loss_of: Callable[[Batch], Tensor]) -> Run:
    weights = list(trained(model).values())

    def step() -> Tensor:
        for p in weights:
            p.grad = None
        loss = loss_of(given.batch)
        loss.backward()
        return loss.detach()

    return Run(step, given.batch, padded_lengths(given.batch))
