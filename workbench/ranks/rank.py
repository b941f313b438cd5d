"""A rank's process: joins the world, then runs cells one after another until the driver goes.

    main thread      queue -> cell -> result to the driver           (user code; signals reach it)
    control thread   channel -> queue, or at once: Free, Look         (also while the main thread computes or waits)

Knows its own process. Does not know other ranks but through torch and the board.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import faulthandler
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from queue import SimpleQueue
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from workbench.errors import EngineError
from workbench.plan.layout import Layout
from workbench.ranks import cell as cells
from workbench.ranks import forming, names, sockets
from workbench.ranks.board import Board
from workbench.ranks.calls import KnownGroup, is_users
from workbench.ranks.channel import ChannelReader, ChannelWriter, Packed, pack, receive, unpack
from workbench.ranks.config import RankConfig
from workbench.ranks.current import Current, set_current
from workbench.ranks.digest import Digest, digest_of
from workbench.ranks.group import Group
from workbench.ranks.intercept import Interceptor
from workbench.ranks.leaving import Freed
from workbench.ranks.messages import (
    Abandon,
    CellDone,
    Free,
    GroupFormed,
    Look,
    Mark,
    Outcome,
    Parted,
    Question,
    Ready,
    Rebuild,
    Rebuilt,
    RunCell,
    Seen,
    Task,
)
from workbench.ranks.recording import FailureTape, writer_for
from workbench.ranks.shown import open_figures, show_value, text_of
from workbench.ranks.stateless_gloo import register_again

__all__ = ["Rank", "main"]

_libc = ctypes.CDLL(None)
_DEEPEST_STACK = 12
_AGAIN_S = 0.01  # after which an interrupt that met a finalizer, or an import, is tried once more
_IMPORT_S = 0.6  # that an import of the user's is given to end
_LIBRARY_S = 4.0  # the same for a library's, which ends by itself and may be large; after 5 s the rank would be killed
_ABOVE = __file__.rpartition("workbench/ranks/")[0]  # the folder that the package lies in
_PACKAGE = f"{_ABOVE}workbench/"
_FINALIZE = weakref.finalize.__call__.__code__
_IMPORTING = "<frozen importlib._bootstrap>"


class Rank:
    """One rank: its namespace, its group, its channel."""

    def __init__(self, config: RankConfig, channel: socket.socket, board: Board) -> None:
        self.config = config
        self.board = board
        self.writer = ChannelWriter(channel)
        self.reader = ChannelReader(channel)
        self.module = ModuleType("__main__")
        self.is_running = False
        self._missed_signal = False  # one came while nothing ran
        self._heard = 0  # the cell that was interrupted last
        self._meant = 0  # the cell that an interrupt was meant for that is tried once more
        self._met_import_s: float | None = None  # when the interrupt of this cell met an import first
        self._waiting: SimpleQueue[tuple[Any, Packed | None]] = SimpleQueue()
        self._store: dist.TCPStore | None = None
        self._store_connections: frozenset[sockets.Connection] = frozenset()
        self._digest = Digest()  # of the result of the cell that runs
        self.failures = FailureTape(config.tape_folder, config.rank) if config.tape_folder else None
        self.interceptor = Interceptor(rank=config.rank, board=board, is_checked=config.is_checked, announce=self._announce)

    # -- start --------------------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Join the world and say so."""
        faulthandler.enable()
        signal.signal(signal.SIGINT, self._on_interrupt)
        torch.set_num_threads(self.config.num_threads)
        seed_all(self.config.seed + self.config.rank)
        _refuse_to_ask(self.config.rank)
        if os.environ.get("MPLBACKEND", "").startswith("module://"):
            os.environ["MPLBACKEND"] = "Agg"  # the notebook's own backend draws in the notebook's process only
        self.interceptor.install()
        threading.Thread(target=self._control, name="workbench-control", daemon=True).start()
        self.board.reset(self.config.rank)
        self.interceptor.begin_generation(self.config.generation)
        self._join(self.config.generation)
        group = Group.from_process_group(_world(), name="world")
        here = Current(
            rank=self.config.rank, world_size=self.config.world_size, group=group, layout=Layout(world_size=self.config.world_size)
        )
        here.generation, here.process = self.config.generation, self
        set_current(here)
        self.here = here
        if self.config.layout is not None:
            forming.use_layout(self.config.layout)
        self._fill_namespace()
        self.writer.send(Ready(pid=os.getpid()))

    def _join(self, generation: int) -> None:
        c = self.config
        limit = timedelta(seconds=c.timeout_s)
        if self.interceptor.has_left_one:  # a thread that was left holds the store: let it go, and take another
            sockets.shut(self._store_connections)
            self._store, self.interceptor.has_left_one = None, False
        if self._store is None:
            before = sockets.connections()
            self._store = dist.TCPStore("127.0.0.1", c.store_port, is_master=False, wait_for_workers=False, timeout=limit)
            self._store_connections = sockets.connections() - before
        store = dist.PrefixStore(f"{c.store_prefix}/{generation}", self._store)
        dist.init_process_group("gloo", store=store, rank=c.rank, world_size=c.world_size, timeout=limit)
        if self.interceptor.is_abandoned:  # between the making of the group and its being known, when nobody could shut it
            raise Freed(f"generation {generation} was abandoned")
        dist.barrier()  # ready means that a collective has worked

    def _fill_namespace(self) -> None:
        import workbench

        sys.modules["__main__"] = self.module
        names: dict[str, Any] = {
            "rank": self.config.rank,
            "world_size": self.config.world_size,
            "group": self.here.group,
            "groups": self.here.groups,
        }
        self.module.__dict__.update(names | {"torch": torch, "dist": dist, "wb": workbench})

    def _announce(self, group: KnownGroup) -> None:
        formed = GroupFormed(key=group.key, name=group.name, ranks=group.ranks, outlives_generations=group.outlives_generations)
        self.writer.send(formed)

    def mark(self, label: str) -> None:
        self.writer.send(Mark(label=label, at_s=time.monotonic()))

    # -- control thread -----------------------------------------------------------------------------------------------------------------

    def _control(self) -> None:
        with contextlib.suppress(Exception):
            for message, value in receive(self.reader):
                try:
                    self._heed(message, value)
                except Exception:  # a bug of ours is shown, and costs nobody the names that live here
                    traceback.print_exc()
        os._exit(0)  # the driver is gone, or the channel broke: nothing is left to do, and nobody to tell

    def _heed(self, message: Any, value: Packed | None) -> None:
        if isinstance(message, Free):
            self.interceptor.shut()
        elif isinstance(message, Abandon):
            self.interceptor.abandon(message.generation)
        elif isinstance(message, Look):
            self.writer.send(self._look(message))
        elif isinstance(message, Question):
            threading.Thread(target=self._answer, args=(message,), name="workbench-answer", daemon=True).start()
        else:
            self._waiting.put((message, value))

    def _look(self, message: Look) -> Seen:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = list(traceback.extract_stack(frame)) if frame is not None else []
        cell_file = cells.file_of(self.board.cell(self.config.rank))
        ours = max((place for place, f in enumerate(stack) if f.filename == __file__), default=-1)  # what calls the cell
        first = next((place for place, f in enumerate(stack) if f.filename == cell_file), ours + 1)
        stack = stack[first:][-_DEEPEST_STACK:]
        line, source = _place(stack, cell_file) if self.is_running else (0, "")
        return Seen(
            ticket=message.ticket,
            line=line,
            source=source,
            stack="".join(traceback.format_list(stack)) if self.is_running else "",
            num_threads=sum(not _is_housekeeping(thread) for thread in threading.enumerate()),
            frames=cells.frames_of(frame) if message.with_names and self.is_running else (),
        )

    def _answer(self, question: Question) -> None:
        """In a thread of its own: attributes and reprs are the user's code, and may take their time."""
        self.writer.send(names.answer(question, vars(self.module)))

    # -- main thread --------------------------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Run what the driver sends, for ever."""
        while True:
            try:
                message, value = self._waiting.get()
                if isinstance(message, Rebuild):
                    self._rebuild(message.generation, message.layout)
                elif isinstance(message, RunCell):
                    self._run(message, value)
            except KeyboardInterrupt:
                continue  # a late stop of a cell that had ended

    def _run(self, message: RunCell, value: Packed | None) -> None:
        started = time.monotonic()
        outcome, text, result, error = Outcome.OK, "", None, None
        self._met_import_s = None
        self._digest = Digest()
        self.board.enter_cell(self.config.rank, message.cell)
        recorder = None if message.task is Task.HOUSE else writer_for(self.failures, self.here.generation)
        if recorder is not None:
            recorder.begin_cell(message.cell, message.task, message.text, value)
        try:
            try:
                self.is_running = True
                if self._missed_signal and self.board.is_stopped(self.config.rank):
                    raise KeyboardInterrupt  # the stop came before the cell
                text, result = self._work(message, value)
            finally:
                self.is_running = self._missed_signal = False  # first of all: from here on a signal raises nothing, and the answer is sent
        except BaseException as raised:
            outcome, error = self._judge(raised), cells.tell(raised)
        self.interceptor.end_cell()
        if recorder is not None:
            recorder.end_cell(outcome, text, self._digest.value, f"{error.kind}: {error.message}" if error else "")
        _flush()
        self.board.enter_cell(self.config.rank, 0)
        done = CellDone(
            cell=message.cell,
            outcome=outcome,
            result_text=text,
            error=error,
            started_s=started,
            ended_s=time.monotonic(),
            is_group_broken=self.interceptor.was_shut or self.interceptor.has_left_backward,
            digest=self._digest,
        )
        self.writer.send(done, result)

    def _work(self, message: RunCell, value: Packed | None) -> tuple[str, Packed | None]:
        namespace = self.module.__dict__
        if message.task is Task.SOURCE:
            return self._run_source(message)
        if message.task is Task.PUSH:
            assert value is not None
            namespace.update(unpack(value))
            return "", None
        if message.task is Task.PULL:
            found = _look_up(message.text, namespace)
            self._digest = digest_of(found)
            return "", _pack(found, message.text)
        assert value is not None
        function, args, kwargs = unpack(value)
        result = function(*args, **kwargs)
        self._digest = digest_of(result) if message.task is Task.CALL else Digest()
        return "", _pack(result, f"the result of {getattr(function, '__name__', 'the function')}")

    def _run_source(self, message: RunCell) -> tuple[str, Packed | None]:
        value = cells.run_source(message.text, self.module, message.cell)
        text, self._digest = text_of(value), digest_of(value)
        shown = [show_value(value, text), *open_figures()] if value is not None else [*open_figures()]
        rich = tuple(one for one in shown if one is not None)
        return text, pack(rich) if rich else None

    def _judge(self, error: BaseException) -> Outcome:
        """A failure of this rank's own, or the consequence of being stopped?"""
        if isinstance(error, (KeyboardInterrupt, Freed)):
            return Outcome.FREED
        is_stopped = self.interceptor.was_shut or self.board.is_stopped(self.config.rank)
        if is_stopped and isinstance(error, (RuntimeError, EngineError)):
            return Outcome.FREED  # its connections were shut, here or by a peer that was stopped too
        return Outcome.RAISED

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        cell = self.board.cell(self.config.rank)
        meant, self._meant = self._meant, 0
        if meant and meant != cell:
            return  # tried again too late: that cell has ended, and this one was not stopped
        if not self.is_running:
            self._missed_signal = True
            return  # it came late: the cell has ended, and forming the next generation must not be stopped; or before the cell begins
        was_heard, self._heard = self._heard == cell, cell
        if was_heard and isinstance(sys.exc_info()[1], KeyboardInterrupt):
            return  # the driver asks until it has an answer; the cell tidies up on its way out
        if self.interceptor.is_busy:
            self.interceptor.is_interrupt_pending = True
        elif self._is_in_finalizer(frame) or self._is_in_import(frame):
            threading.Timer(_AGAIN_S, self._interrupt_again, args=(cell, number)).start()
        else:
            called_by = _frames(frame.f_back if frame is not None else None)
            self.interceptor.has_left_backward |= any(one.f_code.co_name == "_engine_run_backward" for one in called_by)
            raise KeyboardInterrupt

    def _interrupt_again(self, cell: int, number: int) -> None:
        self._meant = cell
        signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _is_in_finalizer(self, frame: FrameType | None) -> bool:
        """An exception raised there would be swallowed, and the stop with it."""
        return any(one.f_code is _FINALIZE or one.f_code.co_name == "__del__" for one in _frames(frame))

    def _is_in_import(self, frame: FrameType | None) -> bool:
        """Left in its middle, a package may not come in a second time; but no longer than a stop may take."""
        if not any(one.f_code.co_filename == _IMPORTING for one in _frames(frame)):
            return False
        module = next((one.f_code.co_filename for one in _frames(frame) if one.f_code.co_name == "<module>"), "")
        if self._met_import_s is None:
            self._met_import_s = time.monotonic()
        return time.monotonic() - self._met_import_s < (_IMPORT_S if is_users(module) else _LIBRARY_S)

    def _rebuild(self, generation: int, layout: Layout | None) -> None:
        error = ""
        try:
            self.interceptor.end_generation()
            if dist.is_initialized():
                dist.destroy_process_group()
            c10d._world.group_count = 0  # not so after a generation that was abandoned; all ranks must name groups alike
            register_again()
            self.interceptor.begin_generation(generation)
            self.writer.send(Parted(generation=generation))
            self._join(generation)
            self.here.generation = generation
            self.here.group.rebind(_world())
            self._follow(layout)
        except (Exception, Freed):
            error = traceback.format_exc()
        self.writer.send(Rebuilt(generation=generation, error=error))

    def _follow(self, layout: Layout | None) -> None:
        """Form the layout's groups again behind the handles that the user holds."""
        here = self.here
        if layout is None or layout != here.layout:  # a stop came while it was changed
            here.groups.clear()
            here.layout, here.has_layout = layout or Layout(world_size=here.world_size), layout is not None
        for axis, formed in forming.form_groups(layout).items() if layout is not None else ():
            if axis in here.groups:
                here.groups[axis].rebind(formed.process_group if formed.is_member else None)
            else:
                here.groups[axis] = formed


def _place(stack: list[traceback.FrameSummary], cell_file: str) -> tuple[int, str]:
    """Line and source of the user's innermost code; where the workbench's own is alone, 0 and its file: the cell has such a line too."""
    outside = [f for f in stack if "/workbench/ranks/" not in f.filename]
    own = [f for f in outside if f.filename.startswith(_PACKAGE)]
    users = [f for f in stack if f.filename == cell_file] or [f for f in outside if is_users(f.filename)]
    place = next(iter((users or own or outside)[-1:]), None)
    if place is None:
        return 0, ""
    if not users and own:
        return 0, f"{place.filename.removeprefix(_ABOVE)}:{place.lineno}"
    return place.lineno or 0, place.line or ""


def _is_housekeeping(thread: threading.Thread) -> bool:
    """Threads that call no collectives: the main one, which is told apart, ours, and those that watch progress bars."""
    return thread is threading.main_thread() or thread.name.startswith("workbench-") or type(thread).__module__.startswith("tqdm.")


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """This one and those that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _world() -> Any:
    return dist.group.WORLD


def _look_up(expression: str, names: dict[str, Any]) -> Any:
    try:
        return eval(expression, names)
    except NameError as error:
        told = NameError(f"{error} on this rank; an earlier cell must bind it there")
        raise told.with_traceback(error.__traceback__.tb_next if error.__traceback__ else None) from None


def _pack(value: Any, what: str) -> Packed:
    try:
        return pack(value)
    except Exception as error:
        raise TypeError(
            f"{what} cannot travel to the driver: a {type(value).__name__} cannot be pickled ({error})\n"
            "bring numbers, arrays, tensors or lists of them; look at the rest on the ranks, in a cell"
        ) from None  # the text has all of it


def _refuse_to_ask(rank: int) -> None:
    """A rank has no terminal: what would wait for one says what to do instead of hanging or meeting end-of-file."""

    def refuse(what: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(
                f"{what} was called on rank {rank}, which has no terminal\n"
                "to debug it: with cluster.record(dir): run the cell; then wb.replay(dir, "
                f"rank={rank}) runs this rank alone in the notebook's own process, where {what} works\n"
                f"to ask it from a terminal, while it is idle or runs: workbench attach {rank}"
            )

        return call

    sys.breakpointhook = refuse("breakpoint()")
    builtins.input = refuse("input()")


def seed_all(seed: int) -> None:
    """Seed random, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.backends.cuda.is_built():
        torch.manual_seed(seed)
    else:  # the same without what it notes for GPUs that may come: a stack with its source lines, 10 ms a rank
        torch.default_generator.manual_seed(seed)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    _libc.fflush(None)


def main(config: RankConfig, fds: list[int]) -> None:
    """Entry of the process; descriptors: channel, board."""
    rank = Rank(config, socket.socket(fileno=fds[0]), Board(fds[1], config.world_size))
    try:
        rank.start()
    except BaseException:
        rank.writer.send(Ready(pid=os.getpid(), error=traceback.format_exc()))
        return
    rank.serve()
