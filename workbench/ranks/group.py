"""A group of ranks and its operations: those of vLLM's GroupCoordinator, under the same names and with the same meaning, over gloo.

    Members          who is in it, in which order; the announcement before each collective
    PointToPoint     send, recv, objects, tensor dicts between two members
    Collectives      reductions, gathers and broadcasts of all members
    Group            the making of a group; experts; graph capture; message queues

Source: `vllm/distributed/parallel_state.py` (0.32.0). Where it differs: the order of `ranks` counts everywhere; all_reduce is out of
place; reduce_scatter is right for every dim; ragged operations work; sizes are told before data, so that what does not fit is an error
on the rank concerned and not a dead process. Bad arguments are `ValueError` on the rank that gave them and `GroupError` on its peers,
before data moves.

A group of one moves nothing: its operations give the input itself. In a cluster announcements stand on the arrival board, and objects,
tensor dicts and ragged gathers lie in memory that its ranks share; under torchrun all of it goes through gloo.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from workbench.errors import GroupError
from workbench.ranks import arguments
from workbench.ranks.called import named
from workbench.ranks.collectives import Collectives
from workbench.ranks.graph_capture import GraphCaptureContext, capture_stream
from workbench.ranks.message_queue import MessageQueue, QueueHandle

__all__ = ["Group"]


class Group(Collectives):
    """Ranks that work together; made by the cluster for each axis of the layout, or by `Group.create`.

    Attributes:
        token_group: for experts: the group whose ranks hold different tokens (data parallel), where some of this group's hold the same.
            None: all of this group's differ.
    """

    token_group: Group | None = None
    _rows: list[int] | None = None

    @classmethod
    def create(cls, ranks: Sequence[int], name: str = "group", *, checks: bool | None = None) -> Group:
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
    def from_process_group(cls, process_group: dist.ProcessGroup | None, ranks: Sequence[int] | None = None, name: str = "group") -> Group:
        """A group over a process group that exists; `ranks` may give its ranks in another order.

        Raises:
            GroupError: there is none, as `dist.group.WORLD` is before `init_process_group`.
        """
        if process_group is None:
            raise GroupError(
                f"there is no process group for group {name!r}\ntorch.distributed has not begun here\ncall init_process_group first"
            )
        held = dist.get_process_group_ranks(process_group)
        return cls(process_group, held if ranks is None else ranks, name=name, rank=dist.get_rank())

    @named
    def dispatch(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The tokens of all ranks on every rank, so that each can run its own experts on them; `combine` takes the results back.

        Args:
            hidden_states: [num_tokens, ...]; ranks may have different numbers of tokens, down to none.
            topk_weights, topk_ids: [num_tokens, top_k].
            is_sequence_parallel: every rank of this group holds tokens of its own; else only those of `token_group` do.
            extra_tensors: more tensors with a row for each token.

        Returns:
            The same, of all tokens, in group order; with extra_tensors also the list of those.
        """
        group = self._with_tokens(is_sequence_parallel)
        tensors = [hidden_states, topk_weights, topk_ids, *(extra_tensors or [])]
        (hidden, weights, ids, *extra), group._rows = group._gather_ragged(tensors, 0, None)
        return (hidden, weights, ids) if extra_tensors is None else (hidden, weights, ids, extra)

    @named
    def combine(self, hidden_states: Tensor, is_sequence_parallel: bool = False) -> Tensor:
        """Sum what the ranks' experts made of all tokens, and give each rank its own rows: [num_all_tokens, ...] -> [num_tokens, ...].

        The tokens are those of the last `dispatch`; without one, equal numbers on all ranks.
        """
        group = self._with_tokens(is_sequence_parallel)
        return group.reduce_scatterv(hidden_states, dim=0, sizes=group._rows)

    def graph_capture(self, graph_capture_context: GraphCaptureContext | None = None) -> AbstractContextManager[GraphCaptureContext]:
        """A context whose stream a CUDA graph is captured on; without CUDA it does nothing. Operations over gloo cannot be captured."""
        return capture_stream(graph_capture_context)

    def prepare_communication_buffer_for_model(self, model: Any) -> None:
        """Nothing: gloo needs no buffers made ready. It is here for code written for GPUs, where the experts' exchange does."""

    @named
    def create_mq_broadcaster(
        self, writer_rank: int = 0, external_writer_handle: QueueHandle | None = None, blocking: bool = True
    ) -> MessageQueue | None:
        """A queue in shared memory from one member to all others, much quicker than `broadcast_object`; all members make this call.

        Args:
            writer_rank: member that writes.
            external_writer_handle: on that member the handle of a queue that a process outside the group writes, with a reader for each
                member; then all members read.
            blocking: wait until all are attached; else call `wait_until_ready` on all of them.

        Returns:
            This member's end; None in a group of one without an external writer.
        """
        made: MessageQueue | None = None
        if self.rank_in_group == writer_rank and external_writer_handle is None and self.world_size > 1:
            made = MessageQueue.create(self.world_size - 1)
        handle = self.broadcast_object(made.export_handle() if made else external_writer_handle, src=writer_rank)
        if handle is None:
            return None
        skips_writer = handle.num_readers < self.world_size
        queue = made or MessageQueue.attach(handle, self.rank_in_group - (skips_writer and self.rank_in_group > writer_rank))
        if blocking:
            queue.wait_until_ready()
        return queue

    def create_single_reader_mq_broadcasters(
        self, reader_rank_in_group: int = 0, blocking: bool = False
    ) -> tuple[MessageQueue, list[QueueHandle]]:
        """A queue from each member to one reader; all members make this call.

        Returns:
            This member's queue to write to, and on the reader the handles of all members' queues, in group order, for
            `MessageQueue.attach(handle, 0)`; elsewhere []. With `blocking` the writers return once the reader has attached.
        """
        queue = MessageQueue.create(1)
        handles = self.gather_object(queue.export_handle(), dst=reader_rank_in_group)
        if blocking and self.rank_in_group != reader_rank_in_group:
            queue.wait_until_ready()
        return queue, handles or []

    def _with_tokens(self, is_sequence_parallel: bool) -> Group:
        return self if is_sequence_parallel or self.token_group is None else self.token_group
