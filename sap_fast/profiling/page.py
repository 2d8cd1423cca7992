"""A profile as one HTML page: it needs no script and no other file, and reads on paper and on a phone."""

from collections.abc import Sequence
from html import escape
from typing import Any

from sap_fast.profiling.phases import BY_KEY, PHASES, Phase
from sap_fast.profiling.text import ADVICE, Content, Table, count, headline, phases, seconds, tables, together, totals

_TITLE = "Where a training step's time goes"

_HEIGHT = 34
# A part narrower than this share of the figure's width gets no number, since it has no room for one.
_ROOM = 0.035

# On a narrow screen, which columns do not fit, each row of a table becomes a block, its heads beside its cells.
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 60rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.lead { font-size: 1.1rem; } .small { font-size: .85rem; color: #555; }
.bar-title { margin: .8rem 0 .2rem; } svg { display: block; } svg text { font: 13px system-ui, sans-serif; }
.legend { list-style: none; padding: 0; margin: 1rem 0; display: grid; gap: .25rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); font-size: .85rem; }
.legend li { display: flex; gap: .5rem; align-items: baseline; }
.swatch { flex: none; min-width: 1.5rem; text-align: center; border-radius: 3px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; border-bottom-color: #888; }
@media screen and (max-width: 42rem) {
  thead { display: none; } table, tbody, tr, td { display: block; }
  tr { padding: .5rem 0; border-bottom: 1px solid #bbb; } td { border: 0; padding: .05rem 0; text-align: left; }
  td:first-child { font-weight: 600; }
  td:not(:first-child)::before { content: attr(data-head) ": "; color: #555; }
}
@media print {
  body { font-size: 10pt; max-width: none; padding: 0; }
  svg, .swatch { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  h2 { break-after: avoid; } tr, li, svg { break-inside: avoid; } thead { display: table-header-group; }
}
"""


def page(profile: Content) -> str:
    """Write a profile as an HTML page.

    Args:
        profile: what ``Profile.to_dict()`` returns.
    """
    shown = tables(profile)
    body = [
        f"<h1>{_TITLE}</h1>",
        f"<p class=lead>{escape(headline(profile))}</p>",
        f"<p class=small>{escape(_place(profile))}</p>",
        _figure(shown),
        "<h2>Whole steps</h2>",
        _table(totals(profile)),
    ]
    for title, costs in shown:
        body += [f"<h2>{escape(title)}: {seconds(together(costs))} in phases</h2>", _table(phases(costs))]
    if profile["advice"]:
        items = "".join(f"<li>{escape(advice['text'])}</li>" for advice in profile["advice"])
        body += ["<h2>What would cut it</h2>", f"<p>{escape(ADVICE)}:</p>", f"<ul>{items}</ul>"]
    body += ["<h2>What was run</h2>", _table((("what", "value"), _facts(profile)))]
    body += [
        "<h2>How it was measured</h2>",
        f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in profile['notes'])}</ul>",
    ]
    return _WHOLE.format(title=_TITLE, style=_STYLE, body="\n".join(body))


_WHOLE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _figure(steps: Sequence[tuple[str, Sequence[Content]]]) -> str:
    """Draw one bar for each step, divided into its phases, all on one scale of time, and a legend: SVG, no scripts.

    Args:
        steps: the title of each step, and its phases.
    """
    lengths = [sum(cost["seconds"]["median"] for cost in costs) for _, costs in steps]
    longest = max(lengths) or 1.0
    shown = {cost["phase"] for _, costs in steps for cost in costs}
    numbers = {phase.key: i for i, phase in enumerate((p for p in PHASES if p.key in shown), 1)}
    bars = [
        f"<p class=bar-title>{escape(title)}: {seconds(length)}</p>\n{_bar(title, costs, longest, numbers)}"
        for (title, costs), length in zip(steps, lengths, strict=True)
    ]
    legend = "\n".join(_entry(BY_KEY[key], number) for key, number in numbers.items())
    return "\n".join([*bars, f"<ol class=legend>\n{legend}\n</ol>"])


def _bar(title: str, costs: Sequence[Content], longest: float, numbers: dict[str, int]) -> str:
    """Draw a bar whose places are percentages of its width, so that text keeps its size on a narrow screen."""
    parts, start = [], 0.0
    for cost in costs:
        phase, width = BY_KEY[cost["phase"]], cost["seconds"]["median"] / longest
        said = f"{phase.label}: {seconds(cost['seconds']['median'])}, {cost['share']:.1%}"
        parts.append(
            f'<rect x="{start:.3%}" y="0" width="{width:.3%}" height="{_HEIGHT}" fill="{phase.colour}">'
            f"<title>{escape(said)}</title></rect>"
        )
        if width > _ROOM:
            parts.append(
                f'<text x="{start + width / 2:.3%}" y="{_HEIGHT / 2 + 4:g}" text-anchor="middle" '
                f'fill="{_ink(phase.colour)}">{numbers[cost["phase"]]}</text>'
            )
        start += width
    label = escape(f"{title}, by phase; the table has its numbers", quote=True)
    return f'<svg role="img" aria-label="{label}" width="100%" height="{_HEIGHT}">{"".join(parts)}</svg>'


def _entry(phase: Phase, number: int) -> str:
    colours = f"background:{phase.colour};color:{_ink(phase.colour)}"
    said = f"<b>{escape(phase.label)}</b>: {escape(phase.holds)}"
    return f'<li><span class=swatch style="{colours}">{number}</span><span>{said}</span></li>'


def _ink(colour: str) -> str:
    """Return black or white, whichever is read better on a colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


def _table(table: Table) -> str:
    heads, rows = table
    head = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in heads)
    lines = []
    for row in rows:
        cells = (
            f'<td data-head="{escape(name, quote=True)}">{escape(cell)}</td>'
            for name, cell in zip(heads, row, strict=True)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{chr(10).join(lines)}\n</tbody>\n</table>"


def _place(profile: Content) -> str:
    return "; ".join(f"{name} {value}" for name, value in profile["environment"].items())


def _facts(profile: Content) -> list[tuple[str, ...]]:
    facts: list[tuple[str, ...]] = [(name.replace("_", " "), count(value)) for name, value in profile["tokens"].items()]
    facts += [(name, _said(value)) for name, value in profile["settings"].items()]
    return facts


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
