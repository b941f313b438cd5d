"""A tape: what one rank was given from outside, in order: cells, seeds, what its collectives and engine calls brought.

    start | cell | collective | collective | outside | cell's end | cell | ...        each a frame: length, checksum, pickle

Every frame is written out as soon as it is complete, so a tape survives a kill -9 of its rank up to the last finished collective. Knows
frames and tensors. Does not know how a rank runs, nor how a tape is played."""

from __future__ import annotations

import os
import pickle
import platform
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import numpy as np
import torch

import workbench
from workbench.errors import ReplayError
from workbench.ranks.channel import Packed
from workbench.ranks.operations import Operation, inputs_of

__all__ = [
    "CellEnd",
    "CellStart",
    "Collective",
    "Outside",
    "TapeReader",
    "TapeStart",
    "TapeWriter",
    "set_player",
    "set_writer",
    "through_tape",
]

_FRAME = struct.Struct("<QI")
_MAGIC = b"workbench tape 1\n"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TapeStart:
    """The rank and what its results depend on.

    Attributes:
        names: cloudpickle of what earlier cells had left, name by name; `unkept` could not be pickled.
    """

    rank: int
    world_size: int
    versions: dict[str, str]
    num_threads: int
    cpu_capability: str
    is_deterministic: bool
    layout: bytes
    names: dict[str, bytes] = field(default_factory=dict)
    unkept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CellStart:
    """A cell and the random states before it; `value` is the pickle that came with it."""

    cell: int
    task: str
    text: str
    value: tuple[bytes, ...]
    random_states: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """A finished collective or point-to-point call: what was asked, what the rank gave, and what its tensors held afterwards.

    Attributes:
        index: its number by when it was begun; an asynchronous receive is written when it was waited for.
    """

    cell: int
    index: int
    op: str
    text: str
    line: int
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What a call out of the rank (an engine's completions) brought; `data` is its pickle."""

    cell: int
    label: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CellEnd:
    cell: int
    outcome: str
    result_text: str
    error: str


def environment() -> dict[str, Any]:
    """What results depend on, in this process now."""
    return {
        "versions": {
            "workbench": workbench.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "is_deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def random_states() -> bytes:
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state()))


def restore_random_states(data: bytes) -> None:
    python, numpy, torch_state = pickle.loads(data)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torch_state)


class TapeWriter:
    """Appends frames; also the hook by which the interceptor tells of finished collectives."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        os.write(self._file, _MAGIC)
        self._num_calls = 0
        self._cell = 0
        self._inputs: tuple[torch.Tensor, ...] = ()

    def write(self, record: Any) -> None:
        data = cloudpickle.dumps(record)
        os.writev(self._file, [_FRAME.pack(len(data), zlib.crc32(data)), data])

    def start(self, *, rank: int, world_size: int, layout: Any, names: dict[str, Any]) -> None:
        kept: dict[str, bytes] = {}
        unkept: list[str] = []
        for name, value in names.items():
            try:
                kept[name] = cloudpickle.dumps(value)
            except Exception:
                unkept.append(name)
        self.write(
            TapeStart(rank=rank, world_size=world_size, layout=cloudpickle.dumps(layout), names=kept, unkept=tuple(unkept), **environment())
        )

    def begin_cell(self, cell: int, task: str, text: str, value: Packed | None) -> None:
        self._cell = cell
        parts = () if value is None else (bytes(value.data), *(bytes(buffer) for buffer in value.buffers))
        self.write(CellStart(cell=cell, task=task, text=text, value=parts, random_states=random_states()))

    def end_cell(self, outcome: str, result_text: str, error: str) -> None:
        self.write(CellEnd(cell=self._cell, outcome=outcome, result_text=result_text, error=error))

    def outside(self, label: str, value: Any) -> None:
        self.write(Outside(cell=self._cell, label=label, data=cloudpickle.dumps(value)))

    def before(self, operation: Operation, args: tuple[Any, ...]) -> bool:
        """Keep what the rank is about to give: the call may write over it."""
        self._inputs = tuple(t.detach().cpu().clone() for t in inputs_of(operation, args))
        return False

    def begun(self, op: str, text: str, line: int, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Keep what a call gave, under the number at which it was begun."""
        cell, index, inputs = self._cell, self._num_calls, self._inputs
        self._num_calls += 1

        def write() -> None:
            outputs = tuple(t.detach().cpu().clone() for t in tensors)
            self.write(Collective(cell=cell, index=index, op=op, text=text, line=line, inputs=inputs, outputs=outputs))

        return write

    def close(self) -> None:
        os.close(self._file)


class TapeReader:
    """Reads one rank's tape.

    Raises:
        ReplayError: no tape, one of somebody else's, damaged, or of another format. A tape whose end is missing is read up to there.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"rank-{rank}.tape"
        if not self.path.is_file():
            held = sorted(p.name for p in folder.glob("rank-*.tape")) if folder.is_dir() else []
            raise ReplayError(
                f"{folder} has no tape of rank {rank}\nit holds {', '.join(held) or 'no tapes'}\nrecord one: with cluster.record(dir): ..."
            )
        found = self.path.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise ReplayError(
                f"{self.path} belongs to another user or can be written by others\na tape runs code: own it, and chmod 600 it"
            )
        self.is_cut_short = False
        self.records = list(self._read())
        if not self.records or not isinstance(self.records[0], TapeStart):
            raise ReplayError(f"{self.path} is cut short before its first record\nrecord it again")

    def _read(self) -> Iterator[Any]:
        with self.path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ReplayError(f"{self.path} is no tape of this version of workbench ({workbench.__version__})\nrecord it again")
            while head := file.read(_FRAME.size):
                if len(head) < _FRAME.size:
                    self.is_cut_short = True
                    return
                size, checksum = _FRAME.unpack(head)
                data = file.read(size)
                if len(data) < size:
                    self.is_cut_short = True
                    return
                if zlib.crc32(data) != checksum:
                    raise ReplayError(
                        f"{self.path} is damaged: a record at byte {file.tell() - size} does not match its checksum\nrecord it again"
                    )
                yield pickle.loads(data)


_writer: TapeWriter | None = None  # of this rank, while it records
_player: Callable[[str], Any] | None = None  # of this process, while it replays


def set_writer(writer: TapeWriter | None) -> None:
    global _writer
    _writer = writer


def writer() -> TapeWriter | None:
    return _writer


def set_player(player: Callable[[str], Any] | None) -> None:
    global _player
    _player = player


def is_playing() -> bool:
    """Whether this process replays a tape."""
    return _player is not None


def through_tape(label: str, call: Callable[[], T]) -> T:
    """Make a call out of the rank: kept while it records, given from the tape while it is replayed."""
    if _player is not None:
        given: T = _player(label)
        return given
    value = call()
    if _writer is not None:
        _writer.outside(label, value)
    return value


def start_tape(folder: str) -> None:
    """Runs in a rank: begin its tape, with the names that earlier cells left."""
    import sys

    from workbench.ranks.current import current

    me = current()
    assert me.process is not None
    ours = {"rank", "world_size", "group", "groups", "torch", "dist", "wb"}
    held = vars(sys.modules["__main__"])
    names = {name: value for name, value in held.items() if not name.startswith("__") and name not in ours}
    made = TapeWriter(Path(folder) / f"rank-{me.rank}.tape")
    made.start(rank=me.rank, world_size=me.world_size, layout=me.layout, names=names)
    me.process.interceptor.hooks.append(made)
    set_writer(made)


def stop_tape() -> None:
    """Runs in a rank: close its tape."""
    from workbench.ranks.current import current

    process = current().process
    if process is not None and _writer is not None:
        process.interceptor.hooks.remove(_writer)
        _writer.close()
        set_writer(None)
