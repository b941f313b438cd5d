"""Completion lengths of a run to look through: shapes, parts of them, and another max_tokens tried; all in the page."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import traitlets
from anywidget import AnyWidget
from matplotlib.figure import Figure

from workbench.view.lengths import plot_lengths
from workbench.view.style import alt_text, figure_png

if TYPE_CHECKING:
    from workbench.run import Run

__all__ = ["LengthExplorer", "length_explorer"]

PARTS = ("origin_rank", "prompt_index", "step", "finish_reason")


class LengthExplorer(AnyWidget):  # type: ignore[misc]  # anywidget has no types here
    """The widget; make it with `length_explorer`.

    Attributes:
        rows: a list per column, [num_completions]: length_tokens and what lengths are looked at by.
    """

    _esm = Path(__file__).parent / "length_explorer.js"
    _css = ".wb-lengths, .wb-lengths text { color: var(--jp-ui-font-color1, #262626); fill: currentColor; font-size: 12px; }"
    rows = traitlets.Dict().tag(sync=True)

    def __init__(self, run: Run) -> None:
        self._run = run
        good = run.completions[run.completions["finish_reason"] != "error"]
        super().__init__(rows={name: good[name].tolist() for name in ("length_tokens", *PARTS)})

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        ax = plot_lengths(self._run)
        assert isinstance(ax.figure, Figure)
        face = {"image/png": b64encode(figure_png(ax.figure)).decode("ascii"), "text/plain": alt_text(ax)}
        return {**data, **face}, metadata


def length_explorer(run: Run) -> LengthExplorer:
    """Lengths as a histogram, an ECDF or a survival curve; by rank, prompt, step or finish reason; and what another max_tokens would cut.

    Failed completions are left out.
    """
    return LengthExplorer(run)
