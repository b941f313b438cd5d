"""A group of ranks and its operations: those of vLLM's GroupCoordinator, under the same names and with the same meaning, over gloo.

    Members          who is in it, in which order; the announcement before each collective
    PointToPoint     send, recv, objects, tensor dicts between two members
    Collectives      reductions, gathers and broadcasts of all members
    Group            the making of a group; experts; graph capture; message queues

Source: `vllm/distributed/parallel_state.py` (0.32.0). Where it differs: the order of `ranks` counts everywhere; all_reduce is out of
place; reduce_scatter is right for every dim; ragged operations work; sizes are told before data, so that what does not fit is an error
on the rank concerned and not a dead process. Bad arguments are `ValueError` on the rank that gave them and `GroupError` on its peers,
before data moves.

A group of one moves nothing: its operations give the input itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from workbench.ranks import arguments
from workbench.ranks.collectives import Collectives

__all__ = ["Group"]


class Group(Collectives):
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
