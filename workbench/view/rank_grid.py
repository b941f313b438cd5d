"""Where each rank of a layout stands in a picture: numbers only, no matplotlib, no widget.

Columns run over tp inside pcp inside pipeline stages, rows over dp inside external_dp; a gap parts the blocks of an outer axis. A grid far
wider than high is folded into lines, one far higher than wide into strips. Groups of one's own are a row each.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2, prod, sqrt

import numpy as np
from numpy.typing import NDArray

from workbench.plan.layout import Layout

__all__ = ["RankGrid", "group_indices", "rank_grid"]

COLUMN_AXES = ("pp", "pcp", "cp", "tp", "sp", "engine")  # outermost first
OUTER_GAP, INNER_GAP, FOLD_GAP = 0.5, 0.2, 1.0  # cells
MAX_TICKS = 16

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGrid:
    """Cells of side 1, x to the right and y downwards.

    Layout(world_size=4, tp=2, pp=2): x = [0, 1, 2.5, 3.5], y = [0, 0, 0, 0].

    Attributes:
        x: left edge of each rank's cell, [world_size].
        y: upper edge of each rank's cell, [world_size].
        x_ticks: (middle of a block of columns, its name); () in a folded grid.
        y_ticks: (middle of a block of rows, its name).
        columns: what the columns are: "tp inside pp".
        rows: what the rows are.
    """

    x: Numbers
    y: Numbers
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    columns: str
    rows: str

    @property
    def width(self) -> float:
        return float(self.x.max()) + 1

    @property
    def height(self) -> float:
        return float(self.y.max()) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """Ranks along one direction: `index` counts cells, `at` adds the gaps; `block` cells stand between two gaps of the outermost axis."""

    names: tuple[str, ...]
    index: Indices
    at: Numbers
    num_cells: int
    block: int

    @property
    def words(self) -> str:
        return " inside ".join(reversed(self.names))


def group_indices(layout: Layout, axis: str) -> Indices:
    """Which group of an axis each rank is in, [world_size].

    Raises:
        LayoutError: the layout has no such axis.
    """
    found = np.empty(layout.world_size, dtype=np.int64)
    for index, group in enumerate(layout.groups(axis)):
        found[list(group)] = index
    return found


def rank_grid(layout: Layout) -> RankGrid:
    """Where each rank of `layout` stands."""
    if not layout.mesh_axes:
        return _grid_of_groups(layout)
    wide = [axis for axis in layout.mesh_axes if layout.degree(axis) > 1]
    columns = [axis for axis in COLUMN_AXES if axis in wide]
    rows = [axis for axis in wide if axis not in columns]
    if not columns and rows:
        columns = [rows.pop()]
    across, down = _line(layout, columns), _line(layout, rows)
    if across.num_cells > 32 and across.num_cells > 8 * down.num_cells:
        return _in_lines(across, down)
    if down.num_cells > 16 and down.num_cells > 4 * across.num_cells:
        return _in_strips(across, down)
    return RankGrid(
        x=across.at, y=down.at, x_ticks=_ticks(across), y_ticks=_ticks(down), columns=across.words or "all ranks", rows=down.words
    )


def _line(layout: Layout, axes: list[str]) -> _Line:
    """The ranks along `axes`, outermost first."""
    coords = [layout.coords(rank) for rank in range(layout.world_size)]
    degrees = [layout.degree(axis) for axis in axes]
    index = np.zeros(layout.world_size, dtype=np.int64)
    gaps = np.zeros(layout.world_size)
    for place, axis in enumerate(axes):
        index = index * degrees[place] + np.array([at[axis] for at in coords])
        if place < len(axes) - 1:
            gaps += index * (INNER_GAP if place else OUTER_GAP)
    return _Line(names=tuple(axes), index=index, at=index + gaps, num_cells=prod(degrees), block=prod(degrees[1:]))


def _ticks(line: _Line) -> tuple[tuple[float, str], ...]:
    """A name for each block of the outermost axis, in its middle; of many, every second, fourth, ..."""
    num_blocks = line.num_cells // line.block
    step = 2 ** max(0, int(np.ceil(log2(num_blocks / MAX_TICKS))))
    if not line.names:
        return ()
    middles = [line.at[line.index // line.block == block] for block in range(0, num_blocks, step)]
    return tuple(((m.min() + m.max() + 1) / 2, f"{line.names[0]} {i * step}") for i, m in enumerate(middles))


def _in_lines(across: _Line, down: _Line) -> RankGrid:
    """A wide grid cut into lines below each other, whole blocks where they fit."""
    ideal = 2 ** round(log2(sqrt(2 * across.num_cells / down.num_cells)))
    per_line = across.block * max(1, round(ideal / across.block)) if 1 < across.block <= 2 * ideal else ideal
    line = across.index // per_line
    gap = FOLD_GAP if down.num_cells > 1 else INNER_GAP if across.block > 1 else 0.0
    y = down.at + line * (down.at.max() + 1 + gap)
    rows = "lines follow one another" + (f"; {down.words} in each" if down.names else "")
    return RankGrid(
        x=across.at - _starts(across, per_line)[line], y=y, x_ticks=(), y_ticks=_first_ranks(y), columns=across.words, rows=rows
    )


def _in_strips(across: _Line, down: _Line) -> RankGrid:
    """A high grid cut into strips beside each other."""
    ideal = sqrt(down.num_cells * across.num_cells / 2)
    per_strip = min(down.num_cells, 2 ** round(log2(ideal)))
    strip = down.index // per_strip
    x = across.at + strip * (across.at.max() + 1 + FOLD_GAP)
    y = down.at - _starts(down, per_strip)[strip]
    return RankGrid(x=x, y=y, x_ticks=(), y_ticks=_first_ranks(y), columns=f"{across.words}; strips follow one another", rows=down.words)


def _starts(line: _Line, size: int) -> Numbers:
    """Where each part of `size` cells begins, [num_parts]."""
    num_parts = -(-line.num_cells // size)
    return np.array([line.at[line.index // size == part].min() for part in range(num_parts)])


def _first_ranks(y: Numbers) -> tuple[tuple[float, str], ...]:
    """A row goes by its lowest rank; of many rows, every second, fourth, ..."""
    edges, first = np.unique(y, return_index=True)  # the first rank that has this y is the lowest
    step = 2 ** max(0, int(np.ceil(log2(len(edges) / MAX_TICKS))))
    return tuple((float(edges[i]) + 0.5, f"rank {first[i]}") for i in range(0, len(edges), step))


def _grid_of_groups(layout: Layout) -> RankGrid:
    """Groups of one's own: those of the first axis, a row each."""
    axis = layout.axes[0]
    row = group_indices(layout, axis)
    column = np.array([layout.index_in_group(rank, axis) for rank in range(layout.world_size)])
    across = _Line(names=(axis,), index=column, at=column.astype(float), num_cells=layout.degree(axis), block=1)
    down = _Line(names=(f"{axis} group",), index=row, at=row.astype(float), num_cells=int(row.max()) + 1, block=1)
    columns, rows = f"place in its {axis} group", f"{axis} groups"
    return RankGrid(x=across.at, y=down.at, x_ticks=_ticks(across), y_ticks=_ticks(down), columns=columns, rows=rows)
