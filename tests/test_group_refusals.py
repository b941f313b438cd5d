"""Bad input of every group operation: what each rank is told, before any data moves, and that the group is usable afterwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from test_group import told, world
from worlds import run_world

from workbench.ranks.group import Group
from workbench.ranks.metrics import reduce_metrics

X, ROWS, INTS = torch.ones(2, 3), torch.ones(2, 2), torch.ones(2, dtype=torch.int16)
SPARSE, NUMBERS = torch.eye(2).to_sparse(), [1, 2]
Call = Callable[[Any], Any]

# every operation, as it is called rightly on each rank of a group of two
OPERATIONS: dict[str, Call] = {
    "all_reduce": lambda g: g.all_reduce(X),
    "reduce_scatter": lambda g: g.reduce_scatter(ROWS),
    "reduce_scatterv": lambda g: g.reduce_scatterv(ROWS, sizes=[1, 1]),
    "all_gather": lambda g: g.all_gather(X),
    "all_gatherv": lambda g: g.all_gatherv(X),
    "gather": lambda g: g.gather(X),
    "broadcast": lambda g: g.broadcast(X.clone()),
    "broadcast_object": lambda g: g.broadcast_object(1),
    "broadcast_object_list": lambda g: g.broadcast_object_list([1]),
    "all_gather_object": lambda g: g.all_gather_object(1),
    "gather_object": lambda g: g.gather_object(1),
    "broadcast_tensor_dict": lambda g: g.broadcast_tensor_dict({"x": X}),
    "barrier": lambda g: g.barrier(),
    "dispatch": lambda g: g.dispatch(X, X, X, True),
    "combine": lambda g: g.combine(ROWS, True),
    "reduce_metrics": lambda g: reduce_metrics(1, group=g),
    "create_mq_broadcaster": lambda g: g.create_mq_broadcaster(),
    "create_single_reader_mq_broadcasters": lambda g: g.create_single_reader_mq_broadcasters(),
    "send": lambda g: g.send(X),
    "recv": lambda g: g.recv(X.shape, X.dtype),
    "send_object": lambda g: g.send_object(1, 1 - max(0, g.rank_in_group)),
    "isend_object": lambda g: g.isend_object(1, 1 - max(0, g.rank_in_group)),
    "recv_object": lambda g: g.recv_object(1 - max(0, g.rank_in_group)),
    "send_tensor_dict": lambda g: g.send_tensor_dict({"x": X}),
    "isend_tensor_dict": lambda g: g.isend_tensor_dict({"x": X}),
    "recv_tensor_dict": lambda g: g.recv_tensor_dict(),
    "irecv_tensor_dict": lambda g: g.irecv_tensor_dict(),
    "process_group": lambda g: g.process_group,
}  # fmt: skip


def test_every_operation_is_tried() -> None:
    known = {name for name in dir(Group) if not name.startswith("_") and callable(getattr(Group, name))}
    needless = {"create", "from_process_group", "rebind", "destroy", "graph_capture", "prepare_communication_buffer_for_model"}
    assert known - needless == set(OPERATIONS) - {"process_group", "reduce_metrics"}


def test_every_operation_refuses_outsiders_and_closed_groups() -> None:
    for outside, closed, after in run_world(3, _elsewhere):
        assert after == 3.0
        for name, text in outside.items():
            lines = ["GroupError: rank 2 is not in group 'pair'", "its members are ranks [0, 1]"]
            assert text.splitlines()[:2] == lines and "call group operations on its members only" in text, (name, text)
        for name, text in closed.items():
            lines = ["GroupError: group 'gone' was destroyed", "it had ranks [0, 1, 2]"]
            assert text.splitlines()[:2] == lines and "form it again with Group.create" in text, (name, text)


def _elsewhere(rank: int) -> Any:
    pair, gone = Group.create([0, 1], "pair"), Group.create([0, 1, 2], "gone")
    outside = {name: told(partial(call, pair)) for name, call in OPERATIONS.items()} if rank == 2 else {}
    gone.destroy()
    closed = {name: told(partial(call, gone)) for name, call in OPERATIONS.items()}
    return outside, closed, world().all_reduce(torch.ones(1)).item()


# operation -> call on rank 0, call on rank 1, what rank 0 is told to have announced; with the wrong arguments of one rank only
MISMATCHES: list[tuple[Call, Call, str]] = [
    (lambda g: g.all_reduce(X), lambda g: g.all_reduce(ROWS), "all_reduce sum float32 [2, 3]"),
    (lambda g: g.all_reduce(X), lambda g: g.all_reduce(X.double()), "all_reduce sum float32 [2, 3]"),
    (lambda g: g.all_reduce(X, "max"), lambda g: g.all_reduce(X), "all_reduce max"),
    (lambda g: g.reduce_scatter(ROWS, 0), lambda g: g.reduce_scatter(ROWS, 1), "reduce_scatter sum float32 [2, 2] dim 0"),
    (lambda g: g.reduce_scatterv(X, sizes=[1, 2]), lambda g: g.reduce_scatterv(X, sizes=[2, 1]), "as [1, 2]"),
    (lambda g: g.all_gather(X), lambda g: g.all_gather(X[:1]), "all_gather float32 [2, 3] dim 1"),
    (lambda g: g.all_gather(X, 0), lambda g: g.all_gather(X, 1), "all_gather float32 [2, 3] dim 0"),
    (lambda g: g.all_gatherv(X), lambda g: g.all_gatherv(ROWS), "all_gatherv float32 [*, 3]"),
    (lambda g: g.all_gatherv([X, X]), lambda g: g.all_gatherv(X), "all_gatherv float32 [*, 3], float32 [*, 3]"),
    (lambda g: g.gather(X, 0), lambda g: g.gather(X, 1), "gather to 0 float32 [2, 3] dim 1"),
    (lambda g: g.gather(X, 0), lambda g: g.gather(X.int(), 0), "gather to 0 float32"),
    (lambda g: g.broadcast(X, 0), lambda g: g.broadcast(X, 1), "broadcast from 0 float32 [2, 3]"),
    (lambda g: g.broadcast(X, 0), lambda g: g.broadcast(ROWS, 0), "broadcast from 0 float32 [2, 3]"),
    (lambda g: g.broadcast_object(1, 0), lambda g: g.broadcast_object(1, 1), "broadcast_object from 0"),
    (lambda g: g.broadcast_object_list([1, 2]), lambda g: g.broadcast_object_list([1]), "broadcast_object_list of 2 from 0"),
    (lambda g: g.all_gather_object(1), lambda g: g.gather_object(1), "all_gather_object"),
    (lambda g: g.gather_object(1, 0), lambda g: g.gather_object(1, 1), "gather_object to 0"),
    (lambda g: g.broadcast_tensor_dict({}, 0), lambda g: g.broadcast_tensor_dict({}, 1), "broadcast_tensor_dict from 0"),
    (lambda g: g.broadcast_tensor_dict({"x": X}), lambda g: g.broadcast_object(), "broadcast_tensor_dict from 0"),
    (lambda g: g.barrier(), lambda g: g.all_gather(X), "barrier"),
    (lambda g: g.dispatch(X, X, X), lambda g: g.dispatch(X, X, X.int()), "all_gatherv float32 [*, 3], float32 [*, 3], float32 [*, 3]"),
    (lambda g: g.combine(ROWS), lambda g: g.combine(torch.ones(4, 2)), "reduce_scatter sum float32 [2, 2] dim 0 as [1, 1]"),
    (lambda g: reduce_metrics(1, "sum", group=g), lambda g: reduce_metrics(1, "max", group=g), "reduce_metrics sum"),
    (lambda g: g.create_mq_broadcaster(0), lambda g: g.create_mq_broadcaster(1), "broadcast_object from 0"),
]  # fmt: skip


def test_every_mismatch_shows_what_each_rank_called_and_leaves_the_group_usable() -> None:
    first, second = run_world(2, _mismatches)
    for texts in (first, second):
        for (expected, _, _), (text, usable) in zip([(e, None, None) for _, _, e in MISMATCHES], texts, strict=True):
            head, *table, remedy = text.splitlines()
            assert head == "GroupError: the ranks of group 'world' met with different calls; no data was sent", text
            assert f"  rank 0: {expected}" in table[0] or expected in table[0], text
            assert table[1].startswith("  rank 1: ") and remedy == "make the calls the same on all of its ranks" and usable == 2.0


def _mismatches(rank: int) -> Any:
    g = world()
    return [(told(partial((one, other)[rank], g)), g.all_reduce(torch.ones(1)).item()) for one, other, _ in MISMATCHES]


# the wrong argument, and what its rank is told; its peer makes the right call and hears the same as a refusal
WRONG: list[tuple[str, Call, Call]] = [
    ("all_gather: invalid dim 2", lambda g: g.all_gather(X, 2), lambda g: g.all_gather(X)),
    ("gather: invalid dim -3", lambda g: g.gather(X, 0, -3), lambda g: g.gather(X)),
    ("all_gatherv: invalid dim 2", lambda g: g.all_gatherv(X, 2), lambda g: g.all_gatherv(X)),
    ("reduce_scatter: invalid dim 5", lambda g: g.reduce_scatter(ROWS, 5), lambda g: g.reduce_scatter(ROWS)),
    ("reduce_scatter: invalid dim -3", lambda g: g.reduce_scatterv(ROWS, -3), lambda g: g.reduce_scatterv(ROWS)),
    ("a 0-dim tensor has none: pass x.reshape(1)", lambda g: g.all_gatherv(torch.tensor(1)), lambda g: g.all_gatherv(X)),
    ("3 rows along dim -1 do not divide among 2 members", lambda g: g.reduce_scatter(X), lambda g: g.reduce_scatter(ROWS)),
    ("sizes [1, 2] add up to 3, but dim 1 has 2 rows", lambda g: g.reduce_scatterv(ROWS, 1, [1, 2]), lambda g: g.reduce_scatterv(ROWS)),
    ("sizes [-1, 3] must be 2 numbers of at least 0", lambda g: g.reduce_scatterv(ROWS, 1, [-1, 3]), lambda g: g.reduce_scatterv(ROWS)),
    ("all_gather: invalid dim 'x'", lambda g: g.all_gather(X, "x"), lambda g: g.all_gather(X)),
    ("all_gather: invalid dim None", lambda g: g.all_gather(X, None), lambda g: g.all_gather(X)),
    ("reduce_scatter: invalid dim True", lambda g: g.reduce_scatter(ROWS, True), lambda g: g.reduce_scatter(ROWS)),
    ("sizes [3] must be 2 numbers", lambda g: g.all_gatherv(X, sizes=3), lambda g: g.all_gatherv(X)),
    ("sizes ['12'] must be 2 numbers", lambda g: g.reduce_scatterv(ROWS, sizes="12"), lambda g: g.reduce_scatterv(ROWS)),
    ("sizes [2] must be 2 numbers", lambda g: g.all_gatherv(X, sizes=[2]), lambda g: g.all_gatherv(X)),
    ("sizes [5, 5] give member 0 5 rows, but its tensor has 2", lambda g: g.all_gatherv(X, sizes=[5, 5]), lambda g: g.all_gatherv(X)),
    ("the tensors have [2, 1] rows along dim 0", lambda g: g.all_gatherv([X, X[:1]]), lambda g: g.all_gatherv(X)),
    ("the tensors have [2, 1, 2] rows along dim 0", lambda g: g.dispatch(X, X[:1], X), lambda g: g.dispatch(X, X, X)),
    ("got an empty list", lambda g: g.all_gatherv([]), lambda g: g.all_gatherv(X)),
    ("src=2 is outside the group of 2", lambda g: g.broadcast(X, 2), lambda g: g.broadcast(X)),
    ("src=-1 is outside the group of 2", lambda g: g.broadcast_object(1, -1), lambda g: g.broadcast_object(1)),
    ("src=None is outside", lambda g: g.broadcast_object_list([1], None), lambda g: g.broadcast_object_list([1])),
    ("src=1.0 is outside", lambda g: g.broadcast_tensor_dict({}, 1.0), lambda g: g.broadcast_tensor_dict({})),
    ("dst=2 is outside the group of 2", lambda g: g.gather(X, 2), lambda g: g.gather(X)),
    ("dst='a' is outside", lambda g: g.gather_object(1, "a"), lambda g: g.gather_object(1)),
    ("src=7 is outside", lambda g: g.create_mq_broadcaster(7), lambda g: g.create_mq_broadcaster()),
    ("gloo cannot reduce int16: convert with", lambda g: g.all_reduce(INTS), lambda g: g.all_reduce(X)),
    ("gloo cannot reduce int16", lambda g: g.reduce_scatter(INTS), lambda g: g.reduce_scatter(ROWS)),
    ("gloo cannot reduce int16", lambda g: g.combine(INTS), lambda g: g.combine(ROWS)),
    ("all_reduce(op='avg'): op must be one of", lambda g: g.all_reduce(X, "avg"), lambda g: g.all_reduce(X)),
    ("reduce_metrics(op='med'): op must be one of", lambda g: reduce_metrics(1, "med", group=g), lambda g: reduce_metrics(1, group=g)),
    ("metrics is a list: metrics are numbers", lambda g: reduce_metrics([1], group=g), lambda g: reduce_metrics(1, group=g)),
    ("expected a tensor, got list", lambda g: g.all_reduce(NUMBERS), lambda g: g.all_reduce(X)),
    ("expected a tensor, got list", lambda g: g.broadcast(NUMBERS), lambda g: g.broadcast(X)),
    ("expected a tensor, got list", lambda g: g.gather(NUMBERS), lambda g: g.gather(X)),
    ("expected a tensor, got int", lambda g: g.all_gatherv([1]), lambda g: g.all_gatherv(X)),
    ("only dense tensors travel", lambda g: g.reduce_scatter(SPARSE), lambda g: g.reduce_scatter(ROWS)),
    ("only dense tensors travel", lambda g: g.broadcast_tensor_dict({"x": SPARSE}), lambda g: g.broadcast_tensor_dict({})),
    ("expected a dict of tensors, got list", lambda g: g.broadcast_tensor_dict(NUMBERS), lambda g: g.broadcast_tensor_dict({})),
    ("cannot be sent to other ranks", lambda g: g.broadcast_object(g.process_group), lambda g: g.broadcast_object()),
    ("cannot be sent to other ranks", lambda g: g.all_gather_object(g.process_group), lambda g: g.all_gather_object(1)),
    ("cannot be sent to other ranks", lambda g: g.gather_object(g.process_group), lambda g: g.gather_object(1)),
]  # fmt: skip


def test_one_ranks_mistake_is_a_value_error_there_and_a_group_error_on_its_peer() -> None:
    first, second = run_world(2, _mistakes)
    for (expected, _, _), (mine, usable), (heard, usable_too) in zip(WRONG, first, second, strict=True):
        assert mine.startswith("ValueError: ") and expected in mine, (expected, mine)
        assert heard.startswith("GroupError: rank 0 of group 'world' refused its part: ValueError: "), (expected, heard)
        assert expected[:60] in heard and heard.endswith("no data was sent; the group is usable"), (expected, heard)
        assert usable == usable_too == 2.0


def _mistakes(rank: int) -> Any:
    g = world()
    return [(told(partial((wrong, right)[rank], g)), g.all_reduce(torch.ones(1)).item()) for _, wrong, right in WRONG]


# between two ranks the one that is wrong raises alone, and nothing has left it
ALONE: list[tuple[str, Call]] = [
    ("dst=2 is outside the group of 2", lambda g: g.send(X, 2)), ("dst=0 is this rank itself", lambda g: g.send(X, 0)),
    ("dst=-1 is outside", lambda g: g.send_object(1, -1)), ("dst=True is outside", lambda g: g.isend_object(1, True)),
    ("dst=9 is outside", lambda g: g.send_tensor_dict({}, 9)), ("dst=9 is outside", lambda g: g.isend_tensor_dict({}, 9)),
    ("src=3 is outside", lambda g: g.recv(X.shape, X.dtype, 3)), ("src=0 is this rank itself", lambda g: g.recv_object(0)),
    ("src=-2 is outside", lambda g: g.recv_tensor_dict(-2)), ("src='x' is outside", lambda g: g.irecv_tensor_dict("x")),
    ("expected a tensor, got list", lambda g: g.send(NUMBERS)), ("only dense tensors travel", lambda g: g.send(SPARSE)),
    ("cannot be sent to other ranks", lambda g: g.send_object(g.process_group, 1)),
    ("cannot be sent to other ranks", lambda g: g.isend_object(g.process_group, 1)),
    ("expected a dict of tensors, got int", lambda g: g.send_tensor_dict(3)),
    ("only dense tensors travel", lambda g: g.isend_tensor_dict({"x": SPARSE})),
    ("6 elements do not divide among 4 ranks", lambda g: g.send_tensor_dict({"x": X}, None, _Four(), {"x": True})),
]  # fmt: skip


class _Four:
    """In the place of an all_gather_group of four."""

    world_size, rank_in_group = 4, 0


def test_a_message_that_cannot_be_sent_is_refused_on_its_rank_alone() -> None:
    texts, received = run_world(2, _unsent)
    for (expected, _), text in zip(ALONE, texts, strict=True):
        assert text.startswith("ValueError: ") and expected in text, (expected, text)
    assert received == ["after", 6.0, {"n": 1}]


def _unsent(rank: int) -> Any:
    g = world()
    if rank == 1:
        return [g.recv_object(0), g.recv(X.shape, X.dtype).sum().item(), g.recv_tensor_dict()]
    texts = [told(partial(call, g)) for _, call in ALONE]
    g.send_object("after", 1)
    g.send(X)
    g.send_tensor_dict({"n": 1})
    return texts


def test_what_does_not_fit_between_two_ranks_is_dropped_and_told_to_the_receiver() -> None:
    _, told_texts = run_world(2, _misfits)
    shape, dtype, kinds, pieces = told_texts[0], told_texts[1], told_texts[2:5], told_texts[5]
    assert "ValueError: recv in group 'world': the tensor from rank 0 does not fit and was dropped\ngot float32 [2, 3]" in shape
    assert "the call asked for float64 [2, 3]\nask for what is sent" in dtype
    assert all(text.startswith("GroupError: the message from rank 0 in group 'world' was dropped on rank 1\nit is: ") for text in kinds)
    assert ["waits for: tensor_dict" in kinds[0], "waits for: object" in kinds[1], "waits for: tensor" in kinds[2]] == [True] * 3
    assert "ValueError: recv_tensor_dict" in pieces and "sent in 2 pieces; the call has no all_gather_group" in pieces
    assert told_texts[6] == 6.0


def _misfits(rank: int) -> Any:
    g = world()
    if rank == 0:
        for _ in range(3):
            g.send(X)
        g.send_tensor_dict({"x": X})
        g.send_object("it", 1)
        g.send_tensor_dict({"x": X}, None, g)
        g.send(X)
        return None
    calls: list[Call] = [
        lambda g: g.recv(torch.Size([4]), torch.float32), lambda g: g.recv(X.shape, torch.float64), lambda g: g.recv_tensor_dict(),
        lambda g: g.recv_object(0), lambda g: g.recv(X.shape, X.dtype), lambda g: g.recv_tensor_dict(),
    ]  # fmt: skip
    return [*(told(partial(call, g)) for call in calls), g.recv(X.shape, X.dtype).sum().item()]
