"""No two texts of a figure lie on each other, and none is cut off: read from the artists' boxes."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

__all__ = ["check_texts"]


def check_texts(ax: Axes, *, scale: float = 1.0, least: int = 1) -> None:
    """Draw the figure of `ax` at 100 dpi times `scale` and look at every text that can be seen.

    Raises:
        AssertionError: it names the texts, or there are fewer than `least`.
    """
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.set_dpi(100 * scale)
    figure.draw_without_rendering()
    unseen = {text for axes in figure.axes for text in _ticks_out_of_view(axes)}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in unseen]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert len(boxes) >= least, f"{len(boxes)} texts, {least} expected"
    for (one, a), (two, b) in combinations(boxes, 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert width <= 0.5 * scale or height <= 0.5 * scale, f"{one!r} lies on {two!r}"
    for name, box in boxes:
        is_inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert is_inside, f"{name!r} is cut off"


def _ticks_out_of_view(ax: Axes) -> set[Any]:
    """Labels of ticks beyond the axes' limits, which matplotlib keeps but does not draw; all of them where axes are off."""
    unseen: set[Any] = set()
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not ax.axison or not low <= tick.get_loc() <= high:
                unseen |= {tick.label1, tick.label2}
    return unseen
