"""The arrival board: shared memory in which each rank posts the collective it has reached, and waits for its peers.

    rank r, reaching collective n of a group:   post(key, n, text) -> doorbell of r rings
                                                 wait until every member has posted n, or the driver says stop
                                                 compare texts: an odd one is a mismatch
    driver, at any time, without any rank's help: read who waits in what since when

A rank writes only its own area, so there is nothing to lock. Waiting is a look for a moment where there are cores enough, then a futex on
the doorbell of the first missing peer: woken at once, and interruptible. Two ranks that waited for each other on the board have not touched
gloo, so stopping them breaks nothing.

Knows shared memory. Does not know torch, cells or processes. x86-64 only: it relies on stores becoming visible in order.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from workbench.errors import GroupError
from workbench.ranks.awake import Awake

__all__ = ["AreaState", "Board", "Place", "Post", "Posted", "Stopped"]

_WORD = 8
_NUM_SLOTS = 2048  # groups, and directed channels of messages, of a rank; memory that was never written to costs nothing
_RING = 4  # texts of the last collectives of a group: a peer is at most one ahead of a rank that waits
_TEXT = 160
_DATA_BYTES = 2048  # what may stand beside a text for the peers to read
_SLOT_WORDS = 2 + _RING * 2 + _RING * _TEXT // _WORD + 2  # key, count, (sequence, checksum) per ring place, texts, sequences of the data
_HEAD_WORDS = 16
_PLACE_BYTES = 512
_LEDGER_ROWS = 4096
_LEDGER_WORDS = 8
_ROW = struct.Struct(f"={_LEDGER_WORDS}q")
_STARTED, _ARRIVED, _ENDED = 4, 5, 6  # words of a ledger row: times, ns
_FIRST_SLOT = _HEAD_WORDS + _PLACE_BYTES // _WORD
_FIRST_DATA = _FIRST_SLOT + _NUM_SLOTS * _SLOT_WORDS  # two places for each slot: a peer is at most one ahead of who still reads
_FIRST_ROW = _FIRST_DATA + _NUM_SLOTS * 2 * _DATA_BYTES // _WORD
_AREA_WORDS = _FIRST_ROW + _LEDGER_ROWS * _LEDGER_WORDS

# words of an area's head
_BELL, _STOP, _CELL, _NUM_USED, _NUM_LEDGER, _KEY, _SEQUENCE, _SINCE, _LINE, _PLACE_SIZE, _STATE = range(11)
_SHOWN = struct.Struct("=6q")  # from _KEY on; the state comes last

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1
_EVERYONE = 2**31 - 1
_LONGEST_PAUSE_S = 0.1  # a bell and a stop wake a rank at once; this is for a stop that comes just before it sleeps


class AreaState(IntEnum):
    """Where a rank is with respect to collectives."""

    NOWHERE = 0
    ON_BOARD = 1  # waits for peers to arrive
    IN_GLOO = 2  # all have arrived (or nobody waited); the backend works
    IN_STORE = 3  # asks a store again and again for what others of a stateless group bring, up to a time of its own
    LIMITED = 4  # in the backend, up to a time that the caller chose


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


class Post(NamedTuple):
    """What a rank posts of a call, as it stands on the board.

    Attributes:
        text: what it is, its length first.
        checksum: of what must be equal on all members.
        place: the call and the text of its line, as `Place` is read from it.
    """

    text: bytes
    checksum: int
    place: bytes
    line: int

    @property
    def what(self) -> str:
        """The call, for people."""
        return self.place.partition(b"\0")[0].decode(errors="ignore")

    @classmethod
    def made(cls, text: bytes, place: bytes, line: int, *, compared: bytes | None = None) -> Post:
        """`compared` must be equal on all members, where that is not the text itself."""
        text = text[: _TEXT - 1]
        checksum = _checksum(text if compared is None else compared)
        return cls(bytes((len(text),)) + text, checksum, place[:_PLACE_BYTES], line)

    @classmethod
    @functools.lru_cache(maxsize=1024)  # most calls are made again
    def of(cls, text: str, place: bytes, line: int, *, compared: str | None = None) -> Post:
        """The same, kept for the next time."""
        return cls.made(text.encode(), place, line, compared=None if compared is None else compared.encode())


def _checksum(text: bytes) -> int:
    return zlib.crc32(text[: _TEXT - 1])


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
        self._awake = Awake(world_size)
        self._wake_of = [self._waking(rank * _AREA_WORDS) for rank in range(world_size)]
        self._forgotten: dict[int, None] = {}  # keys of this process's rank whose slots may be taken, oldest first

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

    def stop(self, ranks: Iterable[int], cell: int) -> None:
        """Make the ranks' waits in `cell` (now or later) end with `Stopped`.

        All are told before any wakes: one that is freed may shut its connections, and its peers must know why.
        """
        for rank in ranks:
            self._words[rank * _AREA_WORDS + _STOP] = cell
        for wake in self._wake_of:  # whoever waits, waits for one of these
            wake()

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
        self._forgotten.clear()

    def ledger_rows(self, rank: int) -> list[tuple[int, ...]]:
        """The last collectives of a rank, oldest first: words as given to `note`."""
        base = rank * _AREA_WORDS
        total = self._words[base + _NUM_LEDGER]
        first = base + _FIRST_ROW
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

    def begin(self, rank: int, key: int, post: Post, state: AreaState, *, data: memoryview | None = None, is_awaited: bool = True) -> int:
        """Post that a rank has reached its next collective of a group.

        Args:
            data: at most 2,048 bytes for the peers to read.
            is_awaited: peers may wait on the board for it; where none should, one that does all the same sees it a moment later.

        Returns:
            The collective's number in its group, from 1.

        Raises:
            GroupError: there is no room for another group.
        """
        w, base = self._words, rank * _AREA_WORDS
        slot = self._slot_of.get((rank, key), 0)
        if not slot or w[slot] != key or key in self._forgotten:
            slot = self._claim(rank, key)
        sequence = w[slot + 1] + 1
        ring = slot + 2 + 2 * (sequence % _RING)
        start = (slot + 2 + _RING * 2) * _WORD + sequence % _RING * _TEXT
        w[ring] = 0  # the number goes first and comes last: who reads it finds the text and checksum that belong to it
        self._bytes[start : start + len(post.text)] = post.text
        w[ring + 1] = post.checksum
        w[ring] = sequence
        if data is not None:
            self._write(rank, slot, sequence, data)
        self.show(rank, key, sequence, state, post.place, post.line)
        w[slot + 1] = sequence
        if is_awaited:
            w[base + _BELL] = (w[base + _BELL] + 1) & 0xFFFFFFFF
            self._wake_of[rank]()
        return sequence

    def show(self, rank: int, key: int, sequence: int, state: AreaState, place: bytes, line: int) -> None:
        """Say where a rank is, for the driver."""
        at = rank * _AREA_WORDS * _WORD
        place = place[:_PLACE_BYTES]
        start = at + _HEAD_WORDS * _WORD
        self._bytes[start : start + len(place)] = place
        _SHOWN.pack_into(self._map, at + _KEY * _WORD, key, sequence, time.monotonic_ns(), line, len(place), state)

    def move(self, rank: int, state: AreaState) -> None:
        self._words[rank * _AREA_WORDS + _STATE] = state

    def take_back(self, rank: int, key: int) -> None:
        """Undo `begin` of a collective that never reached gloo, so that counts agree with peers again."""
        slot = self._claim(rank, key)
        ring = self._words[slot + 1] % _RING
        self._words[slot + 1] -= 1
        self._words[slot + 2 + 2 * ring] *= -1  # a peer that comes later does not compare itself with what never happened, but can show it
        for place in range(2):
            if self._words[slot + _SLOT_WORDS - 2 + place] > self._words[slot + 1]:
                self._words[slot + _SLOT_WORDS - 2 + place] = 0
        self.move(rank, AreaState.NOWHERE)

    def wait(self, rank: int, key: int, sequence: int, peers: Sequence[int], is_stopped: Callable[[], bool]) -> None:
        """Wait until every peer has begun this collective.

        Raises:
            Stopped: `is_stopped()` became true while a peer was missing. When all have arrived the collective goes on, so that peers
                who already entered gloo are not left alone there.
        """
        self._awake.wait(lambda: self.has_arrived(key, sequence, peers))
        pause_s = 0.001
        for peer in peers:
            while True:
                bell = ctypes.c_uint32.from_address(self._address + (peer * _AREA_WORDS + _BELL) * _WORD).value
                if self.count(peer, key) >= sequence:
                    break
                if is_stopped():
                    raise Stopped
                self._wait_for_bell(peer, bell, pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

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

    def texts(self, key: int, sequence: int, members: Sequence[int], *, taken_back: bool = False) -> dict[int, str]:
        """What each member posted for a collective; members whose text was overwritten are left out.

        Args:
            taken_back: also what a member has taken back since. Ask for it only where all have met: else it may be from an earlier cell.
        """
        found = {}
        for member in members:
            slot = self._find(member, key)
            ring = sequence % _RING
            if slot is not None and self._words[slot + 2 + 2 * ring] in ((sequence, -sequence) if taken_back else (sequence,)):
                start = (slot + 2 + _RING * 2) * _WORD + ring * _TEXT
                size = self._bytes[start]
                found[member] = bytes(self._bytes[start + 1 : start + 1 + size]).decode(errors="replace")
        return found

    def data(self, peer: int, key: int, sequence: int) -> memoryview | None:
        """What a peer that has begun this collective wrote beside its text; None for nothing. Read it before this rank goes on."""
        slot = self._find(peer, key)
        for place in range(2):
            if slot is not None and self._words[slot + _SLOT_WORDS - 2 + place] == sequence:
                start = self._data_at(peer, slot, place)
                return self._bytes[start : start + _DATA_BYTES]
        return None

    def forget(self, key: int) -> None:
        """This process's rank is done with a group: another may take its slot, once there is no other room."""
        self._forgotten[key] = None

    def has_arrived(self, key: int, sequence: int, peers: Sequence[int]) -> bool:
        """Whether every peer has begun this collective, and none has taken that back."""
        return all(self.count(peer, key) >= sequence for peer in peers)

    def odd_one(self, key: int, sequence: int, text: str, peers: Sequence[int]) -> int | None:
        """The first peer that posted another text for a collective (as far as it is still on the board)."""
        ring = sequence % _RING
        checksum = _checksum(text.encode())
        for peer in peers:
            slot = self._find(peer, key)
            if slot is None or self._words[slot + 2 + 2 * ring] != sequence:
                continue
            is_other = self._words[slot + 3 + 2 * ring] != checksum
            if is_other and self._words[slot + 2 + 2 * ring] == sequence:  # else it was written over while we read
                return peer
        return None

    def waits_in(self, rank: int, *, longer_than_s: float) -> tuple[int, int] | None:
        """The (key, sequence) in which a rank has waited so long; None where it has not. Two words are read, not the whole area."""
        base = rank * _AREA_WORDS
        if self._words[base + _STATE] == AreaState.NOWHERE or time.monotonic_ns() - self._words[base + _SINCE] < longer_than_s * 1e9:
            return None
        return self._words[base + _KEY], self._words[base + _SEQUENCE]

    def note(self, rank: int, row: Sequence[int]) -> int:
        """Keep one finished collective in the rank's ledger (a ring: the oldest goes first).

        Returns:
            Its number, for `amend`.
        """
        base = rank * _AREA_WORDS
        total = self._words[base + _NUM_LEDGER]
        at = base + _FIRST_ROW + total % _LEDGER_ROWS * _LEDGER_WORDS
        _ROW.pack_into(self._map, at * _WORD, *row)
        self._words[base + _NUM_LEDGER] = total + 1
        return total

    def prepared(
        self, rank: int, key: int, operation: int, state: AreaState, *, is_awaited: bool
    ) -> tuple[Callable[[int, Post], int], Callable[[int, int, int | None, int, int], int]]:
        """What `begin`, `move` and `note` do for calls that are made again and again, as long as their group lives.

        Every name is bound here: to look one up, where other processes had the core in between, costs as much as what it stands for.

        Args:
            operation: as the ledger counts them.
            state, is_awaited: as for `begin`.

        Returns:
            What begins such a call, given when it was started (ns) and what is posted of it: its number in its group; and what ends it,
            given that number, when it was started and when the last peer had arrived (None where that is not told apart from the end),
            its bytes and line: its number in the ledger.
        """
        w, everything, memory, now, wake = self._words, self._bytes, self._map, time.monotonic_ns, self._wake_of[rank]
        base, slot, begun = rank * _AREA_WORDS, self._claim(rank, key), int(state)
        count, rings, now_in, cell, bell, total = slot + 1, slot + 2, base + _STATE, base + _CELL, base + _BELL, base + _NUM_LEDGER
        texts, places, shown, rows = (_WORD * at for at in (rings + 2 * _RING, base + _HEAD_WORDS, base + _KEY, base + _FIRST_ROW))
        pack_shown, pack_row, row_size = _SHOWN.pack_into, _ROW.pack_into, _ROW.size

        def begin(started: int, post: Post) -> int:
            text, checksum, place, line = post
            place_size = len(place)
            sequence = w[count] + 1
            start = texts + sequence % _RING * _TEXT
            ring = rings + 2 * (sequence % _RING)
            w[ring] = 0  # as in `begin`: first and last
            everything[start : start + len(text)] = text
            w[ring + 1] = checksum
            w[ring] = sequence
            everything[places : places + place_size] = place
            pack_shown(memory, shown, key, sequence, started, line, place_size, begun)
            w[count] = sequence
            if is_awaited:
                w[bell] = (w[bell] + 1) & 0xFFFFFFFF
                wake()
            return sequence

        def end(sequence: int, started: int, arrived: int | None, num_bytes: int, line: int) -> int:
            ended = now()
            w[now_in] = 0
            number = w[total]
            where = w[cell] << 20 | line
            at = rows + number % _LEDGER_ROWS * row_size
            pack_row(memory, at, operation, key, sequence, num_bytes, started, arrived or ended, ended, where)
            w[total] = number + 1
            return number

        return begin, end

    def amend(self, rank: int, number: int, *, waited_ns: int | None, end_ns: int) -> None:
        """Complete the row of a call once it was waited for, if the ring still holds it; `waited_ns` None leaves its wait as it is."""
        base = rank * _AREA_WORDS
        if number < 0 or self._words[base + _NUM_LEDGER] - number > _LEDGER_ROWS:
            return
        at = base + _FIRST_ROW + number % _LEDGER_ROWS * _LEDGER_WORDS
        if waited_ns is not None:
            self._words[at + _ARRIVED] = min(self._words[at + _STARTED] + waited_ns, end_ns)
        self._words[at + _ENDED] = end_ns

    # -- inside -------------------------------------------------------------------------------------------------------------------------

    def _find(self, rank: int, key: int) -> int | None:
        """Word index of a group's slot in a rank's area; a place once found is remembered, and checked."""
        known = self._slot_of.get((rank, key))
        if known is not None and self._words[known] == key:
            return known
        base = rank * _AREA_WORDS
        first = base + _FIRST_SLOT
        for index in range(self._words[base + _NUM_USED]):
            slot = first + index * _SLOT_WORDS
            if self._words[slot] == key:
                self._slot_of[rank, key] = slot
                return slot
        return None

    def _claim(self, rank: int, key: int) -> int:
        slot = self._find(rank, key)
        if slot is not None:
            self._forgotten.pop(key, None)
            return slot
        base = rank * _AREA_WORDS
        used = self._words[base + _NUM_USED]
        slot = base + _FIRST_SLOT + used * _SLOT_WORDS if used < _NUM_SLOTS else self._taken_over(rank)
        for offset in (*range(2 + 2 * _RING), _SLOT_WORDS - 2, _SLOT_WORDS - 1):
            self._words[slot + offset] = 0
        self._words[slot] = key
        self._words[base + _NUM_USED] = min(used + 1, _NUM_SLOTS)
        return slot

    def _taken_over(self, rank: int) -> int:
        """The slot of the group that was forgotten first."""
        while self._forgotten:
            slot = self._find(rank, next(iter(self._forgotten)))
            self._forgotten.pop(next(iter(self._forgotten)))
            if slot is not None:
                return slot
        raise GroupError(
            f"rank {rank} uses {_NUM_SLOTS} groups and channels of messages at once, and needs one more\n"
            "each group counts, and each pair, direction and tag of send and recv; those of destroyed groups do not\n"
            "destroy groups that you are done with (group.destroy(), dist.destroy_process_group(pg)), or use fewer tags"
        )

    def _write(self, rank: int, slot: int, sequence: int, data: memoryview) -> None:
        """Put data in the place whose content is older."""
        at = slot + _SLOT_WORDS - 2
        place = 0 if self._words[at] <= self._words[at + 1] else 1
        start = self._data_at(rank, slot, place)
        self._words[at + place] = 0
        self._bytes[start : start + len(data)] = data
        self._words[at + place] = sequence

    def _data_at(self, rank: int, slot: int, place: int) -> int:
        """Byte at which a slot's data begin."""
        index = (slot - rank * _AREA_WORDS - _FIRST_SLOT) // _SLOT_WORDS
        return (rank * _AREA_WORDS + _FIRST_DATA) * _WORD + (2 * index + place) * _DATA_BYTES

    def _waking(self, base: int) -> Callable[[], int]:
        """What wakes those who sleep on a bell; made once, since it is called in every collective."""
        address = ctypes.c_void_p(self._address + (base + _BELL) * _WORD)
        return functools.partial(_libc.syscall, _SYS_FUTEX, address, _FUTEX_WAKE, _EVERYONE, None, None, 0)

    def _wait_for_bell(self, peer: int, seen: int, timeout_s: float) -> None:
        limit = _Timespec(0, int(timeout_s * 1e9))
        address = ctypes.c_void_p(self._address + (peer * _AREA_WORDS + _BELL) * _WORD)
        if _libc.syscall(_SYS_FUTEX, address, _FUTEX_WAIT, ctypes.c_uint32(seen), ctypes.byref(limit), None, 0) != 0:
            number = ctypes.get_errno()
            if number not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
                raise OSError(number, os.strerror(number))
