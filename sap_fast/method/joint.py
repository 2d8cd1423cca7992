"""The dual pass over the task and the pass over the pairs, run as one: ``SAPConfig(delayed_direction=True)``.

The dual pass needs a direction, and the pairs give one. Where it uses the one that the last step found, the two do not
wait for each other: each layer multiplies its frozen weights by the rows of both at once,

    [task x ; task x_dot ; pairs]          forward, as one product with W
    [pairs dy ; task dy ; task dy_dot]     backward, as one product with W^T

and what depends on more than a row (norms with their probes, attention, adapters, head) runs on each by itself. The
pairs are an ordinary stream at theta without dropout. Nothing of one reaches the other's numbers.
"""

from collections.abc import Sequence

import torch

from sap_fast.batch.rows import Count
from sap_fast.method.direction import Direction, SafetyPass
from sap_fast.method.flat import Flat
from sap_fast.method.passes import DualPass, Gradients, Micro, Parts, completed, dual, mean, sides, tokens_scored
from sap_fast.method.probe import Probe
from sap_fast.model.decoder import Decoder


def dual_with_pairs(
    decoder: Decoder, micros: Sequence[Micro], probe: Probe, u: Flat, safety: SafetyPass, *, scored: Count | None = None
) -> tuple[Gradients, Direction]:
    """What :func:`sap_fast.method.passes.dual` yields, and the direction that the pairs give.

    The pairs go with the first micro-batch, whose activations are kept at the same time as theirs.

    Args:
        u: the direction that the dual pass uses.
        safety: the pass over the pairs, begun.
        scored: tokens that the mean is over; those of ``micros`` if None.
    """
    scored = tokens_scored(micros) if scored is None else scored
    first, *rest = micros
    task = DualPass.start(decoder, first, probe, u)
    runs = [task.run, safety.run]
    streams = decoder.run_together(runs, [decoder.embed(run) for run in runs], 0, len(decoder.layers))
    loss, loss_dot = mean(decoder.score(task.run, streams[0]), scored)
    seen = safety.scored(decoder.score(safety.run, streams[1])[0])
    # Neither of the two depends on the variables of the other.
    variables = [*task.variables, *decoder.trained.values()]
    grads = torch.autograd.grad([loss_dot, seen.loss], variables, allow_unused=True)
    count = len(task.variables)
    gradients, direction = task.share(loss, loss_dot, grads[:count]), safety.direction(seen, grads[count:])
    return (gradients + dual(decoder, rest, probe, u, scored=scored) if rest else gradients), direction


def divided_with_pairs(
    decoder: Decoder, parts: Parts, probe: Probe, u: Flat, safety: SafetyPass
) -> tuple[Gradients, Direction]:
    """What :func:`sap_fast.method.passes.divided` yields, and the direction that the pairs give."""
    chosen, others, scored = sides(parts)
    gradients, direction = dual_with_pairs(decoder, chosen, probe, u, safety, scored=scored)
    return completed(decoder, gradients, others, probe, u, scored=scored), direction
