"""A cluster to watch: a tile a rank, who waits for whom, memory over time; it moves while a cell blocks and while ranks are stuck."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from workbench.errors import ClusterClosed
from workbench.frames import memory_frame, timeline_frame
from workbench.records import ClusterSnapshot, Diagnosis, Span
from workbench.view.given import check_given
from workbench.view.memory import plot_memory
from workbench.view.memory_history import MemoryHistory
from workbench.view.moving import MovingWidget, read_scripts
from workbench.view.stacked import stacked_axes
from workbench.view.style import SPAN_STYLES, alt_text, figure_png
from workbench.view.tiles import plot_tiles, tiles_height

__all__ = ["LivePanel", "live"]

MIB = 2**20
MAX_EVENTS = 400


class Looks(Protocol):
    """Gives a snapshot a call."""

    def look(self) -> ClusterSnapshot: ...


class WatchedCluster(Protocol):
    """What a cluster is to this widget."""

    @property
    def world_size(self) -> int: ...

    @property
    def is_closed(self) -> bool: ...

    def observe(self) -> Looks: ...

    def own_view(self, close: Callable[[], None]) -> None: ...

    def interrupt(self) -> None: ...

    def diagnose(self) -> Diagnosis: ...

    def respawn(self, rank: int) -> None: ...


class LivePanel(MovingWidget):
    """The widget; make it with `live`. It holds the cluster weakly: letting go of a cluster still ends it, and this panel with it.

    Attributes:
        snapshot: what it shows.
        told: the answer to the last button, "" before the first.
    """

    _esm = read_scripts("chart.js", "live_panel.js")
    _css = Path(__file__).parent / "chart.css"

    def __init__(self, cluster: WatchedCluster) -> None:
        if cluster.is_closed:
            raise ClusterClosed("the cluster is closed: there is nothing to watch\nstart another: cluster = wb.launch(...)")
        self._cluster = weakref.ref(cluster)
        self._observer = cluster.observe()
        self.snapshot = self._observer.look()
        self.told = ""
        self._start_s = self.snapshot.time_s
        self._memory = MemoryHistory(start_s=self._start_s, num_ranks=cluster.world_size)
        self._memory.add(self.snapshot.memory)
        self._events: list[Span] = []
        self._asleep: list[list[float]] = []
        super().__init__()
        cluster.own_view(self.close)

    def news(self) -> dict[str, Any]:
        before, snapshot = self.snapshot, self._observer.look()
        self.snapshot = snapshot
        if snapshot.cell and snapshot.cell != before.cell:
            self.told = ""  # of an earlier cell
        self._events = [*self._events, *snapshot.events][-MAX_EVENTS:]
        self._follow_sleep(snapshot)
        self._is_ending = self._is_ending or snapshot.is_closed
        return {**self._now(), "memory": self._memory.add(snapshot.memory), "events": self._named(snapshot.events)}

    def everything(self) -> dict[str, Any]:
        return {
            **self._now(),
            "layers": self._memory.layers(),
            "memory": self._memory.points(),
            "events": self._named(self._events),
            "looks": {name: list(look) for name, look in SPAN_STYLES.items()},
        }

    def picture(self) -> tuple[bytes, str]:
        figure, (above, below) = stacked_axes([tiles_height(self.snapshot), 3.2])
        plot_tiles(self.snapshot, above)
        spans = timeline_frame(self._events, start_s=self._start_s)
        plot_memory(memory_frame(self._memory.samples, start_s=self._start_s), below, timeline=spans)
        below.set_xlabel("seconds since the panel was made")
        return figure_png(figure), f"{alt_text(above)}\n{alt_text(below)}"

    def asked(self, content: dict[str, Any]) -> None:
        """Do what a button asks for, beside the main thread: a respawn takes a second."""
        acts = {"interrupt": self._interrupt, "diagnose": self._diagnose, "respawn": self._respawn}
        if content.get("act") in acts:
            threading.Thread(target=self._act, args=(acts[content["act"]],), name="workbench-view-act", daemon=True).start()

    def _act(self, act: Any) -> None:
        cluster = self._cluster()
        try:
            self.told = "the cluster is gone" if cluster is None else act(cluster)
        except Exception as error:  # an exception of a callback is shown nowhere in a notebook: the page says it
            self.told = f"{type(error).__name__}: {error}"
        self.send({"news": {"told": self.told}})

    def _interrupt(self, cluster: WatchedCluster) -> str:
        cell = self._observer.look().cell
        cluster.interrupt()
        return f"asked {cell} to stop" if cell else "no cell runs: there is nothing to stop"

    def _diagnose(self, cluster: WatchedCluster) -> str:
        return cluster.diagnose().text

    def _respawn(self, cluster: WatchedCluster) -> str:
        dead = [status.rank for status in self.snapshot.ranks if status.state.is_terminal()]
        if not dead:
            return "no rank is dead"
        cluster.respawn(dead[0])  # brings back all that are dead
        return f"started afresh, empty: {', '.join(f'rank {rank}' for rank in dead)}"

    def _now(self) -> dict[str, Any]:
        snapshot = self.snapshot
        held = {sample.rank: sample.pss_bytes or sample.rss_bytes for sample in snapshot.memory if sample.process == "rank"}
        return {
            "t": round(snapshot.time_s - self._start_s, 2),
            "generation": snapshot.generation,
            "cell": snapshot.cell,
            "cell_s": round(snapshot.cell_s, 1),
            "ranks": [[s.state, s.cell, s.waits_in, round(s.waits_s, 1), round(held.get(s.rank, 0) / MIB, 1)] for s in snapshot.ranks],
            "engines": [[engine.name, engine.status, engine.phase] for engine in snapshot.engines],
            "waits": _waits(snapshot.diagnosis),
            "asleep": self._asleep,
            "told": self.told,
            "can_act": self.can_act,
            "is_closed": self._is_ending,
        }

    def _named(self, events: Any) -> list[tuple[float, str]]:
        return [(round(event.start_s - self._start_s, 2), event.label or event.span) for event in events]

    def _follow_sleep(self, snapshot: ClusterSnapshot) -> None:
        """Stretches in which every engine sleeps, as it is seen."""
        now_s = round(snapshot.time_s - self._start_s, 2)
        is_asleep = bool(snapshot.engines) and all(engine.status in ("asleep", "weights_only") for engine in snapshot.engines)
        was_asleep = bool(self._asleep) and self._asleep[-1][2] == 1.0
        if was_asleep:
            self._asleep[-1][1:] = [now_s, float(is_asleep)]
        elif is_asleep:
            self._asleep = [*self._asleep[-MAX_EVENTS:], [now_s, now_s, 1.0]]


def live(cluster: WatchedCluster) -> LivePanel:
    """Watch a cluster 5 times a second: ranks, who waits for whom once a wait passes 2 s, memory of every process, engines.

    It moves also while a cell blocks the kernel. Its buttons reach the kernel only between cells and beside `--bg` cells; the stop button
    of the notebook always does. It ends with the cluster and leaves its last picture.

    Raises:
        ClusterClosed: there is nothing to watch.
        TypeError: it is no cluster.
    """
    check_given("live", cluster, "observe", needed="a cluster that is up: what wb.launch gave")
    return LivePanel(cluster)


def _waits(diagnosis: Diagnosis | None) -> dict[str, Any]:
    """Who waits for whom, as plain JSON values; empty while no wait is long."""
    if diagnosis is None or not diagnosis.waiting:
        return {}
    waiting = [
        [w.rank, list(w.missing), f"{w.op} #{w.sequence} of {w.group}", f"line {w.line}: {w.source}" if w.line else ""]
        for w in diagnosis.waiting.values()
    ]
    missing = [[a.rank, a.cause, a.where] for a in diagnosis.missing.values()]
    return {"sentence": diagnosis.sentence, "waiting": waiting, "missing": missing, "is_certain": diagnosis.is_certain_deadlock}
