"""What a rank is about to do, told to its peers before any data moves: fixed-size messages.

An announcement says what the rank calls ("all_gather float32 [2, 3] dim 0") or why it refuses, and one number (rows, bytes). In a
collective all members exchange theirs; if one refuses, or two differ, every member raises and no data has moved, so the group stays
usable. Between two ranks the sender's announcement tells the receiver what to make room for. What is small travels along with it, and what
lies in shared memory is pointed to.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import GroupError
from workbench.ranks.parcels import Parcel

__all__ = ["NUM_BYTES", "ROOM_BYTES", "Announcement", "agree", "carrying", "decode", "encode"]

NUM_BYTES = 2048
_HEAD = struct.Struct("<q??BH")  # number, is_refusal, is_parcel, lengths of the text and of the data in bytes
_TEXT_BYTES = 243
ROOM_BYTES = NUM_BYTES - _HEAD.size - _TEXT_BYTES  # for data


@dataclass(frozen=True, slots=True)
class Announcement:
    """One rank's next step.

    Attributes:
        text: what it calls, or why it refuses.
        number: what only this rank knows: rows or bytes it brings.
        data: those bytes themselves, uint8 [number], where there is room for them; else None.
        parcel: where they lie in memory that the ranks share; else None.
    """

    text: str
    number: int = 0
    is_refusal: bool = False
    data: Tensor | None = None
    parcel: Parcel | None = None

    @property
    def num_brought(self) -> int:
        """Bytes that come with it."""
        return self.parcel.num_bytes if self.parcel else 0 if self.data is None else self.data.numel()


def carrying(text: str, data: Tensor) -> Announcement:
    """An announcement of bytes, uint8 [num_bytes], that brings them along where there is room."""
    return Announcement(text, data.numel(), data=data if 0 < data.numel() <= ROOM_BYTES else None)


def encode(announcement: Announcement) -> bytearray:
    """`NUM_BYTES` bytes; a text that is too long ends in its checksum."""
    text = announcement.text.encode()
    if len(text) > _TEXT_BYTES:  # what is cut is still compared, by its checksum
        text = text[: _TEXT_BYTES - 24].decode(errors="ignore").encode() + f"... [{zlib.crc32(text):08x}]".encode()
    data = bytearray(NUM_BYTES)
    parcel = announcement.parcel
    carried = parcel.pack() if parcel else b"" if announcement.data is None else announcement.data.numpy().data
    _HEAD.pack_into(data, 0, announcement.number, announcement.is_refusal, parcel is not None, len(text), len(carried))
    data[_HEAD.size : _HEAD.size + len(text)] = text
    data[NUM_BYTES - ROOM_BYTES : NUM_BYTES - ROOM_BYTES + len(carried)] = carried
    return data


def decode(data: memoryview) -> Announcement:
    """The inverse of `encode`; the bytes that it brings stay where they are."""
    number, is_refusal, is_parcel, length, carried = _HEAD.unpack_from(data)
    text = str(data[_HEAD.size : _HEAD.size + length], "utf-8", "replace")
    if not carried:
        return Announcement(text, number, is_refusal)
    brought = data[NUM_BYTES - ROOM_BYTES :][:carried]
    if is_parcel:
        return Announcement(text, number, is_refusal, parcel=Parcel.unpack(brought.tobytes()))
    return Announcement(text, number, is_refusal, torch.frombuffer(brought, dtype=torch.uint8))


def agree(announcements: Sequence[Announcement], *, ranks: Sequence[int], name: str) -> None:
    """Check that all members of a group announced the same.

    Raises:
        GroupError: a member refuses, or members differ; the text shows each rank's call, the odd ones first.
    """
    first = announcements[0].text
    if all([a.text == first and not a.is_refusal for a in announcements]):
        return
    refusals = [(rank, a.text) for rank, a in zip(ranks, announcements, strict=True) if a.is_refusal]
    if refusals:
        rank, text = refusals[0]
        raise GroupError(f"rank {rank} of group {name!r} refused its part: {text}\nno data was sent; the group is usable")
    counts = Counter(a.text for a in announcements)
    rows = sorted(zip(ranks, announcements, strict=True), key=lambda row: (counts[row[1].text], row[0]))
    table = "\n".join(f"  rank {rank}: {a.text}" for rank, a in rows)
    raise GroupError(
        f"the ranks of group {name!r} met with different calls; no data was sent\n{table}\nmake the calls the same on all of its ranks"
    )
