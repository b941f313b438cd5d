"""Pickles of tensors that are the same in every process: torch's own hold the addresses of their storages.

Object collectives send pickles, and a replay compares what a rank sends bit for bit. So while a tape is written or played, storages on the
CPU are pickled as their bytes. Who receives such a pickle needs nothing but this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.storage import TypedStorage

__all__ = ["steady_pickles"]

_own: Callable[[Any], Any] = TypedStorage.__reduce__


def steady_pickles(is_on: bool) -> None:
    """Turn it on or off in this process."""
    setattr(TypedStorage, "__reduce__", _reduce if is_on else _own)  # noqa: B010  a plain assignment is refused by the type of a method


def _reduce(storage: TypedStorage) -> Any:
    untyped = storage._untyped_storage
    if untyped.device.type != "cpu":
        return _own(storage)
    data = torch.empty(0, dtype=torch.uint8).set_(untyped).numpy().tobytes()
    return _storage_of, (data, storage.dtype)


def _storage_of(data: bytes, dtype: torch.dtype) -> TypedStorage:
    untyped = torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage(0)
    return TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
