"""Draws line charts as SVG that needs nothing else: no script, no font of its own, legible in print."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

# Of colours that stay apart in grey, each with a mark of its own.
_STYLES = (("#1b6ca8", "circle"), ("#d1495b", "square"), ("#2e933c", "triangle"), ("#8e5ea2", "diamond"))
_WIDTH, _HEIGHT = 380, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 76

Value = float | str


@dataclass(frozen=True)
class Panel:
    """Holds one chart.

    Attributes:
        lines: of each name its points ``(x, y)``, ``y`` not negative. ``x`` is a positive number, placed by its
            logarithm, or a string, placed in order.
    """

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[Value, float]]]


def figure(panels: Sequence[Panel]) -> str:
    """Draw panels side by side, as one SVG document; panels without a point are empty.

    Raises:
        ValueError: no panel, or more lines than there are styles.
    """
    if not panels:
        raise ValueError("a figure needs a panel")
    if max(len(panel.lines) for panel in panels) > len(_STYLES):
        raise ValueError(f"a panel has room for {len(_STYLES)} lines")
    width = len(panels) * _WIDTH
    parts = [f'<g transform="translate({i * _WIDTH} 0)">{_panel(panel)}</g>' for i, panel in enumerate(panels)]
    label = escape("; ".join(panel.title for panel in panels), quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" width="{width}" height="{_HEIGHT}" '
        f'role="img" aria-label="{label}" font-family="sans-serif" font-size="11">\n'
        f'<rect width="{width}" height="{_HEIGHT}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(panel: Panel) -> str:
    xs = list(dict.fromkeys(x for points in panel.lines.values() for x, _ in points))
    places, top = _places(xs), _top(max((y for points in panel.lines.values() for _, y in points), default=1.0))
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT

    def across(x: Value) -> float:
        return _LEFT + 12 + places[x] * (right - _LEFT - 24)

    def up(y: float) -> float:
        return bottom - y / top * (bottom - _TOP)

    parts = [_text(_WIDTH / 2, 20, panel.title, weight="bold"), _text(_WIDTH / 2, bottom + 34, panel.x_label)]
    middle = (bottom + _TOP) / 2
    parts.append(_text(14, middle, panel.y_label, turned=True))
    for i in range(5):
        y = top * i / 4
        parts.append(f'<path d="M{_LEFT} {up(y):.1f}H{right}" stroke="#cccccc" fill="none"/>')
        parts.append(_text(_LEFT - 6, up(y) + 4, f"{y:g}", anchor="end"))
    parts += [_text(across(x), bottom + 16, f"{x:g}" if isinstance(x, float | int) else x) for x in xs]
    for i, (name, points) in enumerate(panel.lines.items()):
        colour, mark = _STYLES[i]
        way = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f"<g>{_mark(mark, across(x), up(y), colour)}<title>{escape(f'{name}: {y:.4g} at {x}')}</title></g>"
            for x, y in points
        ]
        at = _LEFT + i * (right - _LEFT) / len(panel.lines)
        parts.append(_mark(mark, at + 4, _HEIGHT - 16, colour))
        parts.append(_text(at + 14, _HEIGHT - 12, name, anchor="start"))
    return "\n".join(parts)


def _places(xs: Sequence[Value]) -> dict[Value, float]:
    """Place each x between 0 and 1."""
    numbers = [x for x in xs if not isinstance(x, str)]
    if len(numbers) < len(xs) or len(xs) < 2:
        return {x: (i + 0.5) / len(xs) for i, x in enumerate(xs)}
    low, high = math.log(min(numbers)), math.log(max(numbers))
    return {x: (math.log(x) - low) / (high - low) for x in numbers}


def _top(most: float) -> float:
    """Find the end of an axis that holds ``most``: 1, 2, 4 or 8 times a power of ten; its quarters are short."""
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= most * (1 - 1e-9))


def _mark(mark: str, x: float, y: float, colour: str) -> str:
    if mark == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    # Each outline begins above the mark's middle.
    start, rest = {
        "square": ((-4, -4), "h8v8h-8z"),
        "triangle": ((0, -5), "l5 9h-10z"),
        "diamond": ((0, -5), "l5 5l-5 5l-5-5z"),
    }[mark]
    return f'<path d="M{x + start[0]:.1f} {y + start[1]:.1f}{rest}" fill="{colour}"/>'


def _text(
    x: float, y: float, said: str, *, anchor: str = "middle", weight: str = "normal", turned: bool = False
) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="#222222"{turn}>'
        f"{escape(said)}</text>"
    )
