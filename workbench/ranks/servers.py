"""The driver's end of fork servers: started once per driver and kind, kept warm, ended with the driver.

A server of our own, not the one of `multiprocessing`, which belongs to the user. Knows how to start processes with descriptors and to
hear of their end. Does not know what they do."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from workbench.errors import LaunchError
from workbench.postponing import interrupts_postponed
from workbench.ranks.forkserver import Exited, Leave, Spawn, Spawned, read_frame, write_frame

__all__ = ["ForkServer", "describe_exit", "fork_server", "server_of_ranks"]

_RANKS_NEED = ("workbench.ranks.rank", "workbench.ranks.forming", "cloudpickle", "numpy.random")  # the last: numpy loads it late, in 30 ms

# read when a library is loaded, so a server that runs already cannot take them over
_LOAD_TIME_NAMES = ("LD_PRELOAD", "LD_LIBRARY_PATH", "MALLOC_", "KMP_", "OMP_", "GOMP_", "MKL_", "PYTHON", "CUDA_VISIBLE_DEVICES")
_START_LIMIT_S = 120.0
_COMMAND = (
    "import sys; from workbench.ranks.forkserver import main; main(sys.argv[1:])"  # not -m: records must be of the module, not of __main__
)

_servers: dict[tuple[Any, ...], ForkServer] = {}  # one a kind for the life of the driver
_servers_lock = threading.Lock()


class ForkServer:
    """One server process; children are made by `spawn`."""

    def __init__(self, preload: Sequence[str], extra: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        self._sock = ours
        self._log = tempfile.TemporaryFile()
        # idle OpenMP threads sleep: long spinning, the default, starves ranks and engines of a small box (25 times slower under load).
        # A short spin bridges the gap to the next operation: as fast as the default on idle cores
        waiting = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "4000"}
        environment = {**waiting, **os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **extra}
        environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND, str(theirs.fileno()), str(os.getpid()), *preload],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env=environment,
        )
        theirs.close()
        self._lock = threading.Lock()
        self._spawned: SimpleQueue[Spawned | None] = SimpleQueue()
        self._tickets = itertools.count(1)
        self._abandoned: set[int] = set()  # requests whose caller was interrupted; what they start is killed
        self._watchers: dict[int, Callable[[int], None]] = {}
        self._ended: dict[int, int] = {}
        self._watch_lock = threading.Lock()
        self._listener = threading.Thread(target=self._listen, name="workbench-server", daemon=True)
        self._listener.start()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def spawn(self, entry: str, config: Any, *, fds: Sequence[int], environment: dict[str, str], on_exit: Callable[[int], None]) -> int:
        """Fork a child.

        Args:
            entry: "module:function", called in the child with (config, descriptors).
            fds: stdout, stderr, then those that the entry is given.
            on_exit: called once, from a thread, with the status that os.waitpid gave.

        Returns:
            The child's pid.

        Raises:
            LaunchError: the server ended, or could not fork.
        """
        request = Spawn(
            ticket=next(self._tickets),
            entry=entry,
            config=config,
            environment=environment,
            folder=os.getcwd(),
            path=tuple(p or os.getcwd() for p in sys.path),
            num_fds=len(fds),
        )
        with self._lock:
            try:
                with interrupts_postponed():
                    write_frame(self._sock, request, list(fds))
                answer = self._answer(request.ticket)
            except (OSError, Empty) as error:
                raise LaunchError(self._failure(repr(error))) from error
            except BaseException:
                self._abandoned.add(request.ticket)
                raise
        if answer is None or answer.error:
            raise LaunchError(self._failure(answer.error if answer else "it ended"))
        self._watch(answer.pid, on_exit)
        return answer.pid

    def _answer(self, ticket: int) -> Spawned | None:
        """The answer to a request, past those that nobody waits for any more; None when the server has ended."""
        while True:
            answer = self._spawned.get(timeout=_START_LIMIT_S)
            if answer is None or answer.ticket in (ticket, 0):
                return answer
            self._kill(answer)

    def _kill(self, unwanted: Spawned) -> None:
        """End what an interrupted request has started: a child of our server, so its pid is its own until its end was told."""
        if unwanted.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(unwanted.pid, signal.SIGKILL)
            self._watch(unwanted.pid, lambda status: None)

    def close(self) -> None:
        """End the server and all its children."""
        with contextlib.suppress(OSError):
            write_frame(self._sock, Leave())
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes our thread too, which closing alone does not
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(5)
        self._sock.close()
        self._log.close()

    def _watch(self, pid: int, on_exit: Callable[[int], None]) -> None:
        with self._watch_lock:
            if pid not in self._ended:
                self._watchers[pid] = on_exit
                return
            status = self._ended.pop(pid)
        on_exit(status)

    def _listen(self) -> None:
        while True:
            try:
                frame = read_frame(self._sock)
            except OSError:
                frame = None
            if frame is None:
                break
            record = frame[0]
            if isinstance(record, Spawned) and record.ticket in self._abandoned:
                self._kill(record)
            elif isinstance(record, Spawned):
                self._spawned.put(record)
            elif isinstance(record, Exited):
                self._tell(record.pid, record.status)
        self._spawned.put(None)
        for pid in list(self._watchers):
            self._tell(pid, signal.SIGKILL)  # our children get that signal when the server ends

    def _tell(self, pid: int, status: int) -> None:
        with self._watch_lock:
            watcher = self._watchers.pop(pid, None)
            if watcher is None:
                self._ended[pid] = status
        if watcher is not None:
            watcher(status)

    def _failure(self, cause: str) -> str:
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip()
        return (
            f"a process could not be started: {cause}\nthe fork server (pid {self._process.pid}) said: {said[-2000:] or 'nothing'}\n"
            "check the memory and process limits of this machine (ulimit -u), or launch with start_method='spawn'"
        )


def fork_server(preload: Sequence[str], extra: Mapping[str, str] | None = None) -> ForkServer:
    """The warm server for these imports and this environment; started on first use.

    Args:
        extra: environment of the server itself, for what libraries read when imported.
    """
    names = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(_LOAD_TIME_NAMES)))
    key = (os.getpid(), tuple(preload), sys.executable, names, tuple(sorted((extra or {}).items())))
    with _servers_lock:
        server = _servers.get(key)
        if server is None or not server.is_alive:
            server = _servers[key] = ForkServer(preload, extra or {})
        return server


def server_of_ranks(start_method: str = "forkserver") -> ForkServer:
    """The one that forks ranks; with "spawn" it imports nothing, and each rank all for itself."""
    return fork_server(_RANKS_NEED if start_method == "forkserver" else ())


@atexit.register
def _close_servers() -> None:
    for key, server in list(_servers.items()):
        if key[0] == os.getpid():  # those of a parent are not ours
            server.close()


def describe_exit(status: int) -> tuple[int, str | None, str]:
    """Exit code, signal name and likely cause of a waitpid status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name
        causes = {
            "SIGKILL": "killed from outside: by the kernel when memory ran out, or by a kill -9",
            "SIGSEGV": "a crash in native code",
            "SIGABRT": "native code gave up (abort)",
            "SIGBUS": "a memory error, such as a full /dev/shm",
            "SIGTERM": "asked to end from outside",
        }
        return -number, name, causes.get(name, "ended by a signal")
    code = os.waitstatus_to_exitcode(status)
    return code, None, "the code called os._exit or exit" if code else "it ended by itself"
