"""One interception point for every collective of a rank: plain `dist.*`, accelerate, DDP's reducer, functional collectives.

    user code -> c10d operator -> here: post on the board, wait for peers, compare -> gloo -> note in the ledger
    the same call again, from Python: `shortcut`, which passes torch and this file by
    work.wait(), wait_tensor of an asynchronous call -> here: wait for peers, compare -> gloo   (its future: work.wait first, see `futures`)

Blocking collectives wait on the board, where a stop reaches them without harm. Asynchronous ones are posted and compared at once, and
wait there when their work is waited for; gloo has begun by then, so a stop shuts its connections. Those of DDP, whose order is the same on
all ranks, count as blocking: C++ waits for them.

Knows torch, groups and generations of this rank. Does not know the driver: it is given what to call.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from workbench.errors import CollectiveMismatch, GroupError
from workbench.ranks import called as calling
from workbench.ranks import leaving, sockets
from workbench.ranks.awake import Awake
from workbench.ranks.board import AreaState, Board, Post, Stopped
from workbench.ranks.calls import Call, KnownGroup, mismatch_text, place_of, user_frame
from workbench.ranks.futures import Futures
from workbench.ranks.known_groups import KnownGroups
from workbench.ranks.leaving import Freed
from workbench.ranks.making_groups import MakingGroups
from workbench.ranks.messages import ANY_SOURCE
from workbench.ranks.operations import (
    LEDGER_NAMES,
    OPERATIONS,
    Operation,
    misread,
    num_bytes,
    remember_reduce_ops,
    tensors_in,
    with_peer,
)
from workbench.ranks.shortcut import Shortcut
from workbench.ranks.stateless_gloo import is_stateless_gloo
from workbench.ranks.tape import current_writer

__all__ = ["Hook", "Interceptor", "dropped"]

T = TypeVar("T")

# A layer above the backends' that torch leaves empty and that every call passes, inference mode included. The backend's own kernel stays in
# place and is reached by redispatch, which gives up the GIL: held there, it deadlocks with a gloo thread that lets go of a finished
# collective's tensors.
_LAYER = "BackendSelect"
_BELOW = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
_INDEX = {name: index for index, name in enumerate(OPERATIONS)}
_ANNOUNCING = "_allgather_base_"  # what an announcement of our own operations is, to those who see calls of torch
_REDUCTIONS = ("allreduce_", "allreduce_coalesced_")  # DDP goes on meanwhile and asks later what they gave; its other calls it waits for
_UNKNOWN = KnownGroup(key=0, name="", ranks=(), generation=-1)
_LARGE = 1 << 20  # bytes; a smaller message hardly stays in its middle, and would be a fifth slower
_DEAF_S = 0.2  # after its connections were shut gloo raises within milliseconds, or not at all
_MOST_IN_FLIGHT = 1024  # asynchronous calls that are remembered until they are waited for; the oldest go first


class Hook(Protocol):
    """Whoever wants to see, or spoil, every collective of this rank: a tape, a fault."""

    def before(self, operation: Operation, args: tuple[Any, ...]) -> bool:
        """Called before a call is posted, its inputs still whole; True leaves it out on this rank."""
        ...

    def begun(self, op: str, text: str, line: int, tensors: Sequence[torch.Tensor], work: Any) -> Callable[[], None]:
        """Called when a call was begun; what it returns is called when `tensors` hold what it gave. `work` is None where there is none."""
        ...


def dropped(name: str, args: tuple[Any, ...]) -> Any:
    """What an operator returns when it was left out: its tensors as they are, and work that is done with them."""
    done: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
    done.set_result(tensors_in(args[0]))
    work = leaving.work_of(done)
    num_returns = len(getattr(torch.ops.c10d, name).default._schema.returns)
    return (args[0], work) if num_returns == 2 else work


def _yes() -> bool:
    """What `Work.wait` gives."""
    return True


def _storages(tensors: Any) -> frozenset[int]:
    """Where the tensors of an argument lie."""
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors_in(tensors))


class _Busy:
    """While the main thread is inside, a signal is kept for later; no generator, since it is entered in every collective."""

    __slots__ = ("_interceptor", "_is_main", "_was_busy")

    def __init__(self, interceptor: Interceptor) -> None:
        self._interceptor = interceptor

    def __enter__(self) -> None:
        interceptor = self._interceptor
        self._is_main = threading.get_ident() == interceptor.main_thread
        if self._is_main:
            self._was_busy, interceptor.is_busy = interceptor.is_busy, True

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            self._interceptor.be_free(self._was_busy)


class _OfThread(threading.local):
    """What a thread is in the middle of.

    Attributes:
        is_blocking: a send or receive that its caller waits for.
        call: that message, once it has begun; work: of torch.
        told: whom to tell what it received.
        is_in_hook: a communication hook of DDP: C++ waits for what it begins.
    """

    is_blocking: bool = False
    call: Call | None = None
    work: Any = None
    told: Sequence[Callable[[], None]] = ()
    is_in_hook: bool = False


class Interceptor:
    """Puts itself between torch and gloo in this process; one a process, for good."""

    def __init__(self, *, rank: int, board: Board, is_checked: bool, announce: Callable[[KnownGroup], None]) -> None:
        self.rank = rank
        self.board = board
        self.is_checked = is_checked
        self.is_interrupt_pending = False
        self.is_busy = False  # the main thread is in a collective: a signal must wait
        self.has_left_backward = False  # an exception went through a backward pass: DDP's reducer is in its middle for good
        self.has_left_one = False  # a thread still waits in the making of a group
        self._shut_at_s: float | None = None  # when gloo connections of this generation were shut
        self.awake = Awake(board.world_size)
        self._helper: leaving.Helper | None = None
        self._left: set[dist.ProcessGroup] = set()  # a thread still waits in one of them: to destroy it would be to wait too
        self.wait_of_torch = dist.Work.wait
        self._abandoned = -1  # the generation that will never come to be
        self.hooks: list[Hook] = []
        self._shortcut = Shortcut(self)
        self.groups = KnownGroups(rank=rank, board=board, announce=announce, forgotten=self._shortcut.forget)
        self._in_flight: dict[int, Call] = {}  # id of its work -> asynchronous call that nobody has waited for yet
        self._begun: deque[Any] = deque(maxlen=_MOST_IN_FLIGHT)  # works beside those that gloo may still have in hand, the oldest first
        self._unwaited: list[Any] = []  # works of messages that a stop came between, kept as long as their connections
        self._told_later: dict[int, tuple[Any, list[Callable[[], None]]]] = {}  # id of a work -> it, and whom to tell what it received
        self._engines: list[set[sockets.Connection]] = []  # whose calls these are, the innermost last: the connections of each
        self._local = _OfThread()
        self.main_thread = threading.get_ident()
        self._libraries: list[torch.library.Library] = []

    def install(self) -> None:
        """Take over the operators, the waiting for them and the making of groups."""
        remember_reduce_ops()
        self._shortcut.install()
        calling.set_carrier(self)
        for name, operation in OPERATIONS.items():
            library = torch.library.Library("c10d", "IMPL")
            onward = getattr(torch.ops.c10d, name).default.redispatch
            library.impl(name, functools.partial(self._collective, name, operation, onward), _LAYER, with_keyset=True)
            self._libraries.append(library)
        library = torch.library.Library("_c10d_functional", "IMPL")
        library.impl("wait_tensor", self._wait_tensor, _LAYER, with_keyset=True)
        self._libraries.append(library)
        setattr(dist.Work, "wait", self._waiting(dist.Work.wait))  # noqa: B010  a plain assignment is refused by the type of a method
        Futures(lambda work: id(work) in self._in_flight).install()
        MakingGroups(self).install()
        for name in ("send", "recv"):
            wrapped = self._blocking(getattr(c10d, name))
            setattr(c10d, name, wrapped)
            setattr(dist, name, wrapped)
        dist._register_comm_hook = self._knowing_hooks(dist._register_comm_hook)
        self.groups.install()

    @contextmanager
    def engine_groups(self, connections: set[sockets.Connection]) -> Iterator[None]:
        """Groups made inside belong to an engine: they are not watched, and shut only when a stop finds the engine at work.

        Args:
            connections: of this engine; those of groups made inside are added.
        """
        self._engines.append(connections)
        try:
            yield
        except BaseException as error:
            if connections and (isinstance(error, KeyboardInterrupt) or self.is_stopped or self.was_shut):
                sockets.shut(connections)  # its peers, and gloo's own threads, must not wait for what will never come
                self._left.update(c10d._world.pg_map)
            raise
        finally:
            self._engines.pop()

    def shut(self) -> int:
        """Shut this generation's gloo connections: a wait inside gloo raises within milliseconds.

        Returns:
            How many were shut.
        """
        if self._shut_at_s is None:
            self._shut_at_s = time.monotonic()
            timer = threading.Timer(_DEAF_S, self._give_up, args=(self.generation,))
            timer.name = "workbench-give-up"
            timer.start()
        return sockets.shut(self.groups.connections.union(*self._engines))

    def _give_up(self, generation: int) -> None:
        """What gloo should have ended by now, and has not: C++ waits for it, who cannot be called."""
        for one in list(self._begun) if generation == self.generation else ():
            if isinstance(one, leaving.StandIn) and not one.is_completed():
                one.give_up("freed from a collective: the cell was stopped")

    @property
    def was_shut(self) -> bool:
        """Whether gloo connections of this generation were shut."""
        return self._shut_at_s is not None

    def abandon(self, generation: int) -> None:
        """Whoever forms this generation, now or later, is let go."""
        self._abandoned = generation
        if generation == self.generation:
            self.shut()

    @property
    def generation(self) -> int:
        """Which the ranks are at."""
        return self.groups.generation

    @property
    def is_abandoned(self) -> bool:
        return self._abandoned >= self.generation

    def end_generation(self) -> None:
        """Shut what is open, and keep the groups in which gloo does not notice: to destroy one would be to wait for it."""
        self.shut()
        self._shortcut.forget()
        in_hand = [*self._begun, *(call.work for call in self._in_flight.values() if not call.operation.is_point_to_point)]
        while not all(work.is_completed() for work in in_hand):
            if self._is_deaf():
                self._left.update(c10d._world.pg_map)
                return
            time.sleep(0.005)

    def begin_generation(self, generation: int) -> None:
        self.groups.begin_generation(generation)
        self._shut_at_s, self.has_left_backward = None, False
        self._in_flight.clear()
        self._begun.clear()
        self._unwaited.clear()
        self.board.reset(self.rank)

    @property
    def engine_connections(self) -> set[sockets.Connection] | None:
        """Those of the in-rank engine that is at work, or being made; None where none is."""
        return self._engines[-1] if self._engines else None

    @property
    def is_in_hook(self) -> bool:
        """Whether this thread is in a communication hook of DDP, for whose works C++ waits."""
        return self._local.is_in_hook

    def end_cell(self) -> None:
        """A signal that waits is of no use any more."""
        self.is_interrupt_pending = False

    def busy(self) -> _Busy:
        """A context in which a signal waits."""
        return _Busy(self)

    def be_free(self, was_busy: bool) -> None:
        """The main thread leaves a collective, and was in another before or not: a signal that waited is heard."""
        self.is_busy = was_busy
        if self.is_interrupt_pending and not was_busy:
            self.is_interrupt_pending = False
            raise KeyboardInterrupt

    @property
    def is_stopped(self) -> bool:
        """The driver wants the cell to end."""
        return self.is_interrupt_pending or self.is_abandoned or self.board.is_stopped(self.rank)

    def carries(self, process_group: Any) -> bool:
        """Whether announcements of this group go over the board."""
        return self.groups.find_current(process_group) is not None

    def shares(self, process_group: Any) -> bool:
        """Whether large bytes may go beside gloo too; tapes and faults want to see them in calls of torch."""
        return not self.hooks and self.carries(process_group)

    # -- collectives --------------------------------------------------------------------------------------------------------------------

    def _collective(self, name: str, operation: Operation, onward: Callable[..., Any], keyset: Any, *args: Any) -> Any:
        process_group = dist.ProcessGroup.unbox(args[operation.group_at])
        group = self.groups.find(process_group)
        if group is None and self._is_of_engine(operation, args):
            return self._only_leavable(operation, onward(keyset & _BELOW, *args))
        if group is None:
            writer = current_writer()
            if writer is None or not is_stateless_gloo(process_group):
                return onward(keyset & _BELOW, *args)
            return self._only_tape(writer, operation, args, lambda: onward(keyset & _BELOW, *args))
        self.groups.refuse_stale(group, operation.name)
        return self._watched(name, operation, group, args, functools.partial(onward, keyset & _BELOW, *args))

    def _is_of_engine(self, operation: Operation, args: tuple[Any, ...]) -> bool:
        """Whether this is a collective of an engine's on this process's processor, which its caller waits for."""
        is_waited_for = not operation.is_point_to_point and not operation.is_async(args)
        return bool(self._engines) and is_waited_for and all(tensor.device.type == "cpu" for tensor in tensors_in(args[0]))

    def _only_leavable(self, operation: Operation, out: Any) -> Any:
        """Wait for a collective that nobody watches where a stop can leave it; gloo may not notice that its connections are shut."""
        self.outlast(dist.Work.unbox(out[-1] if isinstance(out, tuple) else out), f"{operation.name} of an engine")
        return out

    def _watched(self, name: str, operation: Operation, group: KnownGroup, args: tuple[Any, ...], onward: Callable[[], Any]) -> Any:
        try:
            with self.busy():
                return self._run(name, operation, group, args, onward)
        except BaseException:
            self.has_left_backward |= user_frame(1)[1]
            raise

    def _knowing_hooks(self, register: Callable[..., None]) -> Callable[..., None]:
        """DDP waits in C++ for the futures that a communication hook of the user's gives it."""

        @functools.wraps(register)
        def wrapped(reducer: Any, state: Any, hook: Callable[..., Any]) -> None:
            register(reducer, state, functools.wraps(hook)(functools.partial(self._call_hook, hook)))

        return wrapped

    def _call_hook(self, hook: Callable[..., Any], *args: Any) -> Any:
        self._local.is_in_hook = True
        try:
            return hook(*args)
        finally:
            self._local.is_in_hook = False

    def _run(self, name: str, operation: Operation, group: KnownGroup, args: tuple[Any, ...], onward: Callable[[], Any]) -> Any:
        frame, is_waited_in_cpp = user_frame(3)
        if self.is_checked:
            self._refuse_misread(operation, args)
        if self.hooks and any([hook.before(operation, args) for hook in self.hooks]):
            call = self._describe(operation, group, args, frame)
            for hook in self.hooks:  # a tape holds it too, its tensors as they were
                hook.begun(operation.name, call.text, call.line, tensors_in(args[0]), None)()
            return dropped(name, args)
        is_blocking = self._local.is_blocking if operation.is_point_to_point else not operation.is_async(args)
        is_in_hook = not is_blocking and self._local.is_in_hook
        has_stand_in = is_in_hook or is_waited_in_cpp and name in _REDUCTIONS
        is_waited_in_cpp |= is_in_hook
        is_blocking |= is_waited_in_cpp and not has_stand_in  # C++ waits at once, where nothing can be left: better here
        is_later = not is_blocking and not is_waited_in_cpp
        state = AreaState.NOWHERE if is_later else AreaState.IN_GLOO  # nobody waits in a call that has only begun
        started = time.monotonic_ns()
        meets = self.is_checked or is_waited_in_cpp  # C++ waits for those of DDP, where nobody sees it
        if meets:
            call = self.post(self._describe(operation, group, args, frame), AreaState.NOWHERE if is_later else AreaState.ON_BOARD)
            self.meet(call, waits=not is_later)
            self.board.move(self.rank, state)
            arrived = time.monotonic_ns()
        try:
            out = onward()
            if not meets:  # what is written down now costs little: gloo works meanwhile
                call = self.post(self._describe(operation, group, args, frame), state, is_awaited=False)
                arrived = started
            work = dist.Work.unbox(out[-1] if isinstance(out, tuple) else out)
            if has_stand_in:
                stand_in = leaving.StandIn(work)
                self._keep(stand_in)
                out = (*out[:-1], stand_in.boxed) if isinstance(out, tuple) else stand_in.boxed
            if is_later:
                call.work, call.tensors, call.row = work, args[0], self._note(name, call, args, started, arrived)
                self.remember(call)
            elif operation.is_point_to_point:
                call.row = self._note(name, call, args, started, arrived)
                self._local.call, self._local.work = call, work
            elif is_blocking:  # gloo hangs when a send or recv is waited for twice
                self.outlast(work, call.text)
                arrived = arrived if self.is_checked else time.monotonic_ns()  # not told apart from the moving of data then
            if self.hooks:
                self._tell_hooks(self.hooks, call, args, work, is_blocking=is_blocking)
        except RuntimeError as error:
            self.tell_freed(operation.name, error)
            raise
        finally:
            if not (is_blocking and operation.is_point_to_point):
                self.board.move(self.rank, AreaState.NOWHERE)
        if not is_later and not operation.is_point_to_point:
            self._note(name, call, args, started, arrived)
        if (is_later or is_blocking) and not operation.is_point_to_point:
            self._shortcut.see(call, args)
        return out

    def _only_tape(self, writer: Hook, operation: Operation, args: tuple[Any, ...], onward: Callable[[], Any]) -> Any:
        """A call on a group whose members the board does not know: it is neither watched nor spoiled, but a tape keeps it."""
        writer.before(operation, args)
        text, frame = with_peer(operation, args), user_frame(2)[0]
        is_blocking = self._local.is_blocking if operation.is_point_to_point else not operation.is_async(args)
        out = onward()
        work = dist.Work.unbox(out[-1] if isinstance(out, tuple) else out)
        if is_blocking and not operation.is_point_to_point:
            work.wait()
        line, place = place_of(frame, text)
        call = Call(operation=operation, group=_UNKNOWN, key=0, peers=(), text=text, line=line, place=place)
        self._tell_hooks([writer], call, args, work, is_blocking=is_blocking)
        return out

    def _note(self, name: str, call: Call, args: tuple[Any, ...], started: int, arrived: int) -> int:
        """Put a call in the ledger, or into what is told of the operation of ours that makes it.

        Returns:
            The row's number, -1 where it has none of its own.
        """
        where = self.board.cell(self.rank) << 20 | call.line
        call.num_bytes = num_bytes(args)
        ended = time.monotonic_ns()
        if call.called is None:
            return self.board.note(self.rank, (_INDEX[name], call.key, call.sequence, call.num_bytes, started, arrived, ended, where))
        call.called.add(calling.Row(call.key, call.sequence, call.num_bytes, started, arrived, ended, where), self._note_ours)
        return -1

    def _note_ours(self, name: str, row: calling.Row) -> None:
        """Put one operation of ours in the ledger."""
        self.board.note(self.rank, (LEDGER_NAMES.index(name), *row))

    def exchange(self, process_group: Any, data: bytearray) -> Sequence[memoryview]:
        """What the members of a group announce, as many bytes each; `data` is this rank's.

        It stands on the board, and gloo is not asked; tapes, faults and diagnoses see an all_gather.
        """
        operation, group = OPERATIONS[_ANNOUNCING], self.groups.find(process_group)
        assert group is not None, "asked of groups that `carries` announcements alone"
        whole = bytearray(len(group.ranks) * len(data))
        rows = [memoryview(whole)[at : at + len(data)] for at in range(0, len(whole), len(data))]
        args = (torch.frombuffer(whole, dtype=torch.uint8), torch.frombuffer(data, dtype=torch.uint8), None, False)
        with self.busy():
            call = self._describe(operation, group, args, user_frame(1)[0])
            is_dropped = any([hook.before(operation, args) for hook in self.hooks])
            started = arrived = time.monotonic_ns()
            try:
                if not is_dropped:
                    call = self.post(call, AreaState.ON_BOARD, memoryview(data))
                    self.meet(call, waits=True)
                    arrived = time.monotonic_ns()
                    self._read_announced(call, rows)
                self._tell_hooks(self.hooks, call, args, None, is_blocking=True)
            finally:
                self.board.move(self.rank, AreaState.NOWHERE)
            if not is_dropped:
                self._note(_ANNOUNCING, call, args, started, arrived)
        return rows

    def _read_announced(self, call: Call, rows: Sequence[memoryview]) -> None:
        """Fill in, row by row, what each member posted beside its text."""
        for row, member in zip(rows, call.group.ranks, strict=True):
            data = self.board.data(member, call.key, call.sequence)
            if data is None:  # without the check, another operation of this rank was not noticed before
                texts = self.board.texts(call.key, call.sequence, call.group.ranks)
                raise CollectiveMismatch(mismatch_text(texts, call.sequence, call.group), rank=self.rank)
            row[:] = data

    def _tell_hooks(self, hooks: Sequence[Hook], call: Call, args: tuple[Any, ...], work: Any, *, is_blocking: bool) -> None:
        """Show hooks what a call gave; an asynchronous collective is waited for first. A receive is shown when its caller has waited."""
        if not hooks:
            return
        tensors = tensors_in(args[0])
        is_receive = call.operation.name.startswith("recv")
        for hook in hooks:
            told = hook.begun(call.operation.name, call.text, call.line, tensors, work)
            if not is_receive:
                if not is_blocking and not call.operation.is_point_to_point:
                    work.wait()
                told()
            elif is_blocking:
                self._local.told = [*self._local.told, told]
            else:
                self._told_later.setdefault(id(work), (work, []))[1].append(told)

    def _describe(self, operation: Operation, group: KnownGroup, args: tuple[Any, ...], frame: Any) -> Call:
        text = operation.describe(args)
        sources: Sequence[tuple[int, int]] = ()
        key, peers = group.key, group.peers
        if operation.name == "recv_any":
            sources = [(r, self.groups.channel(group, r, self.rank, args[2])) for r in peers]
            key, peers, text = (
                self.groups.channel_from_any(group, args[2], f"{ANY_SOURCE}{self.rank}"),
                (),
                f"{text} from any",
            )
        elif operation.is_point_to_point:
            if not 0 <= args[2] < len(group.ranks):
                asked = f"{operation.name} {'to' if operation.name == 'send' else 'from'} rank {args[2]}"
                raise ValueError(f"{asked}: group {group.name!r} has ranks {group.ranks}")
            peer = group.ranks[args[2]]
            is_send = operation.name == "send"
            key = self.groups.channel(group, self.rank, peer, args[3]) if is_send else self.groups.channel(group, peer, self.rank, args[3])
            peers, text = (() if is_send else (peer,)), f"{text} {'to' if is_send else 'from'} rank {peer}"
        called = None if operation.is_point_to_point else calling.called_now()
        line, place = place_of(frame, text if called is None else called.text)
        return Call(
            operation=operation, group=group, key=key, peers=peers, sources=sources, text=text, line=line, place=place, called=called
        )

    def post(self, call: Call, state: AreaState, data: memoryview | None = None, *, is_awaited: bool = True) -> Call:
        """Put a call on the board, which gives it its number; an announcement stands there as a whole."""
        shown = call.text if call.called is None else call.shown
        post = Post.of(shown, call.place, call.line, compared=call.text)
        call.sequence = self.board.begin(self.rank, call.key, post, state, data=data, is_awaited=is_awaited)
        return call

    def meet(self, call: Call, *, waits: bool) -> None:
        """Wait for the peers, then compare what each is about to do; a call that does not come to be is taken back."""
        try:
            while True:
                if waits:
                    self._wait_on_board(call)
                self._compare(call, has_met=waits)
                if not waits or self.board.has_arrived(call.key, call.sequence, call.peers):
                    return  # else a peer met a mismatch and went back between our wait and our look
        except Stopped:
            self.board.take_back(self.rank, call.key)
            raise Freed(f"freed from {call.text}: the cell was stopped") from None
        except BaseException:
            self.board.take_back(self.rank, call.key)
            raise

    def _wait_on_board(self, call: Call) -> None:
        if call.sources:
            self.board.wait_any(self.rank, call.sources, lambda: self.is_stopped)
        self.board.wait(self.rank, call.key, call.sequence, call.peers, lambda: self.is_stopped)

    def _compare(self, call: Call, *, has_met: bool) -> None:
        odd = None if call.operation.is_point_to_point else self.board.odd_one(call.key, call.sequence, call.text, call.peers)
        if odd is None:
            return
        texts = self.board.texts(call.key, call.sequence, call.group.ranks, taken_back=has_met)
        if odd in texts:  # else it has told the mismatch itself, and taken its call back, while we looked
            raise CollectiveMismatch(mismatch_text(texts, call.sequence, call.group), rank=self.rank)

    def _refuse_misread(self, operation: Operation, args: tuple[Any, ...]) -> None:
        what = misread(operation, args)
        if what:
            raise GroupError(
                f"rank {self.rank}: {operation.name} was given a tensor that is not contiguous: {what}\n"
                "gloo would read and write its storage as if it were: a wrong result, without an error\n"
                f"hand over a copy, and copy back what it holds: y = x.contiguous(); dist.{operation.name}(y, ...); x.copy_(y)"
            )

    def tell_freed(self, what: str, error: RuntimeError) -> None:
        """gloo's error is no failure of this rank's own when connections were shut, here or by a peer that was stopped too."""
        if self.was_shut or self.board.is_stopped(self.rank):
            raise Freed(f"freed from {what}: the cell was stopped") from error

    # -- waiting ------------------------------------------------------------------------------------------------------------------------

    def _wait_in_gloo(self, call: Call, wait: Callable[[], T], *, has_limit: bool) -> T:
        if not call.operation.is_point_to_point and not has_limit:
            self.outlast(call.work, call.text)
            return wait()
        return self._wait_for_message(call, wait)

    def outlast(self, work: Any, what: str) -> None:
        """Wait for a collective; one that gloo does not end when its connections are shut is left."""
        self.awake.wait(work.is_completed)
        if not leaving.outlast(work, self.wait_of_torch, should_leave=self._is_deaf):
            self._leave(what)

    def _wait_for_message(self, call: Call, wait: Callable[[], T]) -> T:
        """Wait for a large message, which may only be waited for once, in a thread that can be left; stops reach the main thread alone."""
        if call.num_bytes < _LARGE or threading.get_ident() != self.main_thread:
            return wait()
        self._helper = self._helper or leaving.Helper("message")
        with self.busy():  # a signal waits until it is known what was left
            try:
                return self._helper.aside(wait, should_leave=self._is_deaf)
            except leaving.Left:
                self._helper = None
                return self._leave(call.text)

    def _is_deaf(self) -> bool:
        """gloo would have raised by now."""
        return self._shut_at_s is not None and time.monotonic() - self._shut_at_s > _DEAF_S

    def _leave(self, what: str) -> NoReturn:
        self._left.update(c10d._world.pg_map)
        raise Freed(f"freed from {what}: the cell was stopped")

    def _blocking(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Mark a send or recv as one that its caller waits for: the operator itself cannot tell."""

        @functools.wraps(make)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._local.is_blocking = True
            began = time.monotonic_ns()
            try:
                self._local.call = self._local.work = None
                made = make(*args, **kwargs)
                self._take(self._local.call, made)
                if self._local.call is not None:
                    ended = time.monotonic_ns()
                    has_waited = make.__name__ == "send" or not self.is_checked  # a receive that is checked has waited on the board
                    self.board.amend(self.rank, self._local.call.row, waited_ns=ended - began if has_waited else None, end_ns=ended)
                for told in self._local.told:
                    told()
                return made
            except RuntimeError:
                if self.was_shut or self.board.is_stopped(self.rank):
                    raise Freed(f"freed from {make.__name__}: the cell was stopped") from None
                raise
            except KeyboardInterrupt:
                if self._local.work is not None:  # begun, not ended: gloo reads nothing more of a peer whose message has no place to go
                    self._unwaited.append(self._local.work)
                raise
            finally:
                self._local.is_blocking, self._local.work = False, None
                self._local.told = ()
                self.board.move(self.rank, AreaState.NOWHERE)

        return wrapped

    def _take(self, call: Call | None, source: int | None) -> None:
        """Count a message from any rank on the channel of the rank that it came from, as its sender did."""
        for rank, key in call.sources if call is not None else ():
            if rank == source and call is not None:
                self.board.begin(self.rank, key, Post.of(call.text, call.place, call.line), AreaState.NOWHERE)

    def _keep(self, work: Any) -> None:
        """Know a collective of gloo's until it has ended."""
        while self._begun and self._begun[0].is_completed():
            self._begun.popleft()
        self._begun.append(work)

    def remember(self, call: Call) -> None:
        """An asynchronous call has begun: its work is watched until somebody waits for it."""
        for work_id in [i for i, old in itertools.islice(self._in_flight.items(), 2) if old.work.is_completed()]:
            self._in_flight.pop(work_id, None)
        if len(self._in_flight) >= _MOST_IN_FLIGHT:
            self._in_flight.pop(next(iter(self._in_flight)), None)
        self._in_flight[id(call.work)] = call

    def _waiting(self, wait: Callable[..., bool]) -> Callable[..., bool]:
        @functools.wraps(wait)
        def wrapped(work: Any, *args: Any, **kwargs: Any) -> bool:
            call = self._in_flight.pop(id(work), None)
            if call is not None:
                with self.busy():
                    has_limit = bool(args or kwargs)
                    has_ended = not (has_limit or call.operation.is_point_to_point)  # by then: such a call is waited for in slices
                    is_done = self._wait(call, _yes if has_ended else lambda: wait(work, *args, **kwargs), has_limit=has_limit)
            elif self._local.is_blocking and self._local.call is not None:
                is_done = self._wait_for_message(self._local.call, lambda: wait(work, *args, **kwargs))
            else:
                is_done = wait(work, *args, **kwargs)
            for told in self._told_later.pop(id(work), (work, []))[1] if self._told_later else ():
                told()
            return is_done

        return wrapped

    def _wait_tensor(self, keyset: Any, tensor: torch.Tensor) -> torch.Tensor:
        """`wait_tensor` of functional collectives: the work is C++'s own, so the call is known by where its tensor lies."""

        def onward() -> torch.Tensor:
            waited: torch.Tensor = torch.ops._c10d_functional.wait_tensor.default.redispatch(keyset & _BELOW, tensor)
            return waited

        if not self._in_flight or tensor.device.type != "cpu":
            return onward()
        storage = tensor.untyped_storage().data_ptr()
        call = next((call for call in reversed(self._in_flight.values()) if storage in _storages(call.tensors)), None)
        if call is None:
            return onward()
        self._in_flight.pop(id(call.work), None)
        with self.busy():
            return self._wait(call, onward, has_limit=False)

    def _wait(self, call: Call, wait: Callable[[], T], *, has_limit: bool) -> T:
        """Wait for an asynchronous call, on the board as long as peers are missing; one with a time limit of its own waits in gloo."""
        is_on_board = self.is_checked and bool(call.peers or call.sources) and not has_limit
        state = AreaState.ON_BOARD if is_on_board else AreaState.LIMITED if has_limit else AreaState.IN_GLOO
        self.board.show(self.rank, call.key, call.sequence, state, call.place, call.line)
        began = arrived = time.monotonic_ns()
        try:
            if is_on_board:
                self._wait_on_board(call)
                arrived = time.monotonic_ns()
                self._compare(call, has_met=True)
                self.board.move(self.rank, AreaState.IN_GLOO)
            result = self._wait_in_gloo(call, wait, has_limit=has_limit)
            ended = time.monotonic_ns()
            self.board.amend(self.rank, call.row, waited_ns=(arrived if is_on_board else ended) - began, end_ns=ended)
            if call.sources:
                self._take(call, call.group.ranks[call.work._source_rank()])
            return result
        except Stopped:
            self.shut()  # gloo has begun this call: nothing else ends it
            self._keep(call.work)
            raise Freed(f"freed from {call.text}: the cell was stopped") from None
        except RuntimeError as error:
            self.tell_freed(call.text, error)
            raise
        finally:
            self.board.move(self.rank, AreaState.NOWHERE)
