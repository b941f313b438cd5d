"""A rollout to look at while it runs: lengths appear as completions finish, memory as it moves; then it stays as the run's figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd

from workbench.frames import memory_frame
from workbench.records import FinishedCompletion, MemorySample
from workbench.view.lengths import plot_lengths
from workbench.view.memory import plot_memory
from workbench.view.memory_history import MemoryHistory
from workbench.view.moving import MovingWidget, read_scripts
from workbench.view.stacked import stacked_axes
from workbench.view.style import FINISH_STYLES, SPAN_STYLES, alt_text, figure_png

if TYPE_CHECKING:
    from workbench.run import Run

__all__ = ["LiveRollout", "live_rollout"]


class FollowedRun(Protocol):
    """What a rollout that runs is to this widget; see `workbench.live.LiveRun`."""

    start_s: float
    num_steps: int
    step: int
    phase: str
    error: str
    run: Run | None

    def completions_since(self, count: int) -> list[FinishedCompletion]: ...

    def memory_since(self, time_s: float) -> list[MemorySample]: ...

    @property
    def is_done(self) -> bool: ...


class LiveRollout(MovingWidget):
    """The widget; make it with `live_rollout`."""

    _esm = read_scripts("chart.js", "live_rollout.js")
    _css = Path(__file__).parent / "chart.css"

    def __init__(self, live_run: FollowedRun) -> None:
        self._live_run = live_run
        self._num_told = 0
        self._memory = MemoryHistory(start_s=live_run.start_s)
        self._phases: list[tuple[float, str]] = []
        super().__init__()

    def news(self) -> dict[str, Any]:
        live_run = self._live_run
        fresh = live_run.completions_since(self._num_told)
        self._num_told += len(fresh)
        points = self._memory.add(live_run.memory_since(self._memory.latest_s))
        return {**self._now(), "lengths": [[one.length_tokens, one.finish_reason] for one in fresh], "memory": points}

    def everything(self) -> dict[str, Any]:
        done = self._live_run.completions_since(0)[: self._num_told]
        return {
            **self._now(),
            "lengths": [[one.length_tokens, one.finish_reason] for one in done],
            "memory": self._memory.points(),
            "looks": {name: list(look) for name, look in SPAN_STYLES.items()},
            "finishes": {name: list(look) for name, look in FINISH_STYLES.items()},
        }

    def _now(self) -> dict[str, Any]:
        live_run = self._live_run
        return {
            "step": live_run.step,
            "num_steps": live_run.num_steps,
            "phase": live_run.phase,
            "is_done": live_run.is_done,
            "error": live_run.error,
            "layers": self._memory.layers(),
        }

    def picture(self) -> tuple[bytes, str]:
        figure, (above, below) = stacked_axes([3.0, 3.3])
        run = self._live_run.run
        if run is not None:
            plot_lengths(run, above)
            plot_memory(run, below)
        else:
            done = self._live_run.completions_since(0)
            plot_lengths(
                pd.DataFrame([(d.length_tokens, d.finish_reason) for d in done], columns=["length_tokens", "finish_reason"]), above
            )
            plot_memory(memory_frame(self._live_run.memory_since(float("-inf")), start_s=self._live_run.start_s), below)
        return figure_png(figure), f"{alt_text(above)}\n{alt_text(below)}"


def live_rollout(live_run: FollowedRun) -> LiveRollout:
    """Completion lengths and memory of a rollout that runs, 5 times a second; `wb.rollout(..., live=True)` shows it."""
    return LiveRollout(live_run)
