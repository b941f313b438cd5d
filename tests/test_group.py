"""Group operations in real gloo worlds."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from worlds import run_world

from workbench.errors import GroupError
from workbench.ranks.group import Group


def world() -> Group:
    return Group.from_process_group(dist.group.WORLD, name="world")


def test_collectives_of_four_ranks() -> None:
    outs = run_world(4, _collectives)
    assert outs[0]["sum"] == [[600, 604, 608], [612, 616, 620]] and all(o["untouched"] for o in outs)
    assert outs[0]["cat"] == (8, 3) and outs[0]["last"] == (2, 12)
    assert [o["gather"] for o in outs] == [None, None, (8, 3), None]
    assert all(o["object"] == {"from": 3} for o in outs)
    assert outs[0]["next"] == (1, 3, 0, 3) and outs[3]["next"] == (0, 2, 0, 3)
    assert all(o["mean"] == 1.5 and o["max"] == 3 and o["list"] == [3, 30] for o in outs)


def _collectives(rank: int) -> dict[str, Any]:
    g = world()
    x = torch.arange(6).reshape(2, 3) + 100 * rank
    kept = x.clone()
    gathered = g.gather(x, dst=2, dim=0)
    return {
        "sum": g.all_reduce(x).tolist(), "cat": g.all_gather(x, dim=0).shape, "last": g.all_gather(x).shape,
        "gather": None if gathered is None else tuple(gathered.shape),
        "object": g.broadcast_object({"from": rank} if rank == 3 else None, src=3), "untouched": torch.equal(x, kept),
        "next": (g.next_rank, g.prev_rank, g.first_rank, g.last_rank),
        "mean": g.all_reduce(torch.tensor(rank), op="mean").item(), "max": g.all_reduce(torch.tensor(rank), op="max").item(),
        "list": g.broadcast_object_list([rank, rank * 10], src=3),
    }  # fmt: skip


def test_messages_arrive_in_order_and_what_does_not_fit_is_told() -> None:
    sent, told = run_world(2, _messages)
    assert sent == "sent"
    assert told == (["a", ("b", 2)], True, True, [1.0] * 4)


def _messages(rank: int) -> Any:
    g = world()
    if rank == 0:
        g.send_object("a", dst=1)
        g.send_object(("b", 2), dst=1)
        g.send(torch.ones(8))
        g.send_object("unexpected", dst=1)
        g.send(torch.ones(4))
        return "sent"
    objects = [g.recv_object(0), g.recv_object(0)]
    refused = dropped = False
    try:
        g.recv(torch.Size([4]), torch.float32)
    except ValueError as error:
        refused = "float32 [8]" in str(error) and "float32 [4]" in str(error)
    try:
        g.recv(torch.Size([4]), torch.float32)
    except GroupError as error:
        dropped = "it is: object; the call waits for: tensor" in str(error)
    return objects, refused, dropped, g.recv(torch.Size([4]), torch.float32).tolist()


def test_an_unsorted_group_keeps_its_order() -> None:
    outs = run_world(4, _unsorted)
    assert [o[0] for o in outs] == [0, 2, 1, 3]
    assert all(o[1] == [0, 2, 1, 3] and o[2] == 2 for o in outs)


def _unsorted(rank: int) -> Any:
    g = Group.create([0, 2, 1, 3], "odd")
    return g.rank_in_group, g.all_gather(torch.tensor([rank])).tolist(), g.broadcast_object(rank, src=1)


def test_a_mistake_of_one_rank_is_an_error_on_all_and_the_group_lives() -> None:
    first, second = run_world(2, _mistakes)
    assert first == ["ValueError: all_gather: invalid dim 3 for a tensor of shape [2]: choose one of -1..0", "GroupError", 2.0]
    assert second[0].startswith("GroupError: rank 0 of group 'world' refused its part: ValueError: all_gather: invalid dim 3")
    assert second[1:] == ["GroupError", 2.0]


def _mistakes(rank: int) -> Any:
    g, out = world(), []
    for call in (lambda: g.all_gather(torch.ones(2), dim=0 if rank else 3), lambda: g.all_reduce(torch.ones(2 + rank))):
        try:
            call()
        except (ValueError, GroupError) as error:
            out.append(f"{type(error).__name__}: {error}" if not out else type(error).__name__)
    return [*out, g.all_reduce(torch.ones(1)).item()]
