"""How long completions are: a histogram, its median and its tail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from workbench.plan.lengths import LengthStats, length_stats
from workbench.view.style import (
    FINISH_STYLES,
    FULL_SIZE,
    HEADROOM,
    add_legend,
    house_style,
    is_small,
    label_times,
    new_axes,
    rank_blocks,
    set_finding,
    show_empty,
)

if TYPE_CHECKING:
    from workbench.run import Run

__all__ = ["plot_lengths"]

MAX_BINS = 40


def plot_lengths(
    run: Run | pd.DataFrame, ax: Axes | None = None, *, by: str = "finish_reason", size: tuple[float, float] = FULL_SIZE
) -> Axes:
    """Histogram of completion lengths.

    Args:
        run: a run, or a table with columns length_tokens, finish_reason and, for `by="origin_rank"`, origin_rank.
        ax: where to draw; None makes a figure of `size` inches.
        by: what the bars are stacked by, "finish_reason" or "origin_rank"; more than 8 ranks share colours in blocks.

    Raises:
        ValueError: `by` is neither.
    """
    if by not in ("finish_reason", "origin_rank"):
        raise ValueError(f"plot_lengths(by={by!r}): bars are stacked by 'finish_reason' or by 'origin_rank'")
    frame = run if isinstance(run, pd.DataFrame) else run.completions
    good = frame[frame["finish_reason"] != "error"]
    with house_style(is_small=is_small(ax, size)):
        ax = ax or new_axes(size)
        if good.empty:
            return show_empty(ax, f"no completions to show ({len(frame)} failed)" if len(frame) else "no completions to show")
        lengths = good["length_tokens"].to_numpy()
        groups = _by_reason(good) if by == "finish_reason" else _by_rank(good)
        handles = _draw_bars(ax, [(lengths[chosen], look) for chosen, look in groups], _edges(lengths))
        stats = length_stats(lengths, good["finish_reason"].tolist())
        ax.set_xlabel("completion length, tokens")
        ax.set_ylabel("completions")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        num_rows = label_times(ax, [(stats.median, f"median {stats.median:g}"), (stats.percentile(95), f"95 % ≤ {stats.percentile(95):g}")])
        set_finding(ax, _finding(stats, good, num_failed=len(frame) - len(good)), num_label_rows=num_rows)
        add_legend(ax, handles)
    return ax


def _edges(lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Bin edges between whole numbers, all bins equally wide, at most MAX_BINS."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // MAX_BINS)
    num_bins = -(-(high - low + 1) // width)
    return low - 0.5 + width * np.arange(num_bins + 1, dtype=np.float64)


def _by_reason(frame: pd.DataFrame) -> list[tuple[NDArray[np.bool_], dict[str, Any]]]:
    reasons = frame["finish_reason"].to_numpy()
    names = {"stop": "stopped by itself", "length": "cut at the limit", "abort": "aborted"}
    found = [(reason, *FINISH_STYLES[reason]) for reason in names if (reasons == reason).any()]
    return [(reasons == reason, dict(facecolor=color, hatch=hatch, label=names[reason])) for reason, color, hatch in found]


def _by_rank(frame: pd.DataFrame) -> list[tuple[NDArray[np.bool_], dict[str, Any]]]:
    ranks = frame["origin_rank"].to_numpy()
    blocks = rank_blocks(range(int(ranks.max()) + 1))
    return [(np.isin(ranks, block.ranks), dict(facecolor=block.color, label=block.label)) for block in blocks]


def _draw_bars(ax: Axes, groups: Sequence[tuple[NDArray[np.int64], dict[str, Any]]], edges: NDArray[np.float64]) -> list[Patch]:
    floor = np.zeros(len(edges) - 1)
    for lengths, look in groups:
        heights = np.histogram(lengths, edges)[0]
        ax.bar(edges[:-1], heights, np.diff(edges), bottom=floor, align="edge", edgecolor="white", linewidth=0.6, **look)
        floor = floor + heights
    ax.set_ylim(0, HEADROOM * floor.max())
    return [Patch(edgecolor="white", **look) for _, look in groups]


def _finding(stats: LengthStats, frame: pd.DataFrame, *, num_failed: int) -> str:
    limits = frame.loc[frame["finish_reason"] == "length", "length_tokens"].unique()
    cut = f"{stats.truncated_share:.0%} cut".replace("%", " %") if len(limits) else "none cut"
    at = f" at {limits[0]}" if len(limits) == 1 else ""
    noun = "completion" if stats.num_completions == 1 else "completions"
    failed = f", {num_failed} failed" if num_failed else ""
    return f"{stats.num_completions:,} {noun}: median {stats.median:g} tokens, {cut}{at}{failed}"
