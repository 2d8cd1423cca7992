"""From texts to batches: the model's own chat template, prompts masked, rows padded to the longest."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sap_fast.batch import IGNORED
from sap_fast.data.examples import Example, Pair
from sap_fast.errors import BatchError


def encode(tokenizer: Any, prompt: str, completion: str, max_length: int | None = None) -> tuple[list[int], list[int]]:
    """Token ids and labels of one exchange; only the answer (with its end-of-turn mark) is scored.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        max_length: longer exchanges are cut at the end.

    Raises:
        BatchError: no chat template; a template whose text of the exchange does not begin with that of the
            prompt; an answer that is truncated away.
    """
    if not tokenizer.chat_template:
        raise BatchError("the tokenizer has no chat template; set tokenizer.chat_template")
    question = [{"role": "user", "content": prompt}]
    exchange = [*question, {"role": "assistant", "content": completion}]
    head = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(exchange, tokenize=False)
    if not text.startswith(head):
        raise BatchError("the chat template writes an answered prompt differently from an open one")
    # Tokenised apart, so that no token straddles the boundary: in generation the prompt is all there is.
    head_ids, answer_ids = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (head, text[len(head) :])
    )
    ids, labels = head_ids + answer_ids, [IGNORED] * len(head_ids) + answer_ids
    if max_length is not None and len(head_ids) >= max_length:
        raise BatchError(
            f"the prompt alone has {len(head_ids)} tokens and max_length is {max_length}: nothing of the answer is left"
        )
    return ids[:max_length], labels[:max_length]


def collate(tokenizer: Any, examples: Sequence[Example], max_length: int | None = None) -> dict[str, Tensor]:
    """A batch ``{input_ids, attention_mask, labels}``, each ``[B, T]`` int64, padded right to the longest row."""
    return _pad(tokenizer, [encode(tokenizer, *example, max_length) for example in examples])


def collate_pairs(tokenizer: Any, pairs: Sequence[Pair], max_length: int | None = None) -> dict[str, Tensor]:
    """Pairs as one batch ``[2P, T]``: all chosen rows first, then all rejected."""
    chosen = [encode(tokenizer, pair.prompt, pair.chosen, max_length) for pair in pairs]
    rejected = [encode(tokenizer, pair.prompt, pair.rejected, max_length) for pair in pairs]
    return _pad(tokenizer, chosen + rejected)


def _pad(tokenizer: Any, rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.full((len(rows), width), pad),
        "attention_mask": torch.zeros((len(rows), width), dtype=torch.int64),
        "labels": torch.full((len(rows), width), IGNORED),
    }
    for i, (ids, labels) in enumerate(rows):
        batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][i, : len(ids)] = 1
        batch["labels"][i, : len(ids)] = torch.tensor(labels)
    return batch
