"""Looks at a cluster from outside, as often as a live view wants, also while every rank is stuck; no rank is asked anything.

    links, board, /proc, engines --(look)--> ClusterSnapshot

Knows processes, the board and whatever says what it does (`Observed`). Does not know who looks, nor the `Cluster`: letting go of one still
ends it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import psutil

from workbench.ranks.memory import MemorySampler
from workbench.records import ClusterSnapshot, Diagnosis, EngineNow, MemorySample, RankState, RankStatus, Span

if TYPE_CHECKING:
    from workbench.ranks.handle import ActiveCell
    from workbench.ranks.processes import Processes

__all__ = ["Observed", "Observer", "rank_status", "read_memory"]

DIAGNOSE_AFTER_S = 2.0  # a wait that has lasted so long is looked into
_DIAGNOSE_EVERY_S = 1.0


class Observed(Protocol):
    """What belongs to a cluster and is shown beside its ranks: an engine."""

    def now(self) -> EngineNow | None: ...

    def events_since(self, time_s: float) -> list[Span]: ...

    def ranks_and_pids(self) -> list[tuple[int, int]]: ...


def read_memory(pid: int) -> tuple[int, int]:
    """Resident and private memory of a process, bytes; zeros where it is gone."""
    with contextlib.suppress(psutil.Error):
        memory = psutil.Process(pid).memory_full_info()
        return memory.rss, memory.uss
    return 0, 0


def rank_status(processes: Processes, rank: int, cell: ActiveCell | None, memory: tuple[int, int]) -> RankStatus:
    """One rank as its link and the board show it; `memory` is its resident and its private memory."""
    link = processes.links[rank]
    is_running = cell is not None and rank in cell.pending
    waits_in, waits_s = "", 0.0
    if is_running and cell is not None:
        posted = processes.conductor.board.read(rank)
        if posted.state and posted.cell == cell.number:
            group = processes.conductor.groups.get(posted.key)
            waits_in = f"{posted.place.text.partition('(')[0]} #{posted.sequence} of {group.name if group else '?'}"
            waits_s = max(0.0, time.monotonic() - posted.since_s)
    return RankStatus(
        rank=rank,
        pid=link.pid,
        state=RankState.DEAD if link.is_dead else RankState.RUNNING if is_running else RankState.IDLE,
        cell=cell.number if is_running and cell is not None else None,
        rss_bytes=memory[0],
        private_bytes=memory[1],
        waits_in=waits_in,
        waits_s=waits_s,
    )


class Observer:
    """Made by `cluster.observe()`; each `look` is a snapshot. One thread looks at a time."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._sampler = MemorySampler()
        self._sampler.watch(os.getpid(), "driver")
        self._watched: Mapping[int, tuple[str, int]] = {}
        self._looked_s = time.monotonic()
        self._diagnosis: Diagnosis | None = None
        self._diagnosed_s = 0.0
        self._is_diagnosing = False

    def look(self) -> ClusterSnapshot:
        """The cluster now; events are those since the last look."""
        processes, now_s = self._processes, time.monotonic()
        cell = processes.conductor.active
        engines = [(one, state) for one in list(processes.observed) if (state := one.now()) is not None]
        self._watch([one for one, _ in engines])
        memory = tuple(self._sampler.read())
        ranks = tuple(rank_status(processes, rank, cell, (_rss_of(memory, rank), 0)) for rank in range(processes.world_size))
        events = [mark for mark in self._marks() if mark.start_s > self._looked_s]
        events += [event for one, _ in engines for event in one.events_since(self._looked_s)]
        self._looked_s = now_s
        return ClusterSnapshot(
            time_s=now_s,
            generation=processes.conductor.generation,
            cell=cell.name if cell else "",
            cell_s=now_s - cell.started_s if cell else 0.0,
            ranks=ranks,
            diagnosis=self._diagnose(cell, max((status.waits_s for status in ranks), default=0.0)),
            engines=tuple(state for _, state in engines),
            memory=memory,
            events=tuple(sorted((event for event in events if event.start_s <= now_s), key=lambda event: event.start_s)),
            is_closed=processes.is_closed,
        )

    def _watch(self, engines: list[Observed]) -> None:
        """Follow processes as they come and go."""
        present = {link.pid: ("rank", link.rank) for link in self._processes.links if link.pid and not link.is_dead}
        present |= {pid: ("engine", rank) for one in engines for rank, pid in one.ranks_and_pids()}
        for pid in set(self._watched) - set(present):
            self._sampler.unwatch(pid)
        for pid in set(present) - set(self._watched):
            name, rank = present[pid]
            self._sampler.watch(pid, name, rank=rank)
        self._watched = present

    def _marks(self) -> list[Span]:
        return [Span(step=-1, rank=-1, span="mark", start_s=at_s, end_s=at_s, label=label) for at_s, label in list(self._processes.marks)]

    def _diagnose(self, cell: ActiveCell | None, longest_s: float) -> Diagnosis | None:
        """The latest diagnosis while a wait lasts; made beside the looks, since ranks are given time to say where they are."""
        if cell is None or longest_s < DIAGNOSE_AFTER_S:
            self._diagnosis = None
            return None
        is_due = time.monotonic() - self._diagnosed_s > _DIAGNOSE_EVERY_S
        if is_due and not self._is_diagnosing and cell.stop_reason is None and not self._processes.is_closed:
            self._is_diagnosing = True
            threading.Thread(target=self._ask, name="workbench-diagnose", daemon=True).start()
        return self._diagnosis

    def _ask(self) -> None:
        try:
            self._diagnosis = self._processes.conductor.diagnose()
        finally:
            self._diagnosed_s = time.monotonic()
            self._is_diagnosing = False


def _rss_of(memory: tuple[MemorySample, ...], rank: int) -> int:
    return next((sample.rss_bytes for sample in memory if sample.process == "rank" and sample.rank == rank), 0)
