"""Stateless groups of two and three processes."""

from __future__ import annotations

import multiprocessing as mp
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import run_processes

from workbench.errors import GroupError, WorkbenchError
from workbench.ranks.stateless import StatelessGroup, free_port


def join(rank: int, port: Any, world_size: int = 3, **options: Any) -> StatelessGroup:
    """Rank 0 lets the system choose a port and leaves it in a shared value, where the others find it."""
    if rank == 0:
        group = StatelessGroup.create("127.0.0.1", 0, 0, world_size, **options)
        port.value = group.port
        return group
    while not port.value:
        time.sleep(0.01)
    return StatelessGroup.create("127.0.0.1", port.value, rank, world_size, **options)


def run_group(body: Callable[..., Any], num_processes: int = 3) -> list[Any]:
    return run_processes(num_processes, body, mp.get_context("forkserver").Value("i", 0))


def test_each_sender_delivers_its_own() -> None:
    outs = run_group(_senders)
    assert outs[0][0] == ["2a", "1a", "1b", "2b", "self"] and all(o[1] == [0, 1, 4] and o[2] == "secret" for o in outs)
    assert all(o[3] == 6 and o[4] == 1.0 and o[5] == 3 for o in outs)


def _senders(rank: int, port: Any) -> Any:
    group = join(rank, port)
    if rank:
        group.send_obj(f"{rank}a", dst=0)
        group.send_obj(f"{rank}b", dst=0)
        out = None
    else:
        group.send_obj("self", dst=0)
        out = [group.recv_obj(src) for src in (2, 1, 1, 2, 0)]
    group.barrier(timeout_s=20)
    gathered, told = group.all_gather_obj(rank * rank), group.broadcast_obj("secret" if rank == 2 else None, src=2)
    mine = torch.tensor([rank + 1])
    total, mean, top = (group.all_reduce(mine, op).item() for op in ("sum", "mean", "max"))
    assert mine.item() == rank + 1 and mean == 2.0
    if rank == 1:
        group.send(torch.ones(2), dst=2)
    elif rank == 2:
        assert group.recv(torch.empty(2), src=1).tolist() == [1.0, 1.0]
    sent = group.broadcast(torch.full((1,), float(rank)), src=1)
    for _ in range(3):
        group.barrier()
    group.destroy()
    group.destroy()
    return out, gathered, told, total, sent.item(), top


def test_a_barrier_keeps_its_limit_names_the_missing_and_can_go_on() -> None:
    first, second, late = run_group(_late)
    for took_s, text in (first, second):
        assert 0.9 < took_s < 2.0 and "barrier #1" in text and "ranks [2] did not arrive" in text and "timed out after 1 s" in text
    assert late == "there"


def _late(rank: int, port: Any) -> Any:
    group = join(rank, port)
    out: Any = None
    if rank == 2:
        time.sleep(2.5)
        out = "there"
    else:
        started = time.monotonic()
        with pytest.raises(WorkbenchError) as caught:
            group.barrier(timeout_s=1)
        out = (time.monotonic() - started, str(caught.value))
    group.barrier()
    group.barrier(timeout_s=10)
    group.destroy()
    return out


def test_what_expired_is_told_once_and_the_next_is_reachable() -> None:
    assert run_group(_expiring, 2)[1] == ["expired before it was read", "new", "nothing came from rank 0", "later"]


def _expiring(rank: int, port: Any) -> Any:
    group, out = join(rank, port, 2, data_expiration_s=0.3, store_timeout_s=1.0), []
    if rank == 0:
        group.send_obj("old", dst=1)
        time.sleep(0.5)
        group.send_obj("new", dst=1)
        group.barrier()
        time.sleep(1.5)
        group.send_obj("later", dst=1)
    else:
        group.barrier()
        for _ in range(4):
            try:
                out.append(group.recv_obj(0))
            except GroupError as error:
                out.append(next(text for text in ("expired before it was read", "nothing came from rank 0") if text in str(error)))
    group.destroy()
    return out


def test_groups_over_overlapping_processes_stand_side_by_side() -> None:
    assert run_group(_overlapping)[1] == (["a0", "a1", "a2"], ["b1", "b2"])


def _overlapping(rank: int, port: Any) -> Any:
    everyone = join(rank, port)
    out: Any = None
    if rank == 0:
        out = everyone.all_gather_obj("a0")
        everyone.recv_obj(1)  # pass the second group's port through the first
    elif rank == 1:
        pair = StatelessGroup.create("127.0.0.1", 0, 0, 2)
        everyone.send_obj(pair.port, dst=2)
        everyone.send_obj("go on", dst=0)
        out = everyone.all_gather_obj("a1"), pair.all_gather_obj("b1")
        pair.destroy()
    else:
        pair = StatelessGroup.create("127.0.0.1", everyone.recv_obj(1), 1, 2)
        out = everyone.all_gather_obj("a2"), pair.all_gather_obj("b2")
        pair.destroy()
    everyone.destroy()
    return out


def test_a_rank_zero_that_ends_early_is_an_error_that_says_so() -> None:
    _, told = run_group(_early_end, 2)
    assert "lost the store at 127.0.0.1:" in told and "rank 0 serves it" in told


def _early_end(rank: int, port: Any) -> Any:
    group = join(rank, port, 2)
    if rank == 0:
        return group.recv_obj(1)  # and the process ends without a word
    group.send_obj("joined", dst=0)
    with pytest.raises(GroupError) as caught:
        group.recv_obj(0)
    return str(caught.value)


def test_the_store_listens_on_loopback_only_and_outlives_its_handle() -> None:
    group = StatelessGroup.create("127.0.0.1", 0, 0, 1)
    port = group.port
    del group
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        assert connection.getpeername()[0] == "127.0.0.1"
    listening = {line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"}
    assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening
    for store in StatelessGroup._serving[:]:
        if store.port == port:
            StatelessGroup._serving.remove(store)


def test_a_group_of_one_does_it_all_alone() -> None:
    group = StatelessGroup.create("127.0.0.1", 0, 0, 1)
    group.send_obj({"a": 1}, dst=0)
    assert group.recv_obj(0) == {"a": 1} and group.broadcast_obj(2, src=0) == 2 and group.all_gather_obj(3) == [3]
    assert group.all_reduce(torch.tensor([1, 2]), "mean").tolist() == [1.0, 2.0] and "rank 0 of 1" in repr(group)
    group.barrier(timeout_s=0)
    group.destroy()
    with pytest.raises(GroupError, match="has left this group"):
        group.send_obj(1, dst=0)


@pytest.mark.parametrize(("call", "text"), [
    (lambda g: g.send_obj(1, dst=1), "dst=1 is outside the group of 1"), (lambda g: g.recv_obj(-1), "src=-1 is outside"),
    (lambda g: g.broadcast_obj(1, src=2), "src=2 is outside"), (lambda g: g.all_reduce(torch.ones(1), "avg"), "op must be one of 'sum'"),
    (lambda g: StatelessGroup.create("127.0.0.1", 1, 2, 2), "rank=2 is outside the group of 2"),
    (lambda g: StatelessGroup.create("127.0.0.1", 0, 1, 2), "only rank 0 lets the system choose"),
    (lambda g: g.send_obj(lambda: g, dst=0), "cannot be sent to other ranks"),
])  # fmt: skip
def test_bad_arguments_are_refused(call: Any, text: str) -> None:
    group = StatelessGroup.create("127.0.0.1", 0, 0, 1)
    with pytest.raises(ValueError) as caught:
        call(group)
    assert text in str(caught.value)
    group.destroy()


def test_a_taken_port_and_a_missing_server_are_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(GroupError, match=r"rank 0 cannot serve on 127.0.0.1:\d+: Address already in use"):
            StatelessGroup.create("127.0.0.1", taken.getsockname()[1], 0, 2)
    with pytest.raises(GroupError, match="nobody serves 127.0.0.1"):
        StatelessGroup.create("127.0.0.1", free_port(), 1, 2, store_timeout_s=0.5)


def test_destroy_on_rank_zero_names_who_has_not_left() -> None:
    group = StatelessGroup.create("127.0.0.1", 0, 0, 2)
    with pytest.raises(GroupError, match=r"ranks \[1\] to leave the group"):
        group.destroy(timeout_s=0.2)
    assert group._store is not None
    StatelessGroup._serving.remove(group._store)
