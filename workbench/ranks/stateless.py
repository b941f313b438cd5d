"""Groups beside torch's default one: several in a process, over processes that belong to different worlds. They carry small objects.

    send_obj       key  send/<src>/<dst>/<n>        the n-th from src to dst; both ends count
    broadcast_obj  key  broadcast/<src>/<n>         the n-th of src; each reader counts for itself
    barrier        key  barrier/<n>/<rank>          the n-th barrier; a rank writes its own and reads the others'

All is kept in a store that rank 0 serves on one socket. Objects travel sealed, see `wire`. What goes to the store and comes from it passes
`_through`, and so a tape, where the rank has one: a replay opens no store. Source: vLLM's `StatelessProcessGroup`
(`vllm/distributed/utils.py`, 0.32.0), whose keys lack the sender and whose barrier outlives its limit.
"""

from __future__ import annotations

import copyreg
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.errors import GroupError
from workbench.ranks import arguments
from workbench.ranks.store_waits import StoreWait, announce_place
from workbench.ranks.tape import is_playing, through_tape
from workbench.ranks.wire import seal, unseal

__all__ = ["StatelessGroup", "free_port", "serve_or_join"]

_SHORTEST_NAP_S, _LONGEST_NAP_S = 0.0002, 0.01
_EXPIRED = b"expired"
T = TypeVar("T")


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago. Another process may take it: where it matters pass port 0 to rank 0 and tell the others."""
    return through_tape("free_port()", lambda: _free_port(host))


def _free_port(host: str) -> int:
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


class StatelessGroup:
    """Ranks that exchange small objects through a store, without a process group.

    Each rank makes it with `create`. Rank 0 serves the store until its `destroy()`, which waits for the others, or until its process
    ends; a StatelessGroup that is merely dropped keeps serving.

    Attributes:
        rank, world_size: this process's place in this group; it may have another in others.
        host, port: where the store is; with port 0 the one that the system chose.
    """

    _serving: list[dist.TCPStore] = []  # held for good: a server that is collected leaves its clients without their messages  # noqa: RUF012

    def __init__(self, host: str, port: int, *, rank: int, world_size: int, data_expiration_s: float, store_timeout_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.host, self.port = host, port
        self.data_expiration_s = data_expiration_s
        self.store_timeout_s = store_timeout_s
        self._store: dist.TCPStore | None = None  # also in a replay
        self._has_left = False
        self._counts: Counter[str] = Counter()
        self._sent: deque[tuple[float, str]] = deque()

    @classmethod
    def create(
        cls,
        host: str,
        port: int,
        rank: int,
        world_size: int,
        data_expiration_s: float = 3600.0,
        store_timeout_s: float = 300.0,
        listen_socket: socket.socket | None = None,
    ) -> Self:
        """Join the group; rank 0 serves, the others wait for it.

        Args:
            port: 0 on rank 0 lets the system choose; `port` of the group then says which, for the others.
            data_expiration_s: what was sent longer ago is dropped, and its receiver is told.
            store_timeout_s: the longest wait for an object.
            listen_socket: on rank 0 a socket that is bound already; the group takes it over.

        Raises:
            ValueError: a rank outside the world, or port 0 on another rank than 0.
            GroupError: the port is taken, or nobody serves it.
        """
        arguments.member("rank", rank, world_size)
        if rank and not port:
            raise ValueError(f"rank {rank} got port 0: only rank 0 lets the system choose; pass on the port of its group")
        made = cls(host, port, rank=rank, world_size=world_size, data_expiration_s=data_expiration_s, store_timeout_s=store_timeout_s)
        made.port = through_tape(f"StatelessGroup.create(rank={rank}, world_size={world_size})", lambda: made._join(listen_socket))
        if listen_socket is not None and is_playing():
            listen_socket.close()  # taken over, and not needed
        return made

    def send_obj(self, obj: Any, dst: int) -> None:
        """Leave an object for rank `dst`; does not wait for it."""
        arguments.member("dst", dst, self.world_size)
        self._put(f"send/{self.rank}/{dst}", obj, f"send_obj(dst={dst})")

    def recv_obj(self, src: int) -> Any:
        """The next object of rank `src` to this one.

        Raises:
            GroupError: none came within store_timeout_s, or it expired before it was read; then the next is reachable.
        """
        arguments.member("src", src, self.world_size)
        return self._get(f"send/{src}/{self.rank}", src, f"recv_obj(src={src})")

    def broadcast_obj(self, obj: Any | None, src: int) -> Any:
        """Rank `src`'s object on every rank; `src` does not wait for the others."""
        arguments.member("src", src, self.world_size)
        if self.rank != src:
            return self._get(f"broadcast/{src}", src, f"broadcast_obj(src={src})")
        self._put(f"broadcast/{src}", obj, f"broadcast_obj(src={src})")
        return obj

    def all_gather_obj(self, obj: Any) -> list[Any]:
        """Every rank's object, in rank order."""
        self._put(f"broadcast/{self.rank}", obj, "all_gather_obj()")
        others = {src: f"all_gather_obj() from rank {src}" for src in range(self.world_size) if src != self.rank}
        return [self._get(f"broadcast/{src}", src, others[src]) if src in others else obj for src in range(self.world_size)]

    def send(self, tensor: Tensor, dst: int) -> None:
        """`send_obj` of a tensor."""
        self.send_obj(tensor.detach().cpu(), dst)

    def recv(self, tensor: Tensor, src: int) -> Tensor:
        """Write the next tensor of rank `src` into `tensor`, and return it.

        Raises:
            ValueError: its shape or dtype is another; it is dropped.
        """
        received = self.recv_obj(src)
        _check_like(received, tensor, f"recv from rank {src}")
        return _write(tensor, received)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Rank `src`'s tensor on every rank, as a new tensor on the others."""
        received: Tensor = self.broadcast_obj(tensor.detach().cpu() if self.rank == src else None, src)
        return tensor if self.rank == src else received.to(tensor.device)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Combine equal-shaped tensors of all ranks: "sum", "mean", "max", "min" or "product"; a new tensor."""
        if op not in arguments.REDUCE_OPS:
            raise ValueError(f"all_reduce(op={op!r}): op must be one of {', '.join(map(repr, arguments.REDUCE_OPS))}")
        tensors = self.all_gather_obj(tensor.detach().cpu())
        for src, other in enumerate(tensors):
            _check_like(other, tensor, f"all_reduce with rank {src}")
        stacked = torch.stack(tensors).to(arguments.accumulator(tensor.dtype, op))
        reduced = arguments.combine(stacked, op)
        return reduced.to(device=tensor.device, dtype=arguments.reduced_dtype(tensor.dtype, op))

    def barrier(self, timeout_s: float = 30.0) -> None:
        """Return once every rank has called it.

        Raises:
            GroupError: after timeout_s, naming the ranks that did not arrive; they may still arrive at this barrier, and so may this rank.
        """
        self._through("barrier()", lambda: self._meet(timeout_s))

    def _meet(self, timeout_s: float) -> None:
        number = self._counts["barrier"]
        store = self._live()
        _set(store, f"barrier/{number}/{self.rank}", b"1")
        missing = self._wait_for([f"barrier/{number}/{rank}" for rank in range(self.world_size)], timeout_s, self._shown("barrier", number))
        if missing:
            raise GroupError(
                f"barrier #{number + 1} on rank {self.rank} of {self.world_size} timed out after {timeout_s:g} s\n"
                f"ranks {missing} did not arrive\nlook at what they do; call barrier again to go on waiting"
            )
        self._counts["barrier"] += 1
        if number:  # everybody has left the one before
            store.delete_key(f"barrier/{number - 1}/{self.rank}")

    def expire_data(self) -> None:
        """Drop what this rank sent more than data_expiration_s ago; a receiver that still asks for it is told."""
        while self._sent and time.monotonic() - self._sent[0][0] > self.data_expiration_s:
            _set(self._live(), self._sent.popleft()[1], _EXPIRED)

    def destroy(self, timeout_s: float = 30.0) -> None:
        """Leave the group; a second call does nothing. Rank 0 waits for the others to leave, then stops serving.

        Raises:
            GroupError: after timeout_s some have not left; rank 0 serves on.
        """
        if not self._has_left:
            self._through("destroy()", lambda: self._leave(timeout_s))
            self._has_left = True

    def _leave(self, timeout_s: float) -> None:
        store = self._live()
        _set(store, f"left/{self.rank}", b"1")
        if self.rank == 0:
            missing = self._wait_for([f"left/{rank}" for rank in range(self.world_size)], timeout_s, self._shown("destroy", 0))
            if missing:
                raise GroupError(
                    f"destroy on rank 0 waited {timeout_s:g} s for ranks {missing} to leave the group\n"
                    f"they have not called destroy; the store on port {self.port} is still served\ncall destroy on every rank"
                )
            self._serving.remove(store)
        self._store = None
        self._sent.clear()

    def __repr__(self) -> str:
        return f"StatelessGroup(rank {self.rank} of {self.world_size}, {self.host}:{self.port})"

    def __snapshot__(self) -> tuple[Any, ...]:
        """How the names of a rank hold it for a replay: without its store."""
        return copyreg.__newobj__, (type(self),), vars(self) | {"_store": None, "_sent": deque()}  # type: ignore[attr-defined]  # not in typeshed

    def _through(self, what: str, call: Callable[[], T], given: bytes = b"") -> T:
        """Whatever has to do with the store: the one place where a tape listens, and answers in a replay."""
        if self._has_left:
            raise GroupError(f"rank {self.rank} has left this group (port {self.port})\nmake another one with StatelessGroup.create")
        return through_tape(f"{what} of {self}", call, given)

    def _join(self, listen_socket: socket.socket | None) -> int:
        """Serve the store or reach it: its port."""
        store = serve_or_join(self.host, self.port, self.rank, timeout_s=self.store_timeout_s, listen_socket=listen_socket)
        if self.rank == 0:
            self._serving.append(store)
        self._store = store
        announce_place(store.port, self.rank, f"stateless group on port {store.port}")
        return store.port

    def _put(self, channel: str, obj: Any, what: str) -> None:
        data = seal(obj).numpy().tobytes()
        self._through(what, lambda: self._write(channel, data), data)

    def _get(self, channel: str, src: int, what: str) -> Any:
        data = self._through(what, lambda: self._read(channel, src))
        return unseal(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _write(self, channel: str, data: bytes) -> None:
        self.expire_data()
        key = f"{channel}/{self._counts[channel]}"
        _set(self._live(), key, data)
        self._counts[channel] += 1
        self._sent.append((time.monotonic(), key))

    def _read(self, channel: str, src: int) -> bytes:
        """The next object of a channel that another rank, or this one, writes; own broadcasts are counted apart from own reads."""
        reads = f"read {channel}"
        key = f"{channel}/{self._counts[reads]}"
        op = "recv_obj" if channel.startswith("send/") else "broadcast_obj"
        if self._wait_for([key], self.store_timeout_s, self._shown(op, self._counts[reads]), src):
            raise GroupError(
                f"nothing came from rank {src} to rank {self.rank} of {self.world_size} within {self.store_timeout_s:g} s\n"
                "it has not sent, or sent to another rank\n"
                "send first, or give a larger store_timeout_s; what comes later can still be received"
            )
        data = self._live().get(key)
        self._counts[reads] += 1
        if data == _EXPIRED:
            raise GroupError(
                f"an object from rank {src} to rank {self.rank} expired before it was read\n"
                f"it was sent more than data_expiration_s={self.data_expiration_s:g} s ago\nreceive again for the next one, or read sooner"
            )
        return data

    def _shown(self, op: str, number: int) -> StoreWait:
        return StoreWait(op, self.port, number + 1)

    def _wait_for(self, keys: list[str], timeout_s: float, wait: StoreWait, src: int | None = None) -> list[int]:
        """Which of the keys are not there after timeout_s; asks again and again, as the store's own wait lets no interrupt through.

        Args:
            keys: of all ranks, or the one that `src` writes.
        """
        deadline, nap_s = time.monotonic() + timeout_s, _SHORTEST_NAP_S
        store = self._live()
        try:
            with wait:
                while not store.check(keys):
                    left_s = deadline - time.monotonic()
                    if left_s <= 0:
                        return [place for place, key in enumerate(keys) if not store.check([key])]
                    time.sleep(min(nap_s, left_s))
                    nap_s = min(2 * nap_s, _LONGEST_NAP_S)
                    if nap_s == _LONGEST_NAP_S:
                        wait.tell(next((place for place, key in enumerate(keys) if not store.check([key])), 0) if src is None else src)
        except dist.DistNetworkError as error:
            raise GroupError(
                f"rank {self.rank} of {self.world_size} lost the store at {self.host}:{self.port}\n"
                "rank 0 serves it: its process has ended, or it left the group\n"
                "let rank 0 end last: a barrier() at the end, or destroy() on every rank"
            ) from error
        return []

    def _live(self) -> dist.TCPStore:
        assert self._store is not None
        return self._store


def serve_or_join(host: str, port: int, rank: int, *, timeout_s: float, listen_socket: socket.socket | None = None) -> dist.TCPStore:
    """The store of some ranks, served by rank 0.

    Raises:
        GroupError: the port is taken, or nobody serves it.
    """
    listener = (listen_socket or _listen(host, port)) if rank == 0 else None
    return _store(host, port, listener, timeout_s=timeout_s)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens on one address only; the store by itself would listen on all."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise GroupError(
            f"rank 0 cannot serve on {host}:{port}: {error.strerror}\nanother process, or a group that was not destroyed, has it\n"
            "pass port=0 on rank 0 and hand its group.port to the others"
        ) from error
    return listener


def _store(host: str, port: int, listener: socket.socket | None, *, timeout_s: float) -> dist.TCPStore:
    limit = timedelta(seconds=timeout_s)
    if listener is not None:
        port = listener.getsockname()[1]
        return dist.TCPStore(
            host, port, is_master=True, timeout=limit, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=False
        )
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False, use_libuv=False)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise GroupError(
            f"nobody serves {host}:{port} within {timeout_s:g} s\nrank 0 has not made its group there, or has ended\nstart rank 0 first"
        ) from error


def _set(store: dist.TCPStore, key: str, data: bytes) -> None:
    store.set(key, data)  # type: ignore[arg-type]  # torch's annotation says str; it takes bytes


def _check_like(received: Any, tensor: Tensor, what: str) -> None:
    if not isinstance(received, Tensor) or received.shape != tensor.shape or received.dtype != tensor.dtype:
        shown = f"{received.dtype} {list(received.shape)}" if isinstance(received, Tensor) else type(received).__name__
        raise ValueError(f"{what}: got {shown} for {tensor.dtype} {list(tensor.shape)}: pass equal shapes and dtypes")


def _write(target: Tensor, source: Tensor) -> Tensor:
    with torch.no_grad():
        target.copy_(source)
    return target
