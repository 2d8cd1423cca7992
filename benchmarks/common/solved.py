"""What single passes of the library find on packed micro-batches, without a step around them."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from sap_fast.batch.rows import Rows
from sap_fast.config import SAPConfig
from sap_fast.method import passes
from sap_fast.method.direction import Direction
from sap_fast.method.flat import Flat
from sap_fast.method.passes import Dual, Micro, Ordinary, Safety, scored_tokens, solve
from sap_fast.method.probe import Probe
from sap_fast.method.reduce import Gradients, total
from sap_fast.model.decoder import Decoder


def dual(decoder: Decoder, micros: Sequence[Micro], probe: Probe, u: Flat) -> Gradients:
    """Take a dual pass over each micro-batch."""
    scored = scored_tokens(micros)
    return total(found for micro in micros for found in solve(decoder, [Dual(decoder, micro, scored, probe, u)]))


def ordinary(decoder: Decoder, micros: Sequence[Micro], probe: Probe | None = None) -> Gradients:
    """Take an ordinary pass over each micro-batch."""
    scored = scored_tokens(micros)
    return total(found for micro in micros for found in solve(decoder, [Ordinary(decoder, micro, scored, probe)]))


def finite_difference(decoder: Decoder, micros: Sequence[Micro], probe: Probe, u: Flat, radius: Tensor) -> Gradients:
    """Take two ordinary passes over each micro-batch, the second with the weights moved by ``radius`` along ``u``."""
    scored, ahead = scored_tokens(micros), (Flat.of(decoder.trained) + u * radius).copies(decoder.trained)
    return total([passes.finite_difference(decoder, micro, scored, probe, ahead, radius)] for micro in micros)


def direction(decoder: Decoder, rows: Rows, probe: Mapping[int, Tensor], config: SAPConfig) -> Direction:
    """Find the harmful direction of packed pairs, with ``probe [1, d]`` by layer acting."""
    [[sums]] = solve(decoder, [Safety(decoder, rows, rows.sequences // 2, probe, config)])
    return Direction.of(sums)
