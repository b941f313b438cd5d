"""A process group beside the default one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from worlds import run_processes, run_world

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


def test_it_stands_beside_the_default_group() -> None:
    assert run_world(2, _beside, free_port()) == [(3.0, 2.0)] * 2


def _beside(rank: int, port: int) -> Any:
    group = stateless_gloo("127.0.0.1", port, 1 - rank, 2, timeout_s=30)
    x, y = torch.tensor(rank + 1.0), torch.ones(())
    dist.all_reduce(x, group=group)
    destroy_stateless_gloo(group)
    dist.all_reduce(y)
    return x.item(), y.item()
