"""The far end of an engine process, as an `Engine`: used by the driver, and by the rank that generates.

Knows the calls of `host`. Does not know which library the engine is made of.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import EngineError
from workbench.postponing import interrupts_postponed
from workbench.ranks.channel import ChannelReader, ChannelWriter, Packed, pack, unpack
from workbench.ranks.tape import is_playing, through_tape
from workbench.records import EngineMemory, EngineStatus, Prompt, RolloutBatch, Sampling
from workbench.rollout.engine import Origin, PhaseTimes
from workbench.rollout.host import Abort, Call, Reply

if TYPE_CHECKING:
    import torch

__all__ = ["ABORT_LIMIT_S", "Address", "EngineClient", "last_lines"]

ABORT_LIMIT_S = 4.0
_WHOLE_LIMIT_S = 0.5  # the same where the far side does not end the call, but does it whole: a stop is to take no longer than a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """How a rank reaches an engine process; `log_path` is where that process writes."""

    path: str
    token: bytes
    pid: int
    log_path: str


class EngineClient:
    """Calls go out one at a time; the reply carries the engine's state, so `status` is as of the last call."""

    def __init__(self, sock: socket.socket, address: Address) -> None:
        self._sock = sock
        self._writer = ChannelWriter(sock)
        self._reader = ChannelReader(sock)
        self._address = address
        self._tickets = itertools.count(1)
        self._lock = threading.Lock()
        self._status = EngineStatus.STARTING
        self._weight_version = 0
        self._running = 0  # ticket of the call that waits for its reply, 0 when none does
        self.generated_s = (0.0, 0.0)  # begin and end of the last generate
        self._ready: list[tuple[Reply, Packed | None]] = []

    @classmethod
    def connect(cls, address: Address) -> EngineClient:
        """Reach an engine process from a rank.

        Raises:
            EngineError: it does not answer.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if not is_playing():  # a replay takes completions from the tape
                sock.connect(address.path)
                sock.sendall(address.token)
        except OSError as error:
            sock.close()
            raise EngineError(_dead_text(address, f"it does not answer ({error})")) from error
        client = cls(sock, address)
        client._status = EngineStatus.AWAKE
        return client

    @property
    def status(self) -> EngineStatus:
        return self._status

    @property
    def is_sleeping(self) -> bool:
        return self._status in (EngineStatus.ASLEEP, EngineStatus.WEIGHTS_ONLY)

    @property
    def weight_version(self) -> int:
        return self._weight_version

    @property
    def pid(self) -> int:
        return self._address.pid

    def await_start(self, timeout_s: float) -> None:
        """Wait for the process's word that the engine stands.

        Raises:
            EngineError, ValueError: why it does not.
            TimeoutError: no word yet.
        """
        self._sock.settimeout(timeout_s)
        try:
            self._receive(0)
        finally:
            if self._sock.fileno() >= 0:
                self._sock.settimeout(None)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        num_samples: Sequence[int] | None = None,
        origins: Sequence[Origin] | None = None,
        step: int = 0,
    ) -> RolloutBatch:
        options = {"num_samples": num_samples, "origins": origins, "step": step}
        started_s = time.monotonic()
        batch: RolloutBatch = through_tape("generate", lambda: self._call("generate", list(prompts), sampling, **options))
        self.generated_s = (started_s, time.monotonic())
        return batch

    def sleep(self, level: int = 1) -> PhaseTimes:
        times: PhaseTimes = self._call("sleep", level)
        return times

    def wake_up(self, tags: Sequence[str] | None = None) -> PhaseTimes:
        times: PhaseTimes = self._call("wake_up", tags)
        return times

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self._call("update_weights", [(name, tensor) for name, tensor in named_tensors], version)

    def memory(self) -> EngineMemory:
        held: EngineMemory = self._call("memory")
        return held

    def close(self) -> None:
        """End the engine's process in good order, if it still answers."""
        try:
            self._call("close")
        except EngineError:
            pass
        finally:
            self.disconnect()

    def disconnect(self) -> None:
        self._sock.close()

    def mark_dead(self) -> None:
        self._status = EngineStatus.DEAD

    def _call(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        value = pack((args, kwargs))
        with self._lock:
            ticket = self._running = next(self._tickets)
            try:
                self._send(Call(ticket=ticket, verb=verb), value)
                return self._receive(ticket)
            except KeyboardInterrupt:
                self._abort(ticket, ABORT_LIMIT_S if verb == "generate" else _WHOLE_LIMIT_S)
                raise
            finally:
                self._running = 0

    def _send(self, call: Call, value: Packed) -> None:
        try:
            with interrupts_postponed():
                self._writer.send(call, value)
        except OSError as error:
            self._status = EngineStatus.DEAD
            raise EngineError(_dead_text(self._address, f"it was gone before {call.verb}")) from error

    def abort(self) -> None:
        """Have the call end that another thread waits for; that thread gets an EngineError which says so. Nothing, where none runs."""
        ticket = self._running
        if ticket:
            with contextlib.suppress(OSError):  # it is dead: that thread hears of it
                self._writer.send(Abort(ticket=ticket))

    def _abort(self, ticket: int, limit_s: float) -> None:
        """Have the call end on the far side, so that the engine is free for the next; one that is done whole may be left to itself."""
        self._sock.settimeout(limit_s)
        try:
            self._writer.send(Abort(ticket=ticket))
            self._receive(ticket)
        except (EngineError, ValueError, OSError):
            return  # it said that it was interrupted, or is dead: the next call tells
        finally:
            if self._sock.fileno() >= 0:
                self._sock.settimeout(None)

    def _receive(self, ticket: int) -> Any:
        while True:
            while self._ready:
                reply, value = self._ready.pop(0)
                self._status, self._weight_version = reply.status, reply.weight_version
                if reply.ticket == ticket:
                    return self._open(reply, value)
            messages = self._read()
            if messages is None:
                self._status = EngineStatus.DEAD
                raise EngineError(_dead_text(self._address, "it ended"))
            self._ready += messages

    def _read(self) -> list[tuple[Reply, Packed | None]] | None:
        """What has come; an interrupt is heard while nothing comes, not in the middle of a message."""
        limit_s = self._sock.gettimeout()
        ready = select.poll()
        ready.register(self._sock, select.POLLIN)
        if not ready.poll(None if limit_s is None else limit_s * 1000):
            raise TimeoutError("timed out")
        with interrupts_postponed():
            return self._reader.read()

    def _open(self, reply: Reply, value: Packed | None) -> Any:
        if reply.error:
            raise (ValueError if reply.is_value_error else EngineError)(reply.error)
        return None if value is None else unpack(value)


def last_lines(path: str, count: int = 12) -> str:
    """The end of a log; "" where there is none."""
    try:
        return "\n".join(Path(path).read_text(errors="replace").splitlines()[-count:])
    except OSError:
        return ""


def _dead_text(address: Address, what: str) -> str:
    said = last_lines(address.log_path)
    return (
        f"the engine's process (pid {address.pid}) is dead: {what}\n"
        + (f"its log {address.log_path} ends with:\n{said}\n" if said else "it had written nothing\n")
        + "the ranks live on; start another engine: wb.start_engine(cluster, ...)"
    )
