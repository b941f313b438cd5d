"""What can go wrong, as a tree; every text says what happened, what was seen against what was needed, and what to do.

WorkbenchError
├── LayoutError (also ValueError)      sizes or groups that do not fit the world
├── LaunchError                        ranks did not start
├── ClusterClosed                      the cluster was closed
├── ClusterBusy                        another cell still runs
├── RankError                          one cell, told by the ranks; carries the diagnosis
│   ├── RankFailed                     a rank raised or died; `rank` is the first in time
│   ├── CollectiveMismatch             ranks met in one collective with different operations
│   ├── RankDeadlock                   a rank waits for one that can never come
│   ├── RankTimeout                    the cell outlived its `timeout_s`
│   └── RankInterrupted                `interrupt()` ended the cell
├── StaleGroupError                    a group, DDP model or engine of an older generation was used
├── GroupError                         a collective of `Group` or `StatelessGroup` failed
├── ModelError (also ValueError)       a model that is not here, or cannot be made
├── EngineError                        an engine refused, failed or died
├── ReplayError                        a tape is missing, damaged or of another world, or its replay diverged
├── SessionError                       a session's file cannot be written or read, or is not this user's
└── RunError                           a run's folder cannot be written or read
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.records import Diagnosis

__all__ = [
    "ClusterBusy",
    "ClusterClosed",
    "CollectiveMismatch",
    "EngineError",
    "GroupError",
    "LaunchError",
    "LayoutError",
    "ModelError",
    "RankDeadlock",
    "RankError",
    "RankFailed",
    "RankInterrupted",
    "RankTimeout",
    "ReplayError",
    "RunError",
    "SessionError",
    "StaleGroupError",
    "WorkbenchError",
    "page_text",
]

_MOST_WIDE = 100  # characters of a line; some notebooks do not break the lines of an error, and show as many of it as there is room for
_RANKS_OWN = "Traceback (most recent call last):"


class WorkbenchError(Exception):
    """Root of every error that the workbench raises on purpose."""


class LayoutError(WorkbenchError, ValueError):
    """Sizes, degrees or groups that do not fit the world."""


class LaunchError(WorkbenchError):
    """Ranks could not be started."""


class ClusterClosed(WorkbenchError):
    """The cluster was closed; nothing can run on it any more."""


class ClusterBusy(WorkbenchError):
    """Another cell still runs on the ranks."""


class RankError(WorkbenchError):
    """A cell that ended badly.

    Attributes:
        rank: the rank that the error is about, None where it is about several.
        world_size: ranks of the cluster.
        exit_code: exit code of a rank that died, else None.
        signal_name: the signal that ended it ("SIGKILL"), else None.
        rank_traceback: the rank's own traceback, "" where there is none.
        diagnosis: who waited for whom when the cell ended, None where nobody waited.
        locals: short reprs of the names in the frame that failed, {} where there is none.
        tape: folder with the tapes of this cell, for `wb.replay`; None unless the cluster was launched with record="failures".
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        exit_code: int | None = None,
        signal_name: str | None = None,
        rank_traceback: str = "",
        diagnosis: Diagnosis | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.world_size = world_size
        self.exit_code = exit_code
        self.signal_name = signal_name
        self.rank_traceback = rank_traceback
        self.diagnosis = diagnosis
        self.locals: dict[str, str] = {}
        self.tape: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), dict(self.__dict__))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of the driver's stack: our text, which ends with the rank's traceback."""
        return [page_text(self)]


def page_text(error: BaseException) -> str:
    """The error's name and text as a notebook shows them: our own lines broken where they are long, a rank's traceback as it is.

    "RankDeadlock: cell 3 could never end: ranks 0, 1, 3 wait in all_reduce (line 12) of group 'world'; rank 2
        finished the cell without it"
    """
    lines = f"{type(error).__name__}: {error}".split("\n")
    end = lines.index(_RANKS_OWN) if _RANKS_OWN in lines else len(lines)
    return "\n".join([*map(_broken, lines[:end]), *lines[end:]])


def _broken(line: str) -> str:
    if len(line) <= _MOST_WIDE:
        return line
    behind = line[: len(line) - len(line.lstrip())] + "    "
    return textwrap.fill(
        line, _MOST_WIDE, subsequent_indent=behind, replace_whitespace=False, break_long_words=False, break_on_hyphens=False
    )


def _rebuild(kind: type[RankError], message: str, state: dict[str, Any]) -> RankError:
    error = kind(message)
    error.__dict__.update(state)
    return error


class RankFailed(RankError):
    """A rank raised or died; the first failure in time is the one shown."""


class CollectiveMismatch(RankError):
    """Ranks met in one collective with different operations, shapes, dtypes, reduce ops or roots."""


class RankDeadlock(RankError):
    """A rank waits in a collective for a rank that can never come."""


class RankTimeout(RankError):
    """The cell ran longer than its `timeout_s`."""


class RankInterrupted(RankError):
    """`interrupt()` ended the cell."""


class StaleGroupError(WorkbenchError):
    """Something bound to an older generation of the process group was used."""


class GroupError(WorkbenchError):
    """A collective failed or was given what it would misread, or its group is closed."""


class ModelError(WorkbenchError, ValueError):
    """A model that is not here, or cannot be made."""


class EngineError(WorkbenchError):
    """An engine refused a request, failed or died."""


class ReplayError(WorkbenchError):
    """A tape cannot be read or replayed, or the replay diverged from it."""


class SessionError(WorkbenchError):
    """A session's file cannot be written or read, or was not saved by this user."""


class RunError(WorkbenchError):
    """A run's folder cannot be written or read."""
