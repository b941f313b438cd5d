"""Groups of a layout on a cluster: formed in one call, followed through stops and deaths."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_group
import test_group_refusals
from worlds import run_world

import workbench as wb


@pytest.fixture(scope="module")
def pair() -> Iterator[wb.Cluster]:
    with wb.launch(2) as cluster:
        yield cluster


def sums() -> dict[str, tuple[tuple[int, ...], float]]:
    import torch

    return {axis: (group.ranks, group.all_reduce(torch.ones(1)).item()) for axis, group in wb.current().groups.items()}


def expected(layout: wb.Layout, rank: int) -> dict[str, tuple[tuple[int, ...], float]]:
    return {axis: (layout.group_of(rank, axis), float(len(layout.group_of(rank, axis)))) for axis in layout.axes}


def test_groups_follow_the_layout_in_use_and_the_next() -> None:
    with wb.launch(4) as cluster:
        for layout in (
            wb.Layout(4, tp=2, pp=2), wb.Layout(4, tp=2, pcp=2, dcp=4), wb.Layout.megatron(4, tp=2, ep=2), wb.Layout.subgroups(4, size=2),
            wb.Layout.custom({"engine": [[3, 0], [1], [2]]}),
        ):  # fmt: skip
            cluster.use(layout)
            assert cluster.run(sums) == [expected(layout, rank) for rank in range(4)]
        assert cluster.run(lambda: wb.current().rank, ranks="engine=1") == [0]


def test_groups_survive_a_stop_and_a_death_and_those_of_your_own_say_they_are_stale() -> None:
    def waits() -> None:
        import torch

        if wb.current().rank == 0:
            time.sleep(60)
        wb.current().groups["tp"].all_gather(torch.ones(2))

    layout = wb.Layout(4, tp=2, pp=2)
    with wb.launch(4) as cluster:
        cluster.use(layout)
        cluster.execute("mine = wb.Group.create([1, 0], 'mine')\nheld = groups['tp']")
        with pytest.raises(wb.RankTimeout) as stopped:
            cluster.run(waits, timeout_s=1)
        assert 'groups["tp"].all_gather' in str(stopped.value) and "'tp'" in str(stopped.value)
        assert cluster.run(sums) == [expected(layout, rank) for rank in range(4)]
        cluster.kill(2)
        cluster.respawn(2)
        assert cluster.run(sums) == [expected(layout, rank) for rank in range(4)] and cluster.generation > 0
        assert cluster.execute("held.all_gather_object(rank)", ranks="0-1")[0].result_text == "[0, 1]"
        with pytest.raises(wb.RankFailed, match="StaleGroupError: group 'mine' belongs to an older generation"):
            cluster.execute("mine.all_gather_object(rank)", ranks="0-1")


def test_a_mistake_of_one_rank_reaches_all_with_the_check_on() -> None:
    def body() -> list[str]:
        import torch

        group, told = wb.current().group, []
        for call in (lambda: group.all_gatherv(torch.ones(1, 2), sizes=[2, 1]), lambda: group.all_reduce(torch.ones(2 + group.rank))):
            try:
                call()
            except (ValueError, wb.GroupError) as error:
                told.append(type(error).__name__)
        return [*told, str(group.all_reduce(torch.ones(1)).item())]

    with wb.launch(2) as cluster:
        assert cluster.run(body, timeout_s=30) == [["ValueError", "GroupError", "2.0"], ["GroupError", "GroupError", "2.0"]]


def every_kind() -> list[object]:
    import torch

    g = wb.current().group
    large = {"text": "x" * 5000, "rank": 1}
    told: list[object] = [g.broadcast_object(large if g.rank == 1 else None, src=1), g.all_gather_object([g.rank] * 9)]
    if g.rank == 0:
        g.send_object(large, dst=1)
    else:
        told.append(g.recv_object(0))
    values = {"a": torch.ones(3000), "n": 3} if g.rank == 0 else None
    told += [g.all_gatherv(torch.ones(2000 * g.rank + 1)).sum().item(), [*(g.broadcast_tensor_dict(values) or {})]]
    return [*told, g.all_reduce(torch.ones(2)).tolist()]


def test_the_ledger_shows_one_row_under_the_name_that_was_called() -> None:
    with wb.launch(2) as cluster:
        cluster.run(every_kind)
        rows = cluster.ledger()
        ours = rows[(rows["rank"] == 0) & (rows.op != "barrier")]
        called = ["broadcast_object", "all_gather_object", "send", "send", "all_gatherv", "broadcast_tensor_dict", "all_reduce"]
        assert list(ours.op) == called
        bytes_of = dict(zip(ours.op, ours.num_bytes, strict=True))
        assert bytes_of["broadcast_object"] == 0 and bytes_of["all_gatherv"] == 4 and bytes_of["all_reduce"] == 8
        assert 12_000 < bytes_of["broadcast_tensor_dict"] < 13_000 and (rows.wait_s <= rows.duration_s).all()
        cluster.execute("import time; time.sleep(0.3 * rank); group.all_reduce(torch.ones(1))")
        waited = cluster.ledger().tail(2).set_index("rank")
        assert list(waited.op.unique()) == ["all_reduce"] and waited.wait_s[0] > 0.2 > waited.wait_s[1]


def test_objects_of_a_recorded_rank_are_replayed(tmp_path: Path) -> None:
    with wb.launch(2) as cluster:
        with cluster.record(tmp_path):
            results = cluster.run(every_kind)
    for rank in range(2):
        assert wb.replay(tmp_path, rank=rank).result == results[rank]


@pytest.mark.parametrize(("call", "shown"), [
    ("all_reduce(torch.ones(1))", "all_reduce"), ("all_gather(torch.ones(1))", "all_gather"), ("barrier()", "barrier"),
    ("broadcast_object(1, src=1)", "broadcast_object"), ("all_gatherv(torch.ones(1))", "all_gatherv"),
    ("gather_object(1)", "gather_object"), ("reduce_scatter(torch.ones(2), dim=0)", "reduce_scatter"),
    ("broadcast_tensor_dict({}, src=1)", "broadcast_tensor_dict"),
    ("create_mq_broadcaster(1)", "create_mq_broadcaster"), ("dispatch(*[torch.ones(1, 1)] * 3)", "dispatch"),
])  # fmt: skip
def test_a_rank_that_waits_is_shown_in_the_operation_that_it_called(pair: wb.Cluster, call: str, shown: str) -> None:
    with pytest.raises(wb.RankDeadlock) as told:
        pair.execute(f"if rank == 0:\n    group.{call}")
    assert f"rank 0 waits in {shown} (line 2); rank 1 finished the cell without it" in str(told.value)
    assert pair.execute("group.all_gather_object(rank)")[0].result_text == "[0, 1]"


def test_one_of_our_operations_that_meets_one_of_torchs_is_told_by_both_names(pair: wb.Cluster) -> None:
    with pytest.raises(wb.CollectiveMismatch) as told:
        pair.execute("group.all_reduce(torch.ones(1)) if rank == 0 else dist.barrier()")
    assert "rank 0 called Group.all_reduce(sum float32 [1])" in str(told.value) and "rank 1 called barrier()" in str(told.value)
    assert pair.execute("group.all_gather_object(rank)")[0].result_text == "[0, 1]"


def test_groups_check_as_the_cluster_does() -> None:
    def body() -> list[object]:
        import torch

        g, mine = wb.current().group, wb.Group.create([0, 1], "mine")
        rows = g.all_gatherv(torch.full((600 * g.rank,), 1.0))  # sizes are told in any case
        objects = mine.all_gather_object("x" * 3000 * g.rank)
        return [
            g.checks,
            mine.checks,
            wb.current().groups["tp"].checks,
            rows.numel(),
            [len(o) for o in objects],
            g.all_reduce(rows).numel(),
        ]

    with wb.launch(2, check_collectives=False) as cluster:
        cluster.use(wb.Layout(2, tp=2))
        assert cluster.run(body) == [[False, False, False, 600, [0, 3000], 600]] * 2
        cluster.execute("group.all_reduce(torch.ones(1))")
        assert list(cluster.ledger().tail(2).op) == ["all_reduce", "all_reduce"]
        with pytest.raises(wb.RankFailed, match="ValueError: all_gather: invalid dim 3"):
            cluster.execute("group.all_gather(torch.ones(2), dim=3)", timeout_s=20)
        with pytest.raises(wb.CollectiveMismatch, match="rank 0 called Group.all_gather_object(.*), rank 1 called all_reduce"):
            cluster.execute("group.all_gather_object(1) if rank == 0 else group.all_reduce(torch.ones(1))", timeout_s=20)


def test_large_objects_pass_between_two_ranks_in_order_and_dropped_ones_leave_the_channel_usable(pair: wb.Cluster) -> None:
    def body() -> list[object]:
        import torch

        g = wb.current().group
        large: list[dict[str, Any]] = [{"text": chr(97 + n) * 400_000, "array": torch.full((200_000,), n)} for n in range(3)]
        if g.rank == 0:
            for obj in large:
                g.send_object(obj, dst=1)
            g.send_object("small", dst=1)
            g.send_object(large[0], dst=1)
            g.send_object("last", dst=1)
            return [g.recv_object(1)["text"][0], large[0]["text"][0]]
        got = [g.recv_object(0) for _ in range(4)]
        with pytest.raises(wb.GroupError, match="it is: object in shared memory; the call waits for: tensor"):
            g.recv(torch.Size([1]), torch.float32, src=0)
        last = g.recv_object(0)
        g.send_object({"text": "z" * 400_000}, dst=0)
        return [[one["text"][0] + str(len(one["text"])) + str(one["array"].sum().item()) for one in got[:3]], got[3], last]

    first, second = pair.run(body, timeout_s=30)
    assert first == ["z", "a"] and second == [["a4000000", "b400000200000", "c400000400000"], "small", "last"]


def test_what_a_rank_received_is_its_own_when_the_memory_it_came_in_is_used_again(pair: wb.Cluster) -> None:
    def body() -> bool:
        import torch

        g, kept = wb.current().group, []
        for n in range(5):
            objects = g.all_gather_object(torch.full((100_000,), n * 10 + g.rank))
            values = g.broadcast_tensor_dict({"x": torch.full((70_000,), n), "y": torch.full((3,), n)} if g.rank == 0 else None)
            rows = g.all_gatherv([torch.full((50_000 + g.rank,), n), torch.full((50_000 + g.rank, 2), n, dtype=torch.int8)])
            kept.append((n, objects, values, rows))
        return all(
            bool((objects[r] == n * 10 + r).all()) and bool((values["x"] == n).all()) and values["y"].tolist() == [n] * 3
            and bool((rows[0] == n).all()) and rows[0].numel() == 100_001 and rows[1].shape == (100_001, 2) and bool((rows[1] == n).all())
            for n, objects, values, rows in kept for r in range(2)
        )  # fmt: skip

    assert pair.run(body, timeout_s=60) == [True, True]


def test_memory_that_was_shared_is_given_back(pair: wb.Cluster) -> None:
    def shared_bytes() -> int:
        import os

        found = [os.stat(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_parcel(fd)]
        return sum(512 * one.st_blocks for one in found)

    def _is_parcel(fd: str) -> bool:
        import contextlib
        import os

        with contextlib.suppress(OSError):
            return "workbench-parcel" in os.readlink(f"/proc/self/fd/{fd}")
        return False

    def broadcast(size: int) -> int:
        g = wb.current().group
        return len(g.broadcast_object("x" * size if g.rank == 0 else None))

    before = pair.run(shared_bytes)
    assert pair.run(broadcast, 80_000_000, timeout_s=60) == [80_000_000] * 2
    assert pair.run(shared_bytes)[0] >= before[0] + 80_000_000
    pair.run(broadcast, 10)
    assert all(after <= held for after, held in zip(pair.run(shared_bytes), before, strict=True))


@pytest.fixture(scope="module")
def quartet() -> Iterator[wb.Cluster]:
    with wb.launch(4) as cluster:
        yield cluster


@pytest.mark.parametrize("body", [test_group._collectives, test_group._dicts, test_group._unsorted])
def test_four_ranks_get_through_the_board_what_they_get_through_gloo(quartet: wb.Cluster, body: Callable[[int], Any]) -> None:
    on_board = quartet.run(lambda: body(wb.current().rank), timeout_s=60)
    assert on_board == run_world(4, body)


@pytest.mark.parametrize("body", [test_group._moves, test_group._reductions, test_group._experts])
def test_three_ranks_get_through_the_board_what_they_get_through_gloo(trio: wb.Cluster, body: Callable[[int], Any]) -> None:
    on_board = trio.run(lambda: body(wb.current().rank), timeout_s=60)
    assert on_board == run_world(3, body)


@pytest.fixture(scope="module")
def trio() -> Iterator[wb.Cluster]:
    with wb.launch(3) as cluster:
        yield cluster


def test_bad_input_is_told_on_the_board_as_through_gloo(pair: wb.Cluster) -> None:
    for body in (
        test_group._metrics,
        test_group._one_mistake,
        test_group_refusals._mistakes,
        test_group_refusals._mismatches,
        test_group_refusals._misfits,
    ):
        assert pair.run(lambda body=body: body(wb.current().rank), timeout_s=60) == run_world(2, body)


def test_groups_come_and_go_without_using_up_the_board(pair: wb.Cluster) -> None:
    def body() -> list[Any]:
        import torch

        board, me = wb.current().process.interceptor.board, wb.current().rank
        forgotten = len(board._forgotten)
        for n in range(6):
            made = wb.Group.create([0, 1], f"group {n}")
            made.all_reduce(torch.ones(1))
            if me == 0:
                made.send(torch.ones(1), dst=1)
            else:
                made.recv(torch.Size([1]), torch.float32, src=0)
            made.destroy()
            del made
        return [len(board._forgotten) - forgotten]

    assert pair.run(body, timeout_s=60) == [[12], [12]]  # six groups and a channel in each
