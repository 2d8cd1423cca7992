"""Advances several computations of one shape together: where they all ask for something, it is answered at once."""

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
Result = TypeVar("Result")


def lockstep(
    computations: Sequence[Generator[Asked, Answer, Result]], answer: Callable[[list[Asked]], Sequence[Answer]]
) -> list[Result]:
    """Run generators to their ends, which they must reach after equally many questions.

    Args:
        computations: each yields a question and is sent the answer to it.
        answer: called with one question of each; returns their answers.

    Returns:
        What they return.
    """
    answers: Sequence[Any] = [None] * len(computations)
    while True:
        asked, done = [], []
        for each, given in zip(computations, answers, strict=True):
            try:
                asked.append(each.send(given))
            except StopIteration as end:
                done.append(end.value)
        if done:
            assert not asked  # they are of one shape
            return done
        answers = answer(asked)
