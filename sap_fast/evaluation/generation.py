"""Lets a model write greedy answers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sap_fast.data.formats import Conversation
from sap_fast.errors import DataError
from sap_fast.evaluation.likelihood import evaluating
from sap_fast.model.read import base_model

_BATCH = 16


def generate(
    model: nn.Module, tokenizer: Any, conversations: Sequence[Conversation], max_new_tokens: int = 48
) -> list[str]:
    """Let the model write greedy answers; special tokens are left out.

    Args:
        conversations: each is cut before its first learned message, and answered from there.
        max_new_tokens: longer answers end there.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; generating an answer needs one")
    prompts = [
        tokenizer.apply_chat_template(list(c.messages[: c.learned_from]), tokenize=False, add_generation_prompt=True)
        for c in conversations
    ]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    answers: dict[int, str] = {}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with evaluating(model):
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            for i, text in zip(batch, _greedy(model, tokenizer, [ids[i] for i in batch], max_new_tokens), strict=True):
                answers[i] = text
    return [answers[i] for i in range(len(ids))]


def _greedy(model: Any, tokenizer: Any, ids: list[list[int]], max_new_tokens: int) -> list[str]:
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    base: Any = base_model(model)
    own = base.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    end = sorted({i for i in (*ends, tokenizer.eos_token_id) if i is not None})
    pad = next((x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id) if x is not None), 0)
    width = max(map(len, ids))
    padded = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    # transformers fills what a call leaves open from the model's own settings: penalties, beams. Take them off.
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end or None, pad_token_id=pad
    )
    holders = [m for m in (model, base) if hasattr(m, "generation_config")]
    kept = [m.generation_config for m in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        out = model.generate(input_ids=padded, attention_mask=mask, generation_config=greedy)
    finally:
        for holder, settings in zip(holders, kept, strict=True):
            holder.generation_config = settings
    return [text.strip() for text in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]
