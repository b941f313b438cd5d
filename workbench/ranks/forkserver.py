"""A fork server: a process that has imported what children need, and forks one for each request.

    driver --(socket pair: Spawn + descriptors)--> server --fork--> child: environment, descriptors 0-2, entry(config, fds)
    driver <--(Spawned pid, Exited pid status)---- server

Run as `main([FD, DRIVER, MODULE...])`. It only imports and forks: one large torch operation here and a child's first would hang in libgomp.
It forks from its main thread (parent-death signals follow the thread), has no other thread by then, reaps its children with all that they
started in their sessions, and ends all of them and itself when the driver's end closes. Knows processes. Does not know what the children
do."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import glob
import importlib
import json
import os
import pickle
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil

__all__ = ["FOLDER_VARIABLE", "Exited", "Spawn", "Spawned", "import_at_once", "main", "read_frame", "write_frame"]

_SIZE = struct.Struct("<Q")
_MAX_FDS = 16
FOLDER_VARIABLE = "WORKBENCH_FOLDER"  # names a child's cluster folder, which ends with the driver
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PTRACER = 0x59616D61
_ORPHANED_WITHIN_S = 1.0
_TRACKER = "multiprocessing.resource_tracker"
_libc = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawn:
    """Fork a child; descriptors that travel with it: stdout, stderr, then those that the entry is given.

    Attributes:
        entry: "module:function", called with (config, fds).
        ticket: comes back with the answer: a driver that was interrupted no longer waits for it.
    """

    ticket: int
    entry: str
    config: Any
    environment: dict[str, str]
    folder: str
    path: tuple[str, ...]
    num_fds: int


@dataclass(frozen=True, slots=True)
class Leave:
    """The driver lets go of the server on purpose, and looks after its folders itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawned:
    """The answer; ticket 0 stands for every request: the server cannot serve any."""

    pid: int
    error: str = ""
    ticket: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """A child ended; `status` as os.waitpid gives it."""

    pid: int
    status: int


def write_frame(sock: socket.socket, record: Any, fds: list[int] | None = None) -> None:
    """Send one record; descriptors ride on its first bytes."""
    data = pickle.dumps(record)
    head = _SIZE.pack(len(data))
    if fds:
        socket.send_fds(sock, [head], fds)
    else:
        sock.sendall(head)
    sock.sendall(data)


def read_frame(sock: socket.socket) -> tuple[Any, list[int]] | None:
    """One record and its descriptors; None at end of file."""
    head, fds, _, _ = socket.recv_fds(sock, _SIZE.size, _MAX_FDS)
    if not head:
        return None
    head += _read(sock, _SIZE.size - len(head))
    return pickle.loads(_read(sock, _SIZE.unpack(head)[0])), fds


def _read(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise ConnectionError("the other end closed inside a record")
        data += piece
    return bytes(data)


def import_at_once(*modules: str) -> None:
    """Import without the garbage collector, which otherwise looks through all of torch several times: a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        for name in modules:
            importlib.import_module(name)
    finally:
        if was_on:
            gc.enable()


class _Watch:
    """While the server imports, which takes seconds: ends it when the driver goes. Its thread is gone before the first fork."""

    def __init__(self, sock: socket.socket, driver: int) -> None:
        self._reading, self._writing = os.pipe()
        self._thread = threading.Thread(target=self._wait, args=(sock, driver), daemon=True)
        self._thread.start()

    def _wait(self, sock: socket.socket, driver: int) -> None:
        poll = select.poll()
        poll.register(sock, select.POLLRDHUP)  # not what is asked: that waits
        poll.register(self._reading, select.POLLIN)
        if any(fd == sock.fileno() for fd, _ in poll.poll()):
            _remove_folders_of(driver)
            os._exit(0)

    def end(self) -> None:
        os.write(self._writing, b"x")
        self._thread.join()
        os.close(self._reading)
        os.close(self._writing)


def _remove_folders_of(driver: int) -> None:
    """Remove private folders of a driver that was killed; those of one that lives are its own affair."""
    limit = time.monotonic() + _ORPHANED_WITHIN_S
    while os.getppid() == driver:  # a process closes its sockets a moment before it is gone
        if time.monotonic() > limit:
            return
        time.sleep(0.01)
    for journal in glob.glob(os.path.join(tempfile.gettempdir(), "workbench-*", "owner.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(journal, encoding="utf-8") as file:
            if json.load(file)["driver"]["pid"] == driver:
                shutil.rmtree(os.path.dirname(journal), ignore_errors=True)


class _Server:
    def __init__(self, sock: socket.socket, driver: int) -> None:
        self.sock = sock
        self.driver = driver
        self.is_let_go = False
        self.children: set[int] = set()
        self.folders: set[str] = set()  # of clusters whose ranks were started here
        self.wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # in a container the first process may be none that reaps

    def serve(self) -> None:
        try:
            while True:
                ready, _, _ = select.select([self.sock.fileno(), self.wake_read], [], [])
                if self.wake_read in ready:
                    os.read(self.wake_read, 4096)
                    self.reap()
                if self.sock.fileno() in ready:
                    request = read_frame(self.sock)
                    self.is_let_go = request is not None and isinstance(request[0], Leave)
                    if request is None or self.is_let_go:
                        return
                    self.spawn(*request)
        except (ConnectionError, BrokenPipeError):
            return
        finally:
            self.end()

    def spawn(self, request: Spawn, fds: list[int]) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            write_frame(self.sock, Spawned(pid=0, error=f"{error}: no process could be made", ticket=request.ticket))
            pid = -1
        if pid == 0:
            _child(self, request, fds)
        for fd in fds:
            os.close(fd)
        if pid > 0:
            self.children.add(pid)
            self.folders |= {request.environment[FOLDER_VARIABLE]} if FOLDER_VARIABLE in request.environment else set()
            write_frame(self.sock, Spawned(pid=pid, ticket=request.ticket))

    def reap(self) -> None:
        """Take leave of children that have ended, and of what those had started and left to us."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                pid = ended.si_pid
                if pid in self.children:
                    _end_session(pid)
                status = os.waitpid(pid, 0)[1]
                if pid in self.children:
                    self.children.discard(pid)
                    write_frame(self.sock, Exited(pid=pid, status=status))

    def end(self) -> None:
        """The driver is gone: so are we, and all that we started."""
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
        for pid in self.children:
            _end_session(pid)
            os.waitpid(pid, 0)
        for folder in self.folders:  # gone already unless the driver was killed
            shutil.rmtree(folder, ignore_errors=True)
        if not self.is_let_go:
            _remove_folders_of(self.driver)


def _end_session(leader: int) -> None:
    """End what a child of ours has started (loader workers, programs), while the child's number is still its own: before it is reaped.

    Python's trackers are left to end by themselves, once all they track for are gone: they remove the shared memory that those left.
    """
    ended: set[int] = set()
    while others := [process for process in _living(leader) if process.pid not in ended]:  # one may have forked since the look
        for process in others:
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile, or is another user's (sudo)
                process.kill()
        ended |= {process.pid for process in others}


def _living(session: int) -> Iterator[psutil.Process]:
    """Processes of a session that have not ended, but for trackers."""
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(pid) == session:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE and _TRACKER not in " ".join(process.cmdline()):
                    yield process


def _child(server: _Server, request: Spawn, fds: list[int]) -> None:
    """In the child: never returns."""
    code = 1
    try:
        parent = os.getppid()
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        _libc.prctl(_PR_SET_PTRACER, server.driver, 0, 0, 0)  # where Yama restricts that, the driver's py-spy may look at us all the same
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for fd in (server.sock.detach(), server.wake_read, server.wake_write):
            os.close(fd)
        _take_descriptors(fds[0], fds[1])
        os.environ.clear()
        os.environ.update(request.environment)
        os.chdir(request.folder)
        sys.path[:] = request.path
        module, _, function = request.entry.partition(":")
        getattr(importlib.import_module(module), function)(request.config, fds[2:])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)  # no destructors: a thread of a library may still run


def _take_descriptors(out: int, err: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for fd in (null, out, err):
        os.close(fd)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)


def main(argv: list[str]) -> None:
    sock, driver = socket.socket(fileno=int(argv[0])), int(argv[1])
    watch = _Watch(sock, driver)
    import_at_once(*argv[2:])
    watch.end()
    torch = sys.modules.get("torch")  # absent in a server that leaves the import to its children (spawn)
    if torch is not None and torch.cuda.is_initialized():
        write_frame(
            sock, Spawned(pid=0, error="importing made a CUDA context, which children cannot inherit: launch with start_method='spawn'")
        )
        return
    gc.freeze()  # children then do not touch (and so copy) the pages of what is imported
    _Server(sock, driver).serve()
