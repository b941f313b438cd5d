"""A dict of tensors and other values as it travels: its form, then the bytes of each tensor; knows no process group.

    {"h": float32 [8], "n": 3}   ->   form: (("h", TensorForm(float32, (8,), cpu)), ("n", 3))   buffers: [32 bytes]

Order is kept. Only values that are tensors themselves travel as bytes; what is nested in lists and dicts goes with the form, pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from workbench.ranks.wire import bytes_of, dtype_name, dtype_of, from_bytes

__all__ = ["Form", "Packed", "Room", "Slices", "TensorForm", "pack"]

_TOGETHER_BYTES = 1 << 22  # up to here a copy costs less than a message


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorForm:
    """A tensor without its elements.

    Attributes:
        num_slices: into how many equal pieces the ranks of an all_gather_group cut it; this one is a piece when above 1.
    """

    dtype: str
    shape: tuple[int, ...]
    device: str
    num_slices: int = 1

    @property
    def num_bytes(self) -> int:
        """Bytes of what travels."""
        return prod(self.shape) * dtype_of(self.dtype).itemsize // self.num_slices


@dataclass(frozen=True, slots=True)
class Form:
    """The keys of a dict in order, each with its `TensorForm` or its value."""

    items: tuple[tuple[Any, Any], ...]

    @property
    def tensors(self) -> list[TensorForm]:
        return [value for _, value in self.items if isinstance(value, TensorForm)]

    def make_room(self) -> Room:
        """Where the tensors arrive."""
        sizes = [form.num_bytes for form in self.tensors]
        if not _go_together(sizes):
            buffers = [torch.empty(size, dtype=torch.uint8) for size in sizes]
            return Room(buffers, [buffer for buffer in buffers if buffer.numel()])
        whole = torch.empty(sum(sizes), dtype=torch.uint8)
        return Room(list(whole.split(sizes)), [whole])

    def fill(self, buffers: Sequence[Tensor]) -> dict[Any, Any]:
        """The dict whose tensors' bytes are in `buffers`."""
        left = iter(buffers)
        return {key: _tensor(value, next(left)) if isinstance(value, TensorForm) else value for key, value in self.items}


@dataclass(frozen=True, slots=True)
class Room:
    """Where tensors arrive.

    Attributes:
        buffers: one for each tensor, uint8.
        messages: the same memory as it is filled, a message each.
    """

    buffers: list[Tensor]
    messages: list[Tensor]


@dataclass(frozen=True, slots=True)
class Packed:
    """A dict ready to travel.

    Attributes:
        messages: its tensors' bytes, as `Form.make_room` expects them: what is small together, what is large as it is, without a copy.
    """

    form: Form
    messages: list[Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slices:
    """How tensors are cut where the ranks of a group each send one piece.

    Attributes:
        num: ranks of the group; place: this rank's piece.
        overrides: key -> cut it or not; by default a tensor is cut when its number of elements divides by `num`.
    """

    num: int = 1
    place: int = 0
    overrides: dict[Any, bool] | None = None

    def of(self, key: Any, tensor: Tensor) -> int:
        """Pieces of one tensor.

        Raises:
            ValueError: an override asks for pieces that are not equal.
        """
        fits = tensor.numel() > 0 and tensor.numel() % self.num == 0
        wanted = (self.overrides or {}).get(key, fits)
        if wanted and tensor.numel() and not fits:
            raise ValueError(f"all_gather_tensors[{key!r}]: {tensor.numel()} elements do not divide among {self.num} ranks: leave it out")
        return self.num if wanted and fits else 1


def _go_together(sizes: Sequence[int]) -> bool:
    return sum(size > 0 for size in sizes) > 1 and sum(sizes) <= _TOGETHER_BYTES


def pack(values: dict[Any, Any] | None, slices: Slices | None = None) -> Packed:
    """Take a dict apart.

    Raises:
        ValueError: no dict, or a tensor that cannot travel.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected a dict of tensors, got {type(values).__name__}")
    slices = slices or Slices()
    items, buffers = [], []
    for key, value in values.items():
        if isinstance(value, Tensor):
            num = slices.of(key, value)
            data = bytes_of(value)
            buffers.append(data if num == 1 else data.view(num, -1)[slices.place])
            value = TensorForm(dtype=dtype_name(value.dtype), shape=tuple(value.shape), device=value.device.type, num_slices=num)
        items.append((key, value))
    is_one = _go_together([buffer.numel() for buffer in buffers])
    return Packed(Form(tuple(items)), [torch.cat(buffers)] if is_one else [buffer for buffer in buffers if buffer.numel()])


def _tensor(form: TensorForm, buffer: Tensor) -> Tensor:
    """The tensor, or its piece, flat."""
    shape = form.shape if form.num_slices == 1 else (prod(form.shape) // form.num_slices,)
    return from_bytes(buffer, dtype_of(form.dtype), shape).to(form.device)
