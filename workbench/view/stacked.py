"""Several axes of the house under one another in one figure: the static face of a widget that shows several things."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from workbench.view.style import PictureAxes, house_style

__all__ = ["stacked_axes"]

WIDTH = 6.4  # inches


def stacked_axes(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure with one axes a height, inches, each in a part of its own so that its legend stays with it."""
    with house_style():
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        parts: Any = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=list(heights))
        return figure, [part.add_subplot(axes_class=PictureAxes) for part in parts.flat]
