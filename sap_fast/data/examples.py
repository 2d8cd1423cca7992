"""The examples that ship with the package, written for it: benign tasks, and pairs of safe and unsafe answers.

The rejected side of a pair is an affirmative opening without content; there is no harmful text here.
"""

import json
from importlib.resources import files
from typing import NamedTuple


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


def benign_examples() -> list[Example]:
    """The embedded benign instructions and answers."""
    return [Example(**row) for row in _rows("benign.jsonl")]


def safety_pairs() -> list[Pair]:
    """The embedded safety pairs, by category."""
    return [Pair(**row) for row in _rows("pairs.jsonl")]


def _rows(name: str) -> list[dict[str, str]]:
    text = files("sap_fast.data").joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
