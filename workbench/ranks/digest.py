"""A value's content as a short hash: equal on another day, in another process, on another machine, wherever the content is equal.

Knows numbers, text, containers, arrays, tensors, tables and dataclasses. What has no content of its own that could be compared (a thread,
a file, an object of an unknown class) is told as such, never guessed.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import hashlib
import pathlib
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Digest", "digest_of"]

_MOST_BYTES = 1 << 24  # 10 ms of hashing
_NODE_BYTES = 256  # what an item of a container counts beside its bytes: walking it takes that much longer
_DEEPEST = 60
_LONG = 512
_BY_REPR = (
    complex,
    range,
    slice,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    decimal.Decimal,
    fractions.Fraction,
    pathlib.PurePath,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """The hash of a value (16 hex digits), or "" and why it has none."""

    value: str = ""
    reason: str = ""


class _NoDigest(Exception):
    """Why a value cannot be hashed."""


def digest_of(value: Any) -> Digest:
    """Hash a value by its content.

    `nan` equals itself, 0.0 does not equal -0.0, dtypes count, the order of a dict's keys does not.
    """
    walk = _Walk()
    try:
        walk.feed(value, 0)
    except _NoDigest as why:
        return Digest(reason=str(why))
    except Exception as error:  # a value's own hooks may raise anything
        return Digest(reason=f"reading it raised {type(error).__name__}: {error}")
    return Digest(value=walk.hash.hexdigest()[:16])


class _Walk:
    """One hash under way, and how much it may still read."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self._room = _MOST_BYTES

    def feed(self, value: Any, depth: int) -> None:
        if depth > _DEEPEST:
            raise _NoDigest(f"it is nested more than {_DEEPEST} deep, or holds itself")
        self._spend(_NODE_BYTES)
        kind = type(value)
        if value is None or kind in (bool, int):
            self._put("n", repr(value).encode())
        elif kind is float:
            self._put("f", struct.pack("<d", value))
        elif kind is str:
            self._put("s", value.encode("utf-8", "surrogatepass"))
        elif kind in (bytes, bytearray, memoryview):
            self._put("b", bytes(value))
        elif isinstance(value, enum.Enum):
            self._put("e", f"{_name(kind)}.{value.name}".encode())
        elif isinstance(value, (list, tuple)):
            self._sequence(value, depth)
        elif isinstance(value, (set, frozenset)):
            self._unordered("S", [self._apart((item,), depth) for item in value])
        elif isinstance(value, Mapping):
            self._unordered("d", [self._apart(pair, depth) for pair in value.items()])
        elif isinstance(value, _BY_REPR) or kind.__module__ == "torch" and kind.__name__ in ("dtype", "device"):
            self._put("r", f"{_name(kind)} {value!r}".encode())
        elif is_dataclass(value) and not isinstance(value, type):
            self._put("D", _name(kind).encode())
            for item in fields(value):
                self.feed(item.name, depth + 1)
                self.feed(getattr(value, item.name), depth + 1)
        else:
            self._array_like(value, depth)

    def _array_like(self, value: Any, depth: int) -> None:
        told = getattr(type(value), "__digest__", None)
        if told is not None:  # the class says what counts of it
            self._put("C", _name(type(value)).encode())
            self.feed(told(value), depth + 1)
            return
        torch, pandas = sys.modules.get("torch"), sys.modules.get("pandas")
        if isinstance(value, (np.ndarray, np.generic)):
            self._array(np.asarray(value), depth)
        elif torch is not None and isinstance(value, torch.Tensor):
            self._tensor(value)
        elif pandas is not None and isinstance(value, (pandas.DataFrame, pandas.Series, pandas.Index)):
            self._table(value, depth)
        else:
            raise _NoDigest(f"a {_name(type(value))} has no content that could be compared")

    def _put(self, tag: str, data: bytes | memoryview) -> None:
        size = memoryview(data).nbytes
        self._spend(size)
        self.hash.update(f"{tag}{size}:".encode())
        self.hash.update(data)

    def _spend(self, num_bytes: int) -> None:
        self._room -= num_bytes
        if self._room < 0:
            raise _NoDigest(f"it is larger than {_MOST_BYTES >> 20} MiB")

    def _sequence(self, value: Sequence[Any], depth: int) -> None:
        self._put("l" if type(value) is list else "t" if type(value) is tuple else _name(type(value)), str(len(value)).encode())
        kinds = set(map(type, value)) if len(value) > _LONG else set()
        if kinds == {int} or kinds == {float}:
            numbers = np.asarray(value)
            if numbers.dtype != object:
                self._put("N", numbers.data)
                return
        for item in value:
            self.feed(item, depth + 1)

    def _apart(self, items: Sequence[Any], depth: int) -> bytes:
        """The hash of some items by themselves, where their place among others says nothing."""
        inner = _Walk()
        inner._room = self._room
        for item in items:
            inner.feed(item, depth + 1)
        self._room = inner._room
        return inner.hash.digest()

    def _unordered(self, tag: str, parts: list[bytes]) -> None:
        self._put(tag, b"".join(sorted(parts)))

    def _array(self, array: NDArray[Any], depth: int) -> None:
        if array.dtype.hasobject:
            self._put("o", f"{array.shape}".encode())
            for item in array.reshape(-1).tolist():
                self.feed(item, depth + 1)
            return
        self._put("a", f"{array.dtype.str}{array.shape}".encode())
        self._spend(array.nbytes)
        self.hash.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def _tensor(self, tensor: Any) -> None:
        if tensor.layout.__repr__() != "torch.strided" or tensor.is_quantized or tensor.is_meta:
            raise _NoDigest(f"a tensor of layout {tensor.layout} has no plain elements")
        self._put("T", f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        self._spend(tensor.numel() * tensor.element_size())
        if tensor.numel():
            plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            self.hash.update(plain.view(sys.modules["torch"].uint8).numpy().data)

    def _table(self, value: Any, depth: int) -> None:
        self._put("p", type(value).__name__.encode())
        columns = list(value.items()) if type(value).__name__ == "DataFrame" else [(value.name, value)]
        if type(value).__name__ != "Index":
            self.feed(list(getattr(value, "index", ())), depth + 1)
        for name, column in columns:
            self.feed(name, depth + 1)
            self._put("c", str(column.dtype).encode())
            self._array(column.to_numpy(), depth + 1)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
