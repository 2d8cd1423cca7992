"""From exchanges to token ids and labels: the chat template, the prompt masked, long rows cut and counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from sap_fast.batch import IGNORED
from sap_fast.data.files import Table, read_table
from sap_fast.data.formats import Conversation, Exchange, Message, Text, read_pairs, read_tasks
from sap_fast.errors import DataError


class Tokens(NamedTuple):
    """One row: token ids, and labels of equal length, unshifted, -100 where nothing is scored."""

    input_ids: list[int]
    labels: list[int]

    @property
    def scored(self) -> int:
        """Scored tokens; the first of a row has no predecessor and never counts."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Encoded(Sequence):
    """Rows ready to collate: :class:`Tokens`, or (chosen, rejected) of them.

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

    Args:
        tokenizer: a transformers tokenizer; with a chat template, but for plain texts.
        source: a file, a dataset or a list of rows, as :func:`read_table` takes it.
        max_length: longer rows are cut at their end (tokens).
        name: what errors call a source that is not a file.

    Raises:
        DataError: as :func:`read_table` and :func:`read_tasks`; no chat template; no answer left after cutting.
    """
    table = _table(source, name)
    rows = [_tokens(tokenizer, place, x) for place, x in zip(table.places, read_tasks(table), strict=True)]
    kept, cut = _cut([(row,) for row in rows], max_length)
    return _encoded([row for (row,) in kept], cut, len(rows), max_length, table.name)


def encode_pairs(
    tokenizer: Any, source: Any, max_length: int | None = None, *, name: str = "the safety pairs"
) -> Encoded:
    """Read, check and tokenize safety pairs; rows are ``(chosen, rejected)``. As :func:`encode_tasks`."""
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


def encode(tokenizer: Any, exchange: Exchange) -> Tokens:
    """Token ids and labels of one exchange: only what is learned is scored, end-of-turn marks included.

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
    """The conversation's text, and where in it the learned messages are written."""
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

    Scored pieces begin where a token does: in generation the prompt is all there is. Where the tokenizer joins
    across a cut, the pieces are tokenized apart.
    """

    def ids_of(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    ids = ids_of(text)
    beginnings = [ids_of(text[:cut]) for cut in cuts[1:-1]]
    if all(ids[: len(head)] == head for head in beginnings):
        marks = [0, *map(len, beginnings), len(ids)]
        pieces = [ids[a:b] for a, b in pairwise(marks)]
    else:
        pieces = [ids_of(text[a:b]) for a, b in pairwise(cuts)]
    labels = [piece if i % 2 else [IGNORED] * len(piece) for i, piece in enumerate(pieces)]
    return Tokens([i for piece in pieces for i in piece], [i for piece in labels for i in piece])


def _encode_text(tokenizer: Any, text: Text) -> Tokens:
    ids = list(tokenizer(text.text)["input_ids"])
    # A token that straddles the boundary belongs to what is learned.
    head = list(tokenizer(text.text[: text.learned_from])["input_ids"]) if text.learned_from else []
    masked = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, head, strict=False)))
    end = tokenizer.eos_token_id
    ids += [end] if end is not None and ids[-1:] != [end] else []
    return Tokens(ids, [IGNORED] * masked + ids[masked:])


def _tokens(tokenizer: Any, place: str, exchange: Exchange) -> Tokens:
    try:
        return encode(tokenizer, exchange)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _table(source: Any, name: str) -> Table:
    return source if isinstance(source, Table) else read_table(source, name=name)


def _cut(rows: Sequence[tuple[Tokens, ...]], max_length: int | None) -> tuple[list[tuple[Tokens, ...]], int]:
    """Rows cut at ``max_length``, but for those with a side that lost its answer; and how many were cut."""
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2 (a token to predict, and one before it), but is {max_length}")
    cut = sum(any(len(side.input_ids) > (max_length or len(side.input_ids)) for side in row) for row in rows)
    shortened = [tuple(Tokens(ids[:max_length], labels[:max_length]) for ids, labels in row) for row in rows]
    return [row for row in shortened if all(side.scored for side in row)], cut


def _encoded(rows: Sequence[Any], cut: int, before: int, max_length: int | None, name: str) -> Encoded:
    if not rows:
        raise DataError(
            f"{name}: after cutting at max_length={max_length} tokens nothing of any answer is left ({before} rows); "
            "raise max_length"
        )
    return Encoded(rows, cut, before - len(rows))
