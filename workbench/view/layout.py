"""A layout as a grid of ranks, coloured by the groups of one axis."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from workbench.errors import LayoutError
from workbench.plan.layout import Layout
from workbench.view.given import check_given
from workbench.view.rank_grid import RankGrid, group_indices, rank_grid
from workbench.view.style import FULL_SIZE, INK, add_legend, house_style, is_small, new_axes, rank_color, set_finding

__all__ = ["check_axis", "group_letter", "plot_layout"]

MAX_NUMBERED = 64  # ranks with a number in their cell
MAX_LEGEND = 8  # groups that the legend names
NUM_COLORS = 32

Indices = NDArray[np.int64]


def plot_layout(layout: Layout, *, color_by: str = "tp", ax: Axes | None = None, size: tuple[float, float] | None = None) -> Axes:
    """Ranks as a grid, those of one group in one colour: tp inside pipeline stages across, dp inside external_dp down.

    Up to 64 ranks each cell has its rank's number and its group's letter; in larger worlds a frame marks the group of rank 0.

    Args:
        color_by: axis whose groups give the colours; 32 colours, then they repeat.
        ax: where to draw; None makes a figure of `size` inches, by default as high as the grid asks for.

    Raises:
        LayoutError: the layout has no such axis.
        TypeError: it is no layout.
    """
    check_given("plot_layout", layout, "mesh_axes", needed="a layout, such as wb.Layout(world_size=8, tp=2) or cluster.layout")
    check_axis(layout, color_by)
    grid, groups = rank_grid(layout), group_indices(layout, color_by)
    size = size or _fitting_size(layout, grid)
    with house_style(is_small=is_small(ax, size)):
        ax = ax or new_axes(size)
        _draw_cells(ax, grid, groups)
        _draw_borders(ax, grid, groups)
        _set_ticks(ax, grid)
        handles = _legend(layout, color_by)
        if layout.world_size <= MAX_NUMBERED:
            _write_numbers(ax, grid, groups, layout)
        else:
            handles = _frame_first(ax, grid, groups, handles)
        set_finding(ax, _finding(layout, color_by, grid))
        add_legend(ax, handles)
    return ax


def check_axis(layout: Layout, axis: str) -> None:
    """Refuse an axis that the layout has not.

    Raises:
        LayoutError: it names the axes that there are.
    """
    if axis not in layout.axes:
        raise LayoutError(
            f"plot_layout(color_by={axis!r}): {layout} has no axis {axis!r}\nits axes are {', '.join(layout.axes)}\ncolour by one of them"
        )


def group_letter(index: int) -> str:
    """The name of a group in a picture: A to Z, then AA, AB, ..."""
    return (group_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def _fitting_size(layout: Layout, grid: RankGrid) -> tuple[float, float]:
    """Inches: cells of at most 0.7, square where they are numbered."""
    if layout.world_size > MAX_NUMBERED:
        return FULL_SIZE
    return FULL_SIZE[0], 1.4 + grid.height * min(0.7, 5.2 / grid.width)


def _draw_cells(ax: Axes, grid: RankGrid, groups: Indices) -> None:
    """All cells as one mesh, [rows, columns], with empty cells where there are gaps."""
    x_edges, y_edges = (np.unique(np.round(np.concatenate([at, at + 1]), 6)) for at in (grid.x, grid.y))
    cells = np.full((len(y_edges) - 1, len(x_edges) - 1), np.nan)  # NaN is drawn as nothing
    cells[y_edges.searchsorted(np.round(grid.y, 6)), x_edges.searchsorted(np.round(grid.x, 6))] = groups % NUM_COLORS
    colors = ListedColormap([rank_color(index) for index in range(NUM_COLORS)])
    norm = BoundaryNorm(np.arange(NUM_COLORS + 1) - 0.5, NUM_COLORS)
    ax.pcolormesh(x_edges, y_edges, cells, cmap=colors, norm=norm)
    ax.set_xlim(-0.15, grid.width + 0.15)
    ax.set_ylim(grid.height + 0.15, -0.15)
    if len(groups) <= MAX_NUMBERED:
        ax.set_aspect("equal", anchor="NW")


def _draw_borders(ax: Axes, grid: RankGrid, groups: Indices) -> None:
    """Thin white lines between cells, dark ones where two groups meet or a group ends."""
    num_cells = max(grid.width, grid.height)
    if num_cells <= 40:
        ax.add_collection(LineCollection(_sides(grid, np.arange(len(groups))), colors="white", linewidths=0.6))
    ax.add_collection(LineCollection(_sides(grid, groups), colors=INK, linewidths=1.0 if num_cells <= 40 else 0.4, capstyle="projecting"))


def _sides(grid: RankGrid, groups: Indices) -> list[list[tuple[float, float]]]:
    """The sides of cells whose neighbour is of another group or is none."""
    group_at = {(round(x, 3), round(y, 3)): int(g) for x, y, g in zip(grid.x, grid.y, groups, strict=True)}
    sides = []
    for (x, y), group in group_at.items():
        around = ((-1, 0, (0, 0), (0, 1)), (1, 0, (1, 0), (1, 1)), (0, -1, (0, 0), (1, 0)), (0, 1, (0, 1), (1, 1)))
        for dx, dy, a, b in around:
            if group_at.get((round(x + dx, 3), round(y + dy, 3))) != group:
                sides.append([(x + a[0], y + a[1]), (x + b[0], y + b[1])])
    return sides


def _write_numbers(ax: Axes, grid: RankGrid, groups: Indices, layout: Layout) -> None:
    """Each rank's number, and below it the letter of its group, black or white, whichever is easier to read."""
    figure_width_pt = float(ax.get_window_extent().width) / ax.figure.dpi * 72
    figure_height_pt = float(ax.get_window_extent().height) / ax.figure.dpi * 72
    cell_pt = min(figure_width_pt / grid.width, 0.8 * figure_height_pt / grid.height)
    font_pt = min(matplotlib.rcParams["font.size"], cell_pt * 0.36)
    for rank in range(layout.world_size):
        group = int(groups[rank])
        ax.text(
            grid.x[rank] + 0.5, grid.y[rank] + 0.5, f"{rank}\n{group_letter(group)}", ha="center", va="center",
            fontsize=font_pt, linespacing=1.05, color=_ink_on(rank_color(group % NUM_COLORS)),
        )  # fmt: skip


def _ink_on(color: str) -> str:
    """Black or white, whichever contrasts more (https://www.w3.org/TR/WCAG22/#dfn-relative-luminance)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color))
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "#FFFFFF"


def _set_ticks(ax: Axes, grid: RankGrid) -> None:
    for axis, ticks, label in ((ax.xaxis, grid.x_ticks, grid.columns), (ax.yaxis, grid.y_ticks, grid.rows)):
        axis.set_ticks([at for at, _ in ticks], [name for _, name in ticks])
        axis.set_tick_params(length=0)
        axis.set_label_text(label)
    ax.spines[:].set_visible(False)


def _legend(layout: Layout, axis: str) -> list[Patch | Line2D]:
    """A few groups by letter and ranks; of many, nothing: letters and borders tell them apart."""
    groups = layout.groups(axis)
    if not 1 < len(groups) <= MAX_LEGEND:
        return []
    return [Patch(facecolor=rank_color(i), edgecolor=INK, label=f"{group_letter(i)}: {_listed(g)}") for i, g in enumerate(groups)]


def _listed(ranks: tuple[int, ...]) -> str:
    """Ranks in short: "0-7", "0, 4, 8", "0, 4, ..., 60"."""
    if len(ranks) > 2 and ranks == tuple(range(ranks[0], ranks[0] + len(ranks))):
        return f"{ranks[0]}-{ranks[-1]}"
    return ", ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}"


def _frame_first(ax: Axes, grid: RankGrid, groups: Indices, handles: list[Patch | Line2D]) -> list[Patch | Line2D]:
    """Frame rank 0's group, so that one group is seen whole also where colours repeat."""
    chosen = groups == groups[0]
    part = RankGrid(x=grid.x[chosen], y=grid.y[chosen], x_ticks=(), y_ticks=(), columns="", rows="")
    sides = _sides(part, groups[chosen])
    ax.add_collection(LineCollection(sides, colors="white", linewidths=3.6, capstyle="projecting", zorder=3))
    ax.add_collection(LineCollection(sides, colors="black", linewidths=2.0, capstyle="projecting", zorder=4))
    name = f"group of rank 0: {_listed(tuple(np.flatnonzero(chosen).tolist()))}"
    return [*handles, Line2D([], [], color="black", linewidth=2.0, label=name)]


def _finding(layout: Layout, axis: str, grid: RankGrid) -> str:
    sizes = {len(group) for group in layout.groups(axis)}
    num_groups, size = len(layout.groups(axis)), f"{min(sizes)}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
    ranks, noun = f"{layout.world_size:,} rank" + "s" * (layout.world_size > 1), "group" + "s" * (num_groups > 1)
    has_stages = bool(grid.x_ticks) and grid.x_ticks[0][1].startswith("pp ")
    return f"{ranks}: {num_groups} {axis} {noun} of {size}" + ("; columns are pipeline stages" if has_stages else "")
