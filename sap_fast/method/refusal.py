"""Which numbers make a step unusable, and what is said of them."""

import math

from sap_fast.errors import StepRefusedError


def raise_if_refused(seen: list[float], consequence: str) -> None:
    """Refuse a step.

    Args:
        seen: the loss, the norms of its gradient and of the probe, the direction's norm before it was normalised, the
            pairs' mean margin, and the share of them that is saturated.
        consequence: what the error says of what was written.

    Raises:
        StepRefusedError: a number is not finite, or there is no direction.
    """
    loss, gradient, probe, direction, margin, saturated = seen
    finite = [math.isfinite(x) for x in seen]
    problem = None
    if not finite[3] or not finite[4]:
        problem = (
            f"the harmful direction is not finite (norm {direction}, safety margin {margin}): look at the pairs and at "
            "the weights; a smaller learning rate or strength avoids overflow"
        )
    elif direction == 0 and not saturated:
        problem = (
            "the harmful direction is zero: no trained weight receives a gradient from the pairs. Is lora_B zero and "
            "frozen?"
        )
    elif direction == 0:
        problem = (
            f"the harmful direction is zero: {saturated:.0%} of the pairs are saturated at a mean margin of "
            f"{margin:.4g} nats. safety_loss='difference' does not saturate; per_token=True or a larger temperature "
            "also help"
        )
    elif not finite[0]:
        problem = f"the loss is {loss}"
    elif not finite[1] or not finite[2]:
        problem = (
            f"the gradient (norm {gradient}) or the probe (norm {probe}) is not finite although the loss is {loss:.4g}"
        )
    if problem is not None:
        raise StepRefusedError(f"the step is refused: {problem}. {consequence}")
