"""A group of ranks and its operations: those of vLLM's GroupCoordinator, under the same names and with the same meaning, over gloo.

Source: `vllm/distributed/parallel_state.py` (0.32.0). Where it differs: the order of `ranks` counts everywhere; all_reduce is out of
place; reduce_scatter is right for every dim; ragged operations work; sizes are told before data, so that what does not fit is an error
on the rank concerned and not a dead process. Bad arguments are `ValueError` on the rank that gave them and `GroupError` on its peers,
before data moves.

A group of one moves nothing: its operations give the input itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.errors import GroupError
from workbench.ranks import arguments
from workbench.ranks.members import all_gather_bytes
from workbench.ranks.point_to_point import PointToPoint
from workbench.ranks.wire import bytes_of, from_bytes, seal, unseal

__all__ = ["Group"]


class Group(PointToPoint):
    """Ranks that work together; made by the cluster for each axis of the layout, or by `Group.create`."""

    @classmethod
    def create(cls, ranks: Sequence[int], name: str = "group", *, checks: bool = True) -> Group:
        """Form a group; every rank of the world makes this call, members or not, in the same order.

        Returns:
            On ranks outside a group whose `is_member` is False and whose operations raise.

        Raises:
            ValueError: no ranks, one twice, or one outside the world.
        """
        ranks = arguments.members(ranks, dist.get_world_size())
        process_group = dist.new_group(list(ranks), backend="gloo", group_desc=name)
        is_member = dist.get_rank() in ranks
        return cls(process_group if is_member else None, ranks, name=name, rank=dist.get_rank(), checks=checks, is_owner=is_member)

    @classmethod
    def from_process_group(cls, process_group: dist.ProcessGroup, ranks: Sequence[int] | None = None, name: str = "group") -> Group:
        """A group over a process group that exists; `ranks` may give its ranks in another order."""
        held = dist.get_process_group_ranks(process_group)
        return cls(process_group, held if ranks is None else ranks, name=name, rank=dist.get_rank())

    def all_reduce(self, input_: Tensor, op: str = "sum", *, inplace: bool = False) -> Tensor:
        """Combine equal-shaped tensors of all members element by element.

        Args:
            op: "sum", "mean", "max", "min" or "product". A sum of bools is their "or"; a mean of integers is float32.
            inplace: write into `input_` and return it.

        Returns:
            The same shape on every member.

        Raises:
            ValueError: gloo cannot reduce this dtype with this op (int16, float8 and unsigned types beyond uint8).
        """
        self._announce(lambda: arguments.reducible("all_reduce", input_, op, inplace))
        if self.world_size == 1 and not (op == "mean" and not input_.is_floating_point()):
            return input_
        work = input_.detach().to(device="cpu", dtype=arguments.accumulator(input_.dtype, op)).clone(memory_format=torch.contiguous_format)
        if work.numel() and self.world_size > 1:
            dist.all_reduce(work, op=arguments.REDUCE_OPS[op], group=self.process_group)
        if op == "mean":
            work = work / self.world_size
        result = work.to(device=input_.device, dtype=arguments.reduced_dtype(input_.dtype, op))
        return _write(input_, result) if inplace else result

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        """The members' equal-shaped tensors side by side along `dim`, in group order."""
        self._announce(lambda: arguments.gatherable("all_gather", input_, dim))
        if self.world_size == 1:
            return input_
        gathered = all_gather_bytes(self.process_group, bytes_of(input_), self._places)
        return _side_by_side(gathered, input_, dim)

    def gather(self, input_: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
        """The members' equal-shaped tensors side by side along `dim` on member `dst`, None on the others."""
        self._announce(lambda: arguments.gatherable("gather", input_, dim, dst=dst, size=self.world_size))
        if self.world_size == 1:
            return input_
        data = bytes_of(input_)
        gathered = torch.empty((self.world_size, data.numel()), dtype=torch.uint8) if self.rank_in_group == dst else None
        into = None if gathered is None else [gathered[place] for place in self._places]
        dist.gather(data, into, dst=self.ranks[dst], group=self.process_group)
        return None if gathered is None else _side_by_side(gathered, input_, dim)

    def broadcast(self, input_: Tensor, src: int = 0) -> Tensor:
        """Write member `src`'s tensor into `input_` of every member, and return it."""
        self._announce(lambda: arguments.same_everywhere("broadcast", input_, src, self.world_size))
        if self.world_size == 1 or input_.numel() == 0:
            return input_
        data = bytes_of(input_)
        dist.broadcast(data, src=self.ranks[src], group=self.process_group)
        return input_ if self.rank_in_group == src else _write(input_, from_bytes(data, input_.dtype, input_.shape))

    def broadcast_object(self, obj: Any | None = None, src: int = 0) -> Any:
        """Member `src`'s object on every member; what the others pass is not looked at."""
        sealed = torch.empty(0, dtype=torch.uint8)

        def describe() -> tuple[str, int]:
            nonlocal sealed
            arguments.member("src", src, self.world_size)
            if self.rank_in_group == src and self.world_size > 1:
                sealed = seal(obj)
            return f"broadcast_object from {src}", sealed.numel()

        num_bytes = self._announce(describe, always=True)
        if self.rank_in_group == src:
            if self.world_size > 1:
                dist.broadcast(sealed, src=self.rank, group=self.process_group)
            return obj
        sealed = torch.empty(num_bytes[src], dtype=torch.uint8)
        dist.broadcast(sealed, src=self.ranks[src], group=self.process_group)
        return unseal(sealed)

    def broadcast_object_list(self, obj_list: list[Any], src: int = 0) -> list[Any]:
        """Replace the list's items on every member by those of member `src`, and return the list.

        Raises:
            GroupError: the lists differ in length.
        """
        received = self.broadcast_object(obj_list, src)
        if len(received) != len(obj_list):
            raise GroupError(
                f"broadcast_object_list of group {self.name!r} did not fit on rank {self.rank}\n"
                f"got {len(received)} objects from rank {self.ranks[src]} for a list of {len(obj_list)}\npass lists of the same length"
            )
        obj_list[:] = received
        return obj_list

    def barrier(self) -> None:
        """Return once every member has called it."""
        self._announce(lambda: ("barrier", 0))
        if self.world_size > 1:
            dist.barrier(group=self.process_group)


def _side_by_side(gathered: Tensor, like: Tensor, dim: int) -> Tensor:
    """Tensors whose bytes are `gathered`, [num, bytes], concatenated along `dim`."""
    parts = from_bytes(gathered.reshape(-1), like.dtype, (gathered.shape[0], *like.shape)).unbind(0)
    return torch.cat(parts, dim=dim).to(like.device)


def _write(target: Tensor, source: Tensor) -> Tensor:
    with torch.no_grad():
        target.copy_(source)
    return target
