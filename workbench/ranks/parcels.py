"""Bytes of one rank for its peers in shared memory, for what is too large to stand on the board.

    writer: outbox.put(parts)  ->  Parcel (process, descriptor, size)  --- announced to the peers --->  inbox.open(parcel) -> the bytes

The memory is anonymous (a memfd) and reached through the writer's /proc entry, which only processes of the same user may open: nothing is
left behind whatever ends first, and nothing needs to be signed. An outbox has two places, used in turns: when an announcement of a group
has met, all members have begun it, so all have read what came with the one before.

Knows shared memory. Does not know groups or objects.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workbench.errors import GroupError

__all__ = ["Inbox", "Outbox", "Parcel"]

_KEPT_BYTES = (1 << 26) + (1 << 20)  # more is given back as soon as it was used, and costs its pages anew the next time
_LEAST_BYTES = 1 << 18
_LINGER_S = 60.0
_PACKED = struct.Struct("<4q")


@dataclass(frozen=True, slots=True)
class Parcel:
    """Where a rank's bytes lie."""

    pid: int
    fd: int
    inode: int
    num_bytes: int

    def pack(self) -> bytes:
        return _PACKED.pack(self.pid, self.fd, self.inode, self.num_bytes)

    @classmethod
    def unpack(cls, data: bytes) -> Parcel:
        return cls(*_PACKED.unpack(data))


class _Place:
    """A mapped memfd of this process."""

    def __init__(self, num_bytes: int) -> None:
        self.fd = os.memfd_create("workbench-parcel", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, num_bytes)
        self.inode = os.fstat(self.fd).st_ino
        self.bytes = _mapped(self.fd)

    def close(self) -> None:
        """Let go of memory that all have read; the mapping goes with the last tensor over it."""
        os.close(self.fd)
        self.fd = -1

    def __del__(self) -> None:
        if self.fd >= 0:  # its group was dropped right after the call: a slow peer may still be about to open it
            _lingering.append((time.monotonic(), self.fd, self.bytes))
        _let_go()


_lingering: deque[tuple[float, int, Tensor]] = deque()  # when it was dropped, its descriptor, its mapping


def _let_go() -> None:
    while _lingering and time.monotonic() - _lingering[0][0] > _LINGER_S:
        os.close(_lingering.popleft()[1])


class Outbox:
    """What one rank sends in one group."""

    def __init__(self) -> None:
        self._places: list[_Place | None] = [None, None]
        self._turn = 0
        self._is_fresh = False  # the last put belongs to an announcement that has not met

    def put(self, parts: Sequence[Tensor]) -> Parcel:
        """Write parts, uint8 [num_bytes] each, one after another; they stay until the put after the next."""
        num_bytes = sum(part.numel() for part in parts)
        self._turn = 1 - self._turn
        self._is_fresh = True
        place = self._places[self._turn]
        if place is None or place.bytes.numel() < num_bytes:
            self._drop(self._turn)
            place = self._places[self._turn] = _Place(max(num_bytes, _LEAST_BYTES))
        torch.cat(list(parts), out=place.bytes[:num_bytes])
        return Parcel(os.getpid(), place.fd, place.inode, num_bytes)

    def met(self) -> None:
        """An announcement of the group has met: what was put before it has been read, and large memory is given back."""
        for number, place in enumerate(self._places):
            is_unread = self._is_fresh and number == self._turn
            if place is not None and place.bytes.numel() > _KEPT_BYTES and not is_unread:
                self._drop(number)
        self._is_fresh = False

    def read(self) -> None:
        """All have read what was put last."""
        self._is_fresh = False
        self.met()

    def _drop(self, number: int) -> None:
        place = self._places[number]
        if place is not None:
            place.close()
        self._places[number] = None


class Inbox:
    """What one rank receives in one group: views of its peers' memory, kept for the next parcel in the same place."""

    def __init__(self) -> None:
        self._views: dict[tuple[int, int], tuple[int, Tensor]] = {}

    def open(self, parcel: Parcel) -> Tensor:
        """The bytes, uint8 [num_bytes], where they lie: copy what is needed before the group's next call.

        Raises:
            GroupError: the process that wrote them has ended.
        """
        place = (parcel.pid, parcel.fd)
        inode, view = self._views.get(place, (0, _NOTHING))
        if inode != parcel.inode:
            self._views.pop(place, None)
            view = _opened(parcel)
            if view.numel() <= _KEPT_BYTES:
                self._views[place] = (parcel.inode, view)
        return view[: parcel.num_bytes]


_NOTHING = torch.empty(0, dtype=torch.uint8)


def _opened(parcel: Parcel) -> Tensor:
    try:
        fd = os.open(f"/proc/{parcel.pid}/fd/{parcel.fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        raise GroupError(_gone(parcel)) from None
    try:
        if os.fstat(fd).st_ino != parcel.inode:
            raise GroupError(_gone(parcel))
        return _mapped(fd)
    finally:
        os.close(fd)  # the mapping holds the memory


def _mapped(fd: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(mmap.mmap(fd, 0), dtype=np.uint8))


def _gone(parcel: Parcel) -> str:
    return (
        f"process {parcel.pid} has ended before its {parcel.num_bytes} bytes were read\n"
        "they lay in its memory and went with it\nrespawn the rank, and make the call again"
    )
