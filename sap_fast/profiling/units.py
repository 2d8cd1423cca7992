"""Numbers for people: three digits and a unit."""

_SIZES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def seconds(value: float) -> str:
    """Seconds, or milliseconds."""
    return f"{_three(value)} s" if value >= 1 else f"{_three(1e3 * value)} ms"


def size(value: float, unit: str) -> str:
    """With a decimal prefix; nothing at all is a dash."""
    if not value:
        return "–"
    for factor, prefix in _SIZES:
        if value >= factor:
            return f"{_three(value / factor)} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def count(value: float | None) -> str:
    """A whole number; of a small average one digit behind the point."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value == round(value) or value >= 100 else f"{value:,.1f}"


def _three(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
