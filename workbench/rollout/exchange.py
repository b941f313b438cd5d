"""Numbers and byte buffers between the ranks of one process group, and one error for all of them.

Every phase of a rollout begins with a meeting: each rank tells a few numbers, or that it failed. So a rank that cannot go on is an
error everywhere instead of a peer that never comes, and every later size is known before it travels. Few and large messages, never
pickled objects.

Knows process groups and bytes. Does not know prompts, completions or engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from workbench.errors import EngineError, GroupError, StaleGroupError
from workbench.ranks.called import Announcing

__all__ = ["SIZES", "Buffer", "Exchange", "Phase"]

Buffer = NDArray[np.uint8]

_NUM_NUMBERS = 5  # every meeting has this many and a size a rank, so that two different phases still meet and are told apart
SIZES = slice(_NUM_NUMBERS, None)  # in what a meeting gives
_KINDS: tuple[type[Exception], ...] = (EngineError, ValueError, StaleGroupError, GroupError)  # what a rank may tell the others
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the newer name of the same operation


class Phase(IntEnum):
    """Where a rank of a rollout is."""

    GATHER = 1
    SCATTER = 2

    @property
    def method(self) -> str:
        return {Phase.GATHER: "gather_prompts", Phase.SCATTER: "scatter_completions"}[self]


class Exchange:
    """One rank's end of the traffic in a group.

    Args:
        group: a `Group`, an accelerate `Accelerator` (its default world), a torch `ProcessGroup`, or None: this rank alone.

    Attributes:
        num_bytes: what this rank has sent and received so far; a rank's own part counts once for each peer that gets it.
    """

    def __init__(self, group: Any) -> None:
        _check_group(group)
        self._group = group
        self.num_bytes = 0

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The torch group of the moment (a `Group` may have been given a new one since), None where this rank is alone."""
        if self._group is None:
            return None
        if isinstance(self._group, dist.ProcessGroup):
            return self._group
        if _is_accelerator(self._group):
            return dist.group.WORLD if dist.is_initialized() else None
        process_group: dist.ProcessGroup = self._group.process_group
        return process_group

    @property
    def ranks(self) -> tuple[int, ...]:
        """World ranks of the members, in group order: a `Group`'s own, else the process group's."""
        group = self.process_group
        if group is None:
            return (dist.get_rank() if dist.is_initialized() else 0,)
        return tuple(getattr(self._group, "ranks", None) or dist.get_process_group_ranks(group))

    @property
    def rank(self) -> int:
        """This rank's number in the world."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def index(self) -> int:
        """This rank's place in the group."""
        return self.ranks.index(self.rank)

    def meet(
        self, phase: Phase, *numbers: int, buffers: Sequence[Buffer] | None = None, error: Exception | None = None
    ) -> NDArray[np.int64]:
        """Tell everyone a few numbers and learn theirs; one collective.

        Args:
            numbers: at most 5; missing ones are 0.
            buffers: one a rank, [size], which this rank is about to hand out; their sizes are told.
            error: why this rank cannot go on.

        Returns:
            What each rank told, [size, 5 + size], in group order: its numbers and, at `SIZES`, the bytes that it has for each rank.

        Raises:
            ValueError: ranks are in different phases.
            EngineError, ValueError, StaleGroupError, GroupError: the error of the first rank that failed, an EngineError where it was
                of another kind; the same text on every rank.
        """
        kind = -1 if error is None else next((i for i, known in enumerate(_KINDS) if isinstance(error, known)), 0)
        told = b"" if error is None else _tell(error).encode("utf-8", "backslashreplace")
        sizes = [buffer.size for buffer in buffers] if buffers else [0] * self.size
        row = [int(phase), kind, len(told), *numbers, *[0] * (_NUM_NUMBERS - len(numbers)), *sizes]
        with Announcing(phase.method, 8 * len(row)):
            table = self.all_gather_numbers(row)
        self._check_phases(table[:, 0])
        if (table[:, 1] >= 0).any():
            texts = self.all_gather_buffers(np.frombuffer(bytearray(told), np.uint8), table[:, 2])
            self._raise_first(table[:, 1], [bytes(text).decode() for text in texts], error)
        return table[:, 3:]

    def _check_phases(self, phases: NDArray[np.int64]) -> None:
        if (phases == phases[0]).all():
            return
        places = [f"rank {rank}: {Phase(int(phase)).method}" for rank, phase in zip(self.ranks, phases, strict=True)]
        raise ValueError(
            "ranks of one rollout are in different steps\n"
            f"seen: {'; '.join(places)}\n"
            "every rank of the group must call gather_prompts, scatter_completions and generate in the same order"
        )

    def _raise_first(self, kinds: NDArray[np.int64], texts: Sequence[str], own: Exception | None) -> None:
        """Raise the error of the first rank that has one; the others with another text follow in one line each."""
        failed = [i for i, kind in enumerate(kinds) if kind >= 0]
        first = failed[0]
        others = [f"also rank {self.ranks[i]}: {texts[i].splitlines()[0]}" for i in failed[1:] if texts[i] and texts[i] != texts[first]]
        raise _KINDS[int(kinds[first])]("\n".join([texts[first], *others])) from own

    def all_gather_numbers(self, row: Sequence[int]) -> NDArray[np.int64]:
        """The row of every rank, [size, len(row)]; one collective, none where this rank is alone."""
        rows: NDArray[np.int64] = self._all_gather(np.array(row, dtype=np.int64).view(np.uint8)).view(np.int64)
        return rows

    def all_gather_buffers(self, own: Buffer, sizes: NDArray[np.int64]) -> list[Buffer]:
        """The buffer of every rank; one collective, padded to the largest.

        Args:
            sizes: bytes of each rank's buffer, [size], known to all.
        """
        padded = np.zeros(int(sizes.max()), np.uint8)
        padded[: own.size] = own
        return [row[:size] for row, size in zip(self._all_gather(padded), sizes, strict=True)]

    def _all_gather(self, own: Buffer) -> Buffer:
        """Equally many bytes of every rank, [size, num_bytes], in group order."""
        group, ranks = self.process_group, self.ranks
        if group is None or len(ranks) == 1 or own.size == 0:
            return own[None].repeat(len(ranks), axis=0)
        self.num_bytes += 2 * (len(ranks) - 1) * own.size
        rows = torch.empty((len(ranks), own.size), dtype=torch.uint8)
        _gather_into(rows.view(-1), torch.from_numpy(own), group=group)
        held = dist.get_process_group_ranks(group)  # torch sorts ranks; a `Group` keeps the order that it was given
        ordered: Buffer = rows.numpy() if list(ranks) == held else rows.numpy()[[held.index(rank) for rank in ranks]]
        return ordered

    def gather_buffers(self, own: Buffer, sizes: NDArray[np.int64], root: int) -> list[Buffer] | None:
        """The buffer of every rank on the root, None elsewhere; one message a rank.

        Args:
            sizes: bytes of each rank's buffer, [size], known to all.
            root: index in the group.
        """
        if self.index != root:
            self._send(own, root)
            return None
        return [own if i == root else self._receive(int(sizes[i]), i) for i in range(self.size)]

    def scatter_buffers(self, buffers: Sequence[Buffer] | None, sizes: NDArray[np.int64], root: int) -> Buffer:
        """This rank's own of the root's buffers; one message a rank.

        Args:
            buffers: one a rank on the root, [size]; None elsewhere.
            sizes: bytes of each, [size], known to all.
            root: index in the group.
        """
        if self.index != root:
            return self._receive(int(sizes[self.index]), root)
        assert buffers is not None
        for i, buffer in enumerate(buffers):
            if i != root:
                self._send(buffer, i)
        return buffers[root]

    def broadcast_buffers(self, buffers: Sequence[Buffer] | None, sizes: NDArray[np.int64], root: int) -> Buffer:
        """As `scatter_buffers`, but everything goes to everyone, who then keeps its own; one collective."""
        if self.size == 1:
            assert buffers is not None
            return buffers[0]
        ends = np.cumsum(sizes)
        joined = np.empty(int(ends[-1]), np.uint8) if buffers is None else np.concatenate(buffers)
        dist.broadcast(torch.from_numpy(joined), src=self.ranks[root], group=self.process_group)
        self.num_bytes += joined.size * (self.size - 1 if self.index == root else 1)
        return joined[int(ends[self.index] - sizes[self.index]) : int(ends[self.index])]

    def _send(self, array: NDArray[Any], index: int) -> None:
        """Blocking, as `_receive` is: the cluster watches such messages, and can stop a rank that waits for one."""
        self.num_bytes += array.nbytes
        dist.send(torch.from_numpy(array), dst=self.ranks[index], group=self.process_group)

    def _receive(self, num_bytes: int, index: int) -> Buffer:
        buffer = np.empty(num_bytes, np.uint8)
        self.num_bytes += num_bytes
        dist.recv(torch.from_numpy(buffer), src=self.ranks[index], group=self.process_group)
        return buffer


def _tell(error: Exception) -> str:
    return str(error) if isinstance(error, _KINDS) else f"{type(error).__name__}: {error}"


def _check_group(group: Any) -> None:
    if group is None or isinstance(group, dist.ProcessGroup) or _is_accelerator(group) or hasattr(type(group), "process_group"):
        return
    what = "a group that this rank is not in" if group == dist.GroupMember.NON_GROUP_MEMBER else f"{group!r} ({type(group).__name__})"
    needed = "a Group, an accelerate Accelerator or a torch ProcessGroup that this rank is in, or None for this rank alone"
    raise ValueError(f"a rollout cannot run over {what}\nneeded: {needed}\npass wb.current().group inside a rank")


def _is_accelerator(group: Any) -> bool:
    return type(group).__module__.split(".")[0] == "accelerate" and hasattr(group, "process_index")
