"""What engine processes tell of completions that have ended, while others still run: a file of fixed rows, appended to and read along.

    engine process --(append a row)--> file in the cluster's private folder --(read what is new)--> driver

A file, not a message: the engine never waits for a reader, and a reader disturbs no call. It is there only while somebody wants it.
Knows files. Does not know engines.
"""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

from workbench.records import FinishedCompletion, FinishReason

__all__ = ["FinishedReader", "FinishedWriter"]

_ROW = struct.Struct("<qqqqqbd")


def _path(address: str) -> Path:
    return Path(address + ".finished")


class FinishedReader:
    """The driver's end for one engine process: `open` has it tell, `close` ends that."""

    def __init__(self, address: str) -> None:
        """`address` is the path of the engine process's socket."""
        self._path = _path(address)
        self._num_read = 0

    def open(self) -> None:
        self._path.touch(mode=0o600)

    def read(self) -> list[FinishedCompletion]:
        """What has ended since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._num_read)
                data = file.read()
        except OSError:  # the cluster was closed meanwhile
            return []
        whole = data[: len(data) - len(data) % _ROW.size]
        self._num_read += len(whole)
        return [_record(row) for row in _ROW.iter_unpack(whole)]

    def close(self) -> None:
        self._path.unlink(missing_ok=True)


class FinishedWriter:
    """The engine process's end: call it with each completion that ends."""

    def __init__(self, file: int) -> None:
        self._file = file

    @classmethod
    def open(cls, address: str) -> FinishedWriter | None:
        """None where nobody listens."""
        try:
            return cls(os.open(_path(address), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC))
        except OSError:
            return None

    def __call__(self, one: FinishedCompletion) -> None:
        code = FinishReason[one.finish_reason.upper()]
        row = _ROW.pack(one.step, one.origin_rank, one.prompt_index, one.sample_index, one.length_tokens, code, one.at_s)
        with contextlib.suppress(OSError):  # a full disk must not end a rollout
            os.write(self._file, row)

    def close(self) -> None:
        os.close(self._file)


def _record(row: tuple[int, int, int, int, int, int, float]) -> FinishedCompletion:
    step, rank, prompt, sample, length, code, at_s = row
    return FinishedCompletion(
        step=step,
        origin_rank=rank,
        prompt_index=prompt,
        sample_index=sample,
        length_tokens=length,
        finish_reason=FinishReason(code).label,
        at_s=at_s,
    )
