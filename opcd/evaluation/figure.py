"""A figure of matplotlib's that nobody else has."""

from typing import Any


def blank_figure(inches: tuple[float, float], **more: Any) -> Any:
    """One that no pyplot knows of: a notebook's own backend and figures stay as they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=inches, dpi=110, **more)).figure
