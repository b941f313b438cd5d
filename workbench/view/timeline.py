"""What every rank did when: a row a rank, a bar a span, idle time shaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from workbench.view.style import (
    FULL_SIZE,
    IDLE_COLOR,
    SPAN_STYLES,
    add_legend,
    house_style,
    is_small,
    label_times,
    new_axes,
    set_finding,
    show_empty,
)

if TYPE_CHECKING:
    from workbench.run import Run

__all__ = ["plot_timeline"]

BAR_HEIGHT = 0.72  # of a row


def plot_timeline(run: Run | pd.DataFrame, ax: Axes | None = None, *, size: tuple[float, float] = FULL_SIZE) -> Axes:
    """Spans of each rank over time, the engine's own process in the first row.

    Args:
        run: a run, or its `timeline` table.
        ax: where to draw; None makes a figure of `size` inches.
    """
    frame = run if isinstance(run, pd.DataFrame) else run.timeline
    work = frame[frame["span"] != "mark"]
    with house_style(is_small=is_small(ax, size)):
        ax = ax or new_axes(size)
        if work.empty:
            return show_empty(ax, "no spans to show")
        rows = {rank: row for row, rank in enumerate(sorted(work["rank"].unique().tolist()))}
        start_s, end_s = float(work["start_s"].min()), float(work["end_s"].max())
        _shade_idle(ax, work, rows)
        handles = _draw_spans(ax, work, rows)
        _name_rows(ax, list(rows))
        ax.set_xlim(start_s, end_s + 0.005 * (end_s - start_s) if end_s > start_s else start_s + 1.0)
        ax.set_xlabel("seconds since the run's start")
        num_label_rows = label_times(ax, _events(frame))
        set_finding(ax, _finding(work), num_label_rows=num_label_rows)
        add_legend(ax, [*handles, Patch(facecolor=IDLE_COLOR, edgecolor="#BFBFBF", label="idle")])
    return ax


def _shade_idle(ax: Axes, work: pd.DataFrame, rows: dict[int, int]) -> None:
    """One grey bar behind each row; what no span covers is idle."""
    low, high = work["start_s"].min(), work["end_s"].max()
    ax.barh(list(rows.values()), high - low, BAR_HEIGHT, left=low, color=IDLE_COLOR, zorder=0.5)


def _draw_spans(ax: Axes, work: pd.DataFrame, rows: dict[int, int]) -> list[Patch]:
    """Bars of one kind at a time; an outline of the same colour keeps the shortest ones visible."""
    present = set(work["span"])
    kinds = [kind for kind in SPAN_STYLES if kind in present] + sorted(present - set(SPAN_STYLES))
    handles = []
    for kind in kinds:
        color, hatch = SPAN_STYLES.get(kind, ("#000000", ""))
        of_kind = work[work["span"] == kind]
        ys = [rows[rank] for rank in of_kind["rank"]]
        place = dict(width=of_kind["end_s"] - of_kind["start_s"], height=BAR_HEIGHT, left=of_kind["start_s"])
        ax.barh(ys, **place, facecolor=color, edgecolor=color, linewidth=0.8, zorder=2)
        if hatch:
            ax.barh(ys, **place, facecolor="none", edgecolor="#595959", linewidth=0, hatch=hatch, zorder=2.1)
        handles.append(Patch(facecolor=color, edgecolor="#595959", linewidth=0.4, hatch=hatch, label=kind))
    return handles


def _name_rows(ax: Axes, ranks: list[int]) -> None:
    """Names beside the rows, the first row on top; every second, fourth, ... where all would not fit."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    row_pt = figure.get_figheight() * 72 * 0.6 / len(ranks) if hasattr(figure, "get_figheight") else 8.0
    every = 1
    while row_pt * every < matplotlib.rcParams["ytick.labelsize"] * 1.1:
        every *= 2
    shown = [row for row, rank in enumerate(ranks) if rank < 0 or rank % every == 0]
    if every > 1 and ranks[0] < 0 and len(shown) > 1:  # the engine's name would lie on rank 0's
        shown = [row for row in shown if row == 0 or row >= every]
    ax.set_yticks(shown, ["engine" if ranks[row] < 0 else f"rank {ranks[row]}" for row in shown])
    ax.set_ylim(len(ranks) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)


def _events(frame: pd.DataFrame) -> list[tuple[float, str]]:
    """Marks, and where each step begins when there are several."""
    marks = frame[frame["span"] == "mark"]
    events = list(zip(marks["start_s"].tolist(), marks["label"].tolist(), strict=True))
    work = frame[frame["span"].isin(["wake_up", "gather", "generate"])]
    steps = sorted({int(step) for step in work["step"] if step >= 0})  # -1 is what stands before the first
    if 1 < len(steps) <= 12:
        events += [(float(work.loc[work["step"] == step, "start_s"].min()), f"step {step}") for step in steps]
    return events


def _finding(work: pd.DataFrame) -> str:
    total_s = float(work["end_s"].max() - work["start_s"].min())
    num_steps = work.loc[work["step"] >= 0, "step"].nunique()
    steps = "1 step" if num_steps == 1 else f"{num_steps} steps"
    shares = {str(kind): _covered_s(spans) / total_s if total_s else 0.0 for kind, spans in work.groupby("span")}
    largest = sorted(shares.items(), key=lambda item: -item[1])[:3]
    return f"{steps} in {total_s:.3g} s: " + ", ".join(f"{kind} {share * 100:.0f} %" for kind, share in largest)


def _covered_s(spans: pd.DataFrame) -> float:
    """Seconds in which at least one of the spans runs."""
    order = spans.sort_values("start_s")
    starts, ends = order["start_s"].to_numpy(), np.maximum.accumulate(order["end_s"].to_numpy())
    fresh = np.concatenate([[starts[0]], np.maximum(starts[1:], ends[:-1])])
    return float(np.maximum(ends - fresh, 0).sum())
