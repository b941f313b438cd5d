"""How a process group comes to be: after the whole world has met, in a thread that a stop can leave, whole or not at all.

    dist.new_group, DeviceMesh, ... -> torch's helper -> here: wait for the whole world -> torch, aside -> known group, its connections

Knows torch's making of groups. Does not know collectives but the meeting before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from workbench.ranks import leaving, sockets
from workbench.ranks.board import AreaState
from workbench.ranks.calls import Call, place_of, user_frame
from workbench.ranks.operations import NEW_GROUP

if TYPE_CHECKING:
    from workbench.ranks.intercept import Interceptor

__all__ = ["MakingGroups"]


class MakingGroups:
    """Of one process."""

    def __init__(self, interceptor: Interceptor) -> None:
        self._interceptor = interceptor

    def install(self) -> None:
        """Take over torch's making of groups, for good."""
        c10d._new_process_group_helper = self._watched(c10d._new_process_group_helper)
        c10d._new_group_with_tag = self._in_one_piece(c10d._new_group_with_tag)

    def _watched(self, make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def helper(
            group_size: int, group_rank: int, ranks: Sequence[int], backend: Any, store: Any, name: str, *args: Any, **kw: Any
        ) -> Any:
            it = self._interceptor
            if it.engine_connections is not None:
                before = sockets.connections()
                made = make(group_size, group_rank, ranks, backend, store, name, *args, **kw)
                it.engine_connections.update(sockets.connections() - before)
                return made
            self._gather(ranks, name)
            with it.busy():  # a signal waits: all others would have the group, and this rank not
                before = sockets.connections()
                made = self._aside(lambda: make(group_size, group_rank, ranks, backend, store, name, *args, **kw))
                process_group = made[0] if isinstance(made, tuple) else made
                if isinstance(process_group, dist.ProcessGroup):
                    it.groups.learn(process_group, tuple(ranks), kw.get("group_desc"), sockets.connections() - before)
            return made

        return helper

    def _in_one_piece(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """A signal waits: torch counts groups to name them, and a rank that was cut there would name its next ones in another way."""

        @functools.wraps(make)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self._interceptor.busy():
                return make(*args, **kwargs)

        return wrapped

    def _aside(self, make: Callable[[], Any]) -> Any:
        """Make a group in a thread, which can be left: gloo waits for a rank that died meanwhile until its own limit, and cannot be woken.

        Raises:
            Freed: the last step of a stop came, or the generation was abandoned; a new generation follows.
        """
        it = self._interceptor
        try:
            return leaving.aside(make, name="forming", should_leave=lambda: it.was_shut or it.is_abandoned)
        except leaving.Left as left:
            it.has_left_one = True
            left.made.add_done_callback(_destroy)
            raise leaving.Freed("freed while a group was made: the cell was stopped") from None

    def _gather(self, ranks: Sequence[int], name: str) -> None:
        """Meet the whole world before a group is made: torch's own wait for a rank that does not come can neither be seen nor stopped."""
        it = self._interceptor
        world = it.groups.find_current(dist.group.WORLD) if dist.is_initialized() else None
        is_for_all = name.isdigit()  # a hashed name is of a group that only its members make
        if world is None or not is_for_all or len(ranks) < 2:
            return
        text = f"new_group(ranks={list(ranks)})"
        line, place = place_of(user_frame(1)[0], text)
        call = Call(operation=NEW_GROUP, group=world, key=world.key, peers=world.peers, text=text, line=line, place=place)
        try:
            with it.busy():
                it.meet(it.post(call, AreaState.ON_BOARD), waits=True)
        except BaseException:
            c10d._world.group_count -= 1  # else this rank would name its next group otherwise than its peers
            raise
        finally:
            it.board.move(it.rank, AreaState.NOWHERE)


def _destroy(made: Future[Any]) -> None:
    """A group that came to be after nobody wanted it any more."""
    if made.exception() is None and isinstance(made.result(), tuple):
        with suppress(Exception):
            dist.destroy_process_group(made.result()[0])
