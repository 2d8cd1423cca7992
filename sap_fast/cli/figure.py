"""A picture of how methods trade safety for task loss."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sap_fast.atomic import write_with


def draw(path: Path, ways: Mapping[str, Sequence[Any]], title: str) -> None:
    """Draw margin against task loss, a line a method, with the steps written at its points.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for (name, way), mark in zip(ways.items(), "osD^v<>", strict=False):
        axes.plot([p.task_loss for p in way], [p.margin for p in way], marker=mark, label=name)
        for p in way[1:]:
            axes.annotate(str(p.step), (p.task_loss, p.margin), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.invert_xaxis()
    axes.set(
        xlabel="task loss on held-out tasks (nats per token); training goes to the right",
        ylabel="margin on unseen wording (nats per token)",
        title=title,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    canvas = FigureCanvasAgg(figure)
    write_with(path, lambda scratch: canvas.print_figure(scratch, dpi=130, format="png"))
