"""The thread that keeps a cluster: reads channels and output, watches the cell that runs, frees ranks that can get no further.

    channels, pipes --> conductor --> ActiveCell (outputs, values, errors)
                           |  every tick: failure? death? certain deadlock? time over?  ->  stop
    stop:  look (who is where)  ->  board: waits end  ->  signal  ->  shut gloo connections  ->  kill   (each later, and only if still
        needed)
    when all have answered: where gloo connections were shut, all ranks form the next generation

Knows links, the board and one active cell. Does not know notebooks, what layouts mean or what cells are for.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from workbench.errors import LaunchError, RankError, RankFailed
from workbench.plan.layout import Layout
from workbench.ranks.asking import Asker
from workbench.ranks.board import AreaState, Board
from workbench.ranks.channel import Packed
from workbench.ranks.diagnosis import Scene, diagnose
from workbench.ranks.handle import ActiveCell, StopReason
from workbench.ranks.link import Link
from workbench.ranks.messages import (
    ANY_SOURCE,
    Abandon,
    Answer,
    CellDone,
    Free,
    GroupFormed,
    Look,
    Mark,
    Outcome,
    Parted,
    Ready,
    Rebuild,
    Rebuilt,
    RunCell,
    Seen,
)
from workbench.ranks.outside import NativeLook, ProcessLook, look_at
from workbench.ranks.servers import describe_exit
from workbench.records import Diagnosis

__all__ = ["Conductor"]

_TICK_S = 0.05  # between two looks at a cell that runs: each costs the ranks a part of the cores
_STOP_TICK_S = 0.02  # and at one that ends
_LOOK_LIMIT_S = 0.3  # how long ranks may take to say where they are before a stop
_SETTLE_S = 0.25  # how long a deadlock may take to become complete before it is told
_LONG_WAIT_S = 0.1  # shorter waits are no reason to look for a circle
_CHECK_SHARE = 20  # looking for deadlocks takes at most one part in so many of this thread's time
_CALLED_OFF_S = 1.0  # until the next look after a deadlock that was none
_NATIVE_AFTER_S = 0.15  # a rank that has not said where it is by then lets no other thread run: py-spy may tell
_GRACE_S = {"failure": 1.0, "deadlock": 0.15, "timeout": 0.0, "interrupt": 0.0}  # for ranks that are not stuck to end by themselves
_SIGNAL_AGAIN_S = 0.6  # a signal that comes just before a system call begins, after Python last looked for one, is not heard
_SHUT_AFTER_S = 0.3  # after the signal: a rank that has not answered waits in native code, perhaps in gloo
_KILL_AFTER_S = 5.0
_KILL_HURRIED_S = 1.0  # the same, once the user has asked twice; ranks that only have not answered yet keep their names
_TELL_LIMIT_S = 10.0  # for this thread to come to what another asked it for; it takes milliseconds, or it has ended
_PART_LIMIT_S = 10.0  # for a rank to let its old groups go, when the next generation is formed
_PART_HURRIED_S = 1.0  # the same, once the user has asked twice
_SHOWN_FRAMES = 5  # of the stack of a rank that had to be killed


class Conductor:
    """Owns the links of one cluster; all public methods may be called from any thread."""

    def __init__(self, links: list[Link], board: Board, start: Callable[[int, int], None], on_mark: Callable[[str, float], None]) -> None:
        """`start` puts a fresh process in the place of a dead rank, as (rank, generation)."""
        self.links = links
        self.board = board
        self.generation = 0
        self.layout: Layout | None = None  # in use since `cluster.use`; each generation and fresh ranks form its groups
        self.groups: dict[int, GroupFormed] = {}
        self.last_diagnosis: Diagnosis | None = None
        self.active: ActiveCell | None = None
        self.asker = Asker(lambda rank, question: self._later(lambda: self._send(self.links[rank], question)))
        self.changed = threading.Condition()
        self._start = start
        self._on_mark = on_mark
        self._seen: dict[int, Seen] = {}
        self._looked: dict[int, Seen] = {}  # by ticket, below 0: what one rank was asked beside any stop
        self._tickets = itertools.count(-1, -1)
        self._ticket = 0
        self._rebuilding: set[int] | None = None
        self._lingering: set[int] = set()  # of those, who have not let their old groups go
        self._ended: set[int] = set()  # for that, by us
        self._forming_since_s = 0.0
        self.rebuild_errors: dict[int, str] = {}
        self.formation_error: RankError | None = None  # who died while the present generation was formed
        self._stop_stage: set[str] = set()
        self._num_signals = 0  # that this stop has sent to each rank
        self.on_ended: list[Callable[[ActiveCell], None]] = []  # told of each cell when all ranks have answered, before any is started anew
        self._next_check_s = 0.0
        self._natives: dict[int, NativeLook] = {}  # pid -> what py-spy says of it
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._waking = threading.Lock()
        self._todo: list[Callable[[], None]] = []
        self._is_closing = False
        for link in links:
            self._attach(link)
        self._thread = threading.Thread(target=self._loop, name="workbench-conductor", daemon=True)
        self._thread.start()

    # -- any thread ---------------------------------------------------------------------------------------------------------------------

    def begin(self, cell: ActiveCell, message: RunCell, value: Packed | None, values: dict[int, Packed] | None = None) -> None:
        """Send a cell to its members; `value` is the same for all, `values` one a rank."""
        if self._is_closing:
            cell.stop_reason = "closed"
            cell.finished.set()
            return
        self._later(lambda: self._begin(cell, message, value, values))

    def stop(self, cell: ActiveCell, reason: StopReason) -> None:
        """End a cell; a second stop while the first is under way has the last resort come sooner."""
        self._later(lambda: self._stop(cell, reason))

    def replace(self, rank: int, old: Link, link: Link) -> None:
        """Listen to a fresh link in place of a dead rank's; the caller puts it in `links`."""

        def put() -> None:
            self._detach(old)
            old.close()
            self._attach(link)

        self._later(put)

    def begin_generation(self, generation: int, fresh: set[int]) -> None:
        """Have all ranks but the fresh ones form a generation; they report Rebuilt, fresh ones Ready. When it returns, they were told."""
        told = threading.Event()

        def tell() -> None:
            self._begin_generation(generation, fresh)
            told.set()

        self._later(tell)
        told.wait(_TELL_LIMIT_S)

    @property
    def lost_ranks(self) -> set[int]:
        """Those that are dead, or never came as far as a generation."""
        return {link.rank for link in self.links if link.is_dead or not link.is_ready or link.startup_error}

    @property
    def is_rebuilding(self) -> bool:
        return bool(self._rebuilding)

    def diagnose(self, *, native: bool | None = None) -> Diagnosis:
        """Ask the ranks where they are, wait a little for the answers, and read the board.

        Args:
            native: read native stacks too: True of every rank that runs, None of those that do not answer, False of none.
        """
        cell = self.active
        if cell is None:
            return Diagnosis(sentence="no cell runs; every rank is idle")
        if native:
            self._natives = {self.links[rank].pid: NativeLook(self.links[rank].pid) for rank in cell.pending}
        self._later(lambda: self._look(cell))
        limit = time.monotonic() + _LOOK_LIMIT_S
        with self.changed:
            while time.monotonic() < limit and not cell.pending <= set(self._seen):
                self.changed.wait(0.02)
        if native is not False:
            self._read_natives(cell)
        for look in list(self._natives.values()):
            look.wait()
        return self._diagnosis(cell, is_told=True)

    def look(self, rank: int, limit_s: float = 2.0) -> Seen | None:
        """Ask one rank where it is and what its frames hold; None where it does not answer."""
        ticket = next(self._tickets)
        self._later(lambda: self._send(self.links[rank], Look(ticket=ticket, with_names=True)))
        limit = time.monotonic() + limit_s
        with self.changed:
            while ticket not in self._looked and time.monotonic() < limit:
                self.changed.wait(0.02)
        return self._looked.pop(ticket, None)

    def abandon(self) -> None:
        """The cluster is being closed: whoever waits for a cell is told so."""
        if threading.current_thread() is self._thread:
            self._abandon()
        else:
            self._later(self._abandon)

    def exited(self, link: Link, status: int) -> None:
        """A rank's process ended; called by the server's thread."""
        self._later(lambda: self._died(link, status))

    def close(self) -> None:
        """End the thread and close every link; ranks end by themselves."""
        self._is_closing = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)

    # -- the thread ---------------------------------------------------------------------------------------------------------------------

    def _later(self, call: Callable[[], None]) -> None:
        self._todo.append(call)
        self._wake()

    def _wake(self) -> None:
        with self._waking, contextlib.suppress(OSError):
            os.write(self._wake_write, b"x")

    def _attach(self, link: Link) -> None:
        self._selector.register(link.sock, selectors.EVENT_READ, (link, self._read_channel))
        self._selector.register(link.out.reading, selectors.EVENT_READ, (link, self._read_output))
        self._selector.register(link.err.reading, selectors.EVENT_READ, (link, self._read_output))

    def _detach(self, link: Link) -> None:
        for source in (link.sock, link.out.reading, link.err.reading):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(source)

    def _loop(self) -> None:
        try:
            while not self._is_closing:
                self._turn()
        finally:  # a bug of ours that ends this thread ends the cell too: nobody waits for ever
            self._leave()

    def _turn(self) -> None:
        pause_s = 0.5 if self.active is None else _TICK_S if self.active.stop_reason is None else _STOP_TICK_S
        for key, events in self._selector.select(pause_s):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
            else:
                link, handle = key.data
                handle(link, key.fd, events)
        while self._todo:
            self._todo.pop(0)()
        if self._lingering:
            self._hasten()
        if self.active is not None:
            self._tick(self.active)

    def _leave(self) -> None:
        self._is_closing = True
        self._abandon()
        for link in self.links:
            self._detach(link)
            link.close()
        self._selector.close()
        with self._waking:  # a later wake must not write to whatever is given these numbers next
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1

    def _abandon(self) -> None:
        cell = self.active
        if cell is not None:
            cell.stop_reason, self.active = "closed", None
            cell.finished.set()

    def _begin_generation(self, generation: int, fresh: set[int]) -> None:
        if self._rebuilding:
            self._let_go()  # the one before never came to be, and who waits in it would not come to this one
        self.generation = generation
        self.groups = {key: group for key, group in self.groups.items() if group.outlives_generations}
        self.rebuild_errors, self.formation_error = {}, None
        self._rebuilding = {link.rank for link in self.links if not link.is_dead and link.rank not in fresh}
        self._lingering, self._ended, self._forming_since_s = set(self._rebuilding), set(), time.monotonic()
        for rank in self._rebuilding:
            self._send(self.links[rank], Rebuild(generation=generation, layout=self.layout))
            self._let_go_on(rank)
        for link in self.links:
            if link.is_dead and link.rank not in fresh:
                self._abandon_generation(link)

    def _let_go_on(self, rank: int) -> None:
        """Wake a rank that is paused."""
        if (look := self._natives.get(self.links[rank].pid)) is not None:
            look.is_to_go_on = True
        self.links[rank].signal(signal.SIGCONT)

    def _hasten(self) -> None:
        """Wake ranks that were paused meanwhile, and end those that do not come out of their old groups: all others would wait for them."""
        for rank in self._lingering:
            self._let_go_on(rank)
        is_hurried = self.active is not None and "hurry" in self._stop_stage
        if time.monotonic() - self._forming_since_s < (_PART_HURRIED_S if is_hurried else _PART_LIMIT_S):
            return
        for rank in self._lingering - self._ended:
            self._ended.add(rank)
            self.links[rank].signal(signal.SIGKILL)

    @property
    def _is_forming(self) -> bool:
        """Whether ranks wait for each other to form a later generation than the first."""
        return self._rebuilding is not None and (bool(self._rebuilding) or any(not link.is_ready for link in self.links))

    def _abandon_generation(self, link: Link) -> None:
        """A rank died that was to form the generation: let the others go, who would wait for it."""
        code, name, how = link.describe_death()
        if link.rank in self._ended:
            waited_s = time.monotonic() - self._forming_since_s
            how = f"it was ended, because it had not left its old process groups after {waited_s:.0f} s; {how}"
        self.formation_error = RankFailed(
            f"rank {link.rank} of {len(self.links)} died while the ranks formed generation {self.generation}: {how}\n"
            "the other ranks keep their names, but have no process group until it is back\n"
            f"cluster.respawn({link.rank}) brings it back, cluster.restart() starts all afresh",
            rank=link.rank,
            world_size=len(self.links),
            exit_code=code,
            signal_name=name,
        )
        self._rebuilding, self._lingering = set(), set()
        self._let_go()

    def _let_go(self) -> None:
        """Have the ranks leave the generation that they form."""
        for link in self.links:
            if not link.is_dead:
                self._send(link, Abandon(generation=self.generation))

    def _begin(self, cell: ActiveCell, message: RunCell, value: Packed | None, values: dict[int, Packed] | None) -> None:
        self._stop_stage, self._num_signals, self._seen, self._natives = set(), 0, {}, {}
        self.active = cell  # what threads or processes of an earlier cell wrote meanwhile comes with this one
        for rank in cell.members:
            if self.links[rank].is_dead:
                self._died(self.links[rank], self.links[rank].exit_status or 0)
            else:
                self._send(self.links[rank], message, values[rank] if values is not None else value)

    def _send(self, link: Link, message: Any, value: Packed | None = None) -> None:
        try:
            if not link.writer.send(message, value):
                self._selector.modify(link.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, (link, self._read_channel))
        except (BrokenPipeError, ConnectionError, OSError):
            return  # it died: its exit is told by the server

    def _read_channel(self, link: Link, fd: int, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            with contextlib.suppress(OSError):
                if link.writer.flush():
                    self._selector.modify(link.sock, selectors.EVENT_READ, (link, self._read_channel))
        if events & selectors.EVENT_READ:
            messages = link.reader.read()
            if messages is None:
                self._selector.unregister(link.sock)
                return
            for message, value in messages:
                self._take(link, message, value)
            with self.changed:
                self.changed.notify_all()

    def _read_output(self, link: Link, fd: int, events: int) -> None:
        pipe, name = (link.out, "stdout") if fd == link.out.reading else (link.err, "stderr")
        if not pipe.drain(self._streamer(link.rank, name)):
            self._selector.unregister(fd)

    def _streamer(self, rank: int, name: str) -> Callable[[str], None] | None:
        cell = self.active
        if cell is None or cell.on_output is None:
            return None
        show = cell.on_output

        def tell(text: str) -> None:
            try:
                show(rank, name, text)
            except Exception as error:  # the caller's own; this thread must live
                cell.on_output = None
                cell.notes.append(f"on_output raised {type(error).__name__}: {error}; it was not called again")

        return tell

    def _drain(self, link: Link) -> None:
        link.out.drain(self._streamer(link.rank, "stdout"))
        link.err.drain(self._streamer(link.rank, "stderr"))

    def _take(self, link: Link, message: Any, value: Packed | None) -> None:
        if isinstance(message, CellDone):
            self._done(link, message, value)
        elif isinstance(message, GroupFormed):
            self.groups[message.key] = message
        elif isinstance(message, Seen):
            if message.ticket == self._ticket:
                self._seen[link.rank] = message
            elif message.ticket < 0:
                self._looked[message.ticket] = message
        elif isinstance(message, Answer):
            self.asker.take(link.rank, message)
        elif isinstance(message, Rebuilt) and message.generation == self.generation:
            if message.error and self.formation_error is None:
                self.rebuild_errors[link.rank] = message.error
            if self._rebuilding is not None:
                self._rebuilding.discard(link.rank)
            self._lingering.discard(link.rank)
        elif isinstance(message, Parted) and message.generation == self.generation:
            self._lingering.discard(link.rank)
        elif isinstance(message, Ready) and link is self.links[link.rank]:
            link.is_ready, link.startup_error = True, message.error
        elif isinstance(message, Mark):
            self._on_mark(message.label, message.at_s)

    def _done(self, link: Link, message: CellDone, value: Packed | None) -> None:
        cell = self.active
        if cell is None or cell.number != message.cell:
            return
        self._collect(cell, link)
        cell.done[link.rank] = message
        cell.values[link.rank] = value
        if message.outcome is Outcome.RAISED and cell.stop_reason is None:
            self._stop(cell, "failure")
        self._tick(cell)

    def _collect(self, cell: ActiveCell, link: Link) -> None:
        self._drain(link)
        cell.stdout[link.rank] = cell.stdout.get(link.rank, "") + link.out.take()
        cell.stderr[link.rank] = cell.stderr.get(link.rank, "") + link.err.take()

    def _died(self, link: Link, status: int) -> None:
        if link.exit_status is None:
            link.exit_status = status
            self._drain(link)
            while link.is_open and (messages := link.reader.read()):  # what it still had to say counts: why it could not join, say
                for message, value in messages:
                    self._take(link, message, value)
        cell = self.active
        if cell is not None and link.rank in cell.pending and link is self.links[link.rank]:
            self._collect(cell, link)
            cell.deaths[link.rank] = self._death(cell, link)
            cell.died_s[link.rank] = time.monotonic()
            if cell.stop_reason is None:
                self._stop(cell, "failure")
        if link is self.links[link.rank] and self._is_forming and self.formation_error is None:
            self._abandon_generation(link)
        with self.changed:
            self.changed.notify_all()

    def _death(self, cell: ActiveCell, link: Link) -> RankError:
        code, name, how = link.describe_death()
        text = f"rank {link.rank} of {len(self.links)} died in {cell.name}: {how}"
        text += f"\nthe other ranks keep their names; cluster.respawn({link.rank}) brings it back, cluster.restart() starts all afresh"
        return RankFailed(text, rank=link.rank, world_size=len(self.links), exit_code=code, signal_name=name)

    # -- stopping -----------------------------------------------------------------------------------------------------------------------

    def _stop(self, cell: ActiveCell, reason: StopReason) -> None:
        if cell.finished.is_set() or cell is not self.active:
            return
        if cell.stop_reason is not None:
            if reason == "interrupt" and (self._lingering or "asked" in self._stop_stage or cell.stop_reason in ("interrupt", "timeout")):
                self._stop_stage.add("hurry")
            elif reason == "interrupt":
                self._stop_stage.add("asked")
                cell.stopped_s = min(cell.stopped_s, time.monotonic() - _GRACE_S["failure"])
            return
        cell.stop_reason, cell.stopped_s = reason, time.monotonic()
        self._look(cell)

    def _look(self, cell: ActiveCell) -> None:
        self._ticket += 1
        self._seen = {}
        for rank in cell.pending:
            self._send(self.links[rank], Look(ticket=self._ticket))

    def _read_natives(self, cell: ActiveCell) -> None:
        """Begin to read the stacks of ranks that do not answer."""
        for rank in cell.pending - set(self._seen):
            pid = self.links[rank].pid
            if pid not in self._natives:
                self._natives[pid] = NativeLook(pid)

    def _diagnosis(self, cell: ActiveCell, *, is_told: bool = False) -> Diagnosis:
        """Who waits for whom; with `is_told` also how the system sees the ranks' processes."""
        dead = {link.rank: describe_exit(link.exit_status)[1] or "ended" for link in self.links if link.exit_status is not None}
        scene = Scene(
            cell=cell.number,
            members=frozenset(cell.members),
            finished=frozenset(cell.done),
            dead=dead,
            groups=dict(self.groups),
            seen=dict(self._seen),
            looks=self._looks(cell) if is_told else {},
            native={rank: look.text for rank in cell.pending if (look := self._natives.get(self.links[rank].pid)) and look.text},
        )
        return diagnose(self.board, scene)

    def _looks(self, cell: ActiveCell) -> dict[int, ProcessLook]:
        pids = {rank: self.links[rank].pid for rank in sorted(cell.pending)}
        natives = {rank: look for rank, pid in pids.items() if (look := self._natives.get(pid)) and look.is_reading}
        looks = {rank: natives[rank].before if rank in natives else look_at(pid) for rank, pid in pids.items()}
        return {rank: look for rank, look in looks.items() if look is not None}

    def _tick(self, cell: ActiveCell) -> None:
        now = time.monotonic()
        if not cell.pending:
            self._conclude(cell)
        elif cell.stop_reason is None:
            if cell.timeout_s is not None and now - cell.started_s > cell.timeout_s:
                self._stop(cell, "timeout")
            elif self._is_deadlocked(cell, now):
                self._stop(cell, "deadlock")
        else:
            self._advance_stop(cell, now - cell.stopped_s)

    def _is_deadlocked(self, cell: ActiveCell, now: float) -> bool:
        """Whether some wait can never end; looked for only where that may be, and for a small part of the time."""
        is_anybody_gone = bool(cell.done) or len(cell.members) < len(self.links)
        if now < self._next_check_s or not (is_anybody_gone or self._do_waits_differ(cell)):
            return False
        is_certain = self._diagnosis(cell).is_certain_deadlock
        self._next_check_s = now + _CHECK_SHARE * (time.monotonic() - now)
        return is_certain

    def _do_waits_differ(self, cell: ActiveCell) -> bool:
        """Whether ranks have waited for a while in different places: a circle needs two."""
        waits = {self.board.waits_in(rank, longer_than_s=_LONG_WAIT_S) for rank in cell.pending}
        return len(waits - {None}) > 1

    def _call_off(self, cell: ActiveCell) -> None:
        """What looked like a deadlock has gone on, or may: another thread of a rank may come. Nothing was done to the ranks yet."""
        was_asked = "asked" in self._stop_stage
        cell.stop_reason, self._stop_stage = None, set()
        self._next_check_s = time.monotonic() + _CALLED_OFF_S
        if cell.deaths or any(done.outcome is Outcome.RAISED for done in cell.done.values()):
            self._stop(cell, "failure")
        elif was_asked:
            self._stop(cell, "interrupt")

    def _advance_stop(self, cell: ActiveCell, since_s: float) -> None:
        """Take the next step of a stop when its time has come; each step once."""
        assert cell.stop_reason is not None
        stages = self._stop_stage
        if "board" not in stages:
            if since_s < _LOOK_LIMIT_S and not cell.pending <= set(self._seen):
                if since_s > _NATIVE_AFTER_S:
                    self._read_natives(cell)
                return
            if cell.stop_reason == "deadlock" and since_s < _SETTLE_S and self._is_any_on_its_way(cell):
                return
            found = self._diagnosis(cell, is_told=True)
            if cell.stop_reason == "deadlock" and not found.is_certain_deadlock:
                self._call_off(cell)
                return
            cell.diagnosis = self.last_diagnosis = found
            stages.add("board")
            self.board.stop(cell.members, cell.number)
        after_grace_s = since_s - _GRACE_S[cell.stop_reason]
        if after_grace_s >= _SIGNAL_AGAIN_S * self._num_signals:
            self._num_signals += 1
            for rank in cell.pending:
                self.links[rank].signal(signal.SIGINT)
                self._let_go_on(rank)  # a paused one hears nothing else
        if "shut" not in stages and (after_grace_s >= _SHUT_AFTER_S or (since_s >= _SHUT_AFTER_S and self._is_any_in_gloo(cell))):
            stages.add("shut")
            for rank in cell.pending:
                self._send(self.links[rank], Free(cell=cell.number))
        if after_grace_s >= (_KILL_HURRIED_S if "hurry" in stages else _KILL_AFTER_S):
            for rank in cell.pending - cell.killed:
                cell.killed.add(rank)
                look = self._natives.get(self.links[rank].pid)
                if look is not None and look.text:
                    cell.notes.append(f"rank {rank} was in, innermost first:\n  " + "\n  ".join(look.text.splitlines()[:_SHOWN_FRAMES]))
                self.links[rank].signal(signal.SIGKILL)

    def _is_any_on_its_way(self, cell: ActiveCell) -> bool:
        """Whether some rank is in no collective yet: it may be about to join those that wait, and belongs into the sentence then."""
        return any(self.board.read(rank).state is AreaState.NOWHERE for rank in cell.pending)

    def _is_any_in_gloo(self, cell: ActiveCell) -> bool:
        return any(self.board.read(rank).state in (AreaState.IN_GLOO, AreaState.LIMITED) for rank in cell.pending)

    def _conclude(self, cell: ActiveCell) -> None:
        """All members have answered: form the next generation if connections were shut, then let the caller go on."""
        if self._rebuilding:
            return
        stages = self._stop_stage
        if "told" not in stages:
            stages.add("told")
            self._tell_ended(cell)
        if "rebuild" not in stages:
            # a rank may have been told to shut its connections just when it had finished
            is_broken = "shut" in stages or any(done.is_group_broken for done in cell.done.values()) or bool(cell.deaths)
            is_broken = is_broken or (cell.stop_reason is not None and self._is_uneven())
            dead = {link.rank for link in self.links if link.is_dead}
            if is_broken and dead <= cell.killed:
                stages.add("rebuild")
                self._begin_generation(self.generation + 1, dead)
                self._revive(cell, dead)
                return
        if not all(self.links[rank].is_ready or self.links[rank].is_dead for rank in cell.killed):
            return
        cell.notes += [
            f"rank {rank} could not be started again: {error}" for rank in sorted(cell.killed) if (error := self.links[rank].startup_error)
        ]
        if self.formation_error is not None and "rebuild" in stages:
            cell.notes.append(str(self.formation_error))
        elif "rebuild" in stages:
            cell.notes.append(
                f"the stop closed gloo connections: the ranks now form generation {self.generation}; "
                "groups, DDP models and in-rank engines of your own from before it must be made again"
            )
        cell.notes += [f"rank {rank} could not join generation {self.generation}: {text}" for rank, text in self.rebuild_errors.items()]
        self.active = None
        cell.finished.set()
        with self.changed:
            self.changed.notify_all()

    def _tell_ended(self, cell: ActiveCell) -> None:
        for tell in self.on_ended:
            try:
                tell(cell)
            except Exception as error:  # this thread must live
                cell.notes.append(f"{type(error).__name__} while the cell was kept: {error}")

    def _is_uneven(self) -> bool:
        """Whether some members of a group have begun calls that others never will: asynchronous ones, when a stop came in between.

        gloo holds on to those, and the next call of the others would meet them.
        """
        for key, group in self.groups.items():
            if group.outlives_generations:
                continue
            if not group.name.startswith(ANY_SOURCE) and len({self.board.count(rank, key) for rank in group.ranks}) > 1:
                return True
        return False

    def _revive(self, cell: ActiveCell, dead: set[int]) -> None:
        """Start those that this stop had to kill afresh, and say so."""
        for rank in sorted(dead):
            cell.notes.append(
                f"rank {rank} did not heed the stop for {_KILL_AFTER_S:.0f} s or was stopped twice (code that never returns, or swallows "
                "KeyboardInterrupt): it was killed and started afresh, empty; the other ranks keep their names"
            )
            with contextlib.suppress(LaunchError):  # it is told as one that could not be started
                self._start(rank, self.generation)
