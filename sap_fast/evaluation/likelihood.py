"""Teacher-forced log-likelihoods, through the model's own forward: no probe, no dropout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sap_fast.batch.rows import IGNORED
from sap_fast.data.collate import Collator
from sap_fast.data.encode import Tokens

# Of a batch; bounds the logits, [tokens, vocabulary] in float32.
_TOKENS = 1024


def margins(model: nn.Module, pairs: Sequence[tuple[Tokens, Tokens]]) -> Tensor:
    """Compute ``log p(chosen) - log p(rejected)`` of each pair, means over scored tokens: ``[P]``, nats per token."""
    chosen, rejected = zip(*pairs, strict=True)
    total, scored = _log_likelihoods(model, [*chosen, *rejected])
    a, b = (total / scored).chunk(2)
    return a - b


def task_loss(model: nn.Module, rows: Sequence[Tokens]) -> float:
    """Compute the mean negative log-likelihood over all scored tokens of all rows (nats per token)."""
    total, scored = _log_likelihoods(model, rows)
    return float(-total.sum() / scored.sum())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, without gradients, within a block; every module's mode is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _log_likelihoods(model: nn.Module, rows: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Sum up the log-probabilities of each row's scored tokens, and count them: ``[rows]`` float64 on the CPU."""
    device = next(model.parameters()).device
    collate = Collator(0)
    total, scored = torch.zeros(2, len(rows), dtype=torch.float64)
    with evaluating(model):
        for chosen in _batches(rows):
            batch = {key: x.to(device) for key, x in collate([rows[i] for i in chosen]).items()}
            # Logits from the first scored token's predecessor on: those of long prompts would fill the memory.
            unscored = int((batch["labels"][:, 1:] != IGNORED).any(0).int().argmax())
            labels = batch["labels"][:, 1 + unscored :]
            out: Any = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
                logits_to_keep=labels.shape[1] + 1,
            )
            logits = out.logits[:, :-1].float().transpose(1, 2)
            nll = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)  # 0 where not scored
            total[chosen] = -nll.sum(1, dtype=torch.float64).cpu()
            scored[chosen] = (labels != IGNORED).sum(1).double().cpu()
    return total, scored


def _batches(rows: Sequence[Tokens]) -> Iterator[list[int]]:
    """Group the indices of rows of similar length, at most ``_TOKENS`` tokens together with their padding."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids)):
        if batch and (len(batch) + 1) * len(rows[i].input_ids) > _TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
