"""Who is in a group, and the process group behind it; no operation that moves data but the announcement before one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.errors import GroupError, StaleGroupError
from workbench.ranks import announce
from workbench.ranks.announce import Announcement
from workbench.ranks.called import Announcing, carrier
from workbench.ranks.parcels import Inbox, Outbox
from workbench.ranks.wire import joined

__all__ = ["Members"]

_FEW_BYTES = 1 << 19

_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the newer name of the same operation


class Members:
    """The ranks of a group in the order given, and this rank's place among them.

    `first_rank`, `last_rank`, `next_rank` and `prev_rank` are ranks of the world; `src` and `dst` of the operations are ranks within the
    group. A process group of torch may hold its ranks in another order (torch sorts them); here the order of `ranks` counts everywhere.
    It lives as long as torch holds it: kept longer, its gloo threads would let go of tensors while the interpreter ends, which aborts.

    Attributes:
        name: shown in errors and diagnoses.
        ranks: ranks of the world, in the group's order.
        rank: this process's rank in the world.
        rank_in_group: its place in `ranks`, -1 when it is no member.
        checks: exchange announcements before each collective; off, mistakes that only peers could see are not caught. By default as
            `check_collectives` of the cluster says.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        ranks: Sequence[int],
        *,
        name: str,
        rank: int,
        checks: bool | None = None,
        is_owner: bool = False,
    ) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.rank = rank
        self.rank_in_group = self.ranks.index(rank) if rank in self.ranks else -1
        self.checks = carrier().is_checked if checks is None else checks
        self._is_owner = is_owner
        self._is_closed = False
        self.rebind(process_group)

    def rebind(self, process_group: dist.ProcessGroup | None) -> None:
        """Follow a new generation: the same ranks over a new process group (None where this rank is no member)."""
        self._held = _weakly(process_group)
        self._outbox, self._inbox = Outbox(), Inbox()
        self._world = _weakly(dist.group.WORLD) if dist.is_initialized() else None
        if self.is_member and process_group is not None:
            held = dist.get_process_group_ranks(process_group)
            if sorted(held) != sorted(self.ranks):
                raise ValueError(f"group {self.name!r} has ranks {list(self.ranks)}, its process group {held}: pass the same ranks")
            self._order = [held.index(rank) for rank in self.ranks]  # place in the process group of each rank of this group

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The torch process group, for plain `torch.distributed` calls.

        Raises:
            GroupError: this rank is no member, or the group was destroyed.
            StaleGroupError: the world was rebuilt since.
        """
        if not self.is_member:
            raise GroupError(
                f"rank {self.rank} is not in group {self.name!r}\nits members are ranks {list(self.ranks)}\n"
                "call group operations on its members only: `if group.is_member:`"
            )
        if not self._is_closed and not self._is_of_this_world:
            raise StaleGroupError(
                f"group {self.name!r} belongs to an older generation of the world\nthe process group was rebuilt after a stop\n"
                "form it again with Group.create; groups of the layout follow by themselves"
            )
        process_group = self._held()
        if self._is_closed or process_group is None:
            raise GroupError(
                f"group {self.name!r} was destroyed\nit had ranks {list(self.ranks)}\nform it again with Group.create or cluster.use"
            )
        return process_group

    @property
    def _is_of_this_world(self) -> bool:
        now = dist.group.WORLD if dist.is_initialized() else None
        return self._world is None or (now is not None and self._world() is now)

    @property
    def world_size(self) -> int:
        """How many ranks the group has."""
        return len(self.ranks)

    @property
    def is_member(self) -> bool:
        """Whether this rank is in the group."""
        return self.rank_in_group >= 0

    @property
    def first_rank(self) -> int:
        return self.ranks[0]

    @property
    def last_rank(self) -> int:
        return self.ranks[-1]

    @property
    def is_first_rank(self) -> bool:
        return self.rank == self.first_rank

    @property
    def is_last_rank(self) -> bool:
        return self.rank == self.last_rank

    @property
    def next_rank(self) -> int:
        """The rank after this one; after the last comes the first."""
        return self.ranks[(self.rank_in_group + 1) % self.world_size]

    @property
    def prev_rank(self) -> int:
        """The rank before this one; before the first comes the last."""
        return self.ranks[(self.rank_in_group - 1) % self.world_size]

    def destroy(self) -> None:
        """Close the group on this rank; a second call does nothing. A process group that others made is left alone."""
        process_group = self._held() if self._is_of_this_world else None  # a rebuilt world has taken its groups along
        if self._is_owner and process_group is not None and not self._is_closed:
            dist.destroy_process_group(process_group)
        self._is_closed = True
        self._held = _weakly(None)
        self._outbox, self._inbox = Outbox(), Inbox()

    def __repr__(self) -> str:
        place = f"place {self.rank_in_group} of {self.world_size}" if self.is_member else "not a member"
        return f"Group({self.name!r}, ranks={list(self.ranks)}, rank {self.rank} is {place})"

    def __reduce__(self) -> Any:
        raise TypeError(f"group {self.name!r} belongs to the process of rank {self.rank}: send group.ranks, and form a group there")

    def _announce(self, describe: Callable[[], tuple[str, int]]) -> None:
        """Make sure that all members are about to make the same call: `_exchange`, but nothing when checks are off.

        `describe` gives the announcement's text and number.
        """
        if self.checks:
            self._exchange(lambda: Announcement(*describe()))
        else:
            self.process_group  # noqa: B018  raises where this rank is no member or the group is gone
            describe()

    def _exchange(self, describe: Callable[[], Announcement]) -> list[Announcement]:
        """Tell the peers what this rank does next and hear what they do, in group order.

        `describe` checks the arguments; when it raises, the peers are told.

        Raises:
            ValueError: this rank's arguments are wrong.
            GroupError: a peer's are, or members differ.
        """
        self.process_group  # noqa: B018  raises where this rank is no member or the group is gone
        problem: Exception | None = None
        try:
            mine = describe()
        except Exception as error:
            problem, mine = error, Announcement(f"{type(error).__name__}: {error}", is_refusal=True)
        if self.world_size > 1:
            with Announcing(mine.text, mine.num_brought):
                gathered = self._gather_announcements(announce.encode(mine))
            self._outbox.met()
            heard = [announce.decode(gathered[at]) for at in self._order]
        else:
            heard = [mine] * self.world_size
        if problem is not None:
            raise problem
        announce.agree(heard, ranks=self.ranks, name=self.name)
        return heard

    def _bringing(self, text: str, number: int, parts: Sequence[Tensor]) -> Announcement:
        """An announcement that brings its bytes along where it can: parts, uint8 [num_bytes] each, one after another."""
        num_bytes = sum(part.numel() for part in parts)
        if 0 < num_bytes <= announce.ROOM_BYTES:
            return Announcement(text, number, data=joined(parts))
        if num_bytes and self.world_size > 1 and self._shares:
            return Announcement(text, number, parcel=self._outbox.put(parts))
        return Announcement(text, number)

    def _brought(self, announced: Announcement) -> Tensor | None:
        """The bytes that came along with an announcement, to be copied before the next call; None where they must be sent for."""
        return announced.data if announced.parcel is None else self._inbox.open(announced.parcel)

    @property
    def _carries(self) -> bool:
        """Whether announcements go over memory that only the ranks of a cluster share: what they bring needs no signature."""
        return carrier().carries(self.process_group)

    @property
    def _shares(self) -> bool:
        """Whether large bytes may go there too."""
        return carrier().shares(self.process_group)

    def _gather_announced(self, own: Sequence[Tensor], heard: Sequence[Announcement], sizes: Sequence[int]) -> Sequence[Tensor]:
        """Each member's bytes, uint8 [sizes[place]]: as they came along, or collected now.

        Args:
            own: this member's parts.
        """
        mine = joined(own)
        parts = [mine if place == self.rank_in_group else self._brought(a) for place, a in enumerate(heard)]
        missing = [0 if a.num_brought else size for a, size in zip(heard, sizes, strict=True)]
        if any(missing):
            collected = self._gather_bytes(mine if missing[self.rank_in_group] else mine[:0], missing).split(missing)
            parts = [late if size else part for late, size, part in zip(collected, missing, parts, strict=True)]
        return [mine[:0] if part is None else part for part in parts]

    def _gather_bytes(self, data: Tensor, sizes: Sequence[int]) -> Tensor:
        """The bytes of all members one after another: uint8 [sum(sizes)], in group order.

        Args:
            data: this member's, uint8 [sizes[rank_in_group]].
        """
        if max(sizes) * self.world_size <= _FEW_BYTES:  # one collective of padded rows; beyond, its copies cost more than more collectives
            padded = torch.zeros(max(sizes), dtype=torch.uint8)
            padded[: data.numel()] = data
            rows = self._gather_equal(padded)
            return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])
        whole = torch.empty(sum(sizes), dtype=torch.uint8)
        parts = whole.split(list(sizes))
        parts[self.rank_in_group].copy_(data)
        for rank, part in zip(self.ranks, parts, strict=True):
            if part.numel():
                dist.broadcast(part, src=rank, group=self.process_group)
        return whole

    def _gather_announcements(self, data: bytearray) -> Sequence[memoryview]:
        """Those of all members, as the process group orders them: from the board, where there is one."""
        if self._carries:
            return carrier().exchange(self.process_group, data)
        return [row.data for row in self._collected(torch.frombuffer(data, dtype=torch.uint8)).numpy()]

    def _gather_equal(self, data: Tensor) -> Tensor:
        """Equal numbers of bytes of every member: uint8 [world_size, num_bytes], in group order."""
        gathered = self._collected(data)
        return gathered if self._order == sorted(self._order) else gathered[self._order]

    def _collected(self, data: Tensor) -> Tensor:
        """The same, as the process group orders them."""
        gathered = torch.zeros((self.world_size, data.numel()), dtype=torch.uint8)
        if data.numel():
            _gather_into(gathered.view(-1), data, group=self.process_group)
        return gathered


def _weakly(process_group: dist.ProcessGroup | None) -> Callable[[], dist.ProcessGroup | None]:
    """A way to ask for a process group without keeping it alive."""
    return (lambda: None) if process_group is None else weakref.ref(process_group)
