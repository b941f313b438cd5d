"""Memory of the processes over time, stacked, with sleeps and marks.

Stacks proportional memory (PSS): pages that processes share are split among them, so the sum is what the box holds. Resident memory (RSS)
counts a shared page once in every process and must not be summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from workbench.view.style import (
    FULL_SIZE,
    HEADROOM,
    PROCESS_COLORS,
    SPAN_STYLES,
    RankBlock,
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

__all__ = ["asleep_stretches", "device_total", "memory_layers", "plot_memory"]

GIB, MIB = 2**30, 2**20
MAX_NAMED_STEPS = 4  # of more, sleeps are shaded only


def plot_memory(
    run: Run | pd.DataFrame, ax: Axes | None = None, *, timeline: pd.DataFrame | None = None, size: tuple[float, float] = FULL_SIZE
) -> Axes:
    """Proportional memory stacked by process, the engine's lowest; device memory as a dashed line where there is any.

    Args:
        run: a run, or its `memory` table.
        ax: where to draw; None makes a figure of `size` inches.
        timeline: spans that sleeps and marks are read from; a run's own when `run` is one.
    """
    frame = run if isinstance(run, pd.DataFrame) else run.memory
    spans = timeline if isinstance(run, pd.DataFrame) else run.timeline
    small = is_small(ax, size)
    with house_style(is_small=small):
        ax = ax or new_axes(size)
        readable = frame[frame["pss_bytes"] > 0]
        if readable.empty:
            return show_empty(ax, "no memory samples to show" if frame.empty else "the processes' memory (PSS) could not be read")
        blocks = rank_blocks(sorted(readable.loc[readable["process"] == "rank", "rank"].unique().tolist()), max_blocks=4 if small else 8)
        layers = memory_layers(readable, blocks)
        peak = float(max(layers.sum(axis=1).max(), device_total(frame).max()))
        unit, unit_name = (GIB, "GiB") if peak >= GIB else (MIB, "MiB")
        handles = _draw_layers(ax, layers / unit, blocks) + _draw_device(ax, device_total(frame) / unit)
        handles += _shade_sleep(ax, asleep_stretches(spans, since_s=float(layers.index[0]), until_s=float(layers.index[-1])))
        ax.set_xlim(layers.index[0], layers.index[-1])
        ax.set_ylim(0, HEADROOM * peak / unit)
        ax.set_ylabel(f"memory (PSS), {unit_name}")
        ax.set_xlabel("seconds since the run's start")
        num_rows = label_times(ax, _events(spans, float(layers.index[0]), float(layers.index[-1])))
        set_finding(ax, _finding(layers, spans, unit, unit_name), num_label_rows=num_rows)
        add_legend(ax, handles)
    return ax


def memory_layers(frame: pd.DataFrame, blocks: Sequence[RankBlock]) -> pd.DataFrame:
    """PSS bytes over time, [num_times, num_layers]: engines first, then ranks or blocks of ranks, then the rest.

    A process not read at some time between two readings keeps the line between them; before its first and after its last it counts 0.
    """
    names = {rank: block.label for block in blocks for rank in block.ranks}
    layer = frame["process"].where(frame["process"] != "rank", frame["rank"].map(names))
    wide = frame.assign(layer=layer).pivot_table(index="time_s", columns=["layer", "pid"], values="pss_bytes", aggfunc="last")
    table = wide.interpolate(method="index", limit_area="inside").fillna(0.0).T.groupby(level="layer").sum().T
    if len(table) == 1:  # one sample is drawn as a tenth of a second, or there would be nothing to see
        table = pd.concat([table, table.set_axis(table.index + 0.1)])
    wanted = ["engine", *dict.fromkeys(names.values())]
    return table[[name for name in wanted if name in table] + [name for name in table if name not in wanted]]


def _draw_layers(ax: Axes, layers: pd.DataFrame, blocks: Sequence[RankBlock]) -> list[Any]:
    known = PROCESS_COLORS | {block.label: block.color for block in blocks}
    colors = [known.get(str(name), "#A6A6A6") for name in layers]
    ax.stackplot(layers.index, *(layers[name] for name in layers), colors=colors, edgecolor="white", linewidth=0.4)
    return [Patch(facecolor=color, label=str(name)) for name, color in zip(layers, colors, strict=True)]


def device_total(frame: pd.DataFrame) -> pd.Series[float]:
    """Device memory of all processes over time, bytes."""
    wide = frame.pivot_table(index="time_s", columns="pid", values="device_used_bytes", aggfunc="last")
    return wide.interpolate(method="index", limit_area="inside").fillna(0.0).sum(axis=1)


def _draw_device(ax: Axes, total: pd.Series[float]) -> list[Any]:
    if not (total > 0).any():
        return []
    look: dict[str, Any] = dict(color="#000000", linestyle=(0, (4, 2)), linewidth=1.4, label="GPU memory")
    ax.plot(total.index, total, **look)
    return [Line2D([], [], **look)]


def asleep_stretches(spans: pd.DataFrame | None, *, since_s: float, until_s: float) -> list[tuple[float, float]]:
    """Stretches in which every engine process sleeps: from the end of a step's sleeps to the next wake, or to the end.

    An engine kept from an earlier run sleeps from the beginning: its first wake has no sleep before it.
    """
    if spans is None:
        return []
    wakes = sorted(spans.loc[spans["span"] == "wake_up", "start_s"].tolist())
    sleeps = spans[spans["span"] == "sleep"]
    ends = sorted(float(sleeps.loc[sleeps["step"] == step, "end_s"].max()) for step in set(sleeps["step"]))
    if wakes and since_s < wakes[0] and (not ends or wakes[0] < ends[0]):
        ends.insert(0, since_s)
    return [(end_s, next((wake_s for wake_s in wakes if wake_s >= end_s), max(end_s, until_s))) for end_s in ends]


def _shade_sleep(ax: Axes, stretches: Sequence[tuple[float, float]]) -> list[Any]:
    color, hatch = SPAN_STYLES["sleep"]
    look: dict[str, Any] = dict(facecolor=color, alpha=0.25, hatch=hatch, edgecolor="#7F7F7F", linewidth=0)
    for begin_s, end_s in stretches:
        ax.axvspan(begin_s, end_s, zorder=0.5, **look)
    return [Patch(label="asleep", **look)] if stretches else []


def _events(spans: pd.DataFrame | None, low_s: float, high_s: float) -> list[tuple[float, str]]:
    """Marks, and a few steps' sleeps (at their end) and wakes (at their start); several processes' sleep at once is one event."""
    if spans is None:
        return []
    marks = spans[spans["span"] == "mark"]
    events = list(zip(marks["start_s"].tolist(), marks["label"].tolist(), strict=True))
    if spans["step"].nunique() <= MAX_NAMED_STEPS:
        for kind, time, pick in (("sleep", "end_s", max), ("wake_up", "start_s", min)):
            of_kind = spans[spans["span"] == kind]
            events += [(pick(of_kind.loc[of_kind["step"] == step, time].tolist()), kind) for step in set(of_kind["step"])]
    return [(time_s, name) for time_s, name in events if low_s <= time_s <= high_s]


def _finding(layers: pd.DataFrame, spans: pd.DataFrame | None, unit: int, unit_name: str) -> str:
    total = layers.sum(axis=1)
    text = f"{total.max() / unit:.3g} {unit_name} at the most"
    if spans is None or not (spans["span"] == "sleep").any():
        return text + f", {total.iloc[-1] / unit:.3g} {unit_name} at the end"
    asleep = _asleep_low(total, spans)
    return text + (f", {asleep / unit:.3g} {unit_name} while the engine sleeps" if asleep is not None else "")


def _asleep_low(total: pd.Series[float], spans: pd.DataFrame) -> float | None:
    """The least memory seen while the engines sleep; None when no sample lies there."""
    times = total.index.to_numpy(dtype=float)
    during = [
        total[(times >= begin_s) & (times <= end_s)]
        for begin_s, end_s in asleep_stretches(spans, since_s=float(times[0]), until_s=float("inf"))
    ]
    lows = [float(part.min()) for part in during if len(part)]
    return min(lows) if lows else None
