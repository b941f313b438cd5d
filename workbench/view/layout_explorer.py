"""A layout to try out: sliders for its sizes, a grid of ranks to click through, its groups on every axis, the code that makes it.

All that moves is in the page (`layout_explorer.js` over the arithmetic of `layout_plan.js`); the kernel hears what was chosen, and acts
only when the layout is handed to the cluster.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol, cast

import traitlets
from anywidget import AnyWidget
from matplotlib.figure import Figure

from workbench.errors import LayoutError
from workbench.plan.layout import Layout
from workbench.plan.partition import PARTITION_VARIABLE
from workbench.view.given import check_given
from workbench.view.layout import NUM_COLORS, check_axis, plot_layout
from workbench.view.layout_spec import LayoutSpec, code_of, layout_of, spec_of
from workbench.view.moving import read_scripts
from workbench.view.style import alt_text, figure_png, rank_color, static_face

__all__ = ["LayoutExplorer", "layout_explorer"]

HERE = Path(__file__).parent


class UsesLayouts(Protocol):
    """What a cluster is to this widget."""

    world_size: int

    def use(self, layout: Layout) -> None: ...


class LayoutExplorer(AnyWidget):  # type: ignore[misc]  # anywidget has no types here
    """The widget; make it with `layout_explorer`.

    Attributes:
        spec: what the layout is made from, as the page has it; `layout_shown` is the layout itself.
        rank: the chosen rank.
        color_by: axis whose groups give the colours.
        num_layers: of the model whose layers the pipeline stages share; `partition` is "7,8,8,7", or "" for vLLM's rule.
        num_cluster_ranks: world size of the cluster that can be handed the layout, 0 without one.
    """

    _esm = read_scripts("layout_plan.js", "layout_explorer.js")
    _css = HERE / "layout_explorer.css"
    spec = traitlets.Dict().tag(sync=True)
    rank = traitlets.Int(0).tag(sync=True)
    color_by = traitlets.Unicode().tag(sync=True)
    num_layers = traitlets.Int(32, min=1).tag(sync=True)
    partition = traitlets.Unicode().tag(sync=True)
    num_cluster_ranks = traitlets.Int(0).tag(sync=True)
    palette: traitlets.List[str] = traitlets.List().tag(sync=True)

    def __init__(self, layout: Layout, cluster: UsesLayouts | None = None, *, color_by: str = "", num_layers: int = 32) -> None:
        self._cluster = cluster
        super().__init__(
            spec=dict(spec_of(layout)),
            color_by=color_by or _first_axis(layout),
            num_layers=num_layers,
            partition=os.environ.get(PARTITION_VARIABLE, ""),
            num_cluster_ranks=0 if cluster is None else cluster.world_size,
            palette=[rank_color(index) for index in range(NUM_COLORS)],
        )
        self.on_msg(self._on_message)

    @property
    def layout_shown(self) -> Layout:
        """The layout as the page shows it."""
        return layout_of(cast(LayoutSpec, self.spec))

    @property
    def code(self) -> str:
        """The line that makes the layout again."""
        return code_of(self.layout_shown)

    def show(self, layout: Layout) -> None:
        """Show another layout."""
        with self.hold_trait_notifications():
            self.spec = dict(spec_of(layout))
            self.rank = min(self.rank, layout.world_size - 1)
            if self.color_by not in layout.axes:
                self.color_by = _first_axis(layout)

    @traitlets.validate("spec")
    def _check_spec(self, proposal: Any) -> Any:
        layout_of(proposal["value"])
        return proposal["value"]

    @traitlets.validate("rank")
    def _check_rank(self, proposal: Any) -> int:
        rank, layout = int(proposal["value"]), self.layout_shown
        if not 0 <= rank < layout.world_size:
            raise LayoutError(f"{layout}: rank {rank} is outside the world\nranks are 0..{layout.world_size - 1}")
        return rank

    @traitlets.validate("color_by")
    def _check_color_by(self, proposal: Any) -> str:
        check_axis(self.layout_shown, proposal["value"])
        return str(proposal["value"])

    def use(self) -> None:
        """Hand the layout to the cluster, as the button does.

        Raises:
            ValueError: the explorer was made without a cluster, or the cluster refuses.
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

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        ax = plot_layout(self.layout_shown, color_by=self.color_by)
        assert isinstance(ax.figure, Figure)
        face, sizes = static_face(figure_png(ax.figure), alt_text(ax))
        return data | face, metadata | sizes


def layout_explorer(layout: Layout, cluster: UsesLayouts | None = None, *, color_by: str = "", num_layers: int = 32) -> LayoutExplorer:
    """A layout to try out by mouse and keyboard: its sizes and order, each rank's groups on every axis, the layers of its stages.

    Args:
        layout: what is shown at first, up to 1,024 ranks.
        cluster: gets the layout when "Use this layout" is pressed; None shows no such button.
        color_by: axis whose groups give the colours at first, by default tp or the first that there is.
        num_layers: of the model that the pipeline stages share.

    Raises:
        LayoutError: the layout has no such axis, or is too large.
        TypeError: it is no layout.
    """
    check_given("layout_explorer", layout, "mesh_axes", needed="a layout, such as wb.Layout(world_size=8, tp=2) or cluster.layout")
    return LayoutExplorer(layout, cluster, color_by=color_by, num_layers=num_layers)


def _first_axis(layout: Layout) -> str:
    return "tp" if "tp" in layout.axes else layout.axes[0]
