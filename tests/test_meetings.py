"""Rollouts made by hand in the ranks of a cluster: diagnosis, errors and ledger call their meetings by the names that users call."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from scripted_engine import ScriptedEngine

import workbench as wb
from workbench.ranks.cluster import Cluster
from workbench.ranks.operations import ROLLOUT_OPERATIONS
from workbench.rollout.pipeline import GroupedRollout, RootedRollout

SETUP = """
import time
class Mine(wb.RootedRollout):
    pass
rooted, mine = wb.RootedRollout(group, None), Mine(group, None)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(2) as made:
        made.execute(SETUP)
        yield made


@pytest.mark.parametrize("name", ["rooted", "mine"])
def test_a_rank_that_does_not_come_to_gather_prompts_is_told_by_that_name(cluster, name):
    handle = cluster.execute(f"if rank == 1: time.sleep(60)\ngathered = {name}.gather_prompts(['a'] * rank)", block=False)
    time.sleep(0.5)
    waiter = cluster.diagnose().waiting[0]
    assert (waiter.op, waiter.line, waiter.missing) == ("RootedRollout.gather_prompts", 2, (1,))
    assert cluster.status()[0].waits_in.startswith("RootedRollout.gather_prompts #")
    cluster.interrupt()
    with pytest.raises(wb.RankInterrupted, match=r"rank 0 waits in RootedRollout.gather_prompts \(line 2\)"):
        handle.result(timeout_s=10)


def test_a_rank_that_never_comes_to_scatter_completions_is_told_by_that_name(cluster):
    cluster.execute("gathered = rooted.gather_prompts([])")
    with pytest.raises(wb.RankDeadlock, match=r"rank 1 waits in RootedRollout.scatter_completions \(line 1\); rank 0 finished the cell"):
        cluster.execute("if rank == 1: rooted.scatter_completions(None, gathered.offsets)", timeout_s=20)


def test_a_rank_that_comes_to_something_else_is_told_by_both_names(cluster):
    with pytest.raises(wb.CollectiveMismatch) as told:
        cluster.execute("rooted.gather_prompts([]) if rank == 0 else dist.barrier()", timeout_s=20)
    assert "rank 0 called RootedRollout.gather_prompts()" in str(told.value) and "rank 1 called barrier()" in str(told.value)


def roll_out(mode: str) -> int:
    """One step on every rank, with ragged prompts; how many completions this rank got."""
    group = wb.current().group
    engine = ScriptedEngine()
    rollout = RootedRollout(group, engine if group.rank == 0 else None) if mode == "rooted" else GroupedRollout(group, engine)
    return len(rollout.generate(["prompt"] * group.rank, wb.Sampling(max_tokens=4), [3] * group.rank))


@pytest.mark.parametrize("mode, kind, is_sent", [("rooted", "RootedRollout", True), ("grouped", "GroupedRollout", False)])
def test_the_ledger_has_a_row_for_each_meeting_and_what_follows_it(cluster, mode, kind, is_sent):
    before = len(cluster.ledger())
    assert cluster.run(roll_out, mode) == [0, 3]
    rows = cluster.ledger()[before:]
    steps = [f"{kind}.gather_prompts", f"{kind}.scatter_completions"]
    for rank, message in enumerate(("recv", "send")):
        back = "send" if rank == 0 else "recv"
        expected = [message, steps[0], back, steps[1]] if is_sent else steps
        assert sorted(rows[rows["rank"] == rank].op) == sorted(expected)
    meetings = rows[rows.op.isin(steps)]
    assert set(meetings.op) <= set(ROLLOUT_OPERATIONS) and meetings.num_bytes.gt(0).all() and meetings.group.eq("world").all()
