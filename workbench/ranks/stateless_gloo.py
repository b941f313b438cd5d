"""A torch process group beside the default one, for collectives among processes that share no world."""

from __future__ import annotations

import itertools
import socket
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from workbench.ranks import arguments
from workbench.ranks.stateless import serve_or_join
from workbench.ranks.tape import through_tape

__all__ = ["destroy_stateless_gloo", "is_stateless_gloo", "register_again", "stateless_gloo"]

_numbers = itertools.count()
_formed: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def stateless_gloo(
    host: str, port: int, rank: int, world_size: int, *, timeout_s: float = 1800.0, listen_socket: socket.socket | None = None
) -> dist.ProcessGroup:
    """Form a gloo process group without touching torch's default one; a process may be in several, in each with another rank.

    Torch's functions take it as `group=pg`; a `src` or `dst` is a rank within it, as the processes may share no world. What asks for the
    default world is not for it: `dist.get_rank(pg)` (say `pg.rank()`), `dist.get_backend(pg)`.

    Args:
        port: one that rank 0 can serve on; see `free_port`.
        timeout_s: limit of each collective, and of the meeting itself.

    Raises:
        ValueError: a rank outside the world.
        GroupError: the port is taken, or nobody serves it.

    Source: `stateless_init_torch_distributed_process_group` of `vllm/distributed/utils.py`.
    """
    arguments.member("rank", rank, world_size)
    met: list[dist.ProcessGroup] = []
    through_tape(
        f"stateless_gloo(rank={rank}, world_size={world_size})",
        lambda: met.append(_meet(host, port, rank, world_size, timeout_s, listen_socket)),
    )
    process_group = met[0] if met else _without_peers(rank, world_size)
    if listen_socket is not None and not met:
        listen_socket.close()  # taken over, and not needed
    process_group._set_group_name(c10d.GroupName(f"stateless_{next(_numbers)}"))
    _formed.add(process_group)
    register_again()
    return process_group


def _meet(host: str, port: int, rank: int, world_size: int, timeout_s: float, listen_socket: socket.socket | None) -> dist.ProcessGroup:
    limit = timedelta(seconds=timeout_s)
    store = dist.PrefixStore("gloo", serve_or_join(host, port, rank, timeout_s=timeout_s, listen_socket=listen_socket))
    process_group = dist.ProcessGroup(store, rank, world_size)
    backend = dist.ProcessGroupGloo(store, rank, world_size, timeout=limit)
    backend._set_sequence_number_for_group()
    return _over(process_group, backend, dist.ProcessGroup.BackendType.GLOO)


def _without_peers(rank: int, world_size: int) -> dist.ProcessGroup:
    """What stands for it in a replay, where the tape answers before any backend is asked."""
    from torch.testing._internal.distributed.fake_pg import FakeProcessGroup, FakeStore

    backend = FakeProcessGroup._create_internal(rank, world_size)
    return _over(dist.ProcessGroup(FakeStore(), rank, world_size), backend, dist.ProcessGroup.BackendType.CUSTOM)


def _over(process_group: dist.ProcessGroup, backend: Any, kind: Any) -> dist.ProcessGroup:
    process_group._set_default_backend(kind)
    process_group._register_backend(torch.device("cpu"), kind, backend)
    return process_group


def is_stateless_gloo(process_group: Any) -> bool:
    """Whether `stateless_gloo` formed it."""
    return process_group in _formed


def register_again() -> None:
    """Have torch know the groups of this process, which it forgets whenever its default world is destroyed."""
    for process_group in _formed - set(c10d._world.pg_group_ranks):
        c10d._register_process_group(process_group.group_name, process_group)
        c10d._world.pg_group_ranks[process_group] = {place: place for place in range(process_group.size())}


def destroy_stateless_gloo(process_group: dist.ProcessGroup) -> None:
    """Close what `stateless_gloo` formed; others live on."""
    _formed.discard(process_group)
    process_group.shutdown()
    c10d._unregister_process_group(process_group.group_name)
    c10d._world.pg_group_ranks.pop(process_group, None)
