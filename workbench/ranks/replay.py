"""One rank run again, alone, in this process: its cells for real, its peers from the tape.

    tape -> random states, threads, names -> the cell's own code -> each collective: checked against the tape, its outputs put in place

Plain debuggers work: the code runs in the caller's thread. Knows tapes and torch's operators. Starts no process and no engine.
"""

from __future__ import annotations

import argparse
import functools
import os
import pickle
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from workbench.errors import ReplayError
from workbench.ranks import tape
from workbench.ranks.cell import run_source
from workbench.ranks.channel import Packed, unpack
from workbench.ranks.current import Current, set_current
from workbench.ranks.intercept import dropped
from workbench.ranks.operations import OPERATIONS, Operation, inputs_of, remember_reduce_ops, tensors_in
from workbench.ranks.shown import text_of
from workbench.ranks.tape import CellEnd, CellStart, Collective, Outside, TapeReader, TapeStart

__all__ = ["Replayed", "replay"]


_TEST = '''"""Rank {rank} run again from its tape; every collective must be given what it was given when it was recorded."""

import workbench as wb


def test_rank_{rank}_replays() -> None:
    replayed = wb.replay({folder!r}, rank={rank})
    assert not replayed.is_cut_short
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A rank that was run again.

    Attributes:
        result: what the last recorded `cluster.run` returned on this rank, None where only cells were recorded.
        result_texts: repr of each recorded cell's last expression.
        collectives: what the rank took part in, in order.
        names: the rank's names afterwards.
        is_cut_short: the tape ends inside a cell (its rank was killed); the replay ran as far as it goes.
    """

    rank: int
    result: Any
    result_texts: tuple[str, ...]
    collectives: tuple[Collective, ...]
    names: dict[str, Any]
    is_cut_short: bool


class _EndOfTape(BaseException):
    """The tape goes no further; not an Exception, so that the code that is replayed cannot swallow it."""


def replay(folder: str | os.PathLike[str], *, rank: int, strict: bool = True) -> Replayed:
    """Run one recorded rank alone, bit for bit.

    Args:
        folder: what `cluster.record` was given.
        strict: refuse when versions or the processor's capability differ from the tape's; False goes on.

    Raises:
        ReplayError: no such tape, it is damaged, the environment differs, or the run diverged: then it says where, with both values.
    """
    reader = TapeReader(Path(folder), rank)
    start = reader.records[0]
    if strict:
        _check_environment(start)
    if dist.is_initialized():
        raise ReplayError(
            "this process is already a rank of a process group\nreplay in a process that is none, such as the notebook's kernel"
        )
    player = _Player(reader.records[1:])
    with _as_rank(start, player) as module:
        player.run(module)
    return Replayed(
        rank=rank,
        result=player.result,
        result_texts=tuple(player.result_texts),
        collectives=tuple(sorted((r for r in reader.records if isinstance(r, Collective)), key=lambda c: c.index)),
        names={k: v for k, v in vars(module).items() if not k.startswith("__")},
        is_cut_short=reader.is_cut_short or player.is_cut_short,
    )


def _check_environment(start: TapeStart) -> None:
    now = tape.environment()
    differing = [
        f"{name} {was} on the tape, {now['versions'].get(name)} here"
        for name, was in start.versions.items()
        if now["versions"].get(name) != was
    ]
    if start.cpu_capability != now["cpu_capability"]:
        differing.append(f"processor capability {start.cpu_capability} on the tape, {now['cpu_capability']} here")
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

    threads, is_deterministic, states = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), tape.random_states()
    torch.set_num_threads(start.num_threads)
    torch.use_deterministic_algorithms(start.is_deterministic)
    dist.init_process_group("fake", rank=start.rank, world_size=start.world_size, store=FakeStore())
    libraries = player.install()
    tape.set_player(player.outside)
    try:
        group = Group.from_process_group(_world(), name="world")
        here = Current(rank=start.rank, world_size=start.world_size, group=group, layout=pickle.loads(start.layout))
        set_current(here)
        module = ModuleType("__main__")
        vars(module).update({"rank": start.rank, "world_size": start.world_size, "group": group, "groups": here.groups})
        vars(module).update({"torch": torch, "dist": dist, "wb": workbench})
        vars(module).update({name: pickle.loads(data) for name, data in start.names.items()})
        main = sys.modules["__main__"]
        sys.modules["__main__"] = module  # what the rank's code finds as its own main module
        try:
            yield module
        finally:
            sys.modules["__main__"] = main
    finally:
        tape.set_player(None)
        set_current(None)
        for library in libraries:
            library._destroy()
        dist.destroy_process_group()
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(is_deterministic)
        tape.restore_random_states(states)


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
        cell.collectives = deque(sorted(cell.collectives, key=lambda c: c.index))
    return list(cells.values())


class _Player:
    """Walks along the tape: cells are run, collectives and outside calls are answered."""

    def __init__(self, records: list[Any]) -> None:
        self._cells = _cells(records)
        self._now = self._cells[0] if self._cells else None
        self._num_collectives = 0
        self.result: Any = None
        self.result_texts: list[str] = []
        self.is_cut_short = any(cell.end is None for cell in self._cells)

    def install(self) -> list[torch.library.Library]:
        remember_reduce_ops()
        libraries = []
        for name, operation in OPERATIONS.items():
            library = torch.library.Library("c10d", "IMPL")
            library.impl(name, functools.partial(self._collective, name, operation), "BackendSelect", with_keyset=True)
            libraries.append(library)
        return libraries

    def run(self, module: ModuleType) -> None:
        """Run every cell of the tape; one that failed when it was recorded fails here too, for the caller to see."""
        for cell in self._cells:
            self._now = cell
            tape.restore_random_states(cell.start.random_states)
            try:
                self._perform(cell.start, module)
            except _EndOfTape:
                return
            rest = [c.text for c in cell.collectives] or [o.label for o in cell.outsides]
            if rest:
                raise ReplayError(f"the replay diverged in cell {cell.start.cell}: it ended, where the tape goes on with {rest[0]}")

    def _perform(self, start: CellStart, module: ModuleType) -> None:
        if start.task == "source":
            self.result_texts.append(text_of(run_source(start.text, module, start.cell)))
        elif start.task == "push":
            vars(module).update(_value(start))
        elif start.task == "call":
            function, args, kwargs = _value(start)
            self.result = function(*args, **kwargs)

    def outside(self, label: str) -> Any:
        """What a call out of the rank brought."""
        assert self._now is not None
        if not self._now.outsides:
            self._stop_or_diverge(label)
        record = self._now.outsides.popleft()
        if record.label != label:
            raise ReplayError(f"the replay diverged in cell {record.cell}: it asks for {label}, where the tape has {record.label}")
        return pickle.loads(record.data)

    def _collective(self, name: str, operation: Operation, keyset: Any, *args: Any) -> Any:
        assert self._now is not None
        self._num_collectives += 1
        text = _full_text(operation, args)
        if not self._now.collectives:
            self._stop_or_diverge(text)
        record = self._now.collectives.popleft()
        if record.text != text:
            place = f"cell {record.cell}, line {record.line}" if record.line else f"cell {record.cell}"
            raise ReplayError(
                f"the replay diverged at collective {self._num_collectives} ({place}): it calls {text}, where the tape has {record.text}\n"
                "the code, its inputs or its random numbers are not those of the recording"
            )
        self._compare_inputs(record, inputs_of(operation, args))
        with torch.no_grad():
            for tensor, output in zip(tensors_in(args[0]), record.outputs, strict=True):
                tensor.copy_(output)
        return dropped(name, args)

    def _compare_inputs(self, record: Collective, given: list[torch.Tensor]) -> None:
        """What the rank gives must be what it gave, bit for bit."""
        for number, (now, then) in enumerate(zip(given, record.inputs, strict=True)):
            differs = _bits(now.detach().cpu()) != _bits(then)
            if not differs.any():
                continue
            first = int(differs.reshape(now.numel(), -1).any(dim=1).nonzero()[0])
            raise ReplayError(
                f"the replay diverged at collective {self._num_collectives}, {record.text} (cell {record.cell}, line {record.line}): "
                f"element {first} of tensor {number} is {now.reshape(-1)[first].item()!r}, on the tape {then.reshape(-1)[first].item()!r}\n"
                f"{int(differs.reshape(now.numel(), -1).any(dim=1).sum())} of {now.numel()} elements differ\n"
                "the code, its inputs or its random numbers are not those of the recording"
            )

    def _stop_or_diverge(self, asked: str) -> NoReturn:
        assert self._now is not None
        if self._now.end is None:
            raise _EndOfTape
        raise ReplayError(
            f"the replay diverged in cell {self._now.start.cell}: it asks for {asked}, where the tape has the end of the cell"
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that NaN equals itself and -0.0 does not equal 0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _full_text(operation: Operation, args: tuple[Any, ...]) -> str:
    text = operation.describe(args)
    if operation.name == "recv_any":
        return f"{text} from any rank"
    if not operation.is_point_to_point:
        return text
    peer = dist.get_process_group_ranks(dist.ProcessGroup.unbox(args[operation.group_at]))[args[2]]
    return f"{text} {'to' if operation.name == 'send' else 'from'} rank {peer}"


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
    for number, call in enumerate(replayed.collectives, start=1):
        print(f"{number:5d}  cell {call.cell}, line {call.line}: {call.text}")
    ended = (
        "the tape ends there: its rank was killed" if replayed.is_cut_short else "every collective gave and was given what the tape says"
    )
    print(f"rank {arguments.rank}: {len(replayed.collectives)} collectives replayed; {ended}")
    return 0
