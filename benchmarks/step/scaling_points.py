"""What ``benchmarks.scaling`` measures: its axes, the points on them, the contenders, and their rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.step.batches import Given, Shapes
from benchmarks.step.contenders import CONTENDERS, Contender, sap
from sap_fast import SAPConfig
from sap_fast.batch.rows import IGNORED

AXES = {
    "tokens": "tokens in the task batch",
    "length": "tokens in a sequence",
    "probes": "probed layers",
    "targets": "linear maps with adapters",
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = (("q_proj", "v_proj"), ATTENTION, (*ATTENTION, "gate_proj", "up_proj", "down_proj"))
# Ids below are marks of a tokenizer's own.
_FIRST_ID = 3


@dataclass(frozen=True)
class Ranges:
    """The sizes of each axis.

    Attributes:
        tokens, lengths, probes: those of the axes; a number of probes stands for that many layers, or all there are.
        at_length: the length of sequences on the other axes; ``at_tokens``: the tokens on the axis of lengths;
            ``few_tokens``: those on the axes of probes and targets.
    """

    tokens: tuple[int, ...]
    lengths: tuple[int, ...]
    probes: tuple[int, ...]
    at_length: int
    at_tokens: int
    few_tokens: int

    def replaced(
        self, tokens: Sequence[int] | None, lengths: Sequence[int] | None, probes: Sequence[int] | None
    ) -> "Ranges":
        """Return ranges with other sizes, where they are given.

        Raises:
            ValueError: a size that makes no whole sequences.
        """
        given = {"tokens": tokens, "lengths": lengths, "probes": probes}
        result = replace(self, **{name: tuple(sizes) for name, sizes in given.items() if sizes is not None})
        if lengths is not None:
            result = replace(result, at_tokens=max(result.lengths))
        if tokens is not None:
            result = replace(result, few_tokens=min(result.tokens))
        for n in result.tokens:
            if n < result.at_length or n % result.at_length:
                raise ValueError(f"--tokens must be multiples of {result.at_length}, but there is {n}")
        for n in result.lengths:
            if n < 2 or result.at_tokens % n:
                raise ValueError(f"--lengths must be at least 2 and divide {result.at_tokens}, but there is {n}")
        if min(result.probes) < 1:
            raise ValueError(f"--probes must be at least 1, but there is {min(result.probes)}")
        return result


SMALL = Ranges((256, 1024, 2048), (128, 512, 1024), (1, 10, 10**3), 128, 1024, 256)
FULL = Ranges(
    tuple(256 * 2**i for i in range(8)), tuple(128 * 2**i for i in range(7)), (1, 4, 16, 10**3), 128, 8192, 1024
)


@dataclass(frozen=True)
class Point:
    """Holds ``tokens`` of the task batch in sequences of ``length``; ``probes``: how many layers have one."""

    tokens: int
    length: int
    probes: int
    targets: tuple[str, ...]


def points(axis: str, ranges: Ranges, depth: int) -> list[Point]:
    """List an axis's points, for a model of ``depth`` layers; on the other axes a third of them are probed."""
    usual = max(1, depth // 3)
    at = Point(ranges.few_tokens, ranges.at_length, usual, TARGETS[0])
    if axis == "tokens":
        return [replace(at, tokens=n) for n in ranges.tokens]
    if axis == "length":
        return [replace(at, tokens=ranges.at_tokens, length=n) for n in ranges.lengths]
    if axis == "probes":
        return [replace(at, probes=n) for n in dict.fromkeys(min(n, depth) for n in ranges.probes)]
    return [replace(at, targets=targets) for targets in TARGETS]


def spread(count: int, depth: int) -> tuple[int, ...]:
    """Choose so many layers of ``depth``, each in the middle of an equal part; all, if there are not that many."""
    count = min(count, depth)
    return tuple((2 * i + 1) * depth // (2 * count) for i in range(count))


def contenders(probes: int) -> dict[str, Contender]:
    """List plain fine-tuning, our own, and the lagged step with so many probes."""
    config = SAPConfig(schedule="lagged", probe_layers=lambda depth: spread(probes, depth))
    return {name: CONTENDERS[name] for name in ("plain-sft", "own-sft")} | {
        "lagged": Contender(sap(config), "lagged", {"schedule": "lagged"})
    }


def random_rows(vocab: int, sequences: int, length: int, pairs: int, pair_length: int, device: str) -> Given:
    """Draw full rows of random tokens, the second half of each scored; a pair's sides share their first half."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rows, width in ((sequences, length), (2 * pairs, pair_length)):
        ids = torch.randint(_FIRST_ID, vocab, (rows, width), generator=generator)
        labels = ids.clone()
        labels[:, : width // 2] = IGNORED
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    contrast = batches[1]["input_ids"]
    contrast[pairs:, : pair_length // 2] = contrast[:pairs, : pair_length // 2]
    batch, contrast_batch = ({key: x.to(device) for key, x in b.items()} for b in batches)
    return Given("full", Shapes(sequences, length, pairs, pair_length), batch, contrast_batch)
