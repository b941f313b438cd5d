"""Ranks as tiles: what each does at one moment."""

from __future__ import annotations

from collections import Counter
from math import ceil

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from workbench.records import ClusterSnapshot, RankState, RankStatus
from workbench.view.style import house_style, new_axes, set_finding

__all__ = ["TILE_STYLES", "plot_tiles", "tiles_height"]

TILE_STYLES = {  # what a rank does -> (edge colour, line, letter)
    "idle": ("#7F7F7F", "solid", "i"),
    "running": ("#0072B2", "solid", "r"),
    "waits": ("#E69F00", "dashed", "w"),
    "dead": ("#D55E00", "dotted", "x"),
    "starting": ("#56B4E9", "dashdot", "s"),
}
MAX_IN_WORDS = 16  # of more ranks a tile has its number and a letter
COLUMNS, MANY_COLUMNS = 4, 32


def tiles_height(snapshot: ClusterSnapshot) -> float:
    """Height of the figure's part, inches."""
    num_ranks, title = len(snapshot.ranks), 0.8 if snapshot.diagnosis else 0.4
    return title + (0.5 * ceil(num_ranks / COLUMNS) if num_ranks <= MAX_IN_WORDS else 0.2 * ceil(num_ranks / MANY_COLUMNS))


def plot_tiles(snapshot: ClusterSnapshot, ax: Axes | None = None) -> Axes:
    """A tile a rank; of more than 16 ranks only the number and a letter: i idle, r running, w waits in a collective, x dead."""
    with house_style():
        ax = ax or new_axes((6.4, tiles_height(snapshot)))
        in_words = len(snapshot.ranks) <= MAX_IN_WORDS
        num_columns = COLUMNS if in_words else MANY_COLUMNS
        for status in snapshot.ranks:
            color, line, letter = TILE_STYLES[what_it_does(status)]
            row, column = divmod(status.rank, num_columns)
            ax.add_patch(
                Rectangle((column + 0.03, row + 0.06), 0.94, 0.88, facecolor="none", edgecolor=color, linestyle=line, linewidth=1.6)
            )
            text = "\n".join(_words(status)) if in_words else f"{status.rank}{letter}"
            ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6.5 if in_words else 4.5)
        ax.set_xlim(0, num_columns)
        ax.set_ylim(ceil(len(snapshot.ranks) / num_columns), 0)
        ax.set_axis_off()
        set_finding(ax, _finding(snapshot))
    return ax


def what_it_does(status: RankStatus) -> str:
    """ "idle", "running", "waits", "dead" or "starting"."""
    return "waits" if status.state is RankState.RUNNING and status.waits_in else str(status.state)


def _words(status: RankStatus) -> list[str]:
    what = what_it_does(status)
    if what != "waits":
        return [f"rank {status.rank}: {what}"]
    place, _, group = status.waits_in.partition(" of ")
    return [f"rank {status.rank}", place[:26], f"of {group[:14]}, {status.waits_s:.1f} s"]


def _finding(snapshot: ClusterSnapshot) -> str:
    counts = Counter(what_it_does(status) for status in snapshot.ranks)
    ranks = ", ".join(f"{counts[what]} {'wait' if what == 'waits' and counts[what] > 1 else what}" for what in TILE_STYLES if counts[what])
    engines = "".join(f"; engine {engine.status.replace('_', ' ')}" for engine in snapshot.engines)
    cell = f"; {snapshot.cell} since {snapshot.cell_s:.0f} s" if snapshot.cell else ""
    cause = f"; {snapshot.diagnosis.sentence}" if snapshot.diagnosis else ""
    return f"{len(snapshot.ranks)} ranks: {ranks}{cell}{engines}{cause}"
