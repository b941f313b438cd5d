"""Parcels in one process, and those of a process that has ended."""

from __future__ import annotations

import os

import pytest
import torch

from workbench.errors import GroupError
from workbench.ranks import parcels
from workbench.ranks.parcels import Inbox, Outbox, Parcel


def part(value: int, size: int = 1000) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


def test_parts_follow_one_another_and_the_last_two_puts_stay() -> None:
    outbox, inbox = Outbox(), Inbox()
    first = outbox.put([part(1), part(2, 3)])
    assert inbox.open(first).tolist() == [1] * 1000 + [2] * 3 and Parcel.unpack(first.pack()) == first
    second = outbox.put([part(3)])
    assert inbox.open(first)[0] == 1 and inbox.open(second)[0] == 3
    third = outbox.put([part(4)])
    assert inbox.open(third)[0] == 4 and (third.fd, third.inode) == (first.fd, first.inode)


def test_a_place_grows_and_its_readers_follow() -> None:
    outbox, inbox = Outbox(), Inbox()
    small, _ = outbox.put([part(1)]), outbox.put([part(2)])
    assert inbox.open(small)[0] == 1
    large = outbox.put([part(5, 1 << 19)])
    assert large.inode != small.inode and inbox.open(large).sum() == 5 * (1 << 19)


def test_large_memory_is_given_back_once_all_have_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcels, "_KEPT_BYTES", 1 << 19)
    outbox = Outbox()
    parcel = outbox.put([part(1, 1 << 20)])
    view = Inbox().open(parcel)
    outbox.met()  # the announcement that it came with: readers may still be at it
    assert Inbox().open(parcel)[0] == 1
    outbox.met()  # the next one
    with pytest.raises(GroupError):
        Inbox().open(parcel)
    assert view[0] == 1  # who has opened it keeps it
    outbox.put([part(2, 1 << 20)])
    outbox.read()
    assert outbox._places == [None, None]


def test_a_dropped_outbox_can_be_read_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = Outbox()
    parcel = outbox.put([part(7)])
    del outbox
    assert Inbox().open(parcel)[0] == 7
    monkeypatch.setattr(parcels, "_LINGER_S", -1.0)
    parcels._let_go()
    with pytest.raises(GroupError):
        Inbox().open(parcel)


def test_a_parcel_of_a_process_that_ended_is_told() -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, Outbox().put([part(1)]).pack())
        os._exit(0)
    os.waitpid(pid, 0)
    parcel = Parcel.unpack(os.read(reading, 100))
    os.close(reading)
    os.close(writing)
    with pytest.raises(GroupError) as gone:
        Inbox().open(parcel)
    assert str(gone.value).splitlines() == [
        f"process {pid} has ended before its 1000 bytes were read", "they lay in its memory and went with it",
        "respawn the rank, and make the call again",
    ]  # fmt: skip
