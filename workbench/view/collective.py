"""A collective step by step: who sends which part to whom, and what everyone holds afterwards.

A panel a step: members are columns, parts are rows; a message is an arrow over its row, from the sender's cell to the receiver's.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from math import ceil
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from matplotlib.path import Path

from workbench.records import CollectiveStep, CollectiveTrace, Held, Transfer
from workbench.view.style import FULL_SIZE, INK, add_legend, house_style, new_axes, set_finding

__all__ = ["CELL_STYLES", "finding", "held_text", "plot_collective"]

CELL_STYLES = {  # what a cell is -> (face colour, edge colour, width of the edge, what the legend says)
    "holds": ("#EFEFEF", "#8C8C8C", 0.8, "holds"),
    "sends": ("#9BD3F3", "#004A75", 0.8, "sends it"),
    "got": ("#F3BC4C", "#7A4300", 1.6, "has just got it"),
    "result": ("#A9DFC9", "#00694D", 1.6, "its result"),
    "empty": ("#FFFFFF", "#A6A6A6", 0.8, "does not hold it"),
}
GAP, LANE = 0.35, 0.32  # between columns, and over a row for each arrow; in widths of a cell
TITLE_IN, NAMES_IN, BELOW_IN = 0.34, 0.18, 0.16  # inches over and under the cells of a panel
FONT_PT = 6.8
MAX_WRITTEN = 6  # members up to which a strip writes values
MAX_PANELS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class _Strip:
    """Where the panels of a strip stand; lengths in inches, y downwards.

    Attributes:
        numbers: the steps that are drawn.
        cell_in: width of a cell.
        row: height of a cell, and `num_lanes` arrows over it, in widths of a cell.
    """

    trace: CollectiveTrace
    numbers: tuple[int, ...]
    per_row: int
    cell_in: float
    row: float
    num_lanes: int
    is_written: bool

    @property
    def pitch(self) -> float:
        """From the top of one row of cells to the next."""
        return (self.row + self.num_lanes * LANE + 0.1) * self.cell_in

    @property
    def width(self) -> float:
        """From one panel to the next."""
        return _width(self.trace) * self.cell_in

    @property
    def num_letters(self) -> int:
        """What a cell has room for."""
        return int(self.cell_in * 72 / (0.58 * FONT_PT))

    @property
    def height(self) -> float:
        return TITLE_IN + NAMES_IN + len(self.trace.parts) * self.pitch + BELOW_IN

    def corner(self, place: int) -> tuple[float, float]:
        row, column = divmod(place, self.per_row)
        return column * self.width, row * self.height

    def cell(self, place: int, member: int, part: int) -> tuple[float, float]:
        """Upper left corner of a cell."""
        x, y = self.corner(place)
        top = TITLE_IN + NAMES_IN + part * self.pitch + self.num_lanes * LANE * self.cell_in
        return x + member * (1 + GAP) * self.cell_in, y + top


def plot_collective(trace: CollectiveTrace, ax: Axes | None = None, *, step: int | None = None, width: float = FULL_SIZE[0]) -> Axes:
    """The steps of a collective as a strip, or one of them.

    Up to 6 members each cell has its values; of more only colours tell what happens. Of more than 12 steps the middle ones are left out.

    Args:
        step: 0 is what each member gives; None draws all.
        ax: where to draw, best as wide as `width`; None makes a figure of `width` inches, as high as it must be.

    Raises:
        ValueError: the trace has no such step.
    """
    if step is not None and not 0 <= step < len(trace.steps):
        raise ValueError(f"plot_collective(step={step}): the trace has no such step\nits steps are 0..{len(trace.steps) - 1}")
    strip = _arranged(trace, step, width)
    num_rows = ceil(len(strip.numbers) / strip.per_row)
    with house_style(is_small=True):
        ax = ax or new_axes((width, num_rows * strip.height + 0.75))
        for place, number in enumerate(strip.numbers):
            _draw_step(ax, strip, place, number)
        ax.set_xlim(-0.05, strip.per_row * strip.width)
        ax.set_ylim(num_rows * strip.height - BELOW_IN + 0.05, 0)
        ax.set_axis_off()
        set_finding(ax, finding(trace) + _left_out(trace, strip))
        add_legend(ax, _legend(trace, strip))
    return ax


def finding(trace: CollectiveTrace) -> str:
    """The trace in one sentence."""
    num_steps, num_messages = sum(bool(step.transfers) for step in trace.steps), len(trace.transfers)
    size = f"{sum(transfer.num_bytes for transfer in trace.transfers):,} bytes"
    steps = "1 step" if num_steps == 1 else f"{num_steps} steps"
    if trace.max_difference is None:
        return f"{trace.op} on {len(trace.members)} processes: {steps}, {size} between the ranks"
    messages = "1 message" if num_messages == 1 else f"{num_messages} messages"
    text = f"{trace.op} on {len(trace.members)} ranks: {steps}, {messages}, {size}; "
    return text + ("equal to torch's" if trace.max_difference == 0.0 else f"differs from torch's by up to {trace.max_difference:.3g}")


def held_text(held: Held, *, max_letters: int) -> str:
    """A cell's content in few letters: "10, 11", "10..17", "25 values"."""
    if held is None:
        return ""
    if isinstance(held, str):
        return held
    values = [f"{value:.4g}" for value in held]
    text = ", ".join(values)
    return text if len(text) <= max_letters or len(values) == 1 else f"{values[0]}..{values[-1]}"


def _width(trace: CollectiveTrace) -> float:
    return len(trace.members) * (1 + GAP) + 0.45


def _arranged(trace: CollectiveTrace, step: int | None, width: float) -> _Strip:
    """As many panels beside each other as letters allow: cells of at least 0.3 inches where values are written."""
    has_words = any(isinstance(held, str) for one in trace.steps for row in one.held for held in row)
    is_written = step is not None or len(trace.members) <= MAX_WRITTEN
    least_in = (0.55 if has_words else 0.3) if is_written else 0.085
    most = 4 if is_written else 5
    numbers = _chosen(len(trace.steps)) if step is None else (step,)
    fitting = max(1, min(most, int(width / (_width(trace) * least_in))))
    per_row = ceil(len(numbers) / ceil(len(numbers) / fitting))
    return _Strip(
        trace=trace,
        numbers=numbers,
        per_row=per_row,
        cell_in=min(0.75, width * 0.97 / (per_row * _width(trace))),
        row=0.62 if has_words else 0.5,
        num_lanes=max((lane + 1 for one in trace.steps for lane in _lanes(one).values()), default=1),
        is_written=is_written,
    )


def _chosen(num_steps: int) -> tuple[int, ...]:
    """All steps, or the first and last few of many."""
    if num_steps <= MAX_PANELS:
        return tuple(range(num_steps))
    return (*range(MAX_PANELS // 2), *range(num_steps - MAX_PANELS // 2, num_steps))


def _left_out(trace: CollectiveTrace, strip: _Strip) -> str:
    missing = len(trace.steps) - len(strip.numbers)
    return f" ({missing} steps in the middle not drawn)" if missing and len(strip.numbers) > 1 else ""


def _lanes(step: CollectiveStep) -> dict[int, int]:
    """Number of a message in its step -> its lane above its row, so that no two arrows of a row lie on each other."""
    lanes: dict[int, int] = {}
    taken: dict[tuple[int, int], list[tuple[int, int]]] = {}
    order = sorted(range(len(step.transfers)), key=lambda k: abs(step.transfers[k].target - step.transfers[k].source))
    for k in order:
        t = step.transfers[k]
        low, high = sorted((t.source, t.target))
        lane = 0
        while any(a < high and low < b for a, b in taken.get((t.part, lane), [])):
            lane += 1
        taken.setdefault((t.part, lane), []).append((low, high))
        lanes[k] = lane
    return lanes


def _kinds(trace: CollectiveTrace, number: int) -> dict[tuple[int, int], str]:
    """(member, part) -> what the cell is in this step, a key of `CELL_STYLES`."""
    step = trace.steps[number]
    is_last = number == len(trace.steps) - 1
    kinds = {
        (member, part): "empty" if held is None else "result" if is_last and part in trace.results[member] else "holds"
        for member, row in enumerate(step.held)
        for part, held in enumerate(row)
    }
    kinds |= {(transfer.source, transfer.part): "sends" for transfer in step.transfers}
    return kinds | {(transfer.target, transfer.part): "got" for transfer in step.transfers}


def _draw_step(ax: Axes, strip: _Strip, place: int, number: int) -> None:
    trace, step = strip.trace, strip.trace.steps[number]
    x, y = strip.corner(place)
    ax.text(x, y + 0.06, _title(strip, number, step), fontsize=FONT_PT, va="top", weight="bold")
    _write_names(ax, strip, place)
    boxes: dict[str, list[Rectangle]] = {}
    for (member, part), kind in _kinds(trace, number).items():
        left, top = strip.cell(place, member, part)
        boxes.setdefault(kind, []).append(Rectangle((left, top), strip.cell_in, strip.row * strip.cell_in))
        text = held_text(step.held[member][part], max_letters=strip.num_letters) if strip.is_written else ""
        if text:
            middle = (left + strip.cell_in / 2, top + strip.row * strip.cell_in / 2)
            ax.text(*middle, text, fontsize=FONT_PT, ha="center", va="center", color="#000000", linespacing=1.0)
    for kind, of_kind in boxes.items():
        face, edge, line, _ = CELL_STYLES[kind]
        line *= 1.0 if strip.is_written else 0.6
        ax.add_collection(PatchCollection(of_kind, facecolor=face, edgecolor=edge, linewidth=line, linestyle=_dash(kind), zorder=1))
    for k, lane in _lanes(step).items():
        ax.add_patch(_arrow(strip, place, step.transfers[k], lane))


def _title(strip: _Strip, number: int, step: CollectiveStep) -> str:
    """The step's number and title, in at most two lines of the panel's width."""
    num_letters = int(strip.width * 72 / (0.7 * FONT_PT))
    whole = textwrap.wrap(f"{number}  {step.title}", num_letters)
    return "\n".join(whole if len(whole) <= 2 else textwrap.wrap(f"{number}  {step.title.partition(':')[0]}", num_letters)[:2])


def _write_names(ax: Axes, strip: _Strip, place: int) -> None:
    every = 1 if strip.cell_in > 0.12 else 2
    for member, name in list(enumerate(strip.trace.members))[::every]:
        left, _ = strip.cell(place, member, 0)
        at = (left + strip.cell_in / 2, strip.corner(place)[1] + TITLE_IN + NAMES_IN / 2)
        ax.text(*at, name if strip.is_written else name.removeprefix("rank "), fontsize=FONT_PT, ha="center", va="center")


def _arrow(strip: _Strip, place: int, transfer: Transfer, lane: int) -> FancyArrowPatch:
    """Up from the sender's cell, over to the receiver's column, down to its cell."""
    (x0, top), (x1, _) = (strip.cell(place, member, transfer.part) for member in (transfer.source, transfer.target))
    towards = 1 if x1 > x0 else -1
    start, end = x0 + (0.5 + 0.22 * towards) * strip.cell_in, x1 + (0.5 - 0.22 * towards) * strip.cell_in
    over = top - (lane + 0.62) * LANE * strip.cell_in
    path = Path([(start, top), (start, over), (end, over), (end, top)])
    size = max(2.5, min(7.0, strip.cell_in * 20))
    return FancyArrowPatch(
        path=path, arrowstyle=f"-|>,head_length={size * 0.5:.2f},head_width={size * 0.25:.2f}", mutation_scale=1.0,
        color=INK, linewidth=max(0.5, min(1.1, strip.cell_in * 3)), shrinkA=0, shrinkB=0, zorder=2, joinstyle="miter",
    )  # fmt: skip


def _dash(kind: str) -> Literal[":", "-"]:
    return ":" if kind == "empty" else "-"


def _legend(trace: CollectiveTrace, strip: _Strip) -> list[Patch]:
    found = {kind for number in strip.numbers for kind in _kinds(trace, number).values()}
    return [
        Patch(facecolor=face, edgecolor=edge, linewidth=line, linestyle=_dash(kind), label=words)
        for kind, (face, edge, line, words) in CELL_STYLES.items()
        if kind in found
    ]
