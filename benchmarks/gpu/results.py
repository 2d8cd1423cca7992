"""What a run on a GPU has found: a line a fact, on disk the moment it is known, so that no stop loses it.

``results.jsonl`` holds JSON objects, told apart by ``kind``:

- ``run``: where it runs, what it was called with; the first line of each run;
- ``stage``: a stage has ended, after how many seconds, with which problem if it had one (``late`` if that is nothing
  but want of time), how many of its tests were left out, and to which of them ``only`` held it;
- ``begin`` and ``result``: an item, which is one test, has begun, and how it ended (:class:`Item`);
- ``row``: a measurement; its ``stage`` says of what;
- ``collected``, ``share``: how many items one of a stage's processes has before it; it has come to its end, ``stopped``
  for want of time or not.

Lines that a resumed run has from an earlier one carry ``"earlier": true``.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = dict[str, Any]

NAME = "results.jsonl"
# How an item may end: ``died`` with its process, ``hung`` until it was killed.
PASSED, FAILED, SKIPPED, DIED, HUNG = "passed", "failed", "skipped", "died", "hung"
WRONG = (FAILED, DIED, HUNG)


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line, whole: several processes write to one file."""
    data = (json.dumps(line) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Line]:
    """Read all lines of a file, none if there is none; what was cut off while it was written is left out."""
    return parsed(path.read_bytes()) if path.exists() else []


def parsed(data: bytes) -> list[Line]:
    lines = []
    for text in data.splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # the end of a file whose writer was killed
            continue
    return lines


@dataclass(frozen=True)
class Item:
    """One test and how it ended.

    Attributes:
        id: pytest's node id.
        reason: the first line of the exception, or why it was skipped.
        values: what the test recorded of itself.
        earlier: whether an earlier run found it.
    """

    id: str
    stage: str
    outcome: str
    seconds: float = 0.0
    reason: str = ""
    traceback: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    earlier: bool = False

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "Item":
        return cls(**{key: line[key] for key in cls.__dataclass_fields__ if key in line})

    @property
    def line(self) -> Line:
        return {"kind": "result", **vars(self)}


def items(lines: Iterable[Mapping[str, Any]]) -> list[Item]:
    """List the items that have ended, by their last word, in the order in which they first ended."""
    found: dict[str, Item] = {}
    for line in lines:
        if line["kind"] == "result":
            found[line["id"]] = Item.of(line)
    return list(found.values())


def settled(lines: Iterable[Mapping[str, Any]]) -> set[str]:
    """List the ids that a run need not begin: those it has begun, and those that an earlier one has found right.

    What failed earlier is tried again: it may have been mended.
    """
    result = set()
    for line in lines:
        if line["kind"] in ("begin", "result"):
            is_right = line["kind"] == "result" and line["outcome"] == PASSED
            if not line.get("earlier") or is_right:
                result.add(line["id"])
    return result


def wrong(lines: Iterable[Mapping[str, Any]]) -> set[str]:
    """List the ids that failed, died or hung at their last try."""
    return {item.id for item in items(lines) if item.outcome in WRONG}


def rows(lines: Iterable[Mapping[str, Any]], stage: str) -> list[Line]:
    """List the measurements of a stage."""
    return [dict(line) for line in lines if line["kind"] == "row" and line["stage"] == stage]


# What has to be the same of two runs for one to hold the measurements of the other.
_GROUND = ("device", "torch", "triton", "commit")


def carried_over(lines: Iterable[Mapping[str, Any]], begun: Mapping[str, Any]) -> list[Line]:
    """List what a run takes over from an earlier one.

    Which items were right and which were wrong, and the digests of steps, to compare with. Of the same part, on the
    same device and code, the measurements too, and which stages came to their end.

    Args:
        begun: the first line of the run.
    """
    lines = list(lines)
    before = next((line for line in lines if line["kind"] == "run"), None)
    same = before is not None and before["part"] == begun["part"]
    same = same and all(before["environment"][key] == begun["environment"][key] for key in _GROUND)  # type: ignore[index]

    def wanted(line: Mapping[str, Any]) -> bool:
        if line["kind"] == "result":
            return same or "seconds" not in line["values"]
        ended = line["kind"] == "stage" and not (line["problem"] or line["left"] or line.get("only"))
        return "digest" in line or (same and (ended or line["kind"] == "row"))

    return [{**line, "earlier": True} for line in lines if wanted(line)]


def matches(id: str, glob: str | None) -> bool:
    """Tell whether an id is one of ``glob``'s, in which ``*`` and ``?`` alone are special: ids are full of brackets."""
    if glob is None:
        return True
    pattern = re.escape(glob).replace(r"\*", ".*").replace(r"\?", ".")
    return re.fullmatch(pattern, id) is not None


def brief(message: str, length: int = 300) -> str:
    """Shorten a message to one line, without a place in anybody's file system."""
    text = " ".join(message.split())
    return re.sub(r"(?<![\w.])(/[\w.+-]+){2,}", lambda path: path[0].rpartition("/")[2], text)[:length]
