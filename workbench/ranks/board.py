"""The arrival board: shared memory in which each rank posts the collective it has reached, and waits for its peers.

    rank r, reaching collective n of a group:   post(key, n, text) -> doorbell of r rings
                                                 wait until every member has posted n, or the driver says stop
                                                 compare texts: an odd one is a mismatch
    driver, at any time, without any rank's help: read who waits in what since when

A rank writes only its own area, so there is nothing to lock. Waiting is a futex on the doorbell of the first missing peer: woken at once,
and interruptible. Two ranks that waited for each other on the board have not touched gloo, so stopping them breaks nothing.

Knows shared memory. Does not know torch, cells or processes. x86-64 only: it relies on stores becoming visible in order.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

__all__ = ["AreaState", "Board", "Place", "Posted", "Stopped"]

_WORD = 8
_NUM_SLOTS = 256
_RING = 4  # texts of the last collectives of a group: a peer is at most one ahead of a rank that waits
_TEXT = 160
_SLOT_WORDS = 2 + _RING * 2 + _RING * _TEXT // _WORD  # key, count, then (sequence, checksum) per ring place, then texts
_HEAD_WORDS = 16
_PLACE_BYTES = 512
_LEDGER_ROWS = 4096
_LEDGER_WORDS = 8
_AREA_WORDS = _HEAD_WORDS + _PLACE_BYTES // _WORD + _NUM_SLOTS * _SLOT_WORDS + _LEDGER_ROWS * _LEDGER_WORDS

# words of an area's head
_BELL, _STOP, _CELL, _STATE, _KEY, _SEQUENCE, _SINCE, _LINE, _NUM_USED, _PLACE_SIZE, _NUM_LEDGER = range(11)

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1
_EVERYONE = 2**31 - 1


class AreaState(IntEnum):
    """Where a rank is with respect to collectives."""

    NOWHERE = 0
    ON_BOARD = 1  # waits for peers to arrive
    IN_GLOO = 2  # all have arrived (or nobody waited); the backend works


class Stopped(BaseException):
    """The driver ended the cell while this rank waited on the board. Not an Exception: user code must not swallow it."""


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in the user's code a collective was called, and what it is, as the driver shows it."""

    text: str
    line: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Posted:
    """A rank's area as read by the driver.

    Attributes:
        key, sequence: the collective it is in (state not NOWHERE).
        since_s: monotonic time at which it arrived there.
    """

    rank: int
    state: AreaState
    cell: int
    key: int
    sequence: int
    since_s: float
    place: Place


class Board:
    """One shared segment for all ranks of a cluster; the driver creates it, ranks map it."""

    def __init__(self, fd: int, world_size: int) -> None:
        self.fd = fd
        self.world_size = world_size
        self._map = mmap.mmap(fd, world_size * _AREA_WORDS * _WORD)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("q")
        self._anchor = (ctypes.c_char * len(self._map)).from_buffer(self._map)
        self._address = ctypes.addressof(self._anchor)
        self._slot_of: dict[tuple[int, int], int] = {}

    @classmethod
    def create(cls, world_size: int) -> Board:
        """A new board in memory without a name, so that nothing of it can be left behind."""
        fd = os.memfd_create("workbench-board", os.MFD_CLOEXEC)
        os.ftruncate(fd, world_size * _AREA_WORDS * _WORD)
        return cls(fd, world_size)

    def close(self) -> None:
        """Give the descriptor back; the mapping goes with the object."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # -- driver's side ------------------------------------------------------------------------------------------------------------------

    def stop(self, rank: int, cell: int) -> None:
        """Make rank's waits in `cell` (now or later) end with `Stopped`."""
        self._words[rank * _AREA_WORDS + _STOP] = cell

    def read(self, rank: int) -> Posted:
        """Where a rank is now. Read twice by callers that act on it: it may move meanwhile."""
        base = rank * _AREA_WORDS
        w = self._words
        size = max(0, min(_PLACE_BYTES, w[base + _PLACE_SIZE]))
        start = (base + _HEAD_WORDS) * _WORD
        text, _, source = bytes(self._bytes[start : start + size]).decode(errors="replace").partition("\0")
        return Posted(
            rank=rank,
            state=AreaState(w[base + _STATE]),
            cell=w[base + _CELL],
            key=w[base + _KEY],
            sequence=w[base + _SEQUENCE],
            since_s=w[base + _SINCE] / 1e9,
            place=Place(text=text, line=w[base + _LINE], source=source),
        )

    def count(self, rank: int, key: int) -> int:
        """Collectives of a group that a rank has begun in this generation."""
        slot = self._find(rank, key)
        return 0 if slot is None else self._words[slot + 1]

    def reset(self, rank: int) -> None:
        """Forget a rank's groups; for the start of a generation, when no rank waits."""
        base = rank * _AREA_WORDS
        for word in (_STATE, _NUM_USED, _STOP):
            self._words[base + word] = 0
        self._slot_of.clear()

    def ledger_rows(self, rank: int) -> list[tuple[int, ...]]:
        """The last collectives of a rank, oldest first: words as given to `note`."""
        base = rank * _AREA_WORDS
        total = self._words[base + _NUM_LEDGER]
        first = base + _AREA_WORDS - _LEDGER_ROWS * _LEDGER_WORDS
        rows = []
        for number in range(max(0, total - _LEDGER_ROWS), total):
            at = first + (number % _LEDGER_ROWS) * _LEDGER_WORDS
            rows.append(tuple(self._words[at : at + _LEDGER_WORDS]))
        return rows

    # -- rank's side --------------------------------------------------------------------------------------------------------------------

    def enter_cell(self, rank: int, cell: int) -> None:
        self._words[rank * _AREA_WORDS + _CELL] = cell

    def cell(self, rank: int) -> int:
        return self._words[rank * _AREA_WORDS + _CELL]

    def is_stopped(self, rank: int) -> bool:
        base = rank * _AREA_WORDS
        return 0 < self._words[base + _CELL] <= self._words[base + _STOP]

    def begin(self, rank: int, key: int, text: bytes, state: AreaState, place: bytes, line: int) -> int:
        """Post that a rank has reached its next collective of a group.

        Returns:
            The collective's number in its group, from 1.
        """
        w, base = self._words, rank * _AREA_WORDS
        slot = self._claim(rank, key)
        sequence = w[slot + 1] + 1
        text = text[: _TEXT - 1]
        ring = sequence % _RING
        start = (slot + 2 + _RING * 2) * _WORD + ring * _TEXT
        w[slot + 2 + 2 * ring] = 0  # the number goes first and comes last: who reads it finds the text and checksum that belong to it
        self._bytes[start] = len(text)
        self._bytes[start + 1 : start + 1 + len(text)] = text
        w[slot + 3 + 2 * ring] = zlib.crc32(text)
        w[slot + 2 + 2 * ring] = sequence
        self.show(rank, key, sequence, state, place, line)
        w[slot + 1] = sequence
        self._ring_bell(base)
        return sequence

    def show(self, rank: int, key: int, sequence: int, state: AreaState, place: bytes, line: int) -> None:
        """Say where a rank is, for the driver."""
        w, base = self._words, rank * _AREA_WORDS
        place = place[:_PLACE_BYTES]
        start = (base + _HEAD_WORDS) * _WORD
        self._bytes[start : start + len(place)] = place
        w[base + _PLACE_SIZE] = len(place)
        w[base + _KEY] = key
        w[base + _SEQUENCE] = sequence
        w[base + _LINE] = line
        w[base + _SINCE] = time.monotonic_ns()
        w[base + _STATE] = state

    def move(self, rank: int, state: AreaState) -> None:
        self._words[rank * _AREA_WORDS + _STATE] = state

    def take_back(self, rank: int, key: int) -> None:
        """Undo `begin` of a collective that never reached gloo, so that counts agree with peers again."""
        slot = self._claim(rank, key)
        ring = self._words[slot + 1] % _RING
        self._words[slot + 1] -= 1
        self._words[slot + 2 + 2 * ring] = 0  # else a peer that comes later would compare itself with what never happened
        self.move(rank, AreaState.NOWHERE)

    def wait(self, rank: int, key: int, sequence: int, peers: Sequence[int], is_stopped: Callable[[], bool]) -> None:
        """Wait until every peer has begun this collective.

        Raises:
            Stopped: `is_stopped()` became true while a peer was missing. When all have arrived the collective goes on, so that peers
                who already entered gloo are not left alone there.
        """
        pause_s = 0.001
        for peer in peers:
            while True:
                bell = ctypes.c_uint32.from_address(self._address + (peer * _AREA_WORDS + _BELL) * _WORD).value
                if self.count(peer, key) >= sequence:
                    break
                if is_stopped():
                    raise Stopped
                self._wait_for_bell(peer, bell, pause_s)
                pause_s = min(2 * pause_s, 0.02)

    def wait_any(self, rank: int, channels: Sequence[tuple[int, int]], is_stopped: Callable[[], bool]) -> None:
        """Wait until one of the (peer, channel) holds a message that this rank has not taken.

        Raises:
            Stopped: `is_stopped()` became true before.
        """
        pause_s = 0.001
        while not any(self.count(peer, key) > self.count(rank, key) for peer, key in channels):
            if is_stopped():
                raise Stopped
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)

    def texts(self, key: int, sequence: int, members: Sequence[int]) -> dict[int, str]:
        """What each member posted for a collective; members whose text was overwritten are left out."""
        found = {}
        for member in members:
            slot = self._find(member, key)
            ring = sequence % _RING
            if slot is not None and self._words[slot + 2 + 2 * ring] == sequence:
                start = (slot + 2 + _RING * 2) * _WORD + ring * _TEXT
                size = self._bytes[start]
                found[member] = bytes(self._bytes[start + 1 : start + 1 + size]).decode(errors="replace")
        return found

    def has_arrived(self, key: int, sequence: int, peers: Sequence[int]) -> bool:
        """Whether every peer has begun this collective, and none has taken that back."""
        return all(self.count(peer, key) >= sequence for peer in peers)

    def is_same(self, key: int, sequence: int, text: bytes, peers: Sequence[int]) -> bool:
        """Whether every peer posted the same text for a collective (as far as it is still on the board)."""
        ring = sequence % _RING
        checksum = zlib.crc32(text[: _TEXT - 1])
        for peer in peers:
            slot = self._find(peer, key)
            if slot is None or self._words[slot + 2 + 2 * ring] != sequence:
                continue
            is_other = self._words[slot + 3 + 2 * ring] != checksum
            if is_other and self._words[slot + 2 + 2 * ring] == sequence:  # else it was written over while we read
                return False
        return True

    def note(self, rank: int, row: Sequence[int]) -> None:
        """Keep one finished collective in the rank's ledger (a ring: the oldest goes first)."""
        base = rank * _AREA_WORDS
        total = self._words[base + _NUM_LEDGER]
        at = base + _AREA_WORDS - _LEDGER_ROWS * _LEDGER_WORDS + (total % _LEDGER_ROWS) * _LEDGER_WORDS
        for offset, value in enumerate(row):
            self._words[at + offset] = value
        self._words[base + _NUM_LEDGER] = total + 1

    # -- inside -------------------------------------------------------------------------------------------------------------------------

    def _find(self, rank: int, key: int) -> int | None:
        """Word index of a group's slot in a rank's area; a place once found is remembered, and checked."""
        known = self._slot_of.get((rank, key))
        if known is not None and self._words[known] == key:
            return known
        base = rank * _AREA_WORDS
        first = base + _HEAD_WORDS + _PLACE_BYTES // _WORD
        for index in range(self._words[base + _NUM_USED]):
            slot = first + index * _SLOT_WORDS
            if self._words[slot] == key:
                self._slot_of[rank, key] = slot
                return slot
        return None

    def _claim(self, rank: int, key: int) -> int:
        slot = self._find(rank, key)
        if slot is not None:
            return slot
        base = rank * _AREA_WORDS
        used = self._words[base + _NUM_USED]
        if used >= _NUM_SLOTS:
            raise OverflowError(f"rank {rank} uses more than {_NUM_SLOTS} groups and channels in one generation")
        slot = base + _HEAD_WORDS + _PLACE_BYTES // _WORD + used * _SLOT_WORDS
        for offset in range(1, 2 + 2 * _RING):
            self._words[slot + offset] = 0
        self._words[slot] = key
        self._words[base + _NUM_USED] = used + 1
        return slot

    def _ring_bell(self, base: int) -> None:
        address = self._address + (base + _BELL) * _WORD
        bell = ctypes.c_uint32.from_address(address)
        bell.value += 1
        _libc.syscall(_SYS_FUTEX, ctypes.c_void_p(address), _FUTEX_WAKE, _EVERYONE, None, None, 0)

    def _wait_for_bell(self, peer: int, seen: int, timeout_s: float) -> None:
        limit = _Timespec(0, int(timeout_s * 1e9))
        address = ctypes.c_void_p(self._address + (peer * _AREA_WORDS + _BELL) * _WORD)
        if _libc.syscall(_SYS_FUTEX, address, _FUTEX_WAIT, ctypes.c_uint32(seen), ctypes.byref(limit), None, 0) != 0:
            number = ctypes.get_errno()
            if number not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
                raise OSError(number, os.strerror(number))
