"""Groups of a layout on a cluster: formed in one call, followed through stops and deaths."""

from __future__ import annotations

import time

import pytest

import workbench as wb


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
        assert "groups[\"tp\"].all_gather" in str(stopped.value) and "'tp'" in str(stopped.value)
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
