"""A way into a cluster from a shell of the same user: a unix socket in the cluster's private folder.

    shell --token, then a JSON line--> door: status, diagnose, look, run --> a JSON line

Only who can read the folder (0700) finds the token, the system says whose process connects, and nothing but JSON is read, so nothing of a
stranger's is unpickled. Knows the cluster by a weak reference: letting go of one still ends it.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import select
import socket
import struct
import threading
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import ClusterBusy, WorkbenchError

if TYPE_CHECKING:
    from workbench.ranks.cluster import Cluster

__all__ = ["Door", "SOCKET", "TOKEN", "ask"]

SOCKET, TOKEN = "door.sock", "door.token"
_TOKEN_BYTES = 64  # hex digits
_LONGEST_LINE = 1 << 20
_HANDSHAKE_S = 5.0
_CRED = struct.Struct("3i")


class Door:
    """Serves one cluster's socket from a thread, and each caller from another."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self._cluster = weakref.ref(cluster)
        self._token = secrets.token_hex(_TOKEN_BYTES // 2).encode()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(str(folder / SOCKET))
        except OSError:  # the folder's path is longer than a socket's may be: the cluster works all the same
            self._listener.close()
            return
        descriptor = os.open(folder / TOKEN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(self._token)
        self._listener.listen(8)
        threading.Thread(target=self._serve, name="workbench-door", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closing alone does not
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._welcome, args=(sock,), name="workbench-caller", daemon=True).start()

    def _welcome(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, ValueError):
            sock.settimeout(_HANDSHAKE_S)
            _, uid, _ = _CRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CRED.size))
            if uid != os.getuid() or not hmac.compare_digest(_receive(sock, _TOKEN_BYTES), self._token):
                return
            sock.settimeout(None)
            with sock.makefile("rb") as lines:
                while line := lines.readline(_LONGEST_LINE):
                    answer = self._answer(sock, json.loads(line))
                    sock.sendall(json.dumps(answer).encode() + b"\n")

    def _answer(self, sock: socket.socket, asked: dict[str, Any]) -> dict[str, Any]:
        cluster = self._cluster()
        if cluster is None or cluster.is_closed:
            return {"error": "the cluster is closed"}
        verbs: dict[str, Callable[[], dict[str, Any]]] = {
            "status": lambda: {"ranks": [asdict(status) for status in cluster.status()], "cluster": repr(cluster)},
            "diagnose": lambda: {"text": str(cluster.diagnose(native=True if asked.get("native") else None))},
            "look": lambda: _look(cluster, int(asked["rank"])),
            "run": lambda: _run(cluster, int(asked["rank"]), str(asked["source"]), sock),
        }
        verb = asked.get("verb")
        if verb not in verbs:
            return {"error": f"{verb!r} cannot be asked; it must be one of {', '.join(verbs)}"}
        try:
            return verbs[verb]()
        except ClusterBusy as error:
            return {"busy": str(error).partition("\n")[0]}
        except (WorkbenchError, SyntaxError, ValueError) as error:
            return {"error": str(error)}


def _look(cluster: Cluster, rank: int) -> dict[str, Any]:
    """Where a rank that runs is, with the names of its frames."""
    seen = cluster.look(rank)
    if seen is None:
        return {"error": f"rank {rank} does not answer: it is dead, or native code lets none of its threads run"}
    return {"line": seen.line, "source": seen.source, "stack": seen.stack, "frames": [list(frame) for frame in seen.frames]}


def _run(cluster: Cluster, rank: int, source: str, sock: socket.socket) -> dict[str, Any]:
    """Run a cell on one rank; a caller that hangs up, or says anything meanwhile, stops it."""
    handle = cluster.execute(source, ranks=rank, block=False, on_output=lambda *_: None)
    while not handle.wait(0.05):
        if select.select([sock], [], [], 0)[0]:
            handle.cancel()
            handle.wait(15.0)
    output = handle.result(timeout_s=0)[rank]
    return {"stdout": output.stdout, "stderr": output.stderr, "result": output.result_text}


def ask(sock: socket.socket, **question: Any) -> dict[str, Any]:
    """From the shell: one question, one answer.

    Raises:
        ConnectionError: the driver hung up.
    """
    sock.sendall(json.dumps(question).encode() + b"\n")
    data = b""
    while not data.endswith(b"\n"):
        piece = sock.recv(1 << 16)
        if not piece:
            raise ConnectionError("the driver hung up")
        data += piece
    answer: dict[str, Any] = json.loads(data)
    return answer


def _receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := sock.recv(size - len(data))):
        data += piece
    return data
