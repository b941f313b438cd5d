"""The tapes of cells that failed, kept in the user's home of the workbench, for `launch(..., record="failures")`.

    ranks' tapes, in the cluster's folder --the cell failed--> home/tapes/<time>-cell-<number>/rank-*.tape    the last 20, 4 GiB at most

Runs in the driver. Knows files and cells. Does not know what is on a tape.
"""

from __future__ import annotations

import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path

from workbench.home import home
from workbench.ranks.handle import ActiveCell
from workbench.ranks.messages import Outcome, Task

__all__ = ["FailureKeeper"]

_NUM_KEPT = 20
_MOST_KEPT_BYTES = 4 << 30
_NOT_FAILURES = (None, "interrupt", "closed")


class FailureKeeper:
    """Copies the ranks' tapes when a cell has failed, and says so in the cell's notes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.rests = False  # while cluster.record writes tapes of its own
        self.last: Path | None = None

    def __call__(self, cell: ActiveCell) -> None:
        """Called when all ranks have answered, before any of them runs something else."""
        if self.rests or cell.task is Task.HOUSE or cell.stop_reason in _NOT_FAILURES:
            return
        self.last = cell.tape = self._keep(cell.number)
        rank = _rank_of(cell)
        cell.notes.append(f"the tape of every rank is kept: wb.replay({str(cell.tape)!r}, rank={rank}) runs rank {rank} again, alone")

    def _keep(self, number: int) -> Path:
        kept = home() / "tapes"
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-cell-{number}-{secrets.token_hex(3)}"
        half = kept / f".{name}"
        half.mkdir(mode=0o700)
        for path in sorted(self._folder.glob("rank-*.tape")):
            shutil.copyfile(path, half / path.name)
            (half / path.name).chmod(0o600)
        _prune(kept)
        return half.rename(kept / name)


def _rank_of(cell: ActiveCell) -> int:
    """The rank to look at first: the one that raised or died first, else one that others waited for."""
    raised = sorted((d.error.at_s, rank) for rank, d in cell.done.items() if d.outcome is Outcome.RAISED and d.error)
    raised += sorted((at_s, rank) for rank, at_s in cell.died_s.items())
    if raised:
        return min(raised)[1]
    missing = list(cell.diagnosis.missing) if cell.diagnosis else []
    return missing[0] if missing else cell.members[0]


def _prune(kept: Path) -> None:
    """Leave the newest; one more is about to come."""
    folders = sorted((path for path in kept.iterdir() if not path.name.startswith(".")), reverse=True)
    num_bytes = 0
    for place, folder in enumerate(folders):
        num_bytes += sum(path.stat().st_size for path in folder.iterdir())
        if place >= _NUM_KEPT - 1 or num_bytes > _MOST_KEPT_BYTES:
            shutil.rmtree(folder, ignore_errors=True)
