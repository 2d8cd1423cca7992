"""A profile as text, and the tables, numbers and units that its page shares with it.

A profile comes here as the dict that ``Profile.to_dict()`` returns and ``profile.json`` holds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sap_fast.profiling.phases import BY_KEY

_SIZES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

Content = Mapping[str, Any]  # a profile, or one phase of a step in it
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # heads, rows

ADVICE = "What would cut it (predictions from the phase times above, not measured; each changes the algorithm)"


def headline(profile: Content) -> str:
    """Say in a sentence how long a step of SAP takes to plain fine-tuning."""
    ratio = profile["ratios"]["sap/sft"]
    said = (
        f"A step of SAP takes {ratio['median']:.2f}x plain SFT by the same library "
        f"(quartiles {ratio['lower']:.2f} to {ratio['upper']:.2f} over {ratio['rounds']} rounds)"
    )
    if "sap/peft" in profile["ratios"]:
        said += f", and {profile['ratios']['sap/peft']['median']:.2f}x that of transformers and PEFT on padded rows"
    return said + "."


def totals(profile: Content) -> Table:
    """Make the table of whole steps."""
    rows: list[tuple[str, ...]] = []
    base = profile["totals"]["sft"]["median"]
    for key, spread in profile["totals"].items():
        weight, memory = profile["weights"].get(key, 1.0), profile["memory"][key]
        label = profile["labels"][key] + (f" ({weight:.0%} of steps)" if weight < 1 else "")
        quartiles = f"{seconds(spread['lower'])} to {seconds(spread['upper'])}"
        ratio = profile["ratios"].get(f"{key}/sft")
        against = f"{ratio['median'] if ratio else spread['median'] / base:.2f}x"
        rows.append((label, seconds(spread["median"]), quartiles, against, size(memory["peak"], "B")))
    return ("step", "median", "quartiles", "to plain SFT", "peak memory"), rows


def phases(costs: Sequence[Content]) -> Table:
    """Make the table of one step's phases and all of them together; what is not known has no column."""
    on_gpu = any(cost["kernels"] is not None for cost in costs)
    floor = any(cost["floor_seconds"] for cost in costs)
    heads = ["phase", "time", "share", *(["kernels", "GPU busy"] if on_gpu else ["ops"]), "bytes", "FLOPs"]
    rows = [_row(BY_KEY[cost["phase"]].label, cost, on_gpu, floor) for cost in costs]
    added = ("ops", "kernels", "busy_seconds", "bytes", "flops", "floor_seconds")
    whole: dict[str, Any] = {name: sum(cost[name] or 0 for cost in costs) for name in added}
    length, least = together(costs), whole["floor_seconds"]
    whole |= {"seconds": {"median": length}, "share": 1.0, "times_floor": length / least if least else None}
    rows.append(_row("together", whole, on_gpu, floor))
    return tuple(heads + ["times floor"] * floor), rows


def _row(label: str, cost: Content, on_gpu: bool, floor: bool) -> tuple[str, ...]:
    cells = [label, seconds(cost["seconds"]["median"]), f"{cost['share']:.1%}"]
    cells += [count(cost["kernels"] or 0), seconds(cost["busy_seconds"] or 0)] if on_gpu else [count(cost["ops"])]
    cells += [size(cost["bytes"], "B"), size(cost["flops"], "FLOP")]
    if floor:
        cells.append(f"{cost['times_floor']:.1f}x" if cost["times_floor"] else "–")
    return tuple(cells)


def together(costs: Sequence[Content]) -> float:
    """Add up the seconds of a step's phases, by their medians."""
    return float(sum(cost["seconds"]["median"] for cost in costs))


def tables(profile: Content) -> list[tuple[str, Sequence[Content]]]:
    """List the title and the phases of each step, SAP's average first."""
    order = sorted(profile["phases"], key=lambda key: (key != "sap", not key.startswith("sap"), key != "sft", key))
    several = any(weight < 1 for weight in profile["weights"].values())
    names = {**profile["labels"], "sap": "SAP, the average step" if several else "SAP"}
    return [(names[key], profile["phases"][key]) for key in order]


def summary(profile: Content) -> str:
    """Write the whole profile as text for a terminal.

    Args:
        profile: what ``Profile.to_dict()`` returns.
    """
    blocks = [headline(profile), _aligned(totals(profile))]
    for title, costs in tables(profile):
        blocks.append(f"{title}: {seconds(together(costs))} in phases\n{_aligned(phases(costs))}")
    if profile["advice"]:
        blocks.append("\n".join([f"{ADVICE}:", *(f"  {advice['text']}" for advice in profile["advice"])]))
    blocks.append("\n".join(f"- {note}" for note in profile["notes"]))
    return "\n\n".join(blocks)


def _aligned(table: Table) -> str:
    heads, rows = table
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = []
    for row in (heads, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def seconds(value: float) -> str:
    """Write a time in seconds or milliseconds, in three digits."""
    return f"{_three(value)} s" if value >= 1 else f"{_three(1e3 * value)} ms"


def size(value: float, unit: str) -> str:
    """Write an amount of a unit in three digits with a decimal prefix; nothing at all is a dash."""
    if not value:
        return "–"
    for factor, prefix in _SIZES:
        if value >= factor:
            return f"{_three(value / factor)} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def count(value: float | None) -> str:
    """Write a count as a whole number, and a small average with one digit behind the point; None is a dash."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value == round(value) or value >= 100 else f"{value:,.1f}"


def _three(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
