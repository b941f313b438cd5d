"""A stream of typed messages over a unix socket: a pickled header, and buffers that travel beside it uncopied.

    frame = magic+counts (fixed) | size of each part (uint64) | header (pickle of a record) | value (cloudpickle) | buffer | buffer ...

Knows framing and pickling. Does not know what messages mean, nor ranks. The two ends are made as a socket pair, or share a 0700 folder
and a token, so nothing is unpickled that a stranger could have sent."""

from __future__ import annotations

import io
import pickle
import socket
import struct
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Any

import cloudpickle

__all__ = ["ChannelReader", "ChannelWriter", "Packed", "pack", "receive", "unpack"]

_FRAME = struct.Struct("<4sI")
_MAGIC = b"wb01"
_MAX_PARTS_PER_CALL = 64  # well under IOV_MAX


@dataclass(frozen=True, slots=True)
class Packed:
    """A value ready to travel: its pickle, and the large buffers that stayed outside it."""

    data: bytes | bytearray | memoryview
    buffers: tuple[memoryview | bytearray, ...] = ()

    @property
    def num_bytes(self) -> int:
        return len(self.data) + sum(memoryview(b).nbytes for b in self.buffers)


def pack(value: Any) -> Packed:
    """Pickle a value by cloudpickle (functions of a notebook travel by value); arrays and tensors keep their memory."""
    buffers: list[pickle.PickleBuffer] = []
    out = io.BytesIO()
    _Pickler(out, protocol=5, buffer_callback=buffers.append).dump(value)
    return Packed(out.getbuffer(), tuple(b.raw() for b in buffers))


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle tells mypy nothing of its base
    """Torch pickles a tensor into its stream, three copies of it; plain tensors travel beside it instead, as arrays do."""

    def reducer_override(self, obj: Any) -> Any:
        torch = sys.modules.get("torch")  # where it is not loaded there is no tensor
        if torch is not None and type(obj) is torch.Tensor and _is_plain(torch, obj):
            bytes_of = obj.contiguous().reshape(-1).view(torch.uint8).numpy()
            return _tensor_of, (pickle.PickleBuffer(bytes_of), obj.dtype, tuple(obj.shape))
        return super().reducer_override(obj)


def _is_plain(torch: Any, tensor: Any) -> bool:
    """Nothing but numbers in this process's memory: what an array could hold too."""
    is_dense = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized and tensor.numel() > 0
    return is_dense and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg() or tensor.__dict__)


def _tensor_of(data: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    import torch

    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def unpack(packed: Packed) -> Any:
    """The value again; arrays own the received memory and may be written to."""
    return pickle.loads(packed.data, buffers=packed.buffers)


def frame(header: Any, value: Packed | None) -> list[memoryview]:
    """One message as the pieces to write, in order."""
    parts = [memoryview(pickle.dumps(header, protocol=5))]
    if value is not None:
        parts += [memoryview(value.data), *(memoryview(b).cast("B") for b in value.buffers)]
    sizes = struct.pack(f"<{len(parts)}Q", *(p.nbytes for p in parts))
    return [memoryview(_FRAME.pack(_MAGIC, len(parts)) + sizes), *(p for p in parts if p.nbytes)]


class ChannelWriter:
    """Writes messages; whole messages only, from any thread.

    A non-blocking socket (driver) keeps what did not fit in `pending` for the loop that calls `flush`; a blocking one (rank) writes at
    once."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = Lock()
        self._pending: deque[memoryview] = deque()

    @property
    def has_pending(self) -> bool:
        return bool(self._pending)

    def send(self, header: Any, value: Packed | None = None) -> bool:
        """Write a message; False where a part still waits for `flush`."""
        pieces = frame(header, value)
        with self._lock:
            self._pending.extend(pieces)
            return self._write()

    def flush(self) -> bool:
        """Write what waits; True when nothing is left."""
        with self._lock:
            return self._write()

    def _write(self) -> bool:
        while self._pending:
            pieces = [self._pending[i] for i in range(min(len(self._pending), _MAX_PARTS_PER_CALL))]
            try:
                sent = self._sock.sendmsg(pieces)
            except BlockingIOError:
                return False
            self._drop(sent)
        return True

    def _drop(self, sent: int) -> None:
        while sent:
            first = self._pending[0]
            if sent < first.nbytes:
                self._pending[0] = first[sent:]
                return
            sent -= first.nbytes
            self._pending.popleft()


class ChannelReader:
    """Reads messages piece by piece from a socket that may have any amount ready."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._parser = self._parse()
        self._want = next(self._parser)
        self._have = 0
        self._ready: list[tuple[Any, Packed | None]] = []

    def read(self) -> list[tuple[Any, Packed | None]] | None:
        """What one read completed; None when the other end closed.

        Returns:
            (header, value) of each whole message; [] where more must come.
        """
        while True:
            try:
                count = self._sock.recv_into(self._want[self._have :])
            except (BlockingIOError, InterruptedError):
                break
            except ConnectionError:
                return None
            if count == 0:
                return None
            self._have += count
            while self._have == self._want.nbytes:
                self._want, self._have = next(self._parser), 0
                if self._want.nbytes:
                    break
            if self._ready and self._have == 0:
                break
        done, self._ready = self._ready, []
        return done

    def _parse(self) -> Iterator[memoryview]:
        while True:
            start = bytearray(_FRAME.size)
            yield memoryview(start)
            magic, num_parts = _FRAME.unpack(start)
            if magic != _MAGIC:
                raise ConnectionError(
                    f"a channel carried {bytes(magic)!r} where a message begins: the two ends run different versions of workbench"
                )
            sizes = bytearray(8 * num_parts)
            yield memoryview(sizes)
            parts = [bytearray(size) for size in struct.unpack(f"<{num_parts}Q", sizes)]
            for part in parts:
                if part:
                    yield memoryview(part)
            value = Packed(parts[1], tuple(parts[2:])) if num_parts > 1 else None
            self._ready.append((pickle.loads(parts[0]), value))


def receive(reader: ChannelReader) -> Iterator[tuple[Any, Packed | None]]:
    """Messages of a blocking socket until the other end closes."""
    while (batch := reader.read()) is not None:
        yield from batch
