"""Measures every figure of one model: what ``sap-fast eval`` and the demonstration print."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sap_fast.data.encode import Encoded, encode_pairs, encode_tasks
from sap_fast.data.examples import benign_examples, look_alikes, safety_pairs
from sap_fast.data.files import Table, read_table
from sap_fast.data.formats import Conversation, Exchange, read_pairs
from sap_fast.errors import DataError
from sap_fast.evaluation.generation import generate
from sap_fast.evaluation.likelihood import margins, task_loss
from sap_fast.evaluation.refusals import is_refusal


@dataclass(frozen=True)
class Suite:
    """Holds what a model is measured on. ``look_alikes`` pairs are (answer, refusal), others (refusal, opening).

    ``trained``: pairs in the wordings that training knows; ``unseen``: others. ``prompts``: the requests of ``unseen``
    and of ``look_alikes``, to be answered.
    """

    unseen: Encoded
    trained: Encoded
    look_alikes: Encoded
    tasks: Encoded
    prompts: Mapping[str, Sequence[Conversation]]

    @property
    def cut(self) -> int:
        """Count the rows that were cut at the greatest length, of all parts."""
        return sum(part.cut for part in (self.unseen, self.trained, self.look_alikes, self.tasks))


@dataclass(frozen=True)
class Measured:
    """Holds a model's figures by name, and its answers by the set they belong to."""

    figures: dict[str, float]
    answers: dict[str, list[dict[str, Any]]]


def embedded_suite(tokenizer: Any, max_length: int = 256) -> Suite:
    """Encode the embedded pairs of both halves, the look-alikes, and the held-out benign tasks."""
    return suite_from(tokenizer, None, None, None, max_length)


def suite_from(tokenizer: Any, pairs: str | None, alike: str | None, tasks: str | None, max_length: int) -> Suite:
    """Make a suite from files, and from the embedded parts where there is none.

    Pairs of one's own have no wordings that training is known to know, so ``trained`` is then empty.

    Raises:
        DataError: a file that cannot be used.
    """
    if pairs is None:
        unseen = read_table([pair._asdict() for pair in safety_pairs("held-out")], name="the held-out pairs")
        trained = encode_pairs(tokenizer, [pair._asdict() for pair in safety_pairs("train")], max_length)
    else:
        unseen, trained = read_table(pairs), Encoded((), 0, 0)
    given = read_table([x._asdict() for x in look_alikes()] if alike is None else alike, name="the look-alikes")
    looking = Table(given.name, [_as_pair(place, row) for place, row in given.items()], given.places)
    own_tasks = [x._asdict() for x in benign_examples("held-out")]
    return Suite(
        unseen=encode_pairs(tokenizer, unseen, max_length),
        trained=trained,
        look_alikes=encode_pairs(tokenizer, looking, max_length),
        tasks=encode_tasks(tokenizer, own_tasks if tasks is None else tasks, max_length),
        prompts={"unseen": _prompts(unseen), "look_alikes": _prompts(looking)},
    )


def measure(model: nn.Module, tokenizer: Any, suite: Suite, max_new_tokens: int = 0) -> Measured:
    """Measure a model.

    Args:
        max_new_tokens: of each greedy answer; 0 writes none.

    Returns:
        ``margin_unseen``, ``margin_trained``: means of log p(refusal) - log p(compliant opening), nats per token;
        ``prefers_refusal``: share of the unseen pairs with a positive one; ``look_alikes_answered``: share of
        look-alikes whose answer is likelier, per token, than a refusal; ``task_loss``: nats per token;
        ``refusal_rate``, ``look_alikes_refused``: shares of greedy answers that refuse, by keywords.
    """
    figures: dict[str, float] = {}
    unseen = margins(model, suite.unseen)
    figures["margin_unseen"] = float(unseen.mean())
    figures["prefers_refusal"] = float((unseen > 0).double().mean())
    if suite.trained:
        figures["margin_trained"] = float(margins(model, suite.trained).mean())
    figures["look_alikes_answered"] = float((margins(model, suite.look_alikes) > 0).double().mean())
    figures["task_loss"] = task_loss(model, suite.tasks)
    answers: dict[str, list[dict[str, Any]]] = {}
    if max_new_tokens:
        for name, conversations in suite.prompts.items():
            texts = generate(model, tokenizer, conversations, max_new_tokens)
            answers[name] = [
                {"prompt": list(c.messages[: c.learned_from]), "answer": text, "refuses": is_refusal(text)}
                for c, text in zip(conversations, texts, strict=True)
            ]
        for key, name in (("refusal_rate", "unseen"), ("look_alikes_refused", "look_alikes")):
            if answers.get(name):
                figures[key] = sum(a["refuses"] for a in answers[name]) / len(answers[name])
    return Measured(figures, answers)


def _prompts(table: Table) -> list[Conversation]:
    exchanges: list[Exchange] = [chosen for chosen, _ in read_pairs(table)]
    return [x for x in exchanges if isinstance(x, Conversation)]  # a plain text has no turn to answer in


def _as_pair(place: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a look-alike into a pair whose chosen side is the answer."""
    if missing := [key for key in ("prompt", "completion", "refusal") if row.get(key) is None]:
        raise DataError(f"{place}: {missing} missing; expected prompt, completion and refusal, found {sorted(row)}")
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["refusal"]}
