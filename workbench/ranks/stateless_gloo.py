"""A torch process group beside the default one, for collectives among processes that share no world."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from workbench.ranks import arguments
from workbench.ranks.stateless import serve_or_join

__all__ = ["destroy_stateless_gloo", "stateless_gloo"]


def stateless_gloo(
    host: str, port: int, rank: int, world_size: int, *, timeout_s: float = 1800.0, listen_socket: socket.socket | None = None
) -> dist.ProcessGroup:
    """Form a gloo process group without touching torch's default one; a process may be in several, in each with another rank.

    It takes the collectives of torch that name no rank: `dist.all_reduce(x, group=pg)`, `dist.all_gather_into_tensor`, `dist.barrier`.
    Those with a src or dst ask torch for the rank in the default world: call them on the group itself, `pg.broadcast(x, 0).wait()`.

    Args:
        port: one that rank 0 can serve on; see `free_port`.
        timeout_s: limit of each collective, and of the meeting itself.

    Raises:
        ValueError: a rank outside the world.
        GroupError: the port is taken, or nobody serves it.

    Source: `stateless_init_torch_distributed_process_group` of `vllm/distributed/utils.py`.
    """
    arguments.member("rank", rank, world_size)
    limit = timedelta(seconds=timeout_s)
    store = dist.PrefixStore("gloo", serve_or_join(host, port, rank, timeout_s=timeout_s, listen_socket=listen_socket))
    process_group = dist.ProcessGroup(store, rank, world_size)
    backend = dist.ProcessGroupGloo(store, rank, world_size, timeout=limit)
    kind = dist.ProcessGroup.BackendType.GLOO
    process_group._set_default_backend(kind)
    backend._set_sequence_number_for_group()
    process_group._register_backend(torch.device("cpu"), kind, backend)
    return process_group


def destroy_stateless_gloo(process_group: dist.ProcessGroup) -> None:
    """Close what `stateless_gloo` formed; others live on."""
    process_group.shutdown()
    c10d._unregister_process_group(process_group.group_name)
