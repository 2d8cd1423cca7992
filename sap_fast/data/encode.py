"""Turns exchanges into token ids and labels: the chat template, the prompt masked, long rows cut and counted."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from sap_fast.batch.rows import IGNORED
from sap_fast.data.files import SourceRow, Table, read_table
from sap_fast.data.formats import Conversation, Exchange, Message, Text, read_pairs, read_task
from sap_fast.errors import DataError


class Tokens(NamedTuple):
    """Holds one row: token ids, and labels of equal length, unshifted, -100 where nothing is scored."""

    input_ids: list[int]
    labels: list[int]

    @property
    def scored(self) -> int:
        """The number of scored tokens; the first of a row has no predecessor and never counts."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Encoded(Sequence):
    """Holds rows ready to collate: :class:`Tokens`, or (chosen, rejected) of them.

    ``cut``: rows that were longer than ``max_length`` and lost their end; ``dropped``: those of them that
    lost the whole answer, or on one side of a pair, and are not here.
    """

    rows: Sequence[Any]
    cut: int
    dropped: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]


def encode_tasks(tokenizer: Any, source: Any, max_length: int | None = None, *, name: str = "the task data") -> Encoded:
    """Read, check and tokenize task data.

    Rows that hold ``input_ids`` and ``labels`` are tokenized already; what their ``attention_mask`` hides is left out.

    Args:
        tokenizer: a transformers tokenizer; with a chat template, but for plain texts. None for tokenized rows.
        source: a file, a dataset or a list of rows, as :func:`read_table` takes it.
        max_length: longer rows are cut at their end (tokens).
        name: what errors call a source that is not a file.

    Raises:
        DataError: as :func:`read_table` and :func:`read_task`; no chat template; no answer left after cutting.
    """
    table = _table(source, name)
    rows = [
        _tokenized(place, row) if "input_ids" in row else _tokens(tokenizer, place, read_task(place, row))
        for place, row in table.items()
    ]
    kept, cut = _cut([(row,) for row in rows], max_length)
    return _encoded([row for (row,) in kept], cut, len(rows), max_length, table.name)


def encode_pairs(
    tokenizer: Any, source: Any, max_length: int | None = None, *, name: str = "the safety pairs"
) -> Encoded:
    """Read, check and tokenize safety pairs, as :func:`encode_tasks` does tasks; rows are ``(chosen, rejected)``."""
    table = _table(source, name)
    sides = [
        tuple(_tokens(tokenizer, place, side) for side in pair)
        for place, pair in zip(table.places, read_pairs(table), strict=True)
    ]
    for place, (chosen, rejected) in zip(table.places, sides, strict=True):
        if chosen == rejected:
            raise DataError(f"{place}: chosen and rejected have equal tokens, so the pair points nowhere; drop it")
    kept, cut = _cut(sides, max_length)
    # Cutting can leave two answers equal that differed in what was cut.
    apart = [pair for pair in kept if pair[0] != pair[1]]
    return _encoded(apart, cut, len(sides), max_length, table.name)


def set_chat_template(tokenizer: Any, file: str | Path) -> None:
    """Give a tokenizer the Jinja chat template in ``file``.

    Raises:
        DataError: no such file, or it is empty.
    """
    try:
        template = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: no chat template can be read from it ({error})") from None
    if not template.strip():
        raise DataError(f"{file} is empty; expected a Jinja chat template")
    tokenizer.chat_template = template
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    if begins and "bos_token" not in template and tokenizer.bos_token not in template:
        warnings.warn(
            f"{file} does not write {tokenizer.bos_token!r}, with which this tokenizer begins every text: was the "
            "model trained so? Else begin the template with {{ bos_token }}",
            stacklevel=2,
        )


def encode(tokenizer: Any, exchange: Exchange) -> Tokens:
    """Make the token ids and labels of one exchange: only what is learned is scored, end-of-turn marks included.

    Raises:
        DataError: no chat template; a template that fails, or writes an answered prompt differently from an open one.
    """
    if isinstance(exchange, Text):
        return _encode_text(tokenizer, exchange)
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, which says how this model marks the turns of a conversation: set "
            "tokenizer.chat_template, or on the command line give --chat-template FILE"
        )
    text, spans = _render(tokenizer, exchange)
    cuts = [0, *(at for span in spans for at in span)]
    cuts += [len(text)] if cuts[-1] < len(text) else []
    return _tokenize(tokenizer, text, cuts)


def _render(tokenizer: Any, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """Write the conversation as text, and tell where in it the learned messages are."""
    messages = conversation.messages
    text = _apply(tokenizer, messages)
    spans = []
    for i in range(conversation.learned_from, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        head = _apply(tokenizer, messages[:i], add_generation_prompt=True)
        whole = text if i == len(messages) - 1 else _apply(tokenizer, messages[: i + 1])
        if not (whole.startswith(head) and text.startswith(whole)):
            raise DataError(
                "the chat template writes an answered prompt differently from an open one"
                if i == len(messages) - 1
                else "the chat template writes an earlier turn differently once others follow; split the conversation "
                "into one row of prompt and completion for each answer"
            )
        spans.append((len(head), len(whole)))
    return text, spans


def _apply(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except TemplateError as error:
        raise DataError(f"the chat template refuses the conversation: {error}") from None


def _tokenize(tokenizer: Any, text: str, cuts: list[int]) -> Tokens:
    """Tokenize ``text``; of its pieces between ``cuts`` every second one is scored.

    Where a token joins what is before a cut with what is after it, it belongs to the scored piece.
    """

    def ids_of(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    ids = ids_of(text)
    beginnings = [ids_of(text[:cut]) for cut in cuts[1:-1]]
    if all(ids[: len(head)] == head for head in beginnings):
        marks = [0, *map(len, beginnings), len(ids)]
        pieces = [ids[a:b] for a, b in pairwise(marks)]
    elif getattr(tokenizer, "is_fast", False):
        return _by_offsets(tokenizer, text, cuts)
    else:
        pieces = [ids_of(text[a:b]) for a, b in pairwise(cuts)]
    labels = [piece if i % 2 else [IGNORED] * len(piece) for i, piece in enumerate(pieces)]
    return Tokens([i for piece in pieces for i in piece], [i for piece in labels for i in piece])


def _by_offsets(tokenizer: Any, text: str, cuts: list[int]) -> Tokens:
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [(a, b) for i, (a, b) in enumerate(pairwise(cuts)) if i % 2]
    ids = whole["input_ids"]
    scored = [any(first < b and last > a for a, b in spans) for first, last in whole["offset_mapping"]]
    return Tokens(ids, [token if kept else IGNORED for token, kept in zip(ids, scored, strict=True)])


def _encode_text(tokenizer: Any, text: Text) -> Tokens:
    # A text that holds the beginning mark already gets no second one.
    begun = bool(tokenizer.bos_token) and text.text.startswith(tokenizer.bos_token)
    ids = list(tokenizer(text.text, add_special_tokens=not begun)["input_ids"])
    # A token that straddles the boundary belongs to what is learned.
    before = text.text[: text.learned_from]
    head = list(tokenizer(before, add_special_tokens=not begun)["input_ids"]) if before else []
    masked = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, head, strict=False)))
    end = tokenizer.eos_token_id
    ids += [end] if end is not None and ids[-1:] != [end] else []
    return Tokens(ids, [IGNORED] * masked + ids[masked:])


def _tokens(tokenizer: Any, place: str, exchange: Exchange) -> Tokens:
    if tokenizer is None:
        raise DataError(f"{place} holds texts, and there is no tokenizer (processing_class of SAPTrainer)")
    try:
        return encode(tokenizer, exchange)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    except (TypeError, UnicodeError) as error:  # of a text that is none, such as half a surrogate pair
        raise DataError(f"{place}: the tokenizer refuses the text ({error})") from None


def _tokenized(place: str, row: SourceRow) -> Tokens:
    """Take a row of token ids as it is, but for what its mask hides."""
    if row.get("labels") is None:
        raise DataError(f"{place}: input_ids but no labels; add labels, {IGNORED} where nothing is scored")
    columns = [list(row[key]) for key in ("input_ids", "labels")]
    mask = row.get("attention_mask")
    columns.append([1] * len(columns[0]) if mask is None else list(mask))
    if len({len(column) for column in columns}) > 1:
        raise DataError(f"{place}: input_ids, labels and attention_mask have the lengths {[len(c) for c in columns]}")
    if not all(isinstance(x, int) for column in columns for x in column):
        raise DataError(f"{place}: input_ids, labels and attention_mask must be lists of integers")
    shown = [(i, label) for i, label, seen in zip(*columns, strict=True) if seen]
    return Tokens([i for i, _ in shown], [label for _, label in shown])


def _table(source: Any, name: str) -> Table:
    return source if isinstance(source, Table) else read_table(source, name=name)


def _cut(rows: Sequence[tuple[Tokens, ...]], max_length: int | None) -> tuple[list[tuple[Tokens, ...]], int]:
    """Cut rows at ``max_length``, drop those with a side that lost its answer, and count how many were cut."""
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length must be at least 2 (a token to predict, and one before it), but is {max_length}")
    cut = sum(any(len(side.input_ids) > (max_length or len(side.input_ids)) for side in row) for row in rows)
    shortened = [tuple(Tokens(ids[:max_length], labels[:max_length]) for ids, labels in row) for row in rows]
    return [row for row in shortened if all(side.scored for side in row)], cut


def _encoded(rows: Sequence[Any], cut: int, before: int, max_length: int | None, name: str) -> Encoded:
    if not rows and not cut:
        raise DataError(f"{name}: no token of any row is scored; does the chat template write the assistant's answers?")
    if not rows:
        raise DataError(
            f"{name}: after cutting at max_length={max_length} tokens nothing of any answer is left ({before} rows); "
            "raise max_length"
        )
    return Encoded(rows, cut, before - len(rows))
