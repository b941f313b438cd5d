"""Completion lengths to look through: shapes, parts of them side by side, another max_tokens tried, who waits for the longest.

All that moves by hand is in the page (`length_explorer.js` over the arithmetic of `length_stats.js`). Of a rollout that runs, the kernel
sends what has finished since.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import pandas as pd

from workbench.records import FinishedCompletion
from workbench.view.given import check_given
from workbench.view.idle import plot_idle
from workbench.view.lengths import plot_lengths
from workbench.view.moving import MovingWidget, read_scripts
from workbench.view.stacked import stacked_axes
from workbench.view.style import alt_text, figure_png

if TYPE_CHECKING:
    from workbench.run import Run

__all__ = ["LengthExplorer", "length_explorer"]

COLUMNS = ("length_tokens", "origin_rank", "prompt_index", "step", "finish_reason")


@runtime_checkable
class FollowedRun(Protocol):
    """What a rollout that runs is to this widget; see `workbench.live.LiveRun`."""

    run: Run | None

    @property
    def is_done(self) -> bool: ...

    def completions_since(self, count: int) -> list[FinishedCompletion]: ...


class LengthExplorer(MovingWidget):
    """The widget; make it with `length_explorer`."""

    _esm = read_scripts("length_stats.js", "length_explorer.js")
    _css = Path(__file__).parent / "length_explorer.css"

    def __init__(self, source: Run | FollowedRun) -> None:
        self._live = source if isinstance(source, FollowedRun) else None
        self._frame = pd.DataFrame({name: [] for name in COLUMNS}) if isinstance(source, FollowedRun) else _good(source)
        self._ranks = [] if isinstance(source, FollowedRun) else _ranks_of(source)
        self._num_told = 0
        super().__init__()

    def start(self) -> None:
        """Begin to follow a rollout that runs; of a finished one there is nothing to follow."""
        if self._live is not None:
            super().start()

    def news(self) -> dict[str, Any] | None:
        """What has finished since the last call; at the end the run itself, with its failures and empty ranks."""
        live = self._live
        if live is None:
            return None
        is_done = live.is_done
        fresh = live.completions_since(self._num_told)
        self._num_told += len(fresh)
        if is_done:
            self._live, self._is_ending = None, True
            if live.run is not None:
                self._frame, self._ranks = _good(live.run), _ranks_of(live.run)
                return self.everything()
        if not fresh and not is_done:
            return None
        more = pd.DataFrame([[getattr(one, name) for name in COLUMNS] for one in fresh], columns=list(COLUMNS))
        self._frame = more if self._frame.empty else pd.concat([self._frame, more], ignore_index=True)
        return {"more": _lists(more)} if not is_done else self.everything()

    def everything(self) -> dict[str, Any]:
        """All that has finished, a list a column, and all ranks."""
        return {"columns": _lists(self._frame), "ranks": self._ranks, "isLive": self._live is not None}

    def picture(self) -> tuple[bytes, str]:
        """The histogram, and under it who waits for the longest."""
        if self._frame.empty:
            figure, (only,) = stacked_axes([3.0])
            plot_lengths(self._frame, only)
            return figure_png(figure), alt_text(only)
        figure, (above, below) = stacked_axes([3.2, 2.4])
        plot_lengths(self._frame, above)
        plot_idle(self._frame, below, ranks=self._ranks)
        return figure_png(figure), f"{alt_text(above)}\n{alt_text(below)}"


def length_explorer(source: Run | FollowedRun) -> LengthExplorer:
    """Lengths as a histogram, an ECDF or a survival curve; side by side by rank, prompt, step or finish reason, with percentiles.

    Another max_tokens can be tried: what it cuts, what it saves, and how much less ranks wait for the longest. Failed completions are left
    out.

    Args:
        source: a run; or a rollout that runs, whose lengths appear as requests finish:
            `wb.rollout(..., live=lambda live_run: wb.view.length_explorer(live_run).show())`.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(source, FollowedRun):
        check_given("length_explorer", source, "completions", needed="a run: what wb.rollout gave, or wb.load_run(folder)")
    return LengthExplorer(source)


def _good(run: Run) -> pd.DataFrame:
    completions = run.completions
    return completions.loc[completions["finish_reason"] != "error", list(COLUMNS)].reset_index(drop=True)


def _ranks_of(run: Run) -> list[int]:
    """All ranks of a run, those without a completion too."""
    return sorted({rank for of_rank in run.batches.values() for rank in of_rank})


def _lists(frame: pd.DataFrame) -> dict[str, list[Any]]:
    return {name: values.tolist() for name, values in _columns(frame)}


def _columns(frame: pd.DataFrame) -> Iterable[tuple[str, Any]]:
    return ((name, frame[name]) for name in COLUMNS)
