"""Messages from one member of a group to another: an announcement, then what it announces.

    sender                          receiver
    announcement (2 KiB)      --->  makes room; what is small comes along
    payload                   --->  takes it whole, then compares with what its caller asked for

The receiver always takes what was announced, so a call that does not fit raises there, and neither the sender nor the next message notices.
A large object stays in memory that the ranks share: its announcement, signed, says where, and the receiver says when it has taken it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.errors import GroupError
from workbench.ranks import announce, arguments, tensor_dict
from workbench.ranks.announce import Announcement
from workbench.ranks.members import Members
from workbench.ranks.parcels import Outbox
from workbench.ranks.sending import Sending
from workbench.ranks.wire import bytes_of, dtype_name, dtype_of, from_bytes, seal, sign, unseal

__all__ = ["PointToPoint"]

_SHARED, _LARGE_BYTES = "object in shared memory", 1 << 18
_TAKEN = 1  # tag of the word that such an object was taken
_MOST_PENDING = 64  # messages on their way that nobody waits for; sending one more waits for the oldest


class PointToPoint(Members):
    """Sends and receives of a group; messages of one sender arrive in the order sent."""

    _pending: deque[Sending] | None = None
    _leaving: Outbox | None = None

    def send(self, tensor: Tensor, dst: int | None = None) -> None:
        """Send a tensor to member `dst`, by default the next one; returns once it is taken."""
        dst = self._peer("dst", dst, 1)
        data = bytes_of(tensor)
        self._send(f"tensor {dtype_name(tensor.dtype)} {','.join(map(str, tensor.shape))}", [data], dst)

    def recv(self, size: torch.Size, dtype: torch.dtype, src: int | None = None) -> Tensor:
        """The next tensor of member `src`, by default the previous one.

        Raises:
            ValueError: it has another shape or dtype; it is dropped, and the group is usable.
            GroupError: something else than a tensor came; it is dropped.
        """
        src = self._peer("src", src, -1)
        announced = self._expect("tensor", src)
        _, form, shape = (announced.text + " ").split(" ")[:3]
        data = self._payload(announced, src)
        tensor = from_bytes(data, dtype_of(form), [int(n) for n in shape.split(",") if n])
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
        sealed = seal(obj, signs=False)
        if sealed.numel() < _LARGE_BYTES or not self._shares:
            return self._send("object", [sign(sealed)], dst)
        self._leaving = self._leaving or Outbox()
        parcel = self._leaving.put([sealed])
        self._send(_SHARED, [seal(parcel)], dst)
        dist.recv(torch.empty(1, dtype=torch.uint8), src=self.ranks[dst], group=self.process_group, tag=_TAKEN)
        self._leaving.read()

    def isend_object(self, obj: Any, dst: int) -> Sending:
        """`send_object` without waiting; the handle holds the bytes."""
        dst = self._peer("dst", dst, 1)
        return self._send_later("object", [seal(obj)], dst)

    def recv_object(self, src: int) -> Any:
        """The next object of member `src`.

        Raises:
            GroupError: something else than an object came; it is dropped.
        """
        src = self._peer("src", src, -1)
        announced = self._expect("object", src)
        if announced.text != _SHARED:
            return unseal(self._payload(announced, src))
        try:
            return unseal(self._inbox.open(unseal(self._payload(announced, src))), checks=False)
        finally:
            self._say_taken(src)

    def _say_taken(self, src: int) -> None:
        dist.send(torch.ones(1, dtype=torch.uint8), dst=self.ranks[src], group=self.process_group, tag=_TAKEN)

    def send_tensor_dict(
        self,
        tensor_dict_: dict[Any, Any],
        dst: int | None = None,
        all_gather_group: Members | None = None,
        all_gather_tensors: dict[Any, bool] | None = None,
    ) -> dict[Any, Any] | None:
        """Send a dict of tensors and other values to member `dst`, by default the next one; returns once it is taken.

        Args:
            all_gather_group: ranks that hold the same values, each with a receiver of its own (the tensor-parallel group between two
                pipeline stages): each sends one piece of a tensor, and the receivers put the pieces together.
            all_gather_tensors: key -> whether to cut it so; by default where the number of elements divides. False where the ranks differ.

        Returns:
            None; in a group of one the dict itself, as nothing is sent.
        """
        if self.world_size == 1:
            return tensor_dict_
        text, buffers, dst = self._packed_dict(tensor_dict_, dst, all_gather_group, all_gather_tensors)
        self._send(text, buffers, dst)
        return None

    def isend_tensor_dict(
        self,
        tensor_dict_: dict[Any, Any],
        dst: int | None = None,
        all_gather_group: Members | None = None,
        all_gather_tensors: dict[Any, bool] | None = None,
    ) -> list[Sending]:
        """`send_tensor_dict` without waiting: handles to wait for, or to drop. The tensors must not change until they are taken."""
        if self.world_size == 1:
            return []
        text, buffers, dst = self._packed_dict(tensor_dict_, dst, all_gather_group, all_gather_tensors)
        return [self._send_later(text, buffers, dst)]

    def recv_tensor_dict(
        self, src: int | None = None, all_gather_group: Members | None = None, all_gather_tensors: dict[Any, bool] | None = None
    ) -> dict[Any, Any] | None:
        """The next dict of member `src`, by default the previous one; None in a group of one.

        Args:
            all_gather_group: as the sender's; needed where it cut tensors.
            all_gather_tensors: not read: which tensors the sender cut comes along.

        Raises:
            ValueError: the tensors come in pieces, and `all_gather_group` is not of as many ranks; the dict is dropped.
            GroupError: something else than a dict came; it is dropped.
        """
        received, handles, postprocess = self.irecv_tensor_dict(src, all_gather_group, all_gather_tensors)
        for handle in handles:
            handle.wait()
        for finish in postprocess:
            finish()
        return received

    def irecv_tensor_dict(
        self, src: int | None = None, all_gather_group: Members | None = None, all_gather_tensors: dict[Any, bool] | None = None
    ) -> tuple[dict[Any, Any] | None, list[Sending], list[Callable[[], None]]]:
        """`recv_tensor_dict` without waiting for the tensors: the dict, handles to wait for, then functions to call that complete it."""
        if self.world_size == 1:
            return None, [], []
        src = self._peer("src", src, -1)
        form: tensor_dict.Form = unseal(self._payload(self._expect("tensor_dict", src), src))
        room, receiving = form.make_room(), Sending()
        for message in room.messages:
            receiving.add(dist.irecv(message, src=self.ranks[src], group=self.process_group), message)
        received: dict[Any, Any] = dict(form.items)
        try:
            self._check_pieces(form, all_gather_group)
        except ValueError:
            receiving.wait()
            raise
        return received, [receiving], [lambda: _complete(received, form, room.buffers, all_gather_group)]

    def _check_pieces(self, form: tensor_dict.Form, group: Members | None) -> None:
        for piece in form.tensors:
            if piece.num_slices > 1 and (group is None or group.world_size != piece.num_slices):
                here = "no all_gather_group" if group is None else f"an all_gather_group of {group.world_size}"
                raise ValueError(
                    f"recv_tensor_dict in group {self.name!r} on rank {self.rank}: the tensors do not fit and were dropped\n"
                    f"they were sent in {piece.num_slices} pieces; the call has {here}\npass the same all_gather_group on both sides"
                )

    def _packed_dict(
        self, values: dict[Any, Any], dst: int | None, group: Members | None, overrides: dict[Any, bool] | None
    ) -> tuple[str, list[Tensor], int]:
        dst = self._peer("dst", dst, 1)
        slices = None if group is None else tensor_dict.Slices(num=group.world_size, place=group.rank_in_group, overrides=overrides)
        packed = tensor_dict.pack(values, slices)
        return "tensor_dict", [seal(packed.form), *packed.messages], dst

    def _peer(self, what: str, place: int | None, step: int) -> int:
        """The member at the other end: `place`, or the neighbour `step` away."""
        self.process_group  # noqa: B018  raises where this rank is no member or the group is gone
        place = (self.rank_in_group + step) % self.world_size if place is None else arguments.member(what, place, self.world_size)
        if place == self.rank_in_group:
            raise ValueError(f"{what}={place} is this rank itself in group {self.name!r} of {self.world_size}: choose another member")
        return place

    def _send(self, text: str, payload: list[Tensor], dst: int) -> None:
        for data in _messages(text, payload):
            dist.send(data, dst=self.ranks[dst], group=self.process_group)

    def _send_later(self, text: str, payload: list[Tensor], dst: int) -> Sending:
        if self._pending is None:
            self._pending = deque()
        while len(self._pending) >= _MOST_PENDING:
            self._pending.popleft().wait()
        sending = Sending()
        for data in _messages(text, payload):
            sending.add(dist.isend(data, dst=self.ranks[dst], group=self.process_group), data)
        self._pending.append(sending)  # holds the bytes also when the caller drops the handle
        return sending

    def _take(self, num_bytes: int, src: int) -> Tensor:
        data = torch.empty(num_bytes, dtype=torch.uint8)
        if num_bytes:
            dist.recv(data, src=self.ranks[src], group=self.process_group)
        return data

    def _payload(self, announced: Announcement, src: int) -> Tensor:
        """What was announced: brought along, or taken now."""
        return self._take(announced.number, src) if announced.data is None else announced.data

    def _expect(self, expected: str, src: int) -> Announcement:
        """The next announcement of member `src`; what is not expected is taken whole and dropped."""
        announced = announce.decode(self._take(announce.NUM_BYTES, src).numpy().data)
        kind = announced.text.split(" ")[0]
        if kind == expected:
            return announced
        first = self._payload(announced, src)
        if announced.text == _SHARED:
            self._say_taken(src)
        if kind == "tensor_dict":
            for message in unseal(first).make_room().messages:
                self._take(message.numel(), src)
        raise GroupError(
            f"the message from rank {self.ranks[src]} in group {self.name!r} was dropped on rank {self.rank}\n"
            f"it is: {announced.text}; the call waits for: {expected}\n"
            "pair each send with the receive of the same name"
        )


def _messages(text: str, payload: list[Tensor]) -> list[Tensor]:
    """The announcement of the first part of a payload, then what it does not bring along; nothing empty is sent."""
    first = announce.carrying(text, payload[0])
    told = torch.frombuffer(announce.encode(first), dtype=torch.uint8)
    return [told, *filter(Tensor.numel, payload if first.data is None else payload[1:])]


def _complete(received: dict[Any, Any], form: tensor_dict.Form, buffers: list[Tensor], group: Any) -> None:
    """Put the tensors in their places, pieces together."""
    for key, value in form.fill(buffers).items():
        received[key] = value
    for key, value in form.items:
        if isinstance(value, tensor_dict.TensorForm) and value.num_slices > 1:
            received[key] = group.all_gather(received[key], dim=0).reshape(value.shape)
