"""Queues in shared memory between real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch.distributed as dist
from worlds import run_world

from workbench.errors import GroupError
from workbench.ranks.group import Group
from workbench.ranks.message_queue import MessageQueue


def test_every_reader_sees_every_message_in_order() -> None:
    outs = run_world(3, _broadcast)
    assert all(o == (list(range(200)), 5_000_000, [("from", r) for r in range(3)] if place == 2 else None) for place, o in enumerate(outs))


def _broadcast(rank: int) -> Any:
    g = Group.from_process_group(dist.group.WORLD, name="world")
    queue = g.create_mq_broadcaster(writer_rank=1)
    assert queue is not None and queue.is_writer == (rank == 1)
    seen = [queue.broadcast_object(number if rank == 1 else None) for number in range(200)]
    long = len(queue.broadcast_object(b"x" * 5_000_000 if rank == 1 else None))  # several chunks
    mine, handles = g.create_single_reader_mq_broadcasters(reader_rank_in_group=2)
    mine.enqueue(("from", rank))
    got = [MessageQueue.attach(handle, 0).dequeue(timeout_s=10) for handle in handles] or None
    g.barrier()
    return seen, long, got


def test_a_writer_outside_the_group_reaches_all_its_members() -> None:
    assert run_world(2, _external) == [["hello", "end"]] * 2


def _external(rank: int) -> Any:
    g = Group.from_process_group(dist.group.WORLD, name="world")
    pair = Group.create([0, 1], "pair")
    writer = MessageQueue.create(2) if rank == 0 else None  # any process may write; here it is rank 0's
    queue = pair.create_mq_broadcaster(writer_rank=0, external_writer_handle=writer.export_handle() if writer else None, blocking=False)
    assert queue is not None and not queue.is_writer
    if writer:
        writer.wait_until_ready(timeout_s=10)
        writer.enqueue("hello")
        writer.enqueue("end")
    queue.wait_until_ready()
    seen = [queue.dequeue(timeout_s=10), queue.dequeue(timeout_s=10)]
    g.barrier()
    return seen


def test_a_full_ring_waits_and_names_who_is_behind() -> None:
    writer = MessageQueue.create(2, chunk_bytes=64, num_chunks=2)
    quick, slow = (MessageQueue.attach(writer.export_handle(), reader) for reader in range(2))
    for number in range(2):
        writer.enqueue(number)
    assert [quick.dequeue(), quick.dequeue()] == [0, 1]
    with pytest.raises(GroupError, match=r"MessageQueue\(writer, 2 readers\) waited 0.05 s: readers \[1\] are 2 chunks behind"):
        writer.enqueue(2, timeout_s=0.05)
    assert slow.dequeue() == 0
    writer.enqueue(2, timeout_s=1)
    assert slow.dequeue() == 1 and slow.dequeue() == 2 and quick.dequeue() == 2
    with pytest.raises(GroupError, match="waited 0.05 s: no message came"):
        quick.dequeue(timeout_s=0.05)
    for queue in (writer, quick, slow):
        queue.close()
        queue.close()
    with pytest.raises(GroupError, match="was closed"):
        writer.enqueue(1)


def test_wrong_ends_and_numbers_are_refused() -> None:
    writer = MessageQueue.create(1)
    with pytest.raises(GroupError, match=r"readers \[0\] did not attach"):
        writer.wait_until_ready(timeout_s=0.05)
    with pytest.raises(ValueError, match="reader=1 is outside the queue's 1 readers: choose 0..0"):
        MessageQueue.attach(writer.export_handle(), 1)
    with pytest.raises(ValueError, match="num_readers=0"):
        MessageQueue.create(0)
    reader = MessageQueue.attach(writer.export_handle(), 0)
    writer.wait_until_ready(timeout_s=1)
    reader.wait_until_ready(timeout_s=1)
    with pytest.raises(GroupError, match="cannot read"):
        writer.dequeue()
    with pytest.raises(GroupError, match="cannot write"):
        reader.enqueue(1)


def test_a_writer_that_is_killed_is_told_and_leaves_nothing() -> None:
    script = (
        "import pickle, sys, time\nfrom workbench.ranks.message_queue import MessageQueue\n"
        "queue = MessageQueue.create(1)\nsys.stdout.buffer.write(pickle.dumps(queue.export_handle()))\nsys.stdout.flush()\n"
        "queue.wait_until_ready()\nqueue.enqueue('last words')\ntime.sleep(60)\n"
    )
    import pickle

    before = set(os.listdir("/dev/shm"))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        handle = pickle.load(process.stdout)
        reader = MessageQueue.attach(handle, 0)
        assert reader.dequeue(timeout_s=20) == "last words"
        process.send_signal(signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(GroupError, match=f"the queue's writer, process {process.pid}, has ended"):
            reader.dequeue(timeout_s=20)
        assert time.monotonic() - started < 5
    with pytest.raises(GroupError, match="make a new queue with a live writer"):
        MessageQueue.attach(handle, 0)
    assert set(os.listdir("/dev/shm")) <= before
