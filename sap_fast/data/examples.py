"""The examples that ship with the package, written for it: benign tasks, safety pairs, and safe look-alikes.

The rejected side of a pair is an affirmative opening without content; there is no harmful text here. The held-out
half of the pairs differs from the train half in its categories, in how requests are put, and in how answers begin.
"""

import json
from importlib.resources import files
from typing import Literal, NamedTuple

Split = Literal["train", "held-out"]


class Example(NamedTuple):
    """A task: the answer is what is learned."""

    prompt: str
    completion: str


class Pair(NamedTuple):
    """A harmful request with a safe answer (``chosen``) and an unsafe one (``rejected``)."""

    category: str
    prompt: str
    chosen: str
    rejected: str


class LookAlike(NamedTuple):
    """A safe request that looks unsafe, its answer, and what an over-cautious model would say instead."""

    category: str
    prompt: str
    completion: str
    refusal: str


def benign_examples(split: Split = "train") -> list[Example]:
    """Read the embedded benign instructions and answers."""
    return [Example(row["prompt"], row["completion"]) for row in _rows("benign.jsonl") if row["split"] == split]


def safety_pairs(split: Split = "train") -> list[Pair]:
    """Read the embedded safety pairs, by category."""
    return [Pair(*(row[f] for f in Pair._fields)) for row in _rows("pairs.jsonl") if row["split"] == split]


def look_alikes() -> list[LookAlike]:
    """Read the embedded safe requests that look unsafe; for measurement only, no part of any training."""
    return [LookAlike(**row) for row in _rows("lookalikes.jsonl")]


def _rows(name: str) -> list[dict[str, str]]:
    text = files("sap_fast.data").joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
