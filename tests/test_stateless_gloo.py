"""A process group beside the default one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from worlds import run_processes, run_world

import workbench as wb
from workbench.ranks.stateless import free_port
from workbench.ranks.stateless_gloo import destroy_stateless_gloo, stateless_gloo


def test_it_reduces_without_a_default_group() -> None:
    assert run_processes(3, _alone, free_port(), free_port()) == [([6.0], 2.0), ([6.0], 2.0), ([6.0], None)]


def _alone(rank: int, port: int, other: int) -> Any:
    whole = stateless_gloo("127.0.0.1", port, rank, 3, timeout_s=30)
    x = torch.tensor([rank + 1.0])
    dist.all_reduce(x, group=whole)
    assert not dist.is_initialized()
    pair = stateless_gloo("127.0.0.1", other, 1 - rank, 2, timeout_s=30) if rank < 2 else None  # in it, the ranks are swapped
    destroy_stateless_gloo(whole)
    if pair is None:
        return x.tolist(), None
    y = torch.tensor([rank + 1.0])
    pair.broadcast(y, 0).wait()
    dist.barrier(group=pair)
    destroy_stateless_gloo(pair)
    return x.tolist(), y.item()


def test_torchs_own_functions_take_it_with_ranks_within_it() -> None:
    assert run_processes(3, _rooted, free_port()) == [
        {"broadcast": 20.0, "reduce": None, "gather": None, "scatter": 0.0, "recv": None, "objects": [[2], [0, 1, 2], "a"]},
        {"broadcast": 20.0, "reduce": 60.0, "gather": None, "scatter": 1.0, "recv": (0, 9.0), "objects": [[2], [0, 1, 2], "b"]},
        {"broadcast": 20.0, "reduce": None, "gather": [10.0, 20.0, 30.0], "scatter": 2.0, "recv": None, "objects": [[2], [0, 1, 2], "c"]},
    ]


def _rooted(rank: int, port: int) -> Any:
    group = stateless_gloo("127.0.0.1", port, rank, 3, timeout_s=30)
    copied, reduced, mine, got = (torch.tensor([10.0 * (rank + 1)]) for _ in range(4))
    dist.broadcast(copied, src=1, group=group)
    dist.reduce(reduced, dst=1, group=group)
    gathered = [torch.empty(1) for _ in range(3)] if rank == 2 else None
    dist.gather(mine, gathered, dst=2, group=group)
    dist.scatter(got, [torch.tensor([float(n)]) for n in range(3)] if rank == 0 else None, src=0, group=group)
    received = None
    if rank == 0:
        dist.send(torch.tensor([9.0]), dst=1, group=group)
    elif rank == 1:
        buffer = torch.empty(1)
        received = (dist.recv(buffer, group=group), buffer.item())
    box, boxes, own = [rank], [None] * 3, [None]
    dist.broadcast_object_list(box, src=2, group=group)
    dist.all_gather_object(boxes, rank, group=group)
    dist.scatter_object_list(own, ["a", "b", "c"] if rank == 0 else None, src=0, group=group)
    with pytest.raises(ValueError, match="Global rank 3 is not part of group"):
        dist.broadcast(mine, src=3, group=group)
    destroy_stateless_gloo(group)
    return {
        "broadcast": copied.item(), "reduce": reduced.item() if rank == 1 else None, "gather": gathered and torch.cat(gathered).tolist(),
        "scatter": got.item(), "recv": received, "objects": [box, boxes, own[0]],
    }  # fmt: skip


def test_it_outlives_a_generation_of_the_cluster() -> None:
    def form(port: int) -> None:
        import __main__

        __main__.pg = wb.stateless_gloo("127.0.0.1", port, 1 - wb.current().rank, 2, timeout_s=30)

    with wb.launch(2) as cluster:
        cluster.run(form, free_port())
        with pytest.raises(wb.RankTimeout):
            cluster.execute("while rank == 0: pass\nw = dist.all_reduce(torch.ones(1), async_op=True)\nw.wait()", timeout_s=1)
        assert cluster.generation == 1
        cluster.execute("x = torch.tensor([float(rank)])\ndist.broadcast(x, src=0, group=pg)")
        assert cluster.pull("x.item()") == [1.0, 1.0]
        cluster.execute("wb.destroy_stateless_gloo(pg)")


def test_it_stands_beside_the_default_group() -> None:
    assert run_world(2, _beside, free_port()) == [(3.0, 2.0)] * 2


def _beside(rank: int, port: int) -> Any:
    group = stateless_gloo("127.0.0.1", port, 1 - rank, 2, timeout_s=30)
    x, y = torch.tensor(rank + 1.0), torch.ones(())
    dist.all_reduce(x, group=group)
    destroy_stateless_gloo(group)
    dist.all_reduce(y)
    return x.item(), y.item()
