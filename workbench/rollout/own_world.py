"""A torch.distributed world of an engine's own, beside the world of the ranks.

vLLM forms its groups over whatever the process's default world is: inside a rank it would need every rank to take part, and would
break when the ranks' groups are made anew. So the engine gets a second set of c10d state with its own store and sockets, swapped in
while the engine works (torch's own threaded tests swap the same object, `distributed_c10d._world`).

Knows process groups. Does not know engines.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore, _unregister_process_group
from torch.distributed import distributed_c10d as c10d

import workbench.ranks.current as place
from workbench.ranks.sockets import Connection
from workbench.rollout.guard import new_folder

__all__ = ["OwnWorld"]


class _State:
    """What torch keeps of a world; the same fields as `distributed_c10d._World`, whose maps are module globals."""

    def __init__(self, first_group: int) -> None:
        self.default_pg: Any = None
        self.pg_map: dict[Any, Any] = {}
        self.pg_names: dict[Any, Any] = {}
        self.pg_group_ranks: dict[Any, Any] = {}
        self.pg_backend_config: dict[Any, Any] = {}
        self.group_count = first_group  # names of groups; unique in a process, equal on all members
        self.tags_to_pg: dict[str, list[Any]] = {}
        self.pg_to_tag: dict[Any, str] = {}
        self.pg_coalesce_state: dict[Any, Any] = {}
        self.comms: list[Any] = []
        self.pg_config_info: list[dict[str, Any]] = []


class OwnWorld:
    """A world over the members of `process_group`, or of this process alone.

    Made by all members at once. `seed` is a random number that they agree on.

    Args:
        process_group: a torch ProcessGroup of the ranks' world; None makes a world of one.
        backend: "gloo", or "cpu:gloo,cuda:nccl".

    Attributes:
        folder: a private one on rank 0 of several, for sockets and the like; removed by `close`.
    """

    def __init__(self, process_group: Any = None, *, backend: str = "gloo") -> None:
        self.folder: str | None = None
        self.rank: int = 0 if process_group is None else process_group.rank()
        self.size: int = 1 if process_group is None else process_group.size()
        self.seed, path = self._agree(process_group)
        self._state = _State(self.seed * 1000)
        self._connections: set[Connection] = set()  # of its groups, in a rank
        hook = sys.excepthook
        with self.entered():
            store = HashStore() if path is None else FileStore(path, self.size)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=timedelta(minutes=30))
        sys.excepthook = hook  # init_process_group puts "[rank0]:" before every traceback of the process

    def _agree(self, process_group: Any) -> tuple[int, str | None]:
        said: list[Any] = [(1 + secrets.randbits(48), None)]
        if self.rank == 0 and self.size > 1:
            self.folder = str(new_folder("world"))  # only its own user can meet here
            said = [(said[0][0], os.path.join(self.folder, "store"))]
        if self.size > 1:
            dist.broadcast_object_list(said, src=dist.get_global_rank(process_group, 0), group=process_group)
        seed, path = said[0]
        return int(seed), path

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make it the process's default world for a while; in a rank, groups made meanwhile are not watched as the ranks' own are."""
        outside = c10d._world
        c10d._world = self._state  # type: ignore[assignment]  # has the fields of torch's own, not its class
        try:
            with self._unwatched():
                yield
        finally:
            c10d._world = outside

    def _unwatched(self) -> AbstractContextManager[None]:
        here = place._here  # not current(), which would attach to a launcher's environment
        return nullcontext() if here is None or here.process is None else here.process.interceptor.engine_groups(self._connections)

    def close(self) -> None:
        """Drop its groups one by one: destroying the default group would forget the names of the ranks' groups too."""
        groups = list(self._state.pg_map)
        with self.entered():
            for group in groups:
                if group is not self._state.default_pg:
                    with suppress(Exception):
                        dist.destroy_process_group(group)
        for group in groups:
            with suppress(Exception):  # those destroyed above are forgotten already
                _unregister_process_group(group.group_name)
        self._state = _State(0)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
