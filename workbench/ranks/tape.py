"""A tape: what one rank was given from outside, in order: cells, seeds, what its collectives, engines and stateless groups brought.

    start | cell | collective | collective | outside | cell's end | cell | ...        each a frame: length, checksum, pickle

Every frame is written out as soon as it is complete, so a tape survives a kill -9 of its rank up to the last finished collective. Knows
frames and tensors. Does not know how a rank runs, nor how a tape is played."""

from __future__ import annotations

import os
import pickle
import platform
import random
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import cloudpickle
import numpy as np
import torch

import workbench
from workbench.errors import ReplayError
from workbench.ranks.calls import user_frame
from workbench.ranks.channel import Packed
from workbench.ranks.messages import Outcome
from workbench.ranks.operations import Operation, inputs_of
from workbench.ranks.snapshot import files_of_modules
from workbench.ranks.wire import KEY_VARIABLE

__all__ = [
    "CellEnd",
    "CellStart",
    "Collective",
    "Outside",
    "TapeReader",
    "TapeStart",
    "TapeWriter",
    "current_writer",
    "set_player",
    "set_writer",
    "tape_name",
    "through_tape",
]

_FRAME = struct.Struct("<QI")
_MAGIC = b"workbench tape 4\n"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TapeStart:
    """The rank and what its results depend on.

    Attributes:
        layout: pickle of the layout; its groups were formed where `has_layout`.
        path: where modules were looked for.
        names: what earlier cells had left, as `snapshot_names` gives it; b"" where there was nothing yet.
        unkept: name -> why it is not among them.
        key: with which the cluster signed its objects: a replay gives the same bytes.
        files: checksums of the user's own modules that were imported.
    """

    rank: int
    world_size: int
    versions: dict[str, str]
    num_threads: int
    cpu_capability: str
    is_deterministic: bool
    default_dtype: str
    layout: bytes
    has_layout: bool = False
    key: str = ""
    path: tuple[str, ...] = ()
    names: bytes = b""
    unkept: dict[str, str] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)


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
        source: the member of the group that a receive from any heard, -1 for anything else.
    """

    cell: int
    index: int
    op: str
    text: str
    line: int
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    source: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """A finished call out of the rank (an engine's completions, an object from a stateless group): what it brought, or raised.

    Attributes:
        index: its number among the rank's collectives and calls, by when it was begun.
        data: pickle of what it brought, or of the exception where `is_error`.
        given: the object that the rank gave, sealed; b"" where it gave none that is compared.
    """

    cell: int
    index: int
    label: str
    line: int
    data: bytes
    given: bytes = b""
    is_error: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CellEnd:
    """How a cell ended.

    Attributes:
        outcome: an `Outcome`.
        digest: of its result; "" where that has no content to compare.
        error: "kind: message" of what it raised.
        unfinished: the collective, or the call out of the rank, that it was in when it raised or was freed.
        files: checksums of the user's own modules that it imported.
    """

    cell: int
    outcome: str
    result_text: str
    digest: str
    error: str
    unfinished: str = ""
    files: dict[str, int] = field(default_factory=dict)


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
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }


def random_states() -> bytes:
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state()))


def restore_random_states(data: bytes) -> None:
    python, numpy, torch_state = pickle.loads(data)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torch_state)


def tape_name(rank: int) -> str:
    """The file of one rank in a folder of tapes."""
    return f"rank-{rank}.tape"


class TapeWriter:
    """Appends frames; also the hook by which the interceptor tells of finished collectives.

    A tape that would grow beyond `most_bytes` ends there, as one that was cut short does.
    """

    def __init__(self, path: Path, most_bytes: int | None = None) -> None:
        self.num_bytes = 0
        self.can_go_on = True  # what a later cell needs stands here, or follows from it
        self._most = most_bytes
        self._is_full = False
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        os.write(self._file, _MAGIC)
        self._num_calls = 0
        self._is_in_cell = False  # between cells a new generation is formed, which no replay repeats
        self._cell = 0
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._unfinished = ""
        self._modules: set[str] = set()

    def write(self, record: Any) -> None:
        if self._is_full:
            return
        data = cloudpickle.dumps(record)
        self.num_bytes += len(data)
        if self._most is not None and self.num_bytes > self._most:
            self._is_full, self.can_go_on = True, False
            return
        frame = [_FRAME.pack(len(data), zlib.crc32(data)), data]
        try:
            is_whole = os.writev(self._file, frame) == _FRAME.size + len(data)
        except OSError:
            is_whole = False
        if not is_whole:  # the disk is full: the cell is worth more than its tape
            self._is_full, self.can_go_on = True, False
            print(f"the tape {self._path} could not be written any further; it ends here", file=sys.stderr)

    def start(
        self, *, rank: int, world_size: int, layout: Any, has_layout: bool, names: bytes = b"", unkept: dict[str, str] | None = None
    ) -> None:
        files = files_of_modules(self._modules)
        self.write(
            TapeStart(
                rank=rank,
                world_size=world_size,
                layout=cloudpickle.dumps(layout),
                has_layout=has_layout,
                names=names,
                path=tuple(sys.path),
                unkept=unkept or {},
                files=files,
                key=os.environ.get(KEY_VARIABLE, ""),
                **environment(),
            )
        )

    def begin_cell(self, cell: int, task: str, text: str, value: Packed | None) -> None:
        self._cell, self._unfinished, self._is_in_cell = cell, "", True
        parts = () if value is None else (bytes(value.data), *(bytes(buffer) for buffer in value.buffers))
        self.write(CellStart(cell=cell, task=task, text=text, value=parts, random_states=random_states()))

    def end_cell(self, outcome: Outcome, result_text: str, digest: str, error: str) -> None:
        self._is_in_cell = False
        if outcome is Outcome.FREED and not self._unfinished:
            self.can_go_on = False  # stopped in the middle of its own code: nobody knows where
        self.write(
            CellEnd(
                cell=self._cell,
                outcome=outcome,
                result_text=result_text,
                digest=digest,
                error=error,
                unfinished=self._unfinished,
                files=files_of_modules(self._modules),
            )
        )

    def outside(self, label: str, call: Callable[[], T], given: bytes) -> T:
        """Make a call out of the rank, and keep what it brings or raises; the cell's end tells of one in which it was stopped."""
        if not self._is_in_cell:
            return call()
        cell, index, frame = self._cell, self._num_calls, user_frame(1)[0]
        self._num_calls += 1
        self._unfinished = label

        def keep(value: Any, *, is_error: bool = False) -> None:
            self._unfinished = ""
            line, data = frame.f_lineno if frame is not None else 0, cloudpickle.dumps(value)
            self.write(Outside(cell=cell, index=index, label=label, line=line, data=data, given=given, is_error=is_error))

        try:
            value = call()
        except Exception as error:
            keep(error, is_error=True)
            raise
        keep(value)
        return value

    def before(self, operation: Operation, args: tuple[Any, ...]) -> bool:
        """Keep what the rank is about to give: the call may write over it."""
        if not self._is_in_cell:
            return False
        self._inputs = tuple(t.detach().cpu().clone() for t in inputs_of(operation, args))
        self._unfinished = operation.name
        return False

    def begun(self, op: str, text: str, line: int, tensors: Sequence[torch.Tensor], work: Any) -> Callable[[], None]:
        """Keep what a call gave, under the number at which it was begun."""
        if not self._is_in_cell:
            return lambda: None
        cell, index, inputs = self._cell, self._num_calls, self._inputs
        self._num_calls += 1
        self._unfinished = op if op.startswith("recv") else ""

        def write() -> None:
            outputs = tuple(t.detach().cpu().clone() for t in tensors)
            source = work._source_rank() if op == "recv_any" and work is not None else -1
            self._unfinished = ""
            self.write(Collective(cell=cell, index=index, op=op, text=text, line=line, inputs=inputs, outputs=outputs, source=source))

        return write

    def close(self) -> None:
        os.close(self._file)


class TapeReader:
    """Reads one rank's tape.

    Raises:
        ReplayError: no tape, one of somebody else's, damaged, or of another format. A tape whose end is missing is read up to there.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / tape_name(rank)
        if not self.path.is_file():
            held = sorted(p.name for p in folder.glob("rank-*.tape")) if folder.is_dir() else []
            raise ReplayError(
                f"{folder} has no tape of rank {rank}\nit holds {', '.join(held) or 'no tapes'}\nrecord one: with cluster.record(dir): ..."
            )
        self.is_cut_short = False
        with self.path.open("rb") as file:
            found = os.fstat(file.fileno())  # of the file that is read, whatever the name points to later
            if found.st_uid != os.getuid() or found.st_mode & 0o022:
                raise ReplayError(
                    f"{self.path} belongs to another user or can be written by others\na tape runs code: own it, and chmod 600 it"
                )
            self.records = list(self._read(file))
        if not self.records or not isinstance(self.records[0], TapeStart):
            raise ReplayError(f"{self.path} is cut short before its first record\nrecord it again")

    def _read(self, file: BinaryIO) -> Iterator[Any]:
        magic = file.read(len(_MAGIC))
        if magic != _MAGIC:
            is_other = magic.startswith(_MAGIC[:15])
            what = "was written by another version of workbench" if is_other else "is no tape of workbench"
            raise ReplayError(f"{self.path} {what}\nit begins with {magic[:16]!r}, not {_MAGIC[:16]!r}\nrecord it again")
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
_player: Callable[[str, bytes], Any] | None = None  # of this process, while it replays


def set_writer(writer: TapeWriter | None) -> None:
    global _writer
    _writer = writer


def current_writer() -> TapeWriter | None:
    return _writer


def set_player(player: Callable[[str, bytes], Any] | None) -> None:
    global _player
    _player = player


def is_playing() -> bool:
    """Whether this process replays a tape."""
    return _player is not None


def through_tape(label: str, call: Callable[[], T], given: bytes = b"") -> T:
    """Make a call out of the rank: kept while it records, answered from the tape, and not made, while it is replayed.

    Args:
        label: what is called, and whom; a replay must ask for the same.
        given: the object that the rank gives, sealed: a replay must give an equal one.
    """
    if _player is not None:
        brought: T = _player(label, given)
        return brought
    return call() if _writer is None else _writer.outside(label, call, given)
