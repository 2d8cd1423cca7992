"""The guards that act on the task gradient, beside the probe, which acts inside the passes."""

from sap_fast.config import SAPConfig
from sap_fast.method.flat import Flat


def guarded(theta: Flat, u: Flat, config: SAPConfig) -> Flat:
    """Let the guards act on a gradient ``g``: a training step along ``-g`` drifts toward harm by ``-<g, u>``.

    Args:
        theta: the gradient over all trained weights.
        u: the unit harmful direction.
    """
    guards = config.guard.split("+")
    if "project" in guards:
        toward_harm = theta.dot(u).clamp_max(0)
        theta = theta - u * toward_harm
    if "counter" in guards:
        theta = theta + u * (config.counter * theta.norm())
    return theta
