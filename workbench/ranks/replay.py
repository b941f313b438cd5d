"""One rank run again, alone, in this process: its cells for real, its peers from the tape.

    tape -> random states, threads, names -> the cell's own code -> each collective: checked against the tape, its outputs put in place

Plain debuggers work: the code runs in the caller's thread. Knows tapes and torch's operators. Starts no process and no engine.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from workbench import errors
from workbench.errors import ReplayError
from workbench.ranks import tape
from workbench.ranks.cell import run_source
from workbench.ranks.channel import Packed, unpack
from workbench.ranks.current import Current, set_current
from workbench.ranks.difference import difference, differing_elements, is_same, short
from workbench.ranks.digest import digest_of
from workbench.ranks.forming import use_layout
from workbench.ranks.intercept import dropped
from workbench.ranks.leaving import Freed
from workbench.ranks.messages import Outcome, Task
from workbench.ranks.operations import OPERATIONS, Operation, inputs_of, remember_reduce_ops, tensors_in, with_peer
from workbench.ranks.shown import text_of
from workbench.ranks.snapshot import changed_files, restore_names
from workbench.ranks.steady import steady_pickles
from workbench.ranks.tape import CellEnd, CellStart, Collective, Outside, TapeReader, TapeStart
from workbench.ranks.wire import signing_with, unseal

__all__ = ["Replayed", "replay"]

_WHY = "the code, its inputs or its random numbers are not those of the recording"

C = TypeVar("C", Collective, Outside)

_TEST = '''"""Rank {rank} run again from its tape; every collective must be given what it was given when it was recorded."""

import workbench as wb


def test_rank_{rank}_replays() -> None:
    replayed = wb.replay({folder!r}, rank={rank})
    assert not replayed.is_cut_short and not replayed.differing_results
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A rank that was run again.

    Attributes:
        result: what the last recorded `cluster.run` returned on this rank, None where only cells were recorded.
        result_texts: repr of each recorded cell's last expression.
        collectives: what the rank took part in, in order.
        outsides: its calls out of the world, in order: what engines and stateless groups brought.
        names: the rank's names afterwards.
        is_cut_short: the tape ends inside a cell (its rank was killed, or the tape was full); the replay ran as far as it goes.
        freed_from: the call in which the rank waited when its last cell was stopped, "" where it was not.
        differing_results: results of cells that are not, bit for bit, those of the tape, though all collectives were; often times of day.
    """

    rank: int
    result: Any
    result_texts: tuple[str, ...]
    collectives: tuple[Collective, ...]
    names: dict[str, Any] = field(repr=False)
    is_cut_short: bool
    freed_from: str = ""
    differing_results: tuple[str, ...] = ()
    outsides: tuple[Outside, ...] = ()


class _EndOfTape(BaseException):
    """The tape goes no further; not an Exception, so that the code that is replayed cannot swallow it."""


def replay(folder: str | os.PathLike[str], *, rank: int, strict: bool = True) -> Replayed:
    """Run one recorded rank alone, bit for bit: its cells in order, in this thread, so that `breakpoint()` works in them.

    A cell that raised when it was recorded raises here too: the last one for the caller to see, earlier ones in passing.

    Args:
        folder: what `cluster.record` was given, or `cluster.last_tape`.
        strict: refuse when versions, the processor's capability or the user's own modules differ from the tape's; False goes on.

    Raises:
        ReplayError: no such tape, it is damaged, the environment differs, or the run diverged: then it says where, with both values.
    """
    reader = TapeReader(Path(folder), rank)
    start = reader.records[0]
    if strict:
        _check_environment(start, reader.records)
    if dist.is_initialized():
        raise ReplayError(
            "this process is already a rank of a process group\nreplay in a process that is none, such as the notebook's kernel"
        )
    player = _Player(reader.records[1:], start.unkept)
    with signing_with(start.key), _as_rank(start, player) as module:
        player.run(module)
    return Replayed(
        rank=rank,
        result=player.result,
        result_texts=tuple(player.result_texts),
        collectives=_in_order(reader.records, Collective),
        outsides=_in_order(reader.records, Outside),
        names={k: v for k, v in vars(module).items() if not k.startswith("__")},
        is_cut_short=reader.is_cut_short or player.is_cut_short,
        freed_from=player.freed_from,
        differing_results=tuple(player.differing_results),
    )


def _in_order(records: Iterable[Any], kind: type[C]) -> tuple[C, ...]:
    """Calls by when they were begun; they are written when they have ended."""
    return tuple(sorted((record for record in records if isinstance(record, kind)), key=lambda call: call.index))


def _check_environment(start: TapeStart, records: Sequence[Any]) -> None:
    now = tape.environment()
    differing = [
        f"{name} {was} on the tape, {now['versions'].get(name)} here"
        for name, was in start.versions.items()
        if now["versions"].get(name) != was
    ]
    if start.cpu_capability != now["cpu_capability"]:
        differing.append(f"processor capability {start.cpu_capability} on the tape, {now['cpu_capability']} here")
    files = dict(start.files)
    for record in records:
        files |= record.files if isinstance(record, CellEnd) else {}
    differing += [f"{told} since it was recorded" for told in changed_files(files)]
    if differing:
        raise ReplayError(
            f"the tape of rank {start.rank} cannot be replayed bit for bit: {'; '.join(differing)}\nstrict=False tries all the same"
        )


@contextmanager
def _as_rank(start: TapeStart, player: _Player) -> Iterator[ModuleType]:
    """This process as that rank: threads, a process group without peers, the operators, the names."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import workbench
    from workbench.ranks.group import Group

    before, states = tape.environment(), tape.random_states()
    _set_flags(start.num_threads, start.is_deterministic, start.default_dtype)
    make_group = c10d._new_process_group_helper
    c10d._new_process_group_helper = _without_peers(make_group)
    dist.init_process_group("fake", rank=start.rank, world_size=start.world_size, store=FakeStore())
    libraries = player.install()
    sources_of_torch = {name: getattr(dist.Work, name) for name in ("source_rank", "_source_rank")}
    for name in sources_of_torch:
        setattr(dist.Work, name, lambda work: player.source_of(work))
    tape.set_player(player.outside)
    steady_pickles(True)
    try:
        group = Group.from_process_group(_world(), name="world")
        here = Current(rank=start.rank, world_size=start.world_size, group=group, layout=pickle.loads(start.layout))
        set_current(here)
        module = ModuleType("__main__")
        vars(module).update({"rank": start.rank, "world_size": start.world_size, "group": group, "groups": here.groups})
        vars(module).update({"torch": torch, "dist": dist, "wb": workbench})
        main, path = sys.modules["__main__"], list(sys.path)
        sys.modules["__main__"] = module  # what the rank's code finds as its own main module
        sys.path += [entry for entry in start.path if entry not in sys.path]
        try:
            with player.off_tape():
                if start.has_layout:
                    use_layout(here.layout)
                if start.names:
                    _restore(start, vars(module))
            yield module
        finally:
            sys.modules["__main__"] = main
            sys.path[:] = path
    finally:
        tape.set_player(None)
        steady_pickles(False)
        set_current(None)
        for library in libraries:
            library._destroy()
        for name, source_of_torch in sources_of_torch.items():
            setattr(dist.Work, name, source_of_torch)
        dist.destroy_process_group()
        c10d._new_process_group_helper = make_group
        _set_flags(before["num_threads"], before["is_deterministic"], before["default_dtype"])
        tape.restore_random_states(states)


def _restore(start: TapeStart, namespace: dict[str, Any]) -> None:
    try:
        restore_names(start.names, namespace)
    except Exception as error:  # unpickling runs the classes' own code
        raise ReplayError(
            f"the names that earlier cells had left on rank {start.rank} cannot be made here: {type(error).__name__}: {error}\n"
            "replay where the recording ran, with the same modules at the same place"
        ) from error


def _without_peers(make: Callable[..., Any]) -> Callable[..., Any]:
    """Have groups that the rank's code makes, of whatever backend, be made without connections."""

    @functools.wraps(make)
    def helper(group_size: int, group_rank: int, ranks: Sequence[int], backend: Any, *args: Any, **kwargs: Any) -> Any:
        return make(group_size, group_rank, ranks, "fake", *args, **kwargs)

    return helper


def _set_flags(num_threads: int, is_deterministic: bool, default_dtype: str) -> None:
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(is_deterministic)
    torch.set_default_dtype(getattr(torch, default_dtype))


def _world() -> Any:
    return dist.group.WORLD


@dataclass(slots=True)
class _Cell:
    """One recorded cell, with what it was given, in order."""

    start: CellStart
    collectives: deque[Collective]
    outsides: deque[Outside]
    end: CellEnd | None = None


def _cells(records: list[Any]) -> list[_Cell]:
    cells: dict[int, _Cell] = {}
    for record in records:
        if isinstance(record, CellStart):
            cells[record.cell] = _Cell(record, deque(), deque())
        elif isinstance(record, Collective):
            cells[record.cell].collectives.append(record)
        elif isinstance(record, Outside):
            cells[record.cell].outsides.append(record)
        elif isinstance(record, CellEnd):
            cells[record.cell].end = record
    for cell in cells.values():
        cell.collectives = deque(_in_order(cell.collectives, Collective))
        cell.outsides = deque(_in_order(cell.outsides, Outside))
    return list(cells.values())


class _Player:
    """Walks along the tape: cells are run, collectives and outside calls are answered."""

    def __init__(self, records: list[Any], unkept: dict[str, str]) -> None:
        self._cells = _cells(records)
        self._now = self._cells[0] if self._cells else None
        self._unkept = unkept
        self._num_collectives = 0
        self._is_on_tape = True
        self._heard: dict[int, int] = {}  # where a received tensor lies -> who sent it, -1 where the call named the sender
        self._raised: BaseException | None = None  # what the tape had a call raise last
        self._divergence: ReplayError | None = None
        self.result: Any = None
        self.result_texts: list[str] = []
        self.is_cut_short = any(cell.end is None for cell in self._cells)
        self.freed_from = ""
        self.differing_results: list[str] = []

    def install(self) -> list[torch.library.Library]:
        remember_reduce_ops()
        libraries = []
        for name, operation in OPERATIONS.items():
            library = torch.library.Library("c10d", "IMPL")
            library.impl(name, functools.partial(self._collective, name, operation), "BackendSelect", with_keyset=True)
            libraries.append(library)
        return libraries

    @contextmanager
    def off_tape(self) -> Iterator[None]:
        """While groups and names are put back: what that calls was done before the recording began."""
        self._is_on_tape = False
        try:
            yield
        finally:
            self._is_on_tape = True

    def run(self, module: ModuleType) -> None:
        """Run every cell of the tape; one that failed when it was recorded fails here too, the last one for the caller to see."""
        for cell in self._cells:
            self._now = cell
            tape.restore_random_states(cell.start.random_states)
            try:
                text, value = self._perform(cell.start, module)
            except _EndOfTape:
                return
            except BaseException as error:
                self._tell_divergence()
                self._check_failure(cell, error)
                if cell is self._cells[-1] and not isinstance(error, Freed):
                    raise
            else:
                self._tell_divergence()
                self._check_end(cell, text, value)

    def _diverge(self, how: str) -> NoReturn:
        self._divergence = self._divergence or ReplayError(f"the replay diverged {how}\n{_WHY}")
        raise self._divergence

    def _tell_divergence(self) -> None:
        """The first one ends the replay, also where the cell's own code caught it."""
        if self._divergence is not None:
            raise self._divergence

    def _check_failure(self, cell: _Cell, error: BaseException) -> None:
        """A cell raised: it must have done so when it was recorded."""
        end = cell.end
        if end is None or isinstance(error, Freed):
            return
        if error is self._raised and end.outcome == Outcome.FREED:
            return  # the stop of the others came first
        told = f"{type(error).__name__}: {error}"
        name = getattr(error, "name", None) or ""
        if isinstance(error, (NameError, AttributeError)) and name in self._unkept:
            raise ReplayError(
                f"cell {cell.start.cell} reads {name!r}, which the tape does not hold: it was bound before the tape began\n"
                f"it could not be kept: {self._unkept[name]}\nbegin recording before the cell that binds {name!r}"
            ) from error
        if end.outcome != Outcome.RAISED or end.error.partition(":")[0] != type(error).__name__:
            then = f"raised {end.error}" if end.outcome == Outcome.RAISED else f"ended as {end.outcome}"
            raise ReplayError(f"the replay diverged in cell {cell.start.cell}: it raised {told}, where the recorded one {then}") from error

    def _check_end(self, cell: _Cell, text: str, value: Any) -> None:
        """A cell ended well: so must the recorded one, with the same result."""
        number = cell.start.cell
        rest = [c.text for c in cell.collectives] or [o.label for o in cell.outsides]
        if rest:
            raise ReplayError(f"the replay diverged in cell {number}: it ended, where the tape goes on with {rest[0]}")
        if cell.end is None or cell.end.outcome == Outcome.FREED:
            return  # killed or stopped behind its last collective
        if cell.end.outcome == Outcome.RAISED:
            raise ReplayError(f"the replay diverged in cell {number}: it ended well, where the recorded one raised {cell.end.error}")
        now = digest_of(value).value
        if cell.end.digest and now != cell.end.digest:  # told, not raised: a result may be a time of day
            then = cell.end.result_text or "another value"
            self.differing_results.append(
                f"cell {number}: {text or short(value)} (hash {now or 'none'}), on the tape {then} (hash {cell.end.digest})"
            )

    def _perform(self, start: CellStart, module: ModuleType) -> tuple[str, Any]:
        """Run a cell: the text and value of its result."""
        names = vars(module)
        if start.task == Task.SOURCE:
            value = run_source(start.text, module, start.cell)
            text = text_of(value)
            self.result_texts.append(text)
            return text, value
        if start.task == Task.PUSH:
            names.update(_value(start))
            return "", None
        if start.task == Task.PULL:
            return "", eval(start.text, names)
        function, args, kwargs = _value(start)
        self.result = function(*args, **kwargs)
        return "", self.result

    def outside(self, label: str, given: bytes) -> Any:
        """What a call out of the rank brought, or raised."""
        assert self._now is not None
        if not self._now.outsides:
            self._stop_or_diverge(label, label)
        record = self._now.outsides.popleft()
        if record.label != label:
            self._diverge(f"in {_place(record)}: it asks for {label}, where the tape has {record.label}")
        self._compare_given(record, given)
        brought = pickle.loads(record.data)
        if record.is_error:
            self._raised = brought
            raise brought
        return brought

    def _compare_given(self, record: Outside, given: bytes) -> None:
        """The object that the rank gives must be the one that it gave: as a pickle, or, as the order of a set is no content, by content."""
        if given == record.given:
            return
        now, then = (unseal(torch.frombuffer(bytearray(data), dtype=torch.uint8)) for data in (given, record.given))
        if not is_same(now, then):
            self._diverge(f"at {record.label} ({_place(record)}): {difference(now, then)}")

    def _collective(self, name: str, operation: Operation, keyset: Any, *args: Any) -> Any:
        assert self._now is not None
        text = with_peer(operation, args)
        if not self._is_on_tape:
            return dropped(name, args)
        self._num_collectives += 1
        if not self._now.collectives:
            self._stop_or_diverge(text, operation.name)
        record = self._now.collectives.popleft()
        if record.text != text:
            self._diverge(f"at collective {self._num_collectives} ({_place(record)}): it calls {text}, where the tape has {record.text}")
        self._compare_inputs(record, inputs_of(operation, args))
        with torch.no_grad():
            for tensor, output in zip(tensors_in(args[0]), record.outputs, strict=True):
                tensor.copy_(output)
                self._heard[tensor.data_ptr()] = record.source
        return dropped(name, args)

    def source_of(self, work: Any) -> int:
        """Whom a receive from any has heard; its work stands for gloo's, which would know."""
        return self._heard[work.get_future().value()[0].data_ptr()]

    def _compare_inputs(self, record: Collective, given: list[torch.Tensor]) -> None:
        """What the rank gives must be what it gave, bit for bit."""
        for number, (now, then) in enumerate(zip(given, record.inputs, strict=True)):
            if differing_elements(now, then) is not None:
                what = difference(now, then, f"tensor {number}")
                self._diverge(f"at collective {self._num_collectives}, {record.text} ({_place(record)}): {what}")

    def _stop_or_diverge(self, asked: str, op: str = "") -> NoReturn:
        """The cell asks for more than its tape holds."""
        assert self._now is not None
        end = self._now.end
        if end is None:
            raise _EndOfTape
        if op and end.unfinished == op:
            if end.outcome == Outcome.FREED:
                self.freed_from = asked if self._now is self._cells[-1] else ""
                raise Freed(f"freed from {asked}: the cell was stopped when it was recorded")
            raise _as_recorded(end.error)
        self._diverge(f"in cell {self._now.start.cell}: it asks for {asked}, where the tape has the end of the cell")


def _as_recorded(told: str) -> Exception:
    """What a collective itself raised when it was recorded."""
    kind, _, message = told.partition(": ")
    found = getattr(errors, kind, None) or getattr(builtins, kind, None)
    return found(message) if isinstance(found, type) and issubclass(found, Exception) else RuntimeError(told)


def _place(record: Collective | Outside) -> str:
    return f"cell {record.cell}, line {record.line}" if record.line else f"cell {record.cell}"


def _value(start: CellStart) -> Any:
    data, *buffers = start.value
    return unpack(Packed(data, tuple(bytearray(b) for b in buffers)))


def main(argv: Sequence[str]) -> int:
    """`workbench replay DIR --rank K [--pytest FILE]`."""
    parser = argparse.ArgumentParser(prog="workbench replay", description="Run one recorded rank again, alone, in this process.")
    parser.add_argument("folder", help="what cluster.record was given")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--pytest", metavar="FILE", help="write a test that replays it")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.folder).resolve()
    if arguments.pytest:
        TapeReader(folder, arguments.rank)
        Path(arguments.pytest).write_text(_TEST.format(rank=arguments.rank, folder=str(folder)))
        print(f"{arguments.pytest} replays rank {arguments.rank} of {folder}")
        return 0
    replayed = replay(folder, rank=arguments.rank)
    calls: list[Collective | Outside] = [*replayed.collectives, *replayed.outsides]
    for number, call in enumerate(sorted(calls, key=lambda call: call.index), start=1):
        print(f"{number:5d}  {_place(call)}: {call.text if isinstance(call, Collective) else call.label}")
    ended = "the tape ends there: its rank was killed" if replayed.is_cut_short else "every call gave and was given what the tape says"
    if replayed.freed_from:
        ended = f"it waited in {replayed.freed_from} when its cell was stopped"
    for told in replayed.differing_results:
        print(f"a result differs in {told}")
    outsides = f" and {len(replayed.outsides)} calls out of the world" if replayed.outsides else ""
    print(f"rank {arguments.rank}: {len(replayed.collectives)} collectives{outsides} replayed; {ended}")
    return 0
