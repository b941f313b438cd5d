"""Who made whom wait, and for how long: the bill of a cell, from the ledger.

The last to arrive at a collective is late; each other member is owed the time from its own arrival to that one, as far as it really waited.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.ranks.board import Board
from workbench.ranks.messages import GroupFormed

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Stragglers", "find_stragglers"]

_COLUMNS = ("cell", "late_rank", "waiting_rank", "num_collectives", "waited_s")
_NOTICED_S = 0.001  # less in all is not worth a sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Stragglers:
    """The bill.

    Attributes:
        frame: a row a cell, late rank and waiting rank, the dearest first: cell, late_rank, waiting_rank, num_collectives, waited_s.
        sentence: who cost most, and where.
    """

    frame: pd.DataFrame
    sentence: str

    def __str__(self) -> str:
        return self.sentence + (f"\n{self.frame.to_string(index=False)}" if len(self.frame) else "")

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows in a terminal."""
        printer.text(str(self))

    def _repr_html_(self) -> str:
        return f"<div>{html.escape(self.sentence)}</div>{self.frame.to_html(index=False) if len(self.frame) else ''}"


@dataclass(frozen=True, slots=True)
class _Arrival:
    """One rank at one collective; times in ns."""

    rank: int
    cell: int
    line: int
    op: str
    started: int
    waited: int


def find_stragglers(board: Board, groups: Mapping[int, GroupFormed], cell: int | None = None) -> Stragglers:
    """The bill of one cell, or of all that the ledger still holds."""
    import pandas as pd

    from workbench.ranks.operations import LEDGER_NAMES

    met: dict[tuple[int, int], list[_Arrival]] = defaultdict(list)
    for rank in range(board.world_size):
        for op, key, sequence, _, start, arrived, _, where in board.ledger_rows(rank):
            if where >> 20 and cell in (None, where >> 20):  # what the workbench does between cells is nobody's bill
                met[key, sequence].append(_Arrival(rank, where >> 20, where & 0xFFFFF, LEDGER_NAMES[op], start, arrived - start))
    owed: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    places: dict[tuple[int, int, str, int, str], int] = defaultdict(int)
    for (key, _), arrivals in met.items():
        late = max(arrivals, key=lambda one: one.started)
        group = groups[key].name if key in groups else "an earlier generation"
        for one in arrivals:
            if one is not late:
                waited = min(one.waited, late.started - one.started)
                owed[one.cell, late.rank, one.rank].append(waited)
                places[late.cell, late.rank, late.op, late.line, group] += waited
    rows = [(in_cell, late, waiting, len(times), sum(times) / 1e9) for (in_cell, late, waiting), times in owed.items()]
    rows.sort(key=lambda row: row[4], reverse=True)
    frame = pd.DataFrame(rows, columns=list(_COLUMNS))
    return Stragglers(frame=frame, sentence=_sentence(rows, places, cell))


def _sentence(
    rows: Sequence[tuple[int, int, int, int, float]], places: Mapping[tuple[int, int, str, int, str], int], cell: int | None
) -> str:
    where = f"cell {cell}" if cell is not None else "the cells that the ledger holds"
    by_late: dict[tuple[int, int], float] = defaultdict(float)
    for in_cell, late, _, _, waited_s in rows:
        by_late[in_cell, late] += waited_s
    worst = max(by_late, key=lambda who: by_late[who], default=None)
    if cell is not None and not rows:
        return f"the ledger holds no collective of {where}: it has the last ones of each rank, or the cell called none with other ranks"
    if worst is None or by_late[worst] < _NOTICED_S:
        return f"in {where} no rank waited long for another"
    share = by_late[worst] / sum(by_late.values())
    place = max((p for p in places if p[:2] == worst), key=lambda p: places[p])
    return (
        f"in cell {worst[0]} rank {worst[1]} made the others wait {by_late[worst]:.3g} s in all ({share:.0%} of all waiting), "
        f"most in {place[2]} of group {place[4]!r}" + (f" (line {place[3]})" if place[3] else "")
    )
