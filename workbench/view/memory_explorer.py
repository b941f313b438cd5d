"""Memory of a run to look through: by process and part, with every rank's spans under it on the same axis, and the sleeps beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import traitlets
from anywidget import AnyWidget
from numpy.typing import NDArray

from workbench.view.given import check_given
from workbench.view.memory import asleep_stretches, device_total, memory_layers, plot_memory
from workbench.view.moving import read_scripts
from workbench.view.report import sleep_words
from workbench.view.stacked import stacked_axes
from workbench.view.style import PROCESS_COLORS, SPAN_STYLES, alt_text, figure_png, rank_blocks, static_face
from workbench.view.timeline import plot_timeline

if TYPE_CHECKING:
    from workbench.run import Run

__all__ = ["MemoryExplorer", "memory_explorer"]

MIB = 2**20
MAX_POINTS = 1500  # of 720 pixels
PART_COLORS = {"engine: weights": "#332288", "engine: KV cache": "#88CCEE", "engine: the rest": PROCESS_COLORS["engine"]}


class MemoryExplorer(AnyWidget):  # type: ignore[misc]  # anywidget has no types here
    """The widget; make it with `memory_explorer`.

    Attributes:
        scene: layers, points, spans and sleeps that the page draws from.
    """

    _esm = read_scripts("chart.js", "memory_explorer.js")
    _css = Path(__file__).parent / "chart.css"
    scene = traitlets.Dict().tag(sync=True)

    def __init__(self, run: Run) -> None:
        self._run = run
        super().__init__(scene=scene_of(run))

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        figure, (above, below) = stacked_axes([3.2, 2.8])
        plot_memory(self._run, above)
        plot_timeline(self._run, below)
        face, sizes = static_face(figure_png(figure), f"{alt_text(above)}\n{alt_text(below)}")
        return data | face, metadata | sizes


def memory_explorer(run: Run) -> MemoryExplorer:
    """Memory stacked by process, the engine's weights and KV cache apart where it slept; spans and idle time of each rank under it.

    Move the mouse over it, or the arrow keys, for the values and what every rank did at that time.

    Raises:
        TypeError: it is no run.
    """
    check_given("memory_explorer", run, "sleep_report", needed="a run: what wb.rollout gave, or wb.load_run(folder)")
    return MemoryExplorer(run)


def scene_of(run: Run) -> dict[str, Any]:
    """What the page draws from, as plain JSON values: memory in MiB, times in seconds since the run's start."""
    layers, times, held, device = _stack(run)
    asleep = asleep_stretches(run.timeline, since_s=times[0], until_s=times[-1]) if times else []
    spans = [span for span in run.spans if span.span != "mark"]
    ranks = sorted({span.rank for span in spans})
    return {
        "layers": layers,
        "times": times,
        "values": held,
        "device": device,
        "rows": ["engine" if rank < 0 else f"rank {rank}" for rank in ranks],
        "spans": [[ranks.index(s.rank), s.span, round(s.start_s - run.start_s, 3), round(s.end_s - run.start_s, 3)] for s in spans],
        "steps": _steps(run),
        "events": [[round(mark.start_s - run.start_s, 3), mark.label] for mark in run.marks],
        "asleep": [[round(low, 3), round(high, 3)] for low, high in asleep],
        "looks": {name: list(look) for name, look in SPAN_STYLES.items()},
        "sleeps": sleep_words(run.sleep_report).to_dict("records"),
    }


def _stack(run: Run) -> tuple[list[dict[str, str]], list[float], list[list[float]], list[float]]:
    """Layers from the lowest, times [num_times], MiB [num_times][num_layers], MiB on GPUs [num_times]."""
    readable = run.memory[run.memory["pss_bytes"] > 0]
    if readable.empty:
        return [], [], [], []
    blocks = rank_blocks(sorted(readable.loc[readable["process"] == "rank", "rank"].unique().tolist()))
    table = memory_layers(readable, blocks)
    table = table.iloc[:: max(1, math.ceil(len(table) / MAX_POINTS))]
    device = device_total(run.memory).reindex(table.index, method="nearest")
    table = _with_parts(table, run)
    colors = PROCESS_COLORS | PART_COLORS | {block.label: block.color for block in blocks}
    layers = [{"name": str(name), "color": colors.get(str(name), "#A6A6A6")} for name in table]
    times = [round(float(t), 3) for t in table.index]
    return layers, times, (table.to_numpy() / MIB).round(2).tolist(), (device.to_numpy() / MIB).round(1).tolist()


def _with_parts(table: pd.DataFrame, run: Run) -> pd.DataFrame:
    """The engine's layer split into weights, KV cache and the rest, as its sleep reports tell what it held while awake.

    A part that sleeps counts as 0. What is held can be less than its size (a KV cache never touched is no memory yet), so a part is at most
    what the process has left. Without a sleep nobody has told the parts, and the layer stays whole.
    """
    latest = {report.rank: report for report in run.sleeps}
    if not latest or "engine" not in table:
        return table
    is_awake = ~_within(table.index.to_numpy(dtype=float), asleep_stretches(run.timeline, since_s=float(table.index[0]), until_s=math.inf))
    rest = table["engine"].to_numpy(dtype=float)
    parts = {}
    sizes = {
        "engine: weights": sum(report.weights_bytes for report in latest.values()),
        "engine: KV cache": sum(report.kv_cache_bytes for report in latest.values()),
    }
    for name, size in sizes.items():
        parts[name] = np.minimum(rest, size) * is_awake
        rest = rest - parts[name]
    split = pd.DataFrame({"engine: the rest": rest, **parts}, index=table.index)
    return pd.concat([split, table.drop(columns="engine")], axis=1)


def _within(times: NDArray[np.float64], stretches: list[tuple[float, float]]) -> NDArray[np.bool_]:
    inside = np.zeros(len(times), dtype=bool)
    for low, high in stretches:
        inside |= (times >= low) & (times < high)
    return inside


def _steps(run: Run) -> list[list[float]]:
    """[step, begin, end] of each step, to look at one alone."""
    found = []
    for step in run.batches:
        own = [span for span in run.spans if span.step == step]
        if own:
            low, high = min(span.start_s for span in own), max(span.end_s for span in own)
            found.append([step, round(low - run.start_s, 3), round(high - run.start_s, 3)])
    return found
