"""What the driver holds of a cell: its outputs per rank, and a handle while it runs.

Knows outputs and errors of one cell. Does not know how ranks are reached.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.errors import (
    ClusterClosed,
    CollectiveMismatch,
    RankDeadlock,
    RankError,
    RankFailed,
    RankInterrupted,
    RankTimeout,
    WorkbenchError,
)
from workbench.plan.selector import name_ranks
from workbench.ranks.channel import Packed, unpack
from workbench.ranks.messages import CellDone, CellError, Outcome, Task
from workbench.ranks.result import CellResult, RankOutput
from workbench.records import Diagnosis, Shown

__all__ = ["ActiveCell", "CellHandle", "CellResult", "RankOutput", "StopReason", "name_ranks"]

StopReason = str  # "failure", "deadlock", "timeout", "interrupt", "closed"

_TOLD_LATE_S = 0.5  # a death is told later than it happened; what others then meet in gloo is its consequence


@dataclass(slots=True)
class ActiveCell:
    """A cell that runs; written by the conductor's thread, read by the caller when `finished` is set."""

    number: int
    members: tuple[int, ...]
    world_size: int
    task: Task
    text: str
    timeout_s: float | None
    name: str
    started_s: float = field(default_factory=time.monotonic)
    done: dict[int, CellDone] = field(default_factory=dict)
    values: dict[int, Packed | None] = field(default_factory=dict)
    stdout: dict[int, str] = field(default_factory=dict)
    stderr: dict[int, str] = field(default_factory=dict)
    deaths: dict[int, RankError] = field(default_factory=dict)
    died_s: dict[int, float] = field(default_factory=dict)
    killed: set[int] = field(default_factory=set)  # by the stop, since they did not heed it
    stop_reason: StopReason | None = None
    stopped_s: float = 0.0
    diagnosis: Diagnosis | None = None
    notes: list[str] = field(default_factory=list)
    tape: Path | None = None  # where the ranks' tapes of this cell were kept, since it failed
    finished: threading.Event = field(default_factory=threading.Event)
    on_output: Callable[[int, str, str], None] | None = None

    @property
    def pending(self) -> frozenset[int]:
        return frozenset(r for r in self.members if r not in self.done and r not in self.deaths)

    def result(self) -> CellResult:
        return CellResult({rank: self._output(rank) for rank in self.members})

    def _output(self, rank: int) -> RankOutput:
        done = self.done.get(rank)
        error = done.error if done else None
        return RankOutput(
            rank=rank,
            stdout=self.stdout.get(rank, ""),
            stderr=self.stderr.get(rank, ""),
            result_text=done.result_text if done else "",
            error=f"{error.kind}: {error.message}" if error else (str(self.deaths[rank]) if rank in self.deaths else None),
            seconds=done.ended_s - done.started_s if done else 0.0,
            shown=self._shown(rank),
        )

    def _shown(self, rank: int) -> tuple[Shown, ...]:
        packed = self.values.get(rank) if self.task is Task.SOURCE else None
        return unpack(packed) if packed is not None else ()

    def print_output(self) -> None:
        """Print what the ranks wrote, once, where nobody else shows it."""
        texts, self.stdout, self.stderr = (self.stdout, self.stderr), {}, {}
        if self.on_output is not None:
            return
        for by_rank, stream in zip(texts, (sys.stdout, sys.stderr), strict=True):
            lines = [f"[rank {rank}] {line}" for rank, text in sorted(by_rank.items()) for line in text.splitlines()]
            if lines:
                print(*lines, sep="\n", file=stream)

    def returned(self) -> list[Any]:
        """The values of the members, in rank order."""
        return [None if (packed := self.values.get(rank)) is None else unpack(packed) for rank in self.members]

    def error(self) -> WorkbenchError | None:
        """What to raise, by precedence: a rank failed, mismatch, deadlock, timeout, interrupt."""
        if self.stop_reason == "closed":
            return ClusterClosed(
                f"the cluster was closed while {self.name} ran\nits ranks have ended\nstart another: cluster = wb.launch(...)"
            )
        raised = sorted(
            ((d.error, r) for r, d in self.done.items() if d.outcome is Outcome.RAISED and d.error), key=lambda item: item[0].at_s
        )
        own = [(e, r) for e, r in raised if not e.is_mismatch]
        died = [rank for rank in self.deaths if rank not in self.killed]
        if died and not (own and own[0][0].at_s < self.died_s[died[0]] - _TOLD_LATE_S):
            return self._of_death(self.deaths[died[0]])
        if own:
            return self._failed(*own[0], raised)
        if raised:
            error, rank = raised[0]
            return self._make(CollectiveMismatch, f"{error.message}\n\n{error.traceback}", rank=rank, rank_traceback=error.traceback)
        return self._stopped()

    def _stopped(self) -> RankError | None:
        freed = "the other ranks were freed and keep their names" if self.killed else "all ranks were freed and keep their names"
        sentence = self.diagnosis.sentence if self.diagnosis else ""
        text = self.diagnosis.text if self.diagnosis else ""
        if self.stop_reason == "deadlock":
            head = f"{self.name} could never end: {sentence}"
            needed = "every rank of a group must reach each of its collectives"
            if self.diagnosis is not None and self.diagnosis.circle:
                needed = "ranks must come to the collectives and messages that they share in one order"
            return self._make(RankDeadlock, f"{head}\n{needed}; {freed}\n\n{text}")
        if self.stop_reason == "timeout":
            head = f"{self.name} was stopped after {self.timeout_s:g} s (timeout_s)" + (f": {sentence}" if sentence else "")
            return self._make(RankTimeout, f"{head}\n{freed}; give a larger timeout_s if it only needs longer\n\n{text}")
        if self.stop_reason == "interrupt":
            head = f"{self.name} was interrupted" + (f": {sentence}" if sentence else "")
            return self._make(RankInterrupted, f"{head}\n{freed}\n\n{text}")
        return None

    def _failed(self, error: CellError, rank: int, raised: Sequence[tuple[CellError, int]]) -> RankError:
        others = [f"  rank {r}: {e.kind}: {e.message.splitlines()[0] if e.message else ''}" for e, r in raised if r != rank]
        freed = [r for r, d in self.done.items() if d.outcome is Outcome.FREED]
        lines = [f"rank {rank} of {self.world_size} failed in {self.name}: {error.kind}: {error.message}", *others]
        if freed:
            lines.append(f"  {name_ranks(freed)} {'was' if len(freed) == 1 else 'were'} freed; names are kept")
        text = "\n".join([*lines, *self.notes, "", error.traceback])
        made = self._make(RankFailed, text, rank=rank, rank_traceback=error.traceback)
        made.locals = dict(error.names)
        return made

    def _of_death(self, error: RankError) -> RankError:
        made = self._make(RankFailed, "\n".join([str(error), *self.notes]), rank=error.rank)
        made.exit_code, made.signal_name = error.exit_code, error.signal_name
        return made

    def _make(self, kind: type[RankError], text: str, rank: int | None = None, rank_traceback: str = "") -> RankError:
        if self.notes and kind is not RankFailed:
            text += "\n" + "\n".join(self.notes)
        made = kind(text.rstrip(), rank=rank, world_size=self.world_size, rank_traceback=rank_traceback, diagnosis=self.diagnosis)
        made.tape = self.tape
        return made


class CellHandle:
    """A cell that runs beside the driver."""

    def __init__(self, cell: ActiveCell, stop: Callable[[ActiveCell], None]) -> None:
        self._cell = cell
        self._stop = stop

    @property
    def number(self) -> int:
        return self._cell.number

    @property
    def name(self) -> str:
        """How errors and diagnoses call it."""
        return self._cell.name

    @property
    def status(self) -> str:
        """What it does, in one line."""
        if self.done():
            return f"{self._cell.name}: done"
        pending = sorted(self._cell.pending)
        what = f"waits for {name_ranks(pending)}" if pending else "the ranks form their groups again"
        return f"{self._cell.name}: {time.monotonic() - self._cell.started_s:.0f} s, {what}"

    def outputs(self) -> CellResult:
        """What the ranks have given; also of a cell that failed."""
        return self._cell.result()

    def done(self) -> bool:
        """Whether every rank has finished and the group stands."""
        return self._cell.finished.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait, at most `timeout_s`; True when it is done."""
        return self._cell.finished.wait(timeout_s)

    def result(self, timeout_s: float | None = None) -> Any:
        """What `execute` or `run` would have returned.

        Raises:
            TimeoutError: the cell still runs after `timeout_s`; it goes on.
            RankError: as `execute` and `run`.
        """
        if not self._cell.finished.wait(timeout_s):
            raise TimeoutError(f"{self._cell.name} still runs after {timeout_s} s; cancel() stops it")
        error = self._cell.error()
        if error is not None or self._cell.task is not Task.SOURCE:
            self._cell.print_output()
        if error is not None:
            raise error
        return self._cell.result() if self._cell.task is Task.SOURCE else self._cell.returned()

    def cancel(self) -> None:
        """Stop the cell: every rank is freed within a second."""
        if not self.done():
            self._stop(self._cell)

    def __repr__(self) -> str:
        return f"<{self._cell.name}: {'done' if self.done() else 'running'}>"
