"""A collective to step through: who sends what to whom, and what everyone holds; all that moves is in the page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import traitlets
from anywidget import AnyWidget
from matplotlib.figure import Figure

from workbench.records import CollectiveTrace
from workbench.view.collective import CELL_STYLES, finding, plot_collective
from workbench.view.rollout_trace import rollout_trace
from workbench.view.style import alt_text, figure_png, static_face

if TYPE_CHECKING:
    from workbench.run import Run

__all__ = ["CollectiveExplorer", "trace_collective"]

HERE = Path(__file__).parent


@runtime_checkable
class TracesCollectives(Protocol):
    """What a cluster is to this widget."""

    def trace_collective(self, op: str, inputs: Any = None, **options: Any) -> CollectiveTrace: ...


class CollectiveExplorer(AnyWidget):  # type: ignore[misc]  # anywidget has no types here
    """The widget; make it with `trace_collective`.

    Attributes:
        trace: the record that it shows.
        step: the step shown, 0 to the last.
    """

    _esm = HERE / "trace_collective.js"
    _css = HERE / "trace_collective.css"
    scene = traitlets.Dict().tag(sync=True)
    step = traitlets.Int(0).tag(sync=True)

    def __init__(self, trace: CollectiveTrace) -> None:
        self.trace = trace
        kinds = {
            kind: {"face": face, "edge": edge, "line": line, "words": words} for kind, (face, edge, line, words) in CELL_STYLES.items()
        }
        super().__init__(scene=asdict(trace) | {"finding": finding(trace), "kinds": kinds})

    @traitlets.validate("step")
    def _check_step(self, proposal: Any) -> int:
        step = int(proposal["value"])
        if not 0 <= step < len(self.trace.steps):
            raise ValueError(f"step {step} is outside the trace\nits steps are 0..{len(self.trace.steps) - 1}")
        return step

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        ax = plot_collective(self.trace)
        assert isinstance(ax.figure, Figure)
        face, sizes = static_face(figure_png(ax.figure), alt_text(ax))
        return data | face, metadata | sizes


def trace_collective(
    source: TracesCollectives | Run | CollectiveTrace, op: str = "all_reduce", inputs: Any = None, **options: Any
) -> CollectiveExplorer:
    """A collective step by step, with a slider; a strip of all steps where there is no kernel.

    Args:
        source: a cluster, on whose ranks the collective is carried out now, message by message; a run in rooted mode, whose last step is
            shown (`step=` takes another); or a trace that `cluster.trace_collective` gave.
        op: of a cluster: "all_reduce", "reduce_scatter", "all_gather", "gather", "scatter" or "broadcast".
        inputs, options: as in `cluster.trace_collective`: root, reduce_op, axis, rank.

    Raises:
        ValueError: an argument does not fit, or the source is none of the three.
    """
    if isinstance(source, CollectiveTrace):
        return CollectiveExplorer(source)
    if isinstance(source, TracesCollectives):
        return CollectiveExplorer(source.trace_collective(op, inputs, **options))
    if hasattr(source, "batches"):
        return CollectiveExplorer(rollout_trace(source, **options))
    raise ValueError(
        f"trace_collective({type(source).__name__}): nothing to trace there\nneeded: a cluster, a run in rooted mode, or a trace\n"
        "pass what wb.launch, wb.rollout or cluster.trace_collective gave"
    )
