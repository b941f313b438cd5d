"""One axis of a layout: how it cuts the world into groups; integers only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.errors import LayoutError

__all__ = ["Axis", "Ranks"]

Ranks = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """The groups of an axis, packed: group g holds ranks[starts[g]:starts[g + 1]], in its own order.

    [[0, 2], [1, 3]] is ranks = [0, 2, 1, 3], starts = [0, 2, 4], positions = [0, 2, 1, 3], places = [0, 0, 1, 1].

    Attributes:
        ranks: group after group, [world_size].
        starts: [num_groups + 1].
        positions: where each rank stands in `ranks`, [world_size].
    """

    name: str
    ranks: Ranks
    starts: Ranks
    positions: Ranks

    @classmethod
    def from_table(cls, name: str, table: Ranks) -> Axis:
        """An axis whose groups have one size: [num_groups, size]."""
        starts = np.arange(0, table.size + 1, table.shape[1])
        return cls._packed(name, np.ascontiguousarray(table).reshape(-1), starts)

    @classmethod
    def from_groups(cls, name: str, groups: Iterable[Sequence[int]], world_size: int) -> Axis:
        """An axis of given groups, which may differ in size.

        Raises:
            LayoutError: a rank is in two groups or in none, or a group is empty.
        """
        listed = [list(group) for group in groups]
        ranks = np.array([rank for group in listed for rank in group], dtype=np.int64)
        if not all(listed):
            raise LayoutError(f"axis {name!r} has an empty group: {listed}\nleave it out")
        found, counts = np.unique(ranks, return_counts=True)
        if (counts > 1).any():
            raise LayoutError(f"axis {name!r} names ranks {found[counts > 1].tolist()} twice: {listed}\na rank is in one group of an axis")
        if found.tolist() != list(range(world_size)):
            absent = sorted(set(range(world_size)) - set(found.tolist()))
            raise LayoutError(f"axis {name!r} leaves out ranks {absent} of {world_size}: {listed}\ngive each of them a group, if of one")
        return cls._packed(name, ranks, np.cumsum([0, *map(len, listed)]))

    @classmethod
    def _packed(cls, name: str, ranks: Ranks, starts: Ranks) -> Axis:
        positions = np.empty_like(ranks)
        positions[ranks] = np.arange(len(ranks))
        return cls(name, ranks, starts, positions)

    @property
    def num_groups(self) -> int:
        return len(self.starts) - 1

    @property
    def degree(self) -> int:
        """Size of the largest group."""
        return int(np.diff(self.starts).max())

    def groups(self) -> tuple[tuple[int, ...], ...]:
        """All groups, each in its own order."""
        ranks, starts = self.ranks.tolist(), self.starts.tolist()
        return tuple(tuple(ranks[a:b]) for a, b in zip(starts[:-1], starts[1:], strict=True))

    def group_of(self, rank: int) -> tuple[int, ...]:
        """The group that a rank is in."""
        group = self._group_index(self.positions[rank])
        return tuple(self.ranks[self.starts[group] : self.starts[group + 1]].tolist())

    def place_of(self, rank: int) -> int:
        """A rank's index in its group."""
        position = self.positions[rank]
        return int(position - self.starts[self._group_index(position)])

    @property
    def places(self) -> Ranks:
        """Each rank's index in its group, [world_size]."""
        places: Ranks = self.positions - self.starts[self._group_index(self.positions)]
        return places

    def _group_index(self, positions: Any) -> Any:
        return self.starts.searchsorted(positions, side="right") - 1
