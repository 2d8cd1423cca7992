"""The figure: one bar a step, divided into its phases, all on one scale of time. SVG in the page, without scripts."""

from collections.abc import Sequence
from html import escape

from sap_fast.profiling.phases import BY_KEY, PHASES, Phase
from sap_fast.profiling.result import Cost
from sap_fast.profiling.units import seconds

_HEIGHT = 34
# A part narrower than this share of the figure's width has no room for its number.
_ROOM = 0.035


def figure(steps: Sequence[tuple[str, Sequence[Cost]]]) -> str:
    """Bars and their legend, as HTML.

    Args:
        steps: titles, and the phases' costs of each.
    """
    lengths = [sum(cost.seconds.median for cost in costs) for _, costs in steps]
    longest = max(lengths) or 1.0
    shown = {cost.phase for _, costs in steps for cost in costs}
    numbers = {phase.key: i for i, phase in enumerate((p for p in PHASES if p.key in shown), 1)}
    bars = [
        f"<p class=bar-title>{escape(title)}: {seconds(length)}</p>\n{_bar(title, costs, longest, numbers)}"
        for (title, costs), length in zip(steps, lengths, strict=True)
    ]
    legend = "\n".join(_entry(BY_KEY[key], number) for key, number in numbers.items())
    return "\n".join([*bars, f"<ol class=legend>\n{legend}\n</ol>"])


def _bar(title: str, costs: Sequence[Cost], longest: float, numbers: dict[str, int]) -> str:
    """A bar whose places are percentages of its width, so that text keeps its size on a narrow screen."""
    parts, start = [], 0.0
    for cost in costs:
        phase, width = BY_KEY[cost.phase], cost.seconds.median / longest
        said = f"{phase.label}: {seconds(cost.seconds.median)}, {cost.share:.1%}"
        parts.append(
            f'<rect x="{start:.3%}" y="0" width="{width:.3%}" height="{_HEIGHT}" fill="{phase.colour}">'
            f"<title>{escape(said)}</title></rect>"
        )
        if width > _ROOM:
            parts.append(
                f'<text x="{start + width / 2:.3%}" y="{_HEIGHT / 2 + 4:g}" text-anchor="middle" '
                f'fill="{_ink(phase.colour)}">{numbers[cost.phase]}</text>'
            )
        start += width
    label = escape(f"{title}, by phase; the table has its numbers", quote=True)
    return f'<svg role="img" aria-label="{label}" width="100%" height="{_HEIGHT}">{"".join(parts)}</svg>'


def _entry(phase: Phase, number: int) -> str:
    colours = f"background:{phase.colour};color:{_ink(phase.colour)}"
    said = f"<b>{escape(phase.label)}</b>: {escape(phase.holds)}"
    return f'<li><span class=swatch style="{colours}">{number}</span><span>{said}</span></li>'


def _ink(colour: str) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"
