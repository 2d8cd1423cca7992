"""The phases that a step's time is divided into."""

from collections.abc import Callable
from typing import NamedTuple

Begin = Callable[[str], None]  # called with the key of the phase that begins; it ends where the next one begins


class Phase(NamedTuple):
    """Describes one of the phases that a step's time is divided into.

    Attributes:
        key: what results name it by.
        label: what people are told.
        holds: what is done in it.
        colour: how it is drawn in the figure.
    """

    key: str
    label: str
    holds: str
    colour: str


PHASES = (
    Phase("data", "data", "moving the batch to the device, checking and packing it", "#9aa0a6"),
    Phase("direction_forward", "direction: forward", "the pairs through all layers", "#9c3221"),
    Phase(
        "direction_head",
        "direction: head and loss",
        "the pairs' final norm, head and loss, forward and backward",
        "#cf6a45",
    ),
    Phase("direction_backward", "direction: backward", "the pairs back through all layers", "#e8ab8c"),
    Phase("dual_forward", "dual forward", "task rows and their tangents through the layers", "#173f73"),
    Phase("dual_head", "dual: head and loss", "final norm, head and loss of rows and tangents, both ways", "#3873b3"),
    Phase("backward_above", "backward above the lowest probe", "both cotangents, down to the lowest probe", "#6ba5d8"),
    Phase(
        "backward_beneath", "backward beneath the lowest probe", "one cotangent, beneath the lowest probe", "#abcdec"
    ),
    Phase("forward", "forward", "task rows alone through the layers", "#22593f"),
    Phase("head", "head and loss", "final norm, head and loss, forward and backward", "#55a079"),
    Phase("backward", "backward", "task rows back through the layers", "#a3d1b9"),
    Phase(
        "update", "probe update and guard", "the next probe, the guard, the report, the check of its numbers", "#7a4d9c"
    ),
    Phase("write", "writing .grad", "the gradient, to each trained weight", "#5f6368"),
    Phase("optimizer", "optimizer", "AdamW, and .grad set to None", "#35383b"),
)
BY_KEY = {phase.key: phase for phase in PHASES}
DIRECTION = ("direction_forward", "direction_head", "direction_backward")
# These run over the task batch.
PASSES = ("dual_forward", "dual_head", "backward_above", "backward_beneath", "forward", "head", "backward")


def ignored(key: str) -> None:
    """Take no note of a phase that begins; this is the :data:`Begin` of steps whose phases are not timed."""
