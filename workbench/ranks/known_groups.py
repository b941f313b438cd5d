"""The process groups of this rank that are watched, each with its generation, and the channels of messages between two members.

    a group is made  ->  learn        its name on the board, its connections; the driver hears of it
    torch is asked   ->  find         the group, of whatever generation; `refuse_stale` where it is an older one
    nobody holds it  ->  forgotten    what it counts on the board may make room

Knows torch's groups and models by identity. Does not know collectives, waits or signals.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from workbench.errors import StaleGroupError
from workbench.ranks import sockets
from workbench.ranks.board import Board
from workbench.ranks.calls import KnownGroup, key_of

__all__ = ["KnownGroups"]

_ASK_ABOUT_GROUPS = ("get_backend", "get_group_rank", "get_global_rank", "get_process_group_ranks")  # torch asks too, before a collective


class KnownGroups:
    """Those of one process.

    Args:
        announce: tells the driver what a key on the board stands for.
        forgotten: called when a group is no more.

    Attributes:
        generation: which the ranks are at.
    """

    def __init__(self, *, rank: int, board: Board, announce: Callable[[KnownGroup], None], forgotten: Callable[[], None]) -> None:
        self.rank = rank
        self.board = board
        self.announce = announce
        self.forgotten = forgotten
        self.generation = 0
        self._groups: dict[int, KnownGroup] = {}  # id of torch's object -> group, while anybody holds that object
        self._channels: dict[int, int] = {}  # key of a channel -> key of its group
        self._models: weakref.WeakSet[Any] = weakref.WeakSet()  # DDP models of this generation that were called

    def install(self) -> None:
        """Have torch say that a group or model is stale, for good."""
        model = torch.nn.parallel.DistributedDataParallel
        setattr(model, "forward", self._refusing_stale_models(model.forward))  # noqa: B010  a plain assignment is refused by its type
        for name in _ASK_ABOUT_GROUPS:
            wrapped = self._knowing_stale(getattr(c10d, name))
            setattr(c10d, name, wrapped)
            setattr(dist, name, wrapped)

    def begin_generation(self, generation: int) -> None:
        self.generation = generation
        self._channels.clear()
        for model in self._models:  # its hooks on the parameters would meet the backward passes of a model that is made anew over them
            model.reducer._remove_autograd_hooks()
        self._models.clear()

    def learn(self, process_group: Any, ranks: tuple[int, ...], description: str | None, new: frozenset[sockets.Connection]) -> None:
        """Watch a group that was just made, over these connections."""
        ranks = ranks or tuple(range(process_group.size()))
        description = description or process_group.group_desc
        name = "world" if description == "default_pg" else description
        if name in (None, "", "undefined"):
            name = process_group.group_name
        key = key_of(f"{self.generation}:{process_group.group_name}:{ranks}")
        peers = tuple(r for r in ranks if r != self.rank)
        group = KnownGroup(key=key, name=str(name), ranks=ranks, peers=peers, generation=self.generation, connections=new)
        self._groups[id(process_group)] = group
        weakref.finalize(process_group, self._forget, id(process_group), group).atexit = False
        self.announce(group)

    def _forget(self, identity: int, group: KnownGroup) -> None:
        """Nobody holds this group any more: what it counts on the board may make room."""
        self._groups.pop(identity, None)
        self.forgotten()
        if group.generation == self.generation:
            for key in (group.key, *(key for key, owner in list(self._channels.items()) if owner == group.key)):
                self._channels.pop(key, None)
                self.board.forget(key)

    def find(self, process_group: Any) -> KnownGroup | None:
        """The group that torch's object is, of whatever generation; None for one that is not watched."""
        return self._groups.get(id(process_group))

    def find_current(self, process_group: Any) -> KnownGroup | None:
        """The same, if it is of the generation that the ranks are at."""
        group = self._groups.get(id(process_group))
        return group if group is not None and group.generation == self.generation else None

    @property
    def connections(self) -> set[sockets.Connection]:
        """Those of this generation's groups."""
        mine = [group for group in list(self._groups.values()) if group.generation == self.generation]
        return {connection for group in mine for connection in group.connections}

    def channel(self, group: KnownGroup, source: int, target: int, tag: int) -> int:
        """Key of the directed channel of a send or recv: counted on both ends like a group of its own."""
        return self._channel(group, f"{source}>{target}:{tag}", f"{source} to {target}", (source, target))

    def channel_from_any(self, group: KnownGroup, tag: int, name: str) -> int:
        """Key of what receives from any count on, here alone."""
        return self._channel(group, f"any>{self.rank}:{tag}", name, group.ranks)

    def _channel(self, group: KnownGroup, identity: str, name: str, ranks: tuple[int, ...]) -> int:
        key = key_of(f"{group.key}:{identity}")
        if key not in self._channels:
            self._channels[key] = group.key
            self.announce(KnownGroup(key=key, name=f"{name} in {group.name}", ranks=ranks, generation=group.generation))
        return key

    def refuse_stale(self, group: KnownGroup, what: str) -> None:
        """Raise StaleGroupError where a group is of an older generation; `what` was called on it."""
        if group.generation != self.generation:
            raise StaleGroupError(
                f"rank {self.rank}: {what} was called on group {group.name!r} of ranks {list(group.ranks)}, "
                f"which belongs to generation {group.generation}\n"
                f"the ranks are at generation {self.generation}: a stop found ranks inside gloo, and their connections were closed\n"
                "make it again: dist.new_group(...) for a group of your own, DistributedDataParallel(model.module) for a wrapped model; "
                "wb.Group handles and the layout in use follow by themselves"
            )

    def _knowing_stale(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        """Of a group of an older generation torch would say that it was never made, also in place of our own error."""

        @functools.wraps(ask)
        def wrapped(group: Any = None, *args: Any, **kwargs: Any) -> Any:
            known = self._groups.get(id(group))
            if known is not None:
                self.refuse_stale(known, ask.__name__)
            return ask(group, *args, **kwargs)

        return wrapped

    def _refusing_stale_models(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A model whose backward pass was left in the middle would fail inside torch before its first collective."""

        @functools.wraps(forward)
        def wrapped(model: Any, *args: Any, **kwargs: Any) -> Any:
            known = self._groups.get(id(model.process_group))
            if known is not None:
                self.refuse_stale(known, "DistributedDataParallel.forward")
                self._models.add(model)
            return forward(model, *args, **kwargs)

        return wrapped
