"""Messages from one member of a group to another: an announcement, then what it announces.

    sender                          receiver
    announcement (256 bytes)  --->  makes room
    payload                   --->  takes it whole, then compares with what its caller asked for

The receiver always takes what was announced, so a call that does not fit raises there, and neither the sender nor the next message notices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.errors import GroupError
from workbench.ranks import announce, arguments
from workbench.ranks.announce import Announcement
from workbench.ranks.members import Members
from workbench.ranks.wire import bytes_of, dtype_name, dtype_of, from_bytes, seal, unseal

__all__ = ["PointToPoint"]


class PointToPoint(Members):
    """Sends and receives of a group; messages of one sender arrive in the order sent."""

    def send(self, tensor: Tensor, dst: int | None = None) -> None:
        """Send a tensor to member `dst`, by default the next one; returns once it is taken."""
        dst = self._peer("dst", dst, 1)
        self._send_message(f"tensor {dtype_name(tensor.dtype)} {','.join(map(str, tensor.shape))}", bytes_of(tensor), dst)

    def recv(self, size: torch.Size, dtype: torch.dtype, src: int | None = None) -> Tensor:
        """The next tensor of member `src`, by default the previous one.

        Raises:
            ValueError: it has another shape or dtype; it is dropped, and the group is usable.
            GroupError: something else than a tensor came; it is dropped.
        """
        src = self._peer("src", src, -1)
        tensor: Tensor = self._receive(src, "tensor")
        if tuple(tensor.shape) != tuple(size) or tensor.dtype != dtype:
            raise ValueError(
                f"recv in group {self.name!r}: the tensor from rank {self.ranks[src]} does not fit and was dropped\n"
                f"got {dtype_name(tensor.dtype)} {list(tensor.shape)}; the call asked for {dtype_name(dtype)} {list(size)}\n"
                "ask for what is sent, or use recv_tensor_dict, which brings shape and dtype along"
            )
        return tensor

    def send_object(self, obj: Any, dst: int) -> None:
        """Send anything picklable to member `dst`; returns once it is taken."""
        dst = self._peer("dst", dst, 1)
        self._send_message("object", seal(obj), dst)

    def recv_object(self, src: int) -> Any:
        """The next object of member `src`."""
        return self._receive(self._peer("src", src, -1), "object")

    def _peer(self, what: str, place: int | None, step: int) -> int:
        """The member at the other end: `place`, or the neighbour `step` away."""
        self.process_group  # noqa: B018  raises where this rank is no member or the group is gone
        place = (self.rank_in_group + step) % self.world_size if place is None else arguments.member(what, place, self.world_size)
        if place == self.rank_in_group:
            raise ValueError(f"{what}={place} is this rank itself in group {self.name!r} of {self.world_size}: choose another member")
        return place

    def _send_message(self, text: str, payload: Tensor, dst: int) -> None:
        dist.send(announce.encode(Announcement(text, payload.numel())), dst=self.ranks[dst], group=self.process_group)
        if payload.numel():
            dist.send(payload, dst=self.ranks[dst], group=self.process_group)

    def _receive(self, src: int, expected: str) -> Any:
        """The next message of member `src`, whatever it is, taken whole."""
        head = torch.empty(announce.NUM_BYTES, dtype=torch.uint8)
        dist.recv(head, src=self.ranks[src], group=self.process_group)
        announced = announce.decode(head)
        payload = torch.empty(announced.number, dtype=torch.uint8)
        if payload.numel():
            dist.recv(payload, src=self.ranks[src], group=self.process_group)
        kind, _, form = announced.text.partition(" ")
        if kind != expected:
            raise GroupError(
                f"the message from rank {self.ranks[src]} in group {self.name!r} was dropped on rank {self.rank}\n"
                f"it is: {announced.text}; the call waits for: {expected}\n"
                "pair each send with the receive of the same name"
            )
        return unseal(payload) if kind == "object" else _tensor(form, payload)


def _tensor(form: str, payload: Tensor) -> Tensor:
    dtype, _, shape = form.partition(" ")
    return from_bytes(payload, dtype_of(dtype), [int(n) for n in shape.split(",") if n])
