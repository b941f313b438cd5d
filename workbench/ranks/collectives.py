"""Operations that all members of a group call together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.ranks import arguments, tensor_dict
from workbench.ranks.announce import Announcement
from workbench.ranks.called import named
from workbench.ranks.point_to_point import PointToPoint
from workbench.ranks.wire import bytes_of, from_bytes, joined, seal, unseal

__all__ = ["Collectives"]


@dataclass(frozen=True, slots=True)
class _Came:
    """What a broadcast brought.

    Attributes:
        first: bytes of a sealed object; None in a group of one.
        rest: what came along behind it; None where nothing did.
    """

    first: Tensor | None
    rest: Tensor | None
    is_signed: bool

    def object(self) -> Any:
        assert self.first is not None
        return unseal(self.first, checks=self.is_signed)


class Collectives(PointToPoint):
    """Reductions, gathers and broadcasts over a group; none changes its input but `broadcast` and `broadcast_object_list`."""

    @named
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
        if self.world_size == 1 and arguments.reduced_dtype(input_.dtype, op) == input_.dtype:
            return input_
        result = self._reduced(input_, op).to(input_.device)
        return _write(input_, result) if inplace else result

    @named
    def reduce_scatter(self, input_: Tensor, dim: int = -1) -> Tensor:
        """Sum equal-shaped tensors of all members and give each its equal part along `dim`.

        Raises:
            ValueError: the dim does not divide by the group's size.
        """
        return self.reduce_scatterv(input_, dim)

    @named
    def reduce_scatterv(self, input_: Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> Tensor:
        """Sum equal-shaped tensors of all members and give member i its sizes[i] rows along `dim`; without sizes, equal parts.

        Two ranks that both pass [[1, 2, 3]] with dim -1, sizes [1, 2] get [[2]] and [[4, 6]].
        """
        parts: list[int] = []

        def describe() -> tuple[str, int]:
            text, number = arguments.reducible("reduce_scatter", input_, "sum", False)
            parts[:] = arguments.parts(input_, dim, sizes, self.world_size)
            return f"{text} dim {dim % input_.dim()} as {parts}", number

        self._announce(describe)
        if self.world_size == 1:
            return input_
        mine: Tensor = self._reduced(input_, "sum").split(parts, dim=dim)[self.rank_in_group]
        return mine.contiguous().to(input_.device)

    @named
    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        """The members' equal-shaped tensors side by side along `dim`, in group order."""
        self._announce(lambda: arguments.gatherable("all_gather", input_, dim))
        if self.world_size == 1:
            return input_
        data = bytes_of(input_)
        gathered = self._gather_bytes(data, [data.numel()] * self.world_size)
        return _side_by_side(gathered, input_, dim, self.world_size)

    @overload
    def all_gatherv(self, input_: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor: ...
    @overload
    def all_gatherv(self, input_: Sequence[Tensor], dim: int = 0, sizes: Sequence[int] | None = None) -> list[Tensor]: ...

    @named
    def all_gatherv(self, input_: Tensor | Sequence[Tensor], dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor | list[Tensor]:
        """The members' tensors side by side along `dim`, in group order; they may differ in their rows along `dim`, down to none.

        Args:
            input_: a tensor, or several that have equally many rows: then a list comes back.
            sizes: rows of each member, where all know them; each member's own must be true.
        """
        tensors = [input_] if isinstance(input_, Tensor) else list(input_)
        gathered, _ = self._gather_ragged(tensors, dim, sizes)
        return gathered[0] if isinstance(input_, Tensor) else gathered

    @named
    def gather(self, input_: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
        """The members' equal-shaped tensors side by side along `dim` on member `dst`, None on the others."""
        self._announce(lambda: arguments.gatherable("gather", input_, dim, dst=dst, size=self.world_size))
        if self.world_size == 1:
            return input_
        data, is_mine = bytes_of(input_), self.rank_in_group == dst
        gathered = torch.empty((self.world_size if is_mine else 0, data.numel()), dtype=torch.uint8)
        if data.numel():
            into = [gathered[place] for place in sorted(range(self.world_size), key=self._order.__getitem__)] if is_mine else None
            dist.gather(data, into, dst=self.ranks[dst], group=self.process_group)
        return _side_by_side(gathered.view(-1), input_, dim, self.world_size) if is_mine else None

    @named
    def broadcast(self, input_: Tensor, src: int = 0) -> Tensor:
        """Write member `src`'s tensor into `input_` of every member, and return it."""
        self._announce(lambda: arguments.same_everywhere("broadcast", input_, src, self.world_size))
        if self.world_size == 1 or input_.numel() == 0:
            return input_
        data = bytes_of(input_)
        dist.broadcast(data, src=self.ranks[src], group=self.process_group)
        return input_ if self.rank_in_group == src else _write(input_, from_bytes(data, input_.dtype, input_.shape))

    @named
    def broadcast_object(self, obj: Any | None = None, src: int = 0) -> Any:
        """Member `src`'s object on every member; what the others pass is not looked at."""
        return self._broadcast_object("broadcast_object", obj, src, self.process_group)

    @named
    def broadcast_object_list(self, obj_list: list[Any], src: int = 0, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Replace the list's items on every member by those of member `src`, and return the list.

        Args:
            group: a process group over the same ranks to send through, in place of this one's.

        Raises:
            GroupError: the lists differ in length.
        """
        operation = f"broadcast_object_list of {len(obj_list)}"
        obj_list[:] = self._broadcast_object(operation, obj_list, src, group or self.process_group)
        return obj_list

    @named
    def all_gather_object(self, obj: Any) -> list[Any]:
        """The members' objects, in group order."""
        return self._all_gather_object("all_gather_object", lambda: obj)

    @named
    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The members' objects, in group order, on member `dst`; None on the others."""
        self._announce(lambda: (f"gather_object to {arguments.member('dst', dst, self.world_size)}", 0))
        gathered = self.all_gather_object(obj)
        return gathered if self.rank_in_group == dst else None

    @named
    def broadcast_tensor_dict(
        self,
        tensor_dict_: dict[Any, Any] | None = None,
        src: int = 0,
        group: dist.ProcessGroup | None = None,
        metadata_group: dist.ProcessGroup | None = None,
    ) -> dict[Any, Any] | None:
        """Member `src`'s dict of tensors and other values on every member, in its order; nested values go along.

        Args:
            group: a process group over the same ranks for the tensors.
            metadata_group: one for everything else.
        """
        packed: list[tensor_dict.Packed] = []  # on the source

        def pack() -> list[Tensor]:
            packed.append(tensor_dict.pack(tensor_dict_))
            return [seal(packed[0].form, signs=not self._shares), *packed[0].messages]

        came = self._broadcast_parts("broadcast_tensor_dict", pack, src, metadata_group or self.process_group)
        if self.world_size == 1:
            return tensor_dict_
        form: tensor_dict.Form | None = None if packed else came.object()
        room = None if form is None else form.make_room()
        messages = packed[0].messages if room is None else room.messages
        if came.rest is None:
            for message in messages:
                dist.broadcast(message, src=self.ranks[src], group=group or self.process_group)
        elif room is not None:
            for message, part in zip(messages, came.rest.split([message.numel() for message in messages]), strict=True):
                message.copy_(part)
        return tensor_dict_ if form is None or room is None else form.fill(room.buffers)

    @named
    def barrier(self) -> None:
        """Return once every member has called it."""
        self._announce(lambda: ("barrier", 0))
        if self.world_size > 1:
            dist.barrier(group=self.process_group)

    def _broadcast_object(self, operation: str, obj: Any, src: int, process_group: dist.ProcessGroup) -> Any:
        """Member `src`'s object; that member itself keeps the one it has."""
        came = self._broadcast_parts(operation, lambda: [seal(obj, signs=not self._shares)], src, process_group)
        return obj if self.rank_in_group == src else came.object()

    def _broadcast_parts(self, operation: str, make: Callable[[], list[Tensor]], src: int, process_group: dist.ProcessGroup) -> _Came:
        """The first of what `make()` gives on member `src`, uint8 [num_bytes] each; the others too where they can come along."""
        parts: list[Tensor] = []

        def describe() -> Announcement:
            arguments.member("src", src, self.world_size)
            text = f"{operation} from {src}"
            if self.rank_in_group != src or self.world_size == 1:
                return Announcement(text)
            parts[:] = make()
            whole = self._bringing(text, parts[0].numel(), parts)
            return whole if whole.num_brought else self._bringing(text, parts[0].numel(), parts[:1])

        heard = self._exchange(describe)[src]
        brought = parts[0] if parts else self._brought(heard)
        if heard.number and not heard.num_brought:
            brought = torch.empty(heard.number, dtype=torch.uint8) if brought is None else brought
            dist.broadcast(brought, src=self.ranks[src], group=process_group)
        if brought is None or heard.num_brought <= heard.number:
            return _Came(brought, None, self._is_signed(heard))
        return _Came(brought[: heard.number], brought[heard.number :], self._is_signed(heard))

    def _all_gather_object(self, operation: str, make: Callable[[], Any]) -> list[Any]:
        """The members' `make()`; where it raises, all of them raise."""
        made: list[Any] = []
        sealed: list[Tensor] = []

        def describe() -> Announcement:
            made.append(make())
            if self.world_size == 1:
                return Announcement(operation)
            sealed.append(seal(made[0], signs=not self._shares))
            return self._bringing(operation, sealed[0].numel(), sealed)

        heard = self._exchange(describe)
        if self.world_size == 1:
            return made
        parts = self._gather_announced(sealed, heard, [a.number for a in heard])
        return [
            made[0] if place == self.rank_in_group else unseal(part, checks=self._is_signed(heard[place]))
            for place, part in enumerate(parts)
        ]

    def _is_signed(self, announced: Announcement) -> bool:
        """Whether the object of an announcement came over connections, where a stranger might have written it."""
        return not (announced.num_brought and self._carries)

    def _reduced(self, input_: Tensor, op: str) -> Tensor:
        """A new tensor on the CPU, contiguous, in the result's dtype."""
        work = input_.detach().to(device="cpu", dtype=arguments.accumulator(input_.dtype, op)).clone(memory_format=torch.contiguous_format)
        if work.numel() and self.world_size > 1:
            dist.all_reduce(work, op=arguments.REDUCE_OPS[op], group=self.process_group)
        if op == "mean":
            work = work / self.world_size
        return work.to(arguments.reduced_dtype(input_.dtype, op))

    def _gather_ragged(self, tensors: list[Tensor], dim: int, sizes: Sequence[int] | None) -> tuple[list[Tensor], list[int]]:
        """What all_gatherv gives, and the rows of each member."""
        own: list[Tensor] = []
        row_bytes: list[int] = []

        def describe() -> Announcement:
            text, rows = arguments.ragged(tensors, dim, sizes, self.rank_in_group, self.world_size)
            moved = [_rows_first(tensor, dim) for tensor in tensors]
            row_bytes[:] = [prod(tensor.shape[1:]) * tensor.element_size() for tensor in moved]
            own[:] = [bytes_of(tensor) for tensor in moved]
            return self._bringing(text, rows, own)

        heard = self._exchange(describe)
        rows = [a.number for a in heard]
        if self.world_size == 1:
            return tensors, rows
        parts = self._gather_announced(own, heard, [count * sum(row_bytes) for count in rows])
        if len(tensors) == 1:
            return [_rows(tensors[0], dim, sum(rows), parts)], rows
        pieces = [part.split([count * size for size in row_bytes]) for count, part in zip(rows, parts, strict=True)]
        return [_rows(tensor, dim, sum(rows), column) for tensor, column in zip(tensors, zip(*pieces, strict=True), strict=True)], rows


def _rows_first(tensor: Tensor, dim: int) -> Tensor:
    return tensor if dim == 0 else tensor.movedim(dim, 0)


def _rows(like: Tensor, dim: int, num_rows: int, parts: Sequence[Tensor]) -> Tensor:
    """A tensor of num_rows along `dim`, from the bytes of each member's rows."""
    gathered = from_bytes(joined(parts), like.dtype, (num_rows, *_rows_first(like, dim).shape[1:]))
    return (gathered if dim == 0 else gathered.movedim(0, dim).contiguous()).to(like.device)


def _side_by_side(gathered: Tensor, like: Tensor, dim: int, size: int) -> Tensor:
    """The tensors whose bytes follow one another, uint8 [size * bytes], concatenated along `dim`."""
    parts = from_bytes(gathered, like.dtype, (size, *like.shape))
    if dim % like.dim() == 0:  # they lie side by side already
        return parts.reshape(size * like.shape[0], *like.shape[1:]).to(like.device)
    return torch.cat(parts.unbind(0), dim=dim).to(like.device)


def _write(target: Tensor, source: Tensor) -> Tensor:
    with torch.no_grad():
        target.copy_(source)
    return target
