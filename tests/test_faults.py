"""Faults on purpose: each does what it says to one rank, and is undone afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

import workbench as wb
from workbench.ranks.cluster import Cluster

SUM = "x = torch.ones(3); dist.all_reduce(x); x.tolist()"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(3) as cluster:
        yield cluster


def test_a_delay_makes_the_others_wait_for_it(cluster):
    with cluster.inject(wb.Fault(rank=1, op="all_reduce", at=2, action="delay", delay_s=0.6)):
        cluster.execute("for _ in range(3): dist.all_reduce(torch.ones(1))")
    last = cluster.ledger().query("op == 'all_reduce'").groupby("rank").tail(3)
    waits = last.sort_values(["rank", "sequence"]).groupby("rank").wait_s.apply(list)
    assert waits[0][1] > 0.5 and waits[2][1] > 0.5 and waits[1][1] < 0.3
    assert waits[0][0] < 0.5 and waits[0][2] < 0.5


def test_a_dropped_call_is_a_deadlock_that_names_the_rank(cluster):
    with cluster.inject(wb.Fault(rank=2, op="all_reduce", action="drop")), pytest.raises(wb.RankDeadlock, match="rank 2 finished the cell"):
        cluster.execute(SUM)
    assert {cluster.execute(SUM)[rank].result_text for rank in range(3)} == {"[3.0, 3.0, 3.0]"}


def test_corruption_changes_one_element_on_one_rank_the_same_each_time(cluster):
    seen = []
    for _ in range(2):
        with cluster.inject(wb.Fault(rank=0, op="all_reduce", action="corrupt", seed=5)):
            seen.append([cluster.execute(SUM)[rank].result_text for rank in range(3)])
    assert seen[0] == seen[1] and seen[0][1] == seen[0][2] == "[3.0, 3.0, 3.0]"
    assert sum(value != 3.0 for value in eval(seen[0][0])) == 1


def test_a_tape_holds_what_a_corrupted_call_gave(cluster, tmp_path):
    with cluster.record(tmp_path / "tape"), cluster.inject(wb.Fault(rank=0, op="all_reduce", action="corrupt", seed=5)):
        given = cluster.execute(f"{SUM}; dist.all_reduce(x); x.tolist()")[0].result_text
    assert given != "[9.0, 9.0, 9.0]" and wb.replay(tmp_path / "tape", rank=0).result_texts == (given,)


def test_a_paused_rank_is_continued_by_a_stop(cluster):
    started = time.monotonic()
    with cluster.inject(wb.Fault(rank=1, op="any", action="pause")), pytest.raises(wb.RankTimeout, match="rank 1"):
        cluster.execute(f"kept = rank\n{SUM}", timeout_s=1)
    assert time.monotonic() - started < 4
    assert cluster.pull("kept") == [0, 1, 2] and cluster.execute(SUM)[1].result_text == "[3.0, 3.0, 3.0]"


def test_faults_are_counted_per_operation(cluster):
    with cluster.inject(wb.Fault(rank=0, op="broadcast", at=1, action="corrupt")):
        result = cluster.execute(
            "x = torch.ones(2); dist.all_reduce(x); y = torch.ones(2); dist.broadcast(y, src=1); (x.tolist(), y.tolist())"
        )
    assert result[0].result_text != result[1].result_text == "([3.0, 3.0], [1.0, 1.0])"
    assert result[0].result_text.startswith("([3.0, 3.0],")


@pytest.mark.parametrize(
    "fault, told",
    [
        ({"rank": 3, "op": "barrier"}, "rank 3 does not fit; it must be between 0 and 2"),
        ({"rank": 0, "op": "allreduce"}, "op 'allreduce' does not fit; it must be one of all_gather"),
        ({"rank": 0, "op": "barrier", "action": "explode"}, "action 'explode' does not fit; it must be one of delay, kill"),
        ({"rank": 0, "op": "barrier", "at": 0}, "at 0 does not fit; it must be at least 1: calls are counted from 1"),
        ({"rank": 0, "op": "barrier", "action": "delay"}, "delay_s 0.0 does not fit; it must be above 0"),
    ],
)
def test_a_fault_that_could_never_happen_is_refused(cluster, fault, told):
    with pytest.raises(ValueError, match="does not fit") as caught, cluster.inject(wb.Fault(**fault)):
        pass
    assert told in str(caught.value)


def test_a_kill_is_a_death_told_as_such():
    with wb.launch(2) as cluster:
        with cluster.inject(wb.Fault(rank=1, op="all_reduce", action="kill")), pytest.raises(wb.RankFailed, match="SIGKILL") as caught:
            cluster.execute(SUM)
        assert caught.value.rank == 1
        cluster.respawn(1)
        assert cluster.execute(SUM)[0].result_text == "[2.0, 2.0, 2.0]"
