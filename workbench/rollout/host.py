"""An engine's own process: forked from a server that has imported vLLM, it makes one engine and serves calls one after another.

    driver --(socket pair)-------------\\
                                         > reader threads -> queue -> main thread: engine -> reply
    rank   --(unix socket, token first)-/                 `-> Abort: at once, the call under way is interrupted

It belongs to the cluster, not to a rank: it outlives stops of the ranks and ends with the driver. With tp > 1 the processes of one engine
    form a gloo world of their own, on the cluster's store. Knows engines and channels. Does not know rollouts. """

from __future__ import annotations

import contextlib
import faulthandler
import hmac
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from types import FrameType
from typing import Any

from workbench.errors import EngineError
from workbench.ranks.channel import ChannelReader, ChannelWriter, Packed, pack, receive, unpack
from workbench.records import EngineStatus
from workbench.rollout.finished import FinishedWriter

__all__ = ["Abort", "Call", "HostConfig", "Reply", "TOKEN_BYTES", "main"]

TOKEN_BYTES = 32
_VERBS = ("generate", "sleep", "wake_up", "update_weights", "memory", "close")
_LEAVE_AFTER_ABORT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """What an engine process is told at its start.

    Attributes:
        rank: the rank that it works for, -1 where it works for all.
        address: path of the unix socket on which ranks may call, in a 0700 folder.
        token: what a caller must send first.
        tp_rank, tp: its place among the processes of one engine.
        store_port, store_prefix: where those meet.
        options: keyword arguments of the engine's class.
    """

    backend: str
    rank: int
    address: str
    token: bytes
    tp_rank: int
    tp: int
    store_port: int
    store_prefix: str
    num_threads: int
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Perform a verb of the engine; (args, kwargs) travel beside it."""

    ticket: int
    verb: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Interrupt a call, if it still runs."""

    ticket: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer to a call (its value travels beside it), and how the engine is now; ticket 0 is the news that it has started."""

    ticket: int
    error: str = ""
    is_value_error: bool = False
    was_aborted: bool = False
    status: EngineStatus = EngineStatus.AWAKE
    weight_version: int = 0


class _Host:
    def __init__(self, config: HostConfig, driver: socket.socket) -> None:
        self.config = config
        self.engine: Any = None
        self.calls: SimpleQueue[tuple[ChannelWriter, Call, Packed | None]] = SimpleQueue()
        self.driver = ChannelWriter(driver)
        self.running: tuple[ChannelWriter, Call] | None = None
        threading.Thread(target=self._read, args=(driver, self.driver), kwargs={"is_driver": True}, daemon=True).start()

    def start(self) -> None:
        """Make the engine and say so, or say why not."""
        signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            self.engine = _make(self.config)
        except BaseException as error:
            is_value = isinstance(error, ValueError)
            text = str(error) if isinstance(error, (EngineError, ValueError)) else traceback.format_exc()
            self.driver.send(Reply(ticket=0, error=text, is_value_error=is_value, status=EngineStatus.DEAD))
            raise SystemExit(1) from error
        threading.Thread(target=self._listen, name="workbench-engine-listen", daemon=True).start()

    def serve(self) -> None:
        """Perform calls for ever."""
        while True:
            try:
                writer, call, value = self.calls.get()
                self._perform(writer, call, value)
            except KeyboardInterrupt:
                continue  # a late abort of a call that had ended

    def _perform(self, writer: ChannelWriter, call: Call, value: Packed | None) -> None:
        error, is_value_error, was_aborted, result = "", False, False, None
        try:
            self.running = (writer, call)
            args, kwargs = unpack(value) if value is not None else ((), {})
            if call.verb not in _VERBS:
                raise EngineError(f"an engine process was asked for {call.verb!r}; it knows {', '.join(_VERBS)}")
            result = pack(self._call(call.verb, args, kwargs))
            self.running = None
        except KeyboardInterrupt:
            error, was_aborted = f"{call.verb} was interrupted", True
        except Exception as raised:
            is_value_error = isinstance(raised, ValueError) and not isinstance(raised, EngineError)
            error = str(raised) if isinstance(raised, (EngineError, ValueError)) else traceback.format_exc()
        self.running = None
        reply = Reply(
            ticket=call.ticket,
            error=error,
            is_value_error=is_value_error,
            was_aborted=was_aborted,
            status=self.engine.status,
            weight_version=self.engine.weight_version,
        )
        with contextlib.suppress(OSError):  # a caller that has gone needs no answer
            writer.send(reply, result)
        if call.verb == "close":
            os._exit(0)

    def _call(self, verb: str, args: Any, kwargs: Any) -> Any:
        if verb != "generate" or self.config.tp_rank:  # members of one engine complete the same; the first tells
            return getattr(self.engine, verb)(*args, **kwargs)
        self.engine.on_finished = told = FinishedWriter.open(self.config.address)
        try:
            return self.engine.generate(*args, **kwargs)
        finally:
            self.engine.on_finished = None
            if told is not None:
                told.close()

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.running is not None and self.running[1].verb == "generate":
            raise KeyboardInterrupt

    def _abort(self, writer: ChannelWriter, ticket: int) -> None:
        """End a generate that runs; all else is done whole, for half a sleep, or half of the weights, would be of no use to anyone."""
        running = self.running
        if running is not None and running[0] is writer and running[1].ticket == ticket and running[1].verb == "generate":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            if self.config.tp > 1:
                # inside a collective of the engine's own no signal is heard; its group is out of step in any case
                threading.Timer(_LEAVE_AFTER_ABORT_S, lambda: self.running is running and os._exit(1)).start()

    def _read(self, sock: socket.socket, writer: ChannelWriter, *, is_driver: bool) -> None:
        with contextlib.suppress(Exception):
            for message, value in receive(ChannelReader(sock)):
                if isinstance(message, Abort):
                    self._abort(writer, message.ticket)
                elif isinstance(message, Call):
                    self.calls.put((writer, message, value))
        if is_driver:
            self._leave()
        if self.running is not None and self.running[0] is writer:
            self._abort(writer, self.running[1].ticket)  # its caller died

    def _leave(self) -> None:
        """The driver is gone: give back what outlives a process (files, shared memory), but do not wait for a stuck engine."""
        threading.Timer(1.5, lambda: os._exit(0)).start()
        with contextlib.suppress(BaseException):
            if self.engine is not None and self.running is None:
                self.engine.close()
        os._exit(0)

    def _listen(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(self.config.address)
            listener.listen()
            self.driver.send(Reply(ticket=0, status=self.engine.status))
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=self._welcome, args=(sock,), daemon=True).start()

    def _welcome(self, sock: socket.socket) -> None:
        sock.settimeout(5.0)
        given = b""
        with contextlib.suppress(OSError):
            while len(given) < TOKEN_BYTES and (piece := sock.recv(TOKEN_BYTES - len(given))):
                given += piece
        if not hmac.compare_digest(given, self.config.token):
            sock.close()
            return
        sock.settimeout(None)
        self._read(sock, ChannelWriter(sock), is_driver=False)


def _make(config: HostConfig) -> Any:
    import torch

    torch.set_num_threads(config.num_threads)
    options = dict(config.options)
    if config.backend == "hf":
        from workbench.rollout.hf_engine import HFEngine

        return HFEngine(**options)
    if config.tp > 1:
        _form_world(config)
    from workbench.rollout.vllm_engine import VLLMEngine

    return VLLMEngine(**options, tp=config.tp)


def _form_world(config: HostConfig) -> None:
    """The gloo world of one tensor-parallel engine."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", config.store_port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=dist.PrefixStore(config.store_prefix, store), rank=config.tp_rank, world_size=config.tp)


def main(config: HostConfig, fds: list[int]) -> None:
    """Entry of the process; descriptor: the driver's channel."""
    faulthandler.enable()  # a crash in native code then leaves its stack in the log
    host = _Host(config, socket.socket(fileno=fds[0]))
    host.start()
    sys.stdout.flush()
    host.serve()
