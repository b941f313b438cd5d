"""Tensors and objects as bytes, the form in which groups move them; knows no process group.

A tensor travels as the bytes of its elements, so that every dtype can (gloo itself knows about ten). An object travels as a pickle
behind a keyed digest: nothing is unpickled that was not written with the same key. A world without a key trusts whoever can connect to
it, as torch's own object collectives do, and saves the digest.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cloudpickle
import torch
from torch import Tensor

from workbench.errors import GroupError

__all__ = [
    "KEY_VARIABLE",
    "bytes_of",
    "check_dense",
    "dtype_name",
    "dtype_of",
    "from_bytes",
    "joined",
    "seal",
    "sign",
    "signing_with",
    "unseal",
]

KEY_VARIABLE = "WORKBENCH_KEY"
_DIGEST_BYTES = 32


def bytes_of(tensor: Tensor) -> Tensor:
    """The elements of a tensor as bytes: uint8 [numel * itemsize] on the CPU, sharing memory with a contiguous CPU tensor."""
    check_dense(tensor)
    plain = tensor.detach()
    if plain.is_complex() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    return plain.cpu().contiguous().view(-1).view(torch.uint8)


def check_dense(tensor: Tensor) -> None:
    """Refuse what has no plain elements.

    Raises:
        ValueError: something else than a dense tensor.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"expected a tensor, got {type(tensor).__name__}: send other things with the object operations")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ValueError(f"only dense tensors travel, got {tensor.layout}, {tensor.dtype}: call .to_dense() or .dequantize() first")


def from_bytes(data: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The tensor whose elements are `data`, uint8 [numel * itemsize]; shares memory with it where the alignment allows."""
    if data.numel() == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    if data.data_ptr() % dtype.itemsize or data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).reshape(tuple(shape))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts, uint8 [num_bytes] each, as one; without a copy where they lie side by side already."""
    if len(parts) == 1:
        return parts[0]
    ends = [part.data_ptr() + part.numel() for part in parts[:-1]]
    if all(end == part.data_ptr() for end, part in zip(ends, parts[1:], strict=True)) and _is_one_storage(parts):
        return parts[0].as_strided((sum(part.numel() for part in parts),), (1,))
    return torch.cat(list(parts))


def _is_one_storage(parts: Sequence[Tensor]) -> bool:
    return len({part.untyped_storage().data_ptr() for part in parts}) == 1


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """torch.float32 for "float32"."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def seal(obj: Any, *, signs: bool = True) -> Tensor:
    """A pickle of an object behind its digest, uint8 [num_bytes]; what plain pickle refuses (functions of a cell) goes by cloudpickle.

    Args:
        signs: off for what no stranger can write to, memory that ranks share: the digest costs as much as the pickle.

    Raises:
        ValueError: neither can pickle it.
    """
    try:
        data = _written(pickle.dump, obj)
    except Exception:  # pickle raises whatever the object's own hooks raise
        data = _cloudpickled(obj)
    sealed = torch.frombuffer(data, dtype=torch.uint8)
    return sign(sealed) if signs else sealed


def sign(sealed: Tensor) -> Tensor:
    """What `seal` gave without a signature, now with one."""
    data = memoryview(sealed.numpy().data)
    data[:_DIGEST_BYTES] = _digest(data[_DIGEST_BYTES:])
    return sealed


def unseal(sealed: Tensor, *, checks: bool = True) -> Any:
    """The object that `seal` packed; `checks` is off for what came through memory that ranks share.

    Raises:
        GroupError: the digest does not match, so nothing was unpickled.
    """
    view = memoryview(sealed.numpy().data)
    if checks and not hmac.compare_digest(bytes(view[:_DIGEST_BYTES]), _digest(view[_DIGEST_BYTES:])):
        raise GroupError(
            "an object arrived that does not carry this world's key; it was not unpickled\n"
            f"its digest does not match its {len(view) - _DIGEST_BYTES} bytes under the key in {KEY_VARIABLE}\n"
            "start all ranks with the same key; a foreign process may be connected to this world"
        )
    return pickle.loads(view[_DIGEST_BYTES:])


@contextmanager
def signing_with(key: str) -> Iterator[None]:
    """Objects are signed, and their signatures checked, with another cluster's key."""
    before = os.environ.get(KEY_VARIABLE)
    os.environ[KEY_VARIABLE] = key
    try:
        yield
    finally:
        if before is None:
            del os.environ[KEY_VARIABLE]
        else:
            os.environ[KEY_VARIABLE] = before


def _written(dump: Callable[..., None], obj: Any) -> memoryview:
    """A pickle behind room for its digest."""
    file = io.BytesIO()
    file.write(bytes(_DIGEST_BYTES))
    dump(obj, file, protocol=pickle.HIGHEST_PROTOCOL)
    return file.getbuffer()


def _cloudpickled(obj: Any) -> memoryview:
    try:
        return _written(cloudpickle.dump, obj)
    except Exception as error:
        raise ValueError(f"a {type(obj).__name__} cannot be sent to other ranks: {error}") from error


def _digest(data: memoryview) -> bytes:
    key = os.environ.get(KEY_VARIABLE, "").encode()
    return hmac.digest(key, data, hashlib.sha256) if key else bytes(_DIGEST_BYTES)
