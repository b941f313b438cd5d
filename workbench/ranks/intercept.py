"""One interception point for every collective of a rank: plain `dist.*`, accelerate, DDP's reducer, functional collectives.

    user code -> c10d operator -> here: post on the board, wait for peers, compare -> gloo -> note in the ledger

Blocking collectives wait on the board, where a stop reaches them without harm. Asynchronous ones are posted and compared but do not wait
(their order against point-to-point calls is the user's business), but for those of the autograd engine, whose order is the same on all
ranks.

Knows torch, groups and generations of this rank. Does not know the driver: it is given what to call.
"""

from __future__ import annotations

import functools
import linecache
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from workbench.errors import CollectiveMismatch, StaleGroupError
from workbench.ranks import sockets
from workbench.ranks.board import AreaState, Board, Stopped
from workbench.ranks.operations import OPERATIONS, Operation, num_bytes, remember_reduce_ops

__all__ = ["Freed", "Interceptor", "KnownGroup"]

# A layer above the backends' that torch leaves empty and that every call passes, inference mode included. The backend's own kernel stays
# in place and is reached by redispatch, which gives up the GIL: held there, it deadlocks with a gloo thread that lets go of a finished
# collective's tensors.
_LAYER = "BackendSelect"
_BELOW = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)
_INDEX = {name: index for index, name in enumerate(OPERATIONS)}
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_NOT_USER_CODE = (os.path.dirname(torch.__file__) + os.sep, _PACKAGE, "<frozen", "<string>")


class Freed(KeyboardInterrupt):
    """This rank was freed from a collective because its cell was stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownGroup:
    """A process group that the interceptor watches.

    Attributes:
        key: the group's name on the board: the same number on all members, another one in each generation.
        ranks: global ranks, in group order.
        process_group: held for good, so that torch's object keeps its identity also when it is stale.
    """

    key: int
    name: str
    ranks: tuple[int, ...]
    generation: int
    process_group: Any
    connections: frozenset[sockets.Connection]


class Interceptor:
    """Puts itself between torch and gloo in this process; one a process, for good."""

    def __init__(self, *, rank: int, board: Board, is_checked: bool, announce: Callable[[KnownGroup], None]) -> None:
        self.rank = rank
        self.board = board
        self.generation = 0
        self.is_checked = is_checked
        self.is_interrupt_pending = False
        self.is_busy = False  # the main thread is in a collective: a signal must wait
        self.was_shut = False  # gloo connections of this generation were shut
        self._announce = announce
        self._groups: dict[int, KnownGroup] = {}
        self._channels: set[int] = set()
        self._internal = 0
        self._local = threading.local()
        self._main = threading.get_ident()
        self._libraries: list[torch.library.Library] = []

    def install(self) -> None:
        """Take over the operators and the making of groups."""
        remember_reduce_ops()
        for name, operation in OPERATIONS.items():
            library = torch.library.Library("c10d", "IMPL")
            library.impl(name, functools.partial(self._collective, name, operation), _LAYER, with_keyset=True)
            self._libraries.append(library)
        c10d._new_process_group_helper = self._making_groups(c10d._new_process_group_helper)
        for name in ("send", "recv"):
            wrapped = self._blocking(getattr(c10d, name))
            setattr(c10d, name, wrapped)
            setattr(dist, name, wrapped)

    @contextmanager
    def engine_groups(self) -> Iterator[None]:
        """Groups made inside belong to an engine: they are neither watched nor shut."""
        self._internal += 1
        try:
            yield
        finally:
            self._internal -= 1

    def shut(self) -> int:
        """Shut this generation's gloo connections: a wait inside gloo raises within milliseconds.

        Returns:
            How many were shut.
        """
        self.was_shut = True
        mine = [g for g in list(self._groups.values()) if g.generation == self.generation]
        return sockets.shut(connection for group in mine for connection in group.connections)

    def begin_generation(self, generation: int) -> None:
        self.generation = generation
        self.was_shut = False
        self._channels.clear()
        self.board.reset(self.rank)

    def group_of(self, process_group: Any) -> KnownGroup | None:
        return self._groups.get(id(process_group))

    # -- groups -------------------------------------------------------------------------------------------------------------------------

    def _making_groups(self, make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def helper(*args: Any, **kwargs: Any) -> Any:
            before = sockets.connections()
            made = make(*args, **kwargs)
            process_group = made[0] if isinstance(made, tuple) else made
            if isinstance(process_group, dist.ProcessGroup) and not self._internal:
                self._learn(process_group, args, kwargs, sockets.connections() - before)
            return made

        return helper

    def _learn(self, process_group: Any, args: tuple[Any, ...], kwargs: dict[str, Any], new: frozenset[sockets.Connection]) -> None:
        ranks = tuple(kwargs.get("global_ranks_in_group", args[2] if len(args) > 2 else ())) or tuple(range(process_group.size()))
        description = kwargs.get("group_desc") or process_group.group_desc
        name = (
            "world"
            if description == "default_pg"
            else str(description if description not in (None, "", "undefined") else process_group.group_name)
        )
        key = _key(f"{self.generation}:{process_group.group_name}:{ranks}")
        group = KnownGroup(key=key, name=name, ranks=ranks, generation=self.generation, process_group=process_group, connections=new)
        self._groups[id(process_group)] = group
        self._announce(group)

    # -- collectives --------------------------------------------------------------------------------------------------------------------

    def _blocking(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Mark a send or recv as one that its caller waits for: the operator itself cannot tell."""

        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._local.is_blocking = True
            try:
                return call(*args, **kwargs)
            except RuntimeError:
                if self.was_shut:
                    raise Freed(f"freed from {call.__name__}: the cell was stopped") from None
                raise
            finally:
                self._local.is_blocking = False
                self.board.move(self.rank, AreaState.NOWHERE)

        return wrapped

    def _collective(self, name: str, operation: Operation, keyset: Any, *args: Any) -> Any:
        onward = getattr(torch.ops.c10d, name).default.redispatch
        group = self._groups.get(id(dist.ProcessGroup.unbox(args[operation.group_at])))
        if group is None:
            return onward(keyset & _BELOW, *args)
        self._refuse_stale(group, operation)
        is_main = threading.get_ident() == self._main
        was_busy, self.is_busy = self.is_busy, self.is_busy or is_main
        try:
            return self._run(name, operation, group, args, lambda: onward(keyset & _BELOW, *args))
        finally:
            self.is_busy = was_busy
            if is_main and self.is_interrupt_pending and not was_busy:
                self.is_interrupt_pending = False
                raise KeyboardInterrupt

    def _refuse_stale(self, group: KnownGroup, operation: Operation) -> None:
        if group.generation != self.generation:
            raise StaleGroupError(
                f"rank {self.rank}: {operation.name} was called on group {group.name!r} of ranks {list(group.ranks)}, "
                f"which belongs to generation {group.generation}\n"
                f"the ranks are at generation {self.generation}: a stop found ranks inside gloo, and their connections were closed\n"
                "make it again: dist.new_group(...) for a group of your own, DistributedDataParallel(model.module) for a wrapped model; "
                "wb.Group handles and the layout in use follow by themselves"
            )

    def _run(self, name: str, operation: Operation, group: KnownGroup, args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        frame, calls_from_autograd = _user_frame()
        text = operation.describe(args)
        if operation.is_point_to_point:
            key, peers, text = self._channel(operation, group, args, text)
            waits = operation.name == "recv" and getattr(self._local, "is_blocking", False)
            is_blocking = getattr(self._local, "is_blocking", False)
        else:
            key, peers = group.key, tuple(r for r in group.ranks if r != self.rank)
            is_blocking = not operation.is_async(args)
            waits = is_blocking or calls_from_autograd
        line, place = _place(frame, text)
        started = time.monotonic_ns()
        state = AreaState.ON_BOARD if waits and self.is_checked else AreaState.IN_GLOO
        sequence = self.board.begin(self.rank, key, text.encode(), state, place, line)
        if self.is_checked:
            self._meet(operation, key, sequence, text, peers, group, waits=waits)
        arrived = time.monotonic_ns()
        self.board.move(self.rank, AreaState.IN_GLOO)
        try:
            out = call()
            if is_blocking and not operation.is_point_to_point:  # gloo hangs when a send or recv is waited for twice
                dist.Work.unbox(out[-1] if isinstance(out, tuple) else out).wait()
        except RuntimeError:
            if self.was_shut:
                raise Freed(f"freed from {text}: the cell was stopped") from None
            raise
        finally:
            if not (is_blocking and operation.is_point_to_point):
                self.board.move(self.rank, AreaState.NOWHERE)
        row = (_INDEX[name], key, sequence, num_bytes(args), started, arrived, time.monotonic_ns(), self.board.cell(self.rank) << 20 | line)
        self.board.note(self.rank, row)
        return out

    def _channel(self, operation: Operation, group: KnownGroup, args: tuple[Any, ...], text: str) -> tuple[int, Sequence[int], str]:
        """The directed channel of a send or recv: counted on both ends like a group of its own."""
        peer = group.ranks[args[2]]
        source, target = (self.rank, peer) if operation.name == "send" else (peer, self.rank)
        key = _key(f"{group.key}:{source}>{target}:{args[3]}")
        if key not in self._channels:
            self._channels.add(key)
            name = f"{source} to {target} in {group.name}"
            self._announce(
                KnownGroup(
                    key=key, name=name, ranks=(source, target), generation=group.generation, process_group=None, connections=frozenset()
                )
            )
        return key, (() if operation.name == "send" else (source,)), f"{text} {'to' if operation.name == 'send' else 'from'} rank {peer}"

    def _meet(
        self, operation: Operation, key: int, sequence: int, text: str, peers: Sequence[int], group: KnownGroup, *, waits: bool
    ) -> None:
        """Wait for the peers, then compare what each is about to do."""
        try:
            while True:
                if waits:
                    self.board.wait(self.rank, key, sequence, peers, self._is_stopped)
                if not operation.is_point_to_point and not self.board.is_same(key, sequence, text.encode(), peers):
                    raise CollectiveMismatch(self._mismatch(key, sequence, group), rank=self.rank)
                if not waits or self.board.has_arrived(key, sequence, peers):
                    return  # else a peer met a mismatch and went back between our wait and our look
        except Stopped:
            self.board.take_back(self.rank, key)
            raise Freed(f"freed from {text}: the cell was stopped") from None
        except BaseException:
            self.board.take_back(self.rank, key)
            raise

    def _is_stopped(self) -> bool:
        return self.is_interrupt_pending or self.board.is_stopped(self.rank)

    def _mismatch(self, key: int, sequence: int, group: KnownGroup) -> str:
        texts = self.board.texts(key, sequence, group.ranks)
        by_text: dict[str, list[int]] = {}
        for rank, text in texts.items():
            by_text.setdefault(text, []).append(rank)
        rarest_first = sorted(by_text.items(), key=lambda item: (len(item[1]), item[1][::-1]))
        odd_text, odd_ranks = rarest_first[0]
        lines = [
            f"ranks met in collective #{sequence} of group {group.name!r} with different operations: "
            f"{_ranks(odd_ranks)} called {odd_text}, {_ranks(rarest_first[-1][1])} called {rarest_first[-1][0]}",
            *(f"  {_ranks(ranks):<20} {text}" for text, ranks in rarest_first),
            "every rank of a group must make the same calls in the same order, with the same shape, dtype, reduce op and root",
        ]
        return "\n".join(lines)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))


def _key(text: str) -> int:
    """A positive 62-bit number, the same in every process."""
    data = text.encode()
    return (zlib.crc32(data) << 30 | zlib.crc32(data[::-1] + b"?") >> 2) or 1


def _user_frame() -> tuple[FrameType | None, bool]:
    """Innermost frame of user code, and whether the autograd engine made the call."""
    frame: FrameType | None = sys._getframe(3)
    calls_from_autograd = False
    innermost = True
    while frame is not None:
        name = frame.f_code.co_filename
        if innermost and not name.startswith(_PACKAGE):
            calls_from_autograd = frame.f_code.co_name == "_engine_run_backward"
            innermost = False
        if not name.startswith(_NOT_USER_CODE):
            return frame, calls_from_autograd
        frame = frame.f_back
    return None, calls_from_autograd


def _place(frame: FrameType | None, text: str) -> tuple[int, bytes]:
    if frame is None:
        return 0, text.encode()
    line = frame.f_lineno
    source = linecache.getline(frame.f_code.co_filename, line).strip()
    return line, f"{text}\0{source}".encode()
