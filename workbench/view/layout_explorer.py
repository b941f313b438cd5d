"""A layout to click through: a rank's groups on every axis, its coordinates in words.

All that moves is in the page (`layout_explorer.js`); the kernel gives the numbers once, and hears of the chosen rank and axis.
"""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import Any, Protocol

import traitlets
from anywidget import AnyWidget
from matplotlib.figure import Figure

from workbench.errors import LayoutError
from workbench.plan.layout import Layout
from workbench.view.layout import check_axis, plot_layout
from workbench.view.rank_grid import rank_grid
from workbench.view.style import alt_text, figure_png

__all__ = ["LayoutExplorer", "layout_explorer"]

HERE = Path(__file__).parent


class UsesLayouts(Protocol):
    """What a cluster is to this widget."""

    def use(self, layout: Layout) -> None: ...


class LayoutExplorer(AnyWidget):  # type: ignore[misc]  # anywidget has no types here
    """The widget; make it with `layout_explorer`.

    Attributes:
        layout_shown: the layout.
        rank: the chosen rank.
        color_by: axis whose group of that rank is filled.
        scene: the numbers that the page draws from.
    """

    _esm = HERE / "layout_explorer.js"
    _css = HERE / "layout_explorer.css"
    scene = traitlets.Dict().tag(sync=True)
    rank = traitlets.Int(0).tag(sync=True)
    color_by = traitlets.Unicode().tag(sync=True)

    def __init__(self, layout: Layout, cluster: UsesLayouts | None = None, **traits: Any) -> None:
        self.layout_shown, self._cluster = layout, cluster
        super().__init__(scene=scene_of(layout, can_use=cluster is not None), **traits)
        self.on_msg(self._on_message)

    @traitlets.validate("rank")
    def _check_rank(self, proposal: Any) -> int:
        rank = int(proposal["value"])
        if not 0 <= rank < self.layout_shown.world_size:
            raise LayoutError(f"{self.layout_shown}: rank {rank} is outside the world\nranks are 0..{self.layout_shown.world_size - 1}")
        return rank

    @traitlets.validate("color_by")
    def _check_color_by(self, proposal: Any) -> str:
        check_axis(self.layout_shown, proposal["value"])
        return str(proposal["value"])

    def use(self) -> None:
        """Hand the layout to the cluster, as the button does.

        Raises:
            ValueError: the explorer was made without a cluster.
        """
        if self._cluster is None:
            raise ValueError("layout_explorer(layout) knows no cluster\ngive it one: layout_explorer(layout, cluster)")
        self._cluster.use(self.layout_shown)

    def _on_message(self, _widget: Any, content: Any, _buffers: Any) -> None:
        if not content.get("use"):
            return
        try:
            self.use()
            told = f"the cluster uses {self.layout_shown}"
        except Exception as error:  # an exception of a callback is shown nowhere in a notebook: the page says it
            told = f"the cluster refused: {error}"
        self.send({"told": told})

    def _face(self) -> dict[str, Any]:
        ax = plot_layout(self.layout_shown, color_by=self.color_by)
        assert isinstance(ax.figure, Figure)
        return {"image/png": b64encode(figure_png(ax.figure)).decode("ascii"), "text/plain": alt_text(ax)}

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        return {**data, **self._face()}, metadata


def layout_explorer(layout: Layout, cluster: UsesLayouts | None = None, *, color_by: str = "") -> LayoutExplorer:
    """A grid of ranks: click one, type its number or walk with the arrow keys, and its groups light up on every axis.

    Args:
        cluster: gets the layout when "Use this layout" is pressed; None shows no such button.
        color_by: axis that is filled at first, by default tp or the first that there is.

    Raises:
        LayoutError: the layout has no such axis.
    """
    return LayoutExplorer(layout, cluster, color_by=color_by or ("tp" if "tp" in layout.axes else layout.axes[0]))


def scene_of(layout: Layout, *, can_use: bool = False) -> dict[str, Any]:
    """What the page draws from: cells, the groups of each axis, and each rank in words, as plain JSON values."""
    grid = rank_grid(layout)
    return {
        "title": repr(layout),
        "x": grid.x.tolist(),
        "y": grid.y.tolist(),
        "width": grid.width,
        "height": grid.height,
        "groups": {axis: [list(group) for group in layout.groups(axis)] for axis in layout.axes},
        "words": [_in_words(layout, rank) for rank in range(layout.world_size)],
        "can_use": can_use,
    }


def _in_words(layout: Layout, rank: int) -> str:
    """ "rank 5 = pp 1, tp 1": its coordinates on the axes that have more than one place."""
    coords = [f"{axis} {index}" for axis, index in layout.coords(rank).items() if layout.degree(axis) > 1]
    return f"rank {rank}" + (f" = {', '.join(coords)}" if coords else ", the only one")
