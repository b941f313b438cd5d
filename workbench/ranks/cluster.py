"""`Cluster`: N gloo ranks that live between cells, as the notebook holds them.

    Cluster (this file: what one may ask) -> Conductor (the thread that keeps it) -> Link (one rank) -> process

Knows cells, selectors and the layout in use. Does not know prompts, engines or notebooks' magics.
"""

from __future__ import annotations

import contextlib
import html
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from workbench.errors import ClusterBusy, ClusterClosed, LaunchError, RankFailed, RankInterrupted
from workbench.plan.layout import Layout
from workbench.plan.selector import Selector, select_ranks
from workbench.postponing import interrupts_postponed
from workbench.ranks.channel import Packed, pack
from workbench.ranks.door import Door
from workbench.ranks.failures import FailureKeeper
from workbench.ranks.faults import Fault, arm, check_faults, disarm
from workbench.ranks.handle import ActiveCell, CellHandle
from workbench.ranks.history import History
from workbench.ranks.ledger import ledger_frame, write_perfetto
from workbench.ranks.messages import Inquiry, RunCell, Seen, Task
from workbench.ranks.observer import Observed, Observer, rank_status, read_memory
from workbench.ranks.processes import Processes
from workbench.ranks.stragglers import Stragglers, find_stragglers
from workbench.records import CollectiveTrace, Diagnosis, RankStatus

if TYPE_CHECKING:
    import pandas as pd

    from workbench.ranks.reproduce import Reproduction

__all__ = ["Cluster"]

_PROGRESS_AFTER_S = 2.0
_STOP_LIMIT_S = 15.0
_RENEW_LIMIT_S = 5.0  # that an interrupt waits for fresh ranks, which takes a part of a second
_START_LIMIT_S = 120.0
_CLOSE_LIMIT_S = 10.0  # the same for what is closed: engines take their time


class Cluster:
    """Ranks of one world; made by `wb.launch`. `with` closes it, and so does letting go of it.

    Attributes:
        history: what was done with it since launch, for `save_session`.
        report: what `wb.reproduce`, which made it, found; None for any other cluster.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._conductor = processes.conductor
        self._layout = Layout(world_size=processes.world_size)
        self._cell_number = 0
        self._lock = threading.Lock()
        self._is_closed = False
        self._owned: list[Callable[[], None]] = []
        self._failures = FailureKeeper(processes.tape_folder)
        if processes.options.records_failures:
            self._conductor.on_ended.append(self._failures)
        self._taped: tuple[Path, set[int]] | None = None  # where tapes are kept, and the processes that keep them
        self.history = History()
        self.report: Reproduction | None = None
        self._conductor.on_ended.append(self.history.ended)
        self._owned.append(Door(processes.folder, self).close)
        self._views: list[Callable[[], None]] = []
        self._finalizer = weakref.finalize(self, _close, processes, self._owned, self._views)

    # -- what it is ---------------------------------------------------------------------------------------------------------------------

    @property
    def world_size(self) -> int:
        return self._processes.world_size

    @property
    def generation(self) -> int:
        """How many times the process group was formed anew since launch."""
        return self._conductor.generation

    @property
    def layout(self) -> Layout:
        """The layout in use; until `use` it is one flat axis."""
        return self._layout

    @property
    def folder(self) -> Path:
        """A private (0700) folder of this cluster, removed with it."""
        return self._processes.folder

    @property
    def store_port(self) -> int:
        """Port on 127.0.0.1 of the TCPStore that the driver serves."""
        return self._processes.store_port

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def last_diagnosis(self) -> Diagnosis | None:
        """Who waited for whom when a cell was last stopped."""
        return self._conductor.last_diagnosis

    @property
    def last_tape(self) -> Path | None:
        """Folder of the tapes of the last cell that failed, for `wb.replay`; kept with `launch(..., record="failures")`."""
        return self._failures.last

    @property
    def marks(self) -> list[tuple[float, str]]:
        """(monotonic time, label) of each `mark`, the ranks' too."""
        return self._processes.marks

    def mark(self, label: str) -> None:
        """Label this moment in the memory timeline; `wb.current().mark` does the same from a rank."""
        self._processes.marks.append((time.monotonic(), label))

    def pid(self, rank: int) -> int:
        return self._processes.links[self._rank(rank)].pid

    def _rank(self, rank: int) -> int:
        """A rank of this cluster; -1 is the last.

        Raises:
            ValueError: there is none of that number.
        """
        size = self.world_size
        if isinstance(rank, bool) or not isinstance(rank, Integral) or not -size <= rank < size:
            raise ValueError(f"there is no rank {rank!r} in this cluster\nranks run from 0 to {size - 1}\npass one of them, an int")
        return int(rank) % size

    def status(self) -> list[RankStatus]:
        """Every rank as seen from outside, also while all of them are stuck."""
        cell = self._conductor.active
        return [
            rank_status(self._processes, link.rank, cell, (0, 0) if link.is_dead else read_memory(link.pid))
            for link in self._processes.links
        ]

    def observe(self) -> Observer:
        """Looks at the ranks and engines from outside, cheaply and often: what `wb.view.live` reads."""
        return Observer(self._processes)

    def __repr__(self) -> str:
        if self._is_closed:
            return f"<Cluster of {self.world_size} ranks: closed>"
        dead = [link.rank for link in self._processes.links if link.is_dead]
        cell = self._conductor.active
        state = f"{cell.name} runs" if cell else "idle"
        return f"<Cluster of {self.world_size} ranks: {state}, generation {self.generation}" + (f", dead: {dead}>" if dead else ">")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a cluster stays in the process that launched it; on ranks wb.current() has rank, world_size and group")

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{s.rank}</td><td>{s.pid}</td><td>{s.state}</td><td>{'' if s.cell is None else s.cell}</td>"
            f"<td>{html.escape(s.waits_in)}</td><td style='text-align:right'>{s.rss_bytes / 2**20:.0f}</td>"
            f"<td style='text-align:right'>{s.private_bytes / 2**20:.0f}</td></tr>"
            for s in ([] if self._is_closed else self.status())
        )
        head = "<tr><th>rank</th><th>pid</th><th>state</th><th>cell</th><th>waits in</th><th>resident, MiB</th><th>private, MiB</th></tr>"
        return f"<div>{html.escape(repr(self))}</div><table>{head}{rows}</table>"

    # -- running ------------------------------------------------------------------------------------------------------------------------

    def run(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        ranks: Selector = None,
        timeout_s: float | None = None,
        block: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Call a function on ranks.

        Args:
            fn: also one defined in a notebook's cell; it travels with its closure.
            ranks: an int, a list, a slice, or "all", "0,2-3", "tp=0", "dp=1,pp=0".
            timeout_s: end the call, with a diagnosis, after so long.

        Returns:
            One result a chosen rank, in rank order; with block=False a handle at once.

        Raises:
            ValueError: `ranks` chooses nobody.
            RankFailed, CollectiveMismatch, RankDeadlock, RankTimeout, RankInterrupted: the cell ended badly; the cluster is usable again.
            ClusterBusy, ClusterClosed: nothing was sent.
        """
        if not callable(fn):
            raise TypeError(f"cluster.run takes a function, not {type(fn).__name__}: {fn!r}; cluster.execute runs source text")
        name = getattr(fn, "__name__", type(fn).__name__)
        return self._perform(Task.CALL, name, (fn, args, kwargs), ranks, timeout_s=timeout_s, block=block, label=f"{name}()")

    def execute(
        self,
        source: str,
        ranks: Selector = None,
        *,
        timeout_s: float | None = None,
        block: bool = True,
        on_output: Callable[[int, str, str], None] | None = None,
    ) -> Any:
        """Run a cell's source on ranks, each in its own lasting namespace.

        Args:
            on_output: called from a thread with (rank, "stdout" or "stderr", text) as output arrives.

        Returns:
            A `CellResult`: rank -> stdout, stderr, result_text, error; with block=False a handle at once.

        Raises:
            SyntaxError: the source cannot be compiled; nothing was sent. Otherwise as `run`.
        """
        if not isinstance(source, str):
            raise TypeError(f"cluster.execute takes source text, not {type(source).__name__}: {source!r}; cluster.run calls a function")
        compile(source, "<cell>", "exec")
        return self._perform(Task.SOURCE, source, None, ranks, timeout_s=timeout_s, block=block, label="", on_output=on_output)

    def push(self, names: dict[str, Any], ranks: Selector = None) -> None:
        """Bind names on ranks; large arrays travel without a further copy."""
        if not isinstance(names, Mapping):
            raise TypeError(f'push takes a dict of names and values, not {type(names).__name__}: {names!r}; push({{"x": x}}) binds x')
        bad = [name for name in names if not (isinstance(name, str) and name.isidentifier())]
        if bad:
            raise ValueError(f"push: {bad[0]!r} is no name; every key must be an identifier")
        self._perform(Task.PUSH, "", dict(names), ranks, label="push")

    def pull(self, name: str, ranks: Selector = None) -> list[Any]:
        """The value of a name (or expression) on ranks, in rank order."""
        if not isinstance(name, str):
            raise TypeError(f'pull takes one name or expression as text, not {type(name).__name__}: {name!r}; "(x, y)" brings two')
        compile(name, "<pull>", "eval")
        values: list[Any] = self._perform(Task.PULL, name, None, ranks, label=f"pull({name!r})")
        return values

    def use(self, layout: Layout) -> None:
        """Form the groups of a layout on all ranks: `groups["tp"]`, selectors by axis.

        Raises:
            TypeError, ValueError: it is no layout, or of another world size.
        """
        if not isinstance(layout, Layout):
            one = f"wb.Layout(world_size={self.world_size}, tp=...)"
            raise TypeError(f"use takes a layout, not {type(layout).__name__}: {layout!r}; {one} is one")
        if layout.world_size != self.world_size:
            raise ValueError(
                f"the layout has {layout.world_size} ranks, the cluster {self.world_size}; they must be equal\n"
                f"make a layout of {self.world_size} ranks, or launch({layout.world_size})"
            )
        from workbench.ranks.forming import use_layout

        try:
            self.run(use_layout, layout)
        except BaseException:
            if not self._is_closed and not self._conductor.lost_ranks and self._conductor.active is None:
                with interrupts_postponed(_RENEW_LIMIT_S):
                    self._renew(set())  # some ranks may have the new groups and others not: all go back to the layout in use
            raise
        self._layout = self._conductor.layout = layout

    @contextmanager
    def record(self, folder: str | os.PathLike[str]) -> Iterator[Path]:
        """Within the block, keep a tape of every rank: what `wb.replay(folder, rank=k)` needs to run rank k alone.

        A rank that is started afresh within the block begins another, in `folder/generation-N`.

        Raises:
            ValueError: the folder holds something already.
        """
        from workbench.ranks.recording import start_tape, stop_tape  # here: it brings torch, which launch imports while the ranks start

        target = Path(folder).resolve()
        if target.exists() and any(target.iterdir()):
            raise ValueError(f"{target} holds {sorted(p.name for p in target.iterdir())[:3]} already; a tape needs a folder of its own")
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._house(start_tape, str(target))
        self._failures.rests = True
        self._taped = (target, {link.pid for link in self._processes.links})
        try:
            yield target
        finally:
            self._failures.rests = False
            self._taped = None
            self._house_where_alive(stop_tape)

    @contextmanager
    def inject(self, *faults: Fault) -> Iterator[None]:
        """Within the block, have ranks fail on purpose: `wb.Fault(rank=1, op="all_reduce", at=2, action="delay", delay_s=1.0)`.

        Raises:
            ValueError: a fault that could never happen.
        """
        check_faults(faults, self.world_size)
        self.history.event("inject", value=faults)
        self._house(arm, faults)
        try:
            yield
        finally:
            self.history.event("end inject")
            for link in self._processes.links:
                link.signal(signal.SIGCONT)
            self._house_where_alive(disarm)

    def _tape_fresh_ranks(self) -> None:
        """Have ranks that were started since the recording began keep tapes too: what only some record goes other ways between them."""
        from workbench.ranks.recording import start_tape

        assert self._taped is not None
        target, pids = self._taped
        fresh = [link.rank for link in self._processes.links if not link.is_dead and link.pid not in pids]
        if fresh:
            pids.update(self._processes.links[rank].pid for rank in fresh)
            folder = target / f"generation-{self.generation}"
            folder.mkdir(mode=0o700, exist_ok=True)
            self._house(start_tape, str(folder), ranks=fresh)

    def _house(self, fn: Callable[..., Any], *args: Any, ranks: Selector = None) -> Any:
        """Call a function of the workbench's own on ranks; it stands on no tape."""
        return self._perform(Task.HOUSE, "", (fn, args, {}), ranks, label=fn.__name__)

    def _house_where_alive(self, fn: Callable[..., Any]) -> None:
        alive = [link.rank for link in self._processes.links if not link.is_dead]
        if alive and not self._is_closed:
            self._house(fn, ranks=alive)

    def _perform(
        self,
        task: Task,
        text: str,
        value: Any,
        ranks: Selector,
        *,
        timeout_s: float | None = None,
        block: bool = True,
        label: str = "",
        on_output: Callable[[int, str, str], None] | None = None,
    ) -> Any:
        members = select_ranks(ranks, self.world_size, self._layout)
        _check_timeout(timeout_s)
        if self._taped is not None and task is not Task.HOUSE:
            self._tape_fresh_ranks()
        packed = None if value is None else _pack(value, label)
        conductor, cell = self._conductor, None
        try:
            with interrupts_postponed(), self._lock:
                cell = self._new_cell(task, text, members, timeout_s, label, on_output)
                conductor.active = cell
                self.history.add(cell.number, task, text, members, packed, timeout_s)
                message = RunCell(cell=cell.number, task=task, text=text, members=members)
                conductor.begin(cell, message, packed)
            handle = CellHandle(cell, lambda c: conductor.stop(c, "interrupt"))
            if not block:
                return handle
            self._wait_with_progress(cell)
        except KeyboardInterrupt:
            if cell is None:
                raise
            self._interrupted(cell)
            raise KeyboardInterrupt(str(RankInterrupted(cell.diagnosis.sentence if cell.diagnosis else ""))) from None
        return handle.result()

    def _new_cell(
        self,
        task: Task,
        text: str,
        members: Sequence[int],
        timeout_s: float | None,
        label: str,
        on_output: Callable[[int, str, str], None] | None,
    ) -> ActiveCell:
        self._refuse_when_closed_or_busy()
        dead = [rank for rank in members if self._processes.links[rank].is_dead]
        if dead:
            code, name, how = self._processes.links[dead[0]].describe_death()
            raise RankFailed(
                f"rank {dead[0]} of {self.world_size} is dead: {how}\nnothing was sent\n"
                f"cluster.respawn({dead[0]}) brings it back; ranks={[r for r in range(self.world_size) if r not in dead]!r} leaves it out",
                rank=dead[0],
                world_size=self.world_size,
                exit_code=code,
                signal_name=name,
            )
        self._cell_number += 1
        number = self._cell_number
        return ActiveCell(
            number=number,
            members=tuple(members),
            world_size=self.world_size,
            task=task,
            text=text,
            timeout_s=timeout_s,
            name=f"{label} (cell {number})" if label else f"cell {number}",
            on_output=on_output,
        )

    def _refuse_when_closed_or_busy(self) -> None:
        if self._is_closed:
            raise ClusterClosed("the cluster is closed; its ranks have ended\nstart another: cluster = wb.launch(...)")
        active = self._conductor.active
        if active is not None:
            raise ClusterBusy(
                f"{active.name} still runs on ranks {sorted(active.pending)}\n"
                "wait for its handle's result(), or stop it: cluster.interrupt()"
            )

    def _wait_with_progress(self, cell: ActiveCell) -> None:
        if cell.finished.wait(_PROGRESS_AFTER_S):
            return
        from workbench.ranks.progress import Progress

        with Progress() as progress:
            while not cell.finished.wait(0.5):
                pending = sorted(cell.pending)
                progress.show(f"{cell.name}: {time.monotonic() - cell.started_s:.0f} s, ranks {pending} still run")

    def _interrupted(self, cell: ActiveCell) -> None:
        started = time.monotonic()
        self._conductor.stop(cell, "interrupt")
        while not cell.finished.is_set() and time.monotonic() - started < _STOP_LIMIT_S:
            try:
                cell.finished.wait(0.05)
            except KeyboardInterrupt:
                self._conductor.stop(cell, "interrupt")  # the second one: ranks that are stuck are killed soon
        kept = "names kept" if not cell.killed else f"names kept but on {sorted(cell.killed)}"
        found = cell.diagnosis.text if cell.diagnosis and cell.diagnosis.sentence else "no rank waited in a collective"
        print(
            f"{cell.name} interrupted; ranks free after {time.monotonic() - started:.1f} s, {kept}\n{found}",
            *cell.notes,
            sep="\n",
            file=sys.stderr,
        )

    # -- asking and stopping ------------------------------------------------------------------------------------------------------------

    def diagnose(self, *, native: bool | None = None) -> Diagnosis:
        """Who waits for whom, now; from any thread, also while a cell runs.

        Args:
            native: read native stacks with py-spy, where it is installed and may look: True of every rank that runs (seconds), None of
                those that do not answer, False of none.
        """
        if self._is_closed:
            self._refuse_when_closed_or_busy()
        return self._conductor.diagnose(native=native)

    def look(self, rank: int) -> Seen | None:
        """Where a rank is and what its frames hold, while a cell runs; None where it does not answer."""
        return self._conductor.look(self._rank(rank))

    def ask(self, inquiry: Inquiry, text: str, ranks: Selector = None, *, limit_s: float = 0.5) -> dict[int, tuple[str, ...]]:
        """Ask ranks about their names, also while they are busy: what "x.sh" may become, what x is, whether it is bound.

        Returns:
            rank -> lines; ranks that could not answer within `limit_s` are left out.
        """
        members = [rank for rank in select_ranks(ranks, self.world_size, self._layout) if not self._processes.links[rank].is_dead]
        return {} if self._is_closed else self._conductor.asker.ask(inquiry, text, members, limit_s=limit_s)

    def interrupt(self) -> None:
        """Stop the cell that runs: every rank is free within a second, names kept.

        Called again, those that are still stuck are killed one second after the first call. A rank in the middle of importing a library
        ends that first, for four seconds at most.
        """
        cell = self._conductor.active
        if cell is not None:
            self._conductor.stop(cell, "interrupt")

    def kill(self, rank: int) -> None:
        """kill -9 one rank, as a crash would."""
        link = self._processes.links[self._rank(rank)]
        self.history.event("kill", link.rank)
        link.signal(signal.SIGKILL)
        self._until(lambda: link.is_dead, f"rank {rank} to end")

    def respawn(self, rank: int) -> None:
        """Bring a dead rank back, empty; all ranks form the next generation.

        Raises:
            ValueError: the rank lives.
            RankFailed: another rank died meanwhile; call it for that one.
        """
        self._refuse_when_closed_or_busy()
        lost = self._conductor.lost_ranks
        if self._rank(rank) not in lost:
            raise ValueError(f"rank {rank} is alive (pid {self.pid(rank)}); cluster.kill({rank}) first, or cluster.restart() for all")
        self.history.event("respawn", rank)
        with interrupts_postponed(_RENEW_LIMIT_S):
            for one in lost:
                self._processes.links[one].signal(signal.SIGKILL)  # it may still be on its way into a generation that was abandoned
            self._until(lambda: all(self._processes.links[one].is_dead for one in lost), "ranks to end")
            self._renew(lost)

    def restart(self) -> None:
        """Fresh ranks in place of all: empty namespaces, the next generation."""
        if self._is_closed:
            self._refuse_when_closed_or_busy()
        self.history.event("restart")
        with interrupts_postponed(_RENEW_LIMIT_S):
            for link in self._processes.links:
                link.signal(signal.SIGKILL)
            self._until(lambda: all(link.is_dead for link in self._processes.links) and self._conductor.active is None, "the ranks to end")
            self._renew(set(range(self.world_size)))

    def _renew(self, fresh: set[int]) -> None:
        generation = self.generation + 1
        self._conductor.begin_generation(generation, fresh)
        for rank in sorted(fresh):
            self._processes.start(rank, generation)
        self._until(self._is_whole, "the ranks to form a group")

    def _is_whole(self) -> bool:
        if self._conductor.formation_error is not None:
            raise self._conductor.formation_error
        self._processes.raise_startup_error()
        return self._processes.are_ready() and not self._conductor.is_rebuilding

    def _until(self, is_so: Callable[[], bool], what: str) -> None:
        limit = time.monotonic() + _START_LIMIT_S
        with self._conductor.changed:
            while not is_so():
                if time.monotonic() > limit:
                    raise LaunchError(f"waited {_START_LIMIT_S:.0f} s for {what}; cluster.close() ends it")
                self._conductor.changed.wait(0.05)

    # -- records ------------------------------------------------------------------------------------------------------------------------

    def ledger(self) -> pd.DataFrame:
        """A row a collective and rank, the last 4,096 of each rank.

        Columns: rank, op, group, sequence, num_bytes of the rank's tensors, start_s since launch, skew_s after the first member that
        arrived, wait_s until the last had, duration_s in all, cell, line.
        """
        return ledger_frame(self._conductor.board, self._conductor.groups, since_s=self._processes.began_s)

    def stragglers(self, cell: int | None = None) -> Stragglers:
        """Who made whom wait, and for how long, in one cell or in all that the ledger holds: a table and a sentence."""
        return find_stragglers(self._conductor.board, self._conductor.groups, cell)

    def to_perfetto(self, path: str | os.PathLike[str]) -> Path:
        """Write the ledger as a trace that Perfetto and chrome://tracing open."""
        return write_perfetto(self.ledger(), Path(path))

    def trace_collective(
        self, op: str, inputs: Any = None, *, root: int = 0, reduce_op: str = "sum", axis: str | None = None, rank: int = 0
    ) -> CollectiveTrace:
        """Carry out a collective message by message on the ranks and keep each; `wb.view.trace_collective` shows it.

        Args:
            op: "all_reduce", "reduce_scatter", "all_gather", "gather", "scatter" or "broadcast".
            inputs: a tensor or list of numbers for each rank, or the name of a tensor on the ranks; None takes numbers easy to follow.
            root: place in the group.
            reduce_op: "sum", "max", "min" or "product".
            axis: trace the groups of this axis of the layout in use, not the world; the group of `rank` is kept.

        Raises:
            ValueError: an argument does not fit, or the group has fewer than 2 or more than 16 members.
        """
        from workbench.ranks.tracing import trace_collective

        return trace_collective(self, op, inputs, root=root, reduce_op=reduce_op, axis=axis, rank=rank)

    def save_session(self, path: str | os.PathLike[str]) -> Path:
        """Write what `wb.reproduce(path)` runs again: every cell since launch with hashes of what each rank gave, seeds, layout, versions.

        Functions, arguments, pushed names and what an engine's handle was given (weights, too) are in it as pickles, up to 16 MiB each and
        128 MiB in all; what is larger is named in it.

        Raises:
            SessionError: the file holds something else, or cannot be written.
        """
        from workbench.ranks.saving import save_session

        return save_session(self._processes.options, self._layout, self.history, path)

    # -- end ----------------------------------------------------------------------------------------------------------------------------

    def own(self, close: Callable[[], None], observed: Observed | None = None) -> None:
        """Have something closed with the cluster, before its ranks; live views also show what is `observed`."""
        self._owned.append(close)
        if observed is not None:
            self._processes.observed.append(observed)

    def own_view(self, close: Callable[[], None]) -> None:
        """Have a view closed with the cluster, before all that it shows."""
        self._views.append(close)

    def close(self) -> None:
        """End the ranks and all that belongs to them; may be called twice."""
        self._is_closed = True
        self._finalizer()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _check_timeout(timeout_s: Any) -> None:
    is_number = isinstance(timeout_s, Real) and not isinstance(timeout_s, bool)
    if timeout_s is not None and not (is_number and timeout_s > 0):
        raise ValueError(f"timeout_s is {timeout_s!r}; it must be seconds above 0, or None for no limit")


def _pack(value: Any, label: str) -> Packed:
    try:
        return pack(value)
    except Exception as error:  # pickle raises whatever the value's own hooks raise
        what = f"push: {_first_that_stays(value)}" if label == "push" else f"an argument of {label}"
        raise TypeError(
            f"{what} cannot travel to the ranks: {error}\n"
            "pass numbers, arrays, tensors or plain objects; make the rest on the ranks, in a cell"
        ) from error


def _first_that_stays(names: Mapping[str, Any]) -> str:
    """The name in a push whose value cannot be pickled."""
    for name, value in names.items():
        try:
            pack(value)
        except Exception:
            return f"{name} ({type(value).__name__})"
    return "a value"


def _close(processes: Processes, owned: list[Callable[[], None]], views: list[Callable[[], None]]) -> None:
    if processes.owner_pid != os.getpid():  # a fork of the driver that ends takes nothing with it
        return
    with interrupts_postponed(_CLOSE_LIMIT_S):
        try:
            for close in [*views, *reversed(owned)]:
                with contextlib.suppress(Exception):
                    close()
        finally:
            processes.close()
