"""The formats of a row, which are trl's: what is said in it, and which part of that is learned.

Task rows

    {"prompt": ..., "completion": ...}   texts, or lists of messages
    {"messages": [...]}                  every assistant message is learned
    {"text": ...}                        learned whole, as it stands, without a chat template
    {"input_ids": ..., "labels": ...}    tokenized already (see ``encode.py``)

Pairs

    {"prompt": ..., "chosen": ..., "rejected": ...}   texts, or lists of messages
    {"chosen": ..., "rejected": ...}                  the prompt is what both sides have in common

A message is ``{"role": "system" | "user" | "assistant", "content": text}``. A text under ``prompt`` is what the
user says: unlike in trl, it goes through the chat template like a conversation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sap_fast.data.files import SourceRow, Table
from sap_fast.errors import DataError

Message = Mapping[str, str]
_ROLES = ("system", "user", "assistant")
_TASKS = "prompt and completion; messages; or text"
_PAIRS = "prompt, chosen and rejected; or chosen and rejected that share their beginning"


@dataclass(frozen=True)
class Conversation:
    """Messages; the assistant's from number ``learned_from`` on are learned."""

    messages: tuple[Message, ...]
    learned_from: int = 0


@dataclass(frozen=True)
class Text:
    """A text as it stands, learned from character ``learned_from`` on."""

    text: str
    learned_from: int = 0


Exchange = Conversation | Text


def read_task(place: str, row: SourceRow) -> Exchange:
    """Read a task row as an exchange.

    Raises:
        DataError: missing or mixed columns, fields of the wrong kind, nothing to learn; ``place`` begins it.
    """
    kinds = [kind for kind in (("prompt", "completion"), ("messages",), ("text",)) if kind[-1] in row]
    if not kinds:
        raise DataError(f"{place}: expected {_TASKS}; the columns are {sorted(row)}")
    if len(kinds) > 1:
        raise DataError(f"{place}: {[k[-1] for k in kinds]} are there together; keep the columns of one format")
    _require(place, row, kinds[0])
    match kinds[0][-1]:
        case "completion":
            return _answered(place, row["prompt"], row["completion"], "completion")
        case "messages":
            messages = _messages(place, row["messages"], "messages")
            if not any(m["role"] == "assistant" for m in messages):
                raise DataError(f"{place}: no message of the assistant in messages, so there is nothing to learn")
            if messages[0]["role"] == "assistant":
                raise DataError(f"{place}: messages begin with the assistant; what it answers must come first")
            return Conversation(messages)
        case _:
            return Text(_text(place, row["text"], "text"))


def read_pairs(table: Table) -> list[tuple[Exchange, Exchange]]:
    """Read pairs as (chosen, rejected) exchanges.

    Raises:
        DataError: as :func:`read_task`; chosen and rejected that are equal, or have nothing in common to answer.
    """
    return [_pair(place, row) for place, row in table.items()]


def _pair(place: str, row: SourceRow) -> tuple[Exchange, Exchange]:
    _require(place, row, ("chosen", "rejected"), _PAIRS)
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen == rejected:
        raise DataError(f"{place}: chosen and rejected are equal, so the pair points nowhere; drop it")
    if row.get("prompt") is not None:
        prompt = row["prompt"]
        return _answered(place, prompt, chosen, "chosen"), _answered(place, prompt, rejected, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _texts_in_common(place, chosen, rejected)
    return _messages_in_common(place, chosen, rejected)


def _texts_in_common(place: str, chosen: str, rejected: str) -> tuple[Exchange, Exchange]:
    # Cut after the last white space in common, so that answers which begin with the same letters stay whole.
    alike = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    common = chosen[: min(len(chosen), len(rejected)) if alike is None else alike]
    shared = len(common) - len(common.split()[-1]) if common and not common[-1].isspace() else len(common)
    if not common[:shared].strip():
        raise DataError(f"{place}: there is no prompt, and chosen and rejected do not begin alike; add a column prompt")
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if not text[shared:].strip():
            raise DataError(f"{place}: {side} has nothing beyond the prompt that both sides share")
    return Text(chosen, shared), Text(rejected, shared)


def _messages_in_common(place: str, chosen: Any, rejected: Any) -> tuple[Exchange, Exchange]:
    sides = _messages(place, chosen, "chosen"), _messages(place, rejected, "rejected")
    shared = 0
    for a, b in zip(*sides, strict=False):
        if a != b:
            break
        shared += 1
    if not shared:
        raise DataError(
            f"{place}: there is no prompt, and chosen and rejected do not begin with the same message; add a column "
            "prompt"
        )
    for side, messages in zip(("chosen", "rejected"), sides, strict=True):
        _check_answer(place, messages[shared:], side)
    return Conversation(sides[0], shared), Conversation(sides[1], shared)


def _answered(place: str, prompt: Any, answer: Any, side: str) -> Conversation:
    """Read a prompt and its answer, each a text or a list of messages."""
    said = (
        ({"role": "user", "content": _text(place, prompt, "prompt")},)
        if isinstance(prompt, str)
        else _messages(place, prompt, "prompt")
    )
    if isinstance(answer, str):
        return Conversation((*said, {"role": "assistant", "content": _text(place, answer, side)}), len(said))
    answers = _messages(place, answer, side)
    _check_answer(place, answers, side)
    return Conversation((*said, *answers), len(said))


def _check_answer(place: str, messages: Sequence[Message], side: str) -> None:
    if not messages or messages[0]["role"] != "assistant":
        found = messages[0]["role"] if messages else "nothing"
        raise DataError(f"{place}: {side} must answer with a message of the assistant, but has {found}")


def _require(place: str, row: SourceRow, columns: Sequence[str], expected: str = _TASKS) -> None:
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        raise DataError(f"{place}: {missing} missing; expected {expected}; the columns are {sorted(row)}")


def _text(place: str, value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {column} must be a text, but is a {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{place}: {column} is empty")
    return value


def _messages(place: str, value: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(
            f"{place}: {column} must be a text or a list of messages, but is {type(value).__name__} {value!r:.60}"
            if column != "messages"
            else f"{place}: messages must be a list of messages, but is {type(value).__name__} {value!r:.60}"
        )
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(f"{place}: {column}[{i}] must have role and content, but is {message!r:.60}")
        if message["role"] not in _ROLES:
            raise DataError(f"{place}: {column}[{i}] has the role {message['role']!r}; known are {list(_ROLES)}")
        messages.append({"role": message["role"], "content": _text(place, message["content"], f"{column}[{i}]")})
    return tuple(messages)
