"""Collectives carried out message by message: the schedules by arithmetic, the traces on real ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

import workbench as wb
from workbench.plan.schedule import COLLECTIVES, schedule_of
from workbench.ranks.cluster import Cluster
from workbench.records import CollectiveTrace, Held

EVERY_OP = pytest.mark.parametrize("op", COLLECTIVES)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(4) as cluster:
        yield cluster


def contributors(op: str, size: int, root: int = 0) -> list[dict[int, set[int]]]:
    """Whose values are in each part that each member ends up with, by walking through the schedule: [size], part -> places."""
    schedule = schedule_of(op, size, root)
    held = [{part: {place} for part in parts} for place, parts in enumerate(schedule.before)]
    for step in schedule.steps:
        before = [dict(parts) for parts in held]
        for move in step.moves:
            came = before[move.source][move.part]
            held[move.target][move.part] = came | before[move.target][move.part] if move.is_reduced else came
    return [{part: parts[part] for part in after} for parts, after in zip(held, schedule.after, strict=True)]


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8])
@EVERY_OP
def test_schedules_bring_everyone_what_the_collective_promises(op, size):
    root, everyone = size - 1, set(range(size))
    wanted = {
        "all_reduce": [{part: everyone for part in range(size)}] * size,
        "reduce_scatter": [{place: everyone} for place in range(size)],
        "all_gather": [{part: {part} for part in range(size)}] * size,
        "gather": [{part: {part} for part in range(size)} if place == root else {} for place in range(size)],
        "scatter": [{place: {root}} for place in range(size)],
        "broadcast": [{0: {root}}] * size,
    }
    assert contributors(op, size, root) == wanted[op]


def test_a_ring_moves_each_part_once_a_step_and_a_tree_doubles():
    ring = schedule_of("all_reduce", 8)
    assert len(ring.steps) == 14 and all(len({move.part for move in step.moves}) == 8 for step in ring.steps)
    assert [len(step.moves) for step in schedule_of("broadcast", 6).steps] == [1, 2, 2]


def test_an_unknown_collective_has_no_schedule():
    with pytest.raises(ValueError, match=r"no schedule for 'all_to_all'\nknown are all_reduce, .*\nchoose one of them"):
        schedule_of("all_to_all", 4)


def results(trace: CollectiveTrace) -> list[list[Held]]:
    return [[trace.steps[-1].held[place][part] for part in parts] for place, parts in enumerate(trace.results)]


@EVERY_OP
def test_real_ranks_end_with_torchs_result(cluster, op):
    trace = cluster.trace_collective(op, root=2 if op in ("gather", "scatter", "broadcast") else 0)
    own = [(10 * place + 10, 10 * place + 11) for place in range(4)]
    wanted = {
        "all_reduce": [[(100,), (104,), (108,), (112,)]] * 4,
        "reduce_scatter": [[(100,)], [(104,)], [(108,)], [(112,)]],
        "all_gather": [own] * 4,
        "gather": [[], [], own, []],
        "scatter": [[(30,)], [(31,)], [(32,)], [(33,)]],
        "broadcast": [[(30, 31, 32)]] * 4,
    }
    assert results(trace) == wanted[op] and trace.max_difference == 0.0 and trace.dtype == "int64"


def test_every_message_carries_what_its_sender_held_and_comes_after_it_was_sent(cluster):
    trace = cluster.trace_collective("all_reduce")
    assert len(trace.steps) == 8 and len(trace.transfers) == 24
    for before, step in zip(trace.steps[:-1], trace.steps[1:], strict=True):
        for t in step.transfers:
            assert t.carried == before.held[t.source][t.part] and t.num_bytes == 8 and 0 <= t.start_s < t.end_s
            own, now = before.held[t.target][t.part], step.held[t.target][t.part]
            assert now == ((own[0] + t.carried[0],) if t.is_reduced else t.carried)


@pytest.mark.parametrize("reduce_op, wanted", [("max", (7.5, 9.0)), ("min", (-1.0, 0.0)), ("product", (-15.0, 0.0))])
def test_own_values_and_other_reductions(cluster, reduce_op, wanted):
    values = [[7.5, 0.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0], [2.0, 9.0, 1.0, 1.0], [1.0, 2.0, 1.0, 1.0]]
    trace = cluster.trace_collective("all_reduce", values, reduce_op=reduce_op)
    assert tuple(held[0] for held in results(trace)[3][:2]) == wanted and trace.dtype == "float32"  # type: ignore[index]
    assert trace.op == f"all_reduce ({reduce_op})"


def test_a_tensor_on_the_ranks_is_traced_by_its_name_and_large_parts_are_counted(cluster):
    cluster.execute("big = torch.full((4, 25), float(rank))")
    trace = cluster.trace_collective("reduce_scatter", "big")
    assert results(trace) == [["25 values"]] * 4 and trace.transfers[0].num_bytes == 100 and trace.max_difference == 0.0


def test_the_messages_stand_in_the_ledger(cluster):
    before = len(cluster.ledger())
    cluster.trace_collective("scatter")
    ops = cluster.ledger().op[before:].tolist()
    assert ops.count("send") == 3 and ops.count("recv") == 3 and ops.count("scatter") == 4


def test_a_corrupted_message_shows_as_a_difference(cluster):
    with cluster.inject(wb.Fault(rank=2, op="recv", at=1, action="corrupt")):
        trace = cluster.trace_collective("all_gather", [[1], [2], [3], [4]])
    assert trace.max_difference and trace.max_difference > 0


def test_groups_of_an_axis_are_traced_in_their_own_order(cluster):
    cluster.use(wb.Layout(4, tp=2))
    trace = cluster.trace_collective("all_gather", axis="tp", rank=3)
    assert trace.members == ("rank 2", "rank 3") and results(trace)[0] == [(10, 11), (20, 21)]
    cluster.use(wb.Layout.custom({"x": [[3, 1], [0, 2]]}))
    for op in COLLECTIVES:
        assert cluster.trace_collective(op, axis="x", rank=1).max_difference == 0.0
    assert cluster.trace_collective("gather", axis="x", rank=1).members == ("rank 3", "rank 1")
    cluster.use(wb.Layout(4))


@pytest.mark.parametrize(
    "arguments, text",
    [
        (dict(op="all_to_all"), "trace_collective('all_to_all'): there is no such collective\nknown are all_reduce, all_gather, "),
        (
            dict(op="all_reduce", reduce_op="mean"),
            "trace_collective(reduce_op='mean'): no such operation\nknown are sum, max, min, product",
        ),
        (dict(op="gather", root=4), "trace_collective(root=4) is outside the group\nroot is a place in the group, 0..3"),
        (dict(op="gather", rank=9), "trace_collective(rank=9) is outside the world\nranks are 0..3"),
        (dict(op="gather", axis="tq"), "trace_collective(axis='tq'): Layout(world_size=4) has no such axis\nits axes are "),
        (dict(op="gather", axis="tp"), "trace_collective: a group of 1 cannot be traced\nneeded: 2 to 16 members"),
        (dict(op="gather", inputs=[[1], [2]]), "trace_collective: 2 inputs for 4 ranks\nneeded: one a rank"),
    ],
)
def test_what_cannot_be_traced_is_refused_before_anything_is_sent(cluster, arguments, text):
    num_rows = len(cluster.ledger())
    with pytest.raises(ValueError, match=re.escape(text)):
        cluster.trace_collective(**arguments)
    assert len(cluster.ledger()) == num_rows


@pytest.mark.parametrize(
    "op, inputs, text",
    [
        ("all_gather", [[1], [2, 3], [4], [5]], "ranks 0 and 1 give different tensors\ngot 1 values of torch.int64 and 2 of torch.int64"),
        ("all_reduce", [[1, 2]] * 4, "2 values do not fit 4 ranks\nneeded: at least 4, one a rank"),
        ("scatter", [[1] * 6, None, None, None], "6 values do not fit 4 ranks\nneeded: a multiple of 4"),
        ("gather", [[1], None, [2], [3]], "the input of rank 1 is no tensor\ngot NoneType"),
        ("gather", "nowhere", "'nowhere' on rank 0 is no tensor\ngot NoneType\npush a tensor"),
    ],
)
def test_values_that_do_not_fit_are_an_error_and_the_cluster_stays_usable(cluster, op, inputs, text):
    with pytest.raises(wb.RankFailed, match=re.escape(text)):
        cluster.trace_collective(op, inputs)
    assert cluster.generation == 0 and torch.tensor(cluster.run(lambda: wb.current().rank)).sum() == 6
