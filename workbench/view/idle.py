"""Who waits for the longest: the tokens that each rank makes, and the time it waits for the one that makes the most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from workbench.view.style import (
    FULL_SIZE,
    HEADROOM,
    IDLE_COLOR,
    OKABE_ITO,
    add_legend,
    house_style,
    is_small,
    new_axes,
    set_finding,
    show_empty,
)

if TYPE_CHECKING:
    from workbench.run import Run

__all__ = ["idle_by_rank", "plot_idle"]

TIMES = ("sum", "max")
_MOST_NAMES = 16  # on the axis; of more ranks every second, third, ... is named


def plot_idle(
    run: Run | pd.DataFrame,
    ax: Axes | None = None,
    *,
    time: str = "sum",
    ranks: Sequence[int] | None = None,
    size: tuple[float, float] = FULL_SIZE,
) -> Axes:
    """Tokens of each rank, and above them its wait for the rank that takes longest, as if every rank generated for itself.

    Args:
        run: a run, or a table with columns step, origin_rank, length_tokens and finish_reason.
        ax: where to draw; None makes a figure of `size` inches.
        time: a rank's time is the "sum" of its tokens (one completion after another) or the "max" (all at once: its longest).
        ranks: all ranks, those without a completion too; None takes a run's own, or those in the table.

    Raises:
        ValueError: `time` is neither.
    """
    if time not in TIMES:
        raise ValueError(f"plot_idle(time={time!r}): a rank's time is the 'sum' or the 'max' of its completions' tokens")
    frame = run if isinstance(run, pd.DataFrame) else run.completions
    if ranks is None and not isinstance(run, pd.DataFrame):
        ranks = sorted({rank for of_rank in run.batches.values() for rank in of_rank})
    good = frame[frame["finish_reason"] != "error"]
    with house_style(is_small=is_small(ax, size)):
        ax = ax or new_axes(size)
        if good.empty:
            return show_empty(ax, "no completions to show")
        busy, total = idle_by_rank(good, ranks, time=time)
        places = np.arange(len(busy))
        width = 0.8 if len(busy) <= 64 else 1.0
        ax.bar(places, busy, width, color=OKABE_ITO[0])
        ax.bar(places, total - busy, width, bottom=busy, facecolor=IDLE_COLOR, edgecolor="#8C8C8C", hatch="////", linewidth=0)
        ax.set_xlim(-0.6, len(busy) - 0.4)
        ax.set_ylim(0, HEADROOM * max(total, 1.0))
        ax.set_xlabel("rank")
        ax.set_ylabel("tokens" if time == "sum" else "tokens of the longest")
        named = places[:: -(-len(busy) // _MOST_NAMES)]
        ax.set_xticks(named, [str(rank) for rank in busy.index[named]])
        set_finding(ax, _finding(busy, total))
        looks = Patch(color=OKABE_ITO[0], label="generates"), Patch(facecolor=IDLE_COLOR, edgecolor="#8C8C8C", hatch="////", label="waits")
        add_legend(ax, looks)
    return ax


def idle_by_rank(frame: pd.DataFrame, ranks: Sequence[int] | None = None, *, time: str = "sum") -> tuple[pd.Series[float], float]:
    """Tokens of time that each rank works, and how long all of them take when they wait for each other at the end of each step.

    Lengths 4, 4, 8, 64 on ranks 0, 0, 1, 1: by "sum" 8 and 72 of 72, by "max" 4 and 64 of 64.

    Returns:
        Work of each rank, indexed by rank, and the total.
    """
    took = frame.groupby(["step", "origin_rank"])["length_tokens"].agg(time).unstack(fill_value=0)
    everyone = sorted({*(int(rank) for rank in took.columns), *(ranks or ())})
    took = took.reindex(columns=everyone, fill_value=0)
    return took.sum(axis=0).astype(float), float(took.max(axis=1).sum())


def _finding(busy: pd.Series[float], total: float) -> str:
    if len(busy) == 1:
        return "one rank waits for nobody"
    share = 1.0 - float(busy.sum()) / (len(busy) * total) if total else 0.0
    return f"{len(busy):,} ranks would wait {share * 100:.0f} % of their time for the longest"
