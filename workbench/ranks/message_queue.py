"""One writer, many readers, one ring of shared memory: objects for the processes of one box.

    head     written: messages' chunks written so far · ready · per reader: chunks read so far, attached
    chunk i  size of what is left of the message, then bytes; a long message takes several chunks

Each number has one writer, and a chunk is written before it is counted; x86-64 keeps that order for all processes. The memory is anonymous
(a memfd) and reached through the writer's /proc entry, so nothing is left behind whatever ends first. Objects travel sealed, see `wire`.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from workbench.errors import GroupError
from workbench.ranks.wire import seal, unseal

__all__ = ["MessageQueue", "QueueHandle"]

_WORD = 8
_SPINS = 200
_LONGEST_NAP_S = 0.001
_ALIVE_CHECK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueHandle:
    """Where a queue is, for its readers; may be sent to any process of the box."""

    pid: int
    started: str
    fd: int
    num_readers: int
    chunk_bytes: int
    num_chunks: int


class MessageQueue:
    """One end of a queue. The writer makes it with `create`, readers with `attach`; every reader sees every message, in order.

    Attributes:
        is_writer: whether this end writes.
    """

    def __init__(self, handle: QueueHandle, fd: int, reader: int | None) -> None:
        self._handle = handle
        self._fd = fd
        self._reader = reader
        self.is_writer = reader is None
        head_words = 2 + 2 * handle.num_readers
        self._memory = mmap.mmap(fd, _total_bytes(handle))
        words: NDArray[np.int64] = np.frombuffer(self._memory, dtype=np.int64, count=head_words)
        self._written, self._ready = words[0:1], words[1:2]
        self._read, self._attached = words[2 : 2 + handle.num_readers], words[2 + handle.num_readers :]
        self._chunks = np.frombuffer(self._memory, dtype=np.uint8, offset=head_words * _WORD).reshape(handle.num_chunks, -1)

    @classmethod
    def create(cls, num_readers: int, *, chunk_bytes: int = 1 << 20, num_chunks: int = 8) -> MessageQueue:
        """The writer's end."""
        if min(num_readers, num_chunks) < 1 or chunk_bytes < 1:
            raise ValueError(f"a queue needs readers and chunks, got {num_readers=}, {num_chunks=}, {chunk_bytes=}: pass at least 1")
        fd = os.memfd_create("workbench-queue", os.MFD_CLOEXEC)
        rounded = -(-chunk_bytes // _WORD) * _WORD
        handle = QueueHandle(
            pid=os.getpid(), started=_started(os.getpid()), fd=fd, num_readers=num_readers, chunk_bytes=rounded, num_chunks=num_chunks
        )
        os.ftruncate(fd, _total_bytes(handle))
        return cls(handle, fd, None)

    @classmethod
    def attach(cls, handle: QueueHandle, reader: int) -> MessageQueue:
        """The end of reader 0..num_readers-1; each number once.

        Raises:
            ValueError: no such reader.
            GroupError: the writer has ended.
        """
        if not 0 <= reader < handle.num_readers:
            raise ValueError(f"reader={reader} is outside the queue's {handle.num_readers} readers: choose 0..{handle.num_readers - 1}")
        try:
            fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise GroupError(_gone(handle)) from error
        queue = cls(handle, fd, reader)
        queue._attached[reader] = 1
        return queue

    def export_handle(self) -> QueueHandle:
        """What readers attach with."""
        return self._handle

    def wait_until_ready(self, timeout_s: float | None = 60.0) -> None:
        """Return once all readers are attached.

        Raises:
            GroupError: after timeout_s, naming the readers that are missing, or when the writer has ended.
        """
        if self.is_writer:
            self._wait(lambda: bool(self._attached.all()), timeout_s, self._unattached)
            self._ready[0] = 1
        else:
            self._wait(lambda: bool(self._ready[0]), timeout_s, self._unattached)

    def enqueue(self, obj: Any, timeout_s: float | None = None) -> None:
        """Write an object for all readers; waits while the slowest of them is a whole ring behind.

        Raises:
            GroupError: after timeout_s, naming the readers that are behind.
        """
        self._check(is_writing=True)
        data = seal(obj).numpy()
        room = self._handle.chunk_bytes
        for start in range(0, len(data), room):
            self._wait(self._has_room, timeout_s, self._behind)
            chunk = self._chunks[int(self._written[0]) % self._handle.num_chunks]
            part = data[start : start + room]
            chunk[:_WORD].view(np.int64)[0] = len(data) - start
            chunk[_WORD : _WORD + len(part)] = part
            self._written[0] += 1

    def dequeue(self, timeout_s: float | None = None) -> Any:
        """The next object.

        Raises:
            GroupError: none came within timeout_s, or the writer has ended.
        """
        self._check(is_writing=False)
        parts: list[NDArray[np.uint8]] = []
        left = room = self._handle.chunk_bytes
        while not parts or left > room:
            self._wait(self._has_message, timeout_s, lambda: "no message came")
            chunk = self._chunks[int(self._read[self._reader]) % self._handle.num_chunks]
            left = int(chunk[:_WORD].view(np.int64)[0])
            parts.append(chunk[_WORD : _WORD + min(left, room)].copy())
            self._read[self._reader] += 1
        return unseal(torch.from_numpy(np.concatenate(parts)))

    def broadcast_object(self, obj: Any = None) -> Any:
        """`enqueue` on the writer, `dequeue` on readers; the object on all of them."""
        if not self.is_writer:
            return self.dequeue()
        self.enqueue(obj)
        return obj

    def close(self) -> None:
        """Let go of the memory; a second call does nothing. Readers keep what they have attached."""
        if self._fd >= 0:
            for name in ("_written", "_ready", "_read", "_attached", "_chunks"):
                delattr(self, name)
            self._memory.close()
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_chunks", None) is not None:
            self.close()

    def __repr__(self) -> str:
        role = "writer" if self.is_writer else f"reader {self._reader}"
        return f"MessageQueue({role}, {self._handle.num_readers} readers)"

    def _check(self, *, is_writing: bool) -> None:
        if self._fd < 0:
            raise GroupError(f"{self} was closed\nmake another one")
        if is_writing != self.is_writer:
            raise GroupError(f"{self} cannot {'write' if is_writing else 'read'}\na queue has one writer; use broadcast_object on all ends")

    def _has_room(self) -> bool:
        return int(self._written[0] - self._read.min()) < self._handle.num_chunks

    def _has_message(self) -> bool:
        return bool(self._written[0] > self._read[self._reader])

    def _unattached(self) -> str:
        return f"readers {np.flatnonzero(self._attached == 0).tolist()} did not attach"

    def _behind(self) -> str:
        late = self._written[0] - self._read >= self._handle.num_chunks
        return f"readers {np.flatnonzero(late).tolist()} are {self._handle.num_chunks} chunks behind"

    def _wait(self, is_there: Callable[[], bool], timeout_s: float | None, problem: Callable[[], str]) -> None:
        """Spin, then nap; an interrupt gets through."""
        started, nap_s, spins = time.monotonic(), 20e-6, 0
        next_check_s = _ALIVE_CHECK_S
        while not is_there():
            spins += 1
            if spins < _SPINS:
                os.sched_yield()
                continue
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _LONGEST_NAP_S)
            waited_s = time.monotonic() - started
            if timeout_s is not None and waited_s > timeout_s:
                raise GroupError(f"{self} waited {timeout_s:g} s: {problem()}\nlook at what the other end does, or give a larger timeout_s")
            if waited_s > next_check_s:
                next_check_s += _ALIVE_CHECK_S
                if not self.is_writer and _started(self._handle.pid) != self._handle.started and not is_there():
                    raise GroupError(_gone(self._handle))


def _total_bytes(handle: QueueHandle) -> int:
    return _WORD * (2 + 2 * handle.num_readers) + handle.num_chunks * (_WORD + handle.chunk_bytes)


def _started(pid: int) -> str:
    """When a process began, in clock ticks since boot; "" when there is none. With the pid it names one process for good."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _gone(handle: QueueHandle) -> str:
    return f"the queue's writer, process {handle.pid}, has ended\nwhat it had not written yet is lost\nmake a new queue with a live writer"
