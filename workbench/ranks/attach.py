"""`workbench attach RANK`: ask a live rank from a shell: run Python in its names while it is idle, look at its stack while it runs.

Finds clusters of this user by the journals in their private folders. Knows the door. Does not know what runs behind it.
"""

from __future__ import annotations

import argparse
import codeop
import contextlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.ranks.door import SOCKET, TOKEN, ask

__all__ = ["LiveCluster", "connect", "find_cluster", "live_clusters", "main"]

_CONNECT_S = 5.0
_HELP = """\
Python runs in the rank's names, one cell at a time; Ctrl-C stops it.
  :where            its stack, while it runs
  :locals [N]       names of the frame N steps above the innermost (0)
  :diagnose         who waits for whom
  :status           all ranks
  :quit             or Ctrl-D"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCluster:
    """A cluster whose driver lives, by its private folder."""

    folder: Path
    driver_pid: int


def live_clusters(root: Path | None = None) -> list[LiveCluster]:
    """Clusters of this user that are up on this machine, the newest last."""
    import psutil

    found: list[tuple[float, LiveCluster]] = []
    for folder in (root or Path(tempfile.gettempdir())).glob("workbench-*"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, psutil.Error):
            held = folder.stat()
            driver = json.loads((folder / "owner.json").read_text())["driver"]
            process = psutil.Process(int(driver["pid"]))
            is_same = abs(process.create_time() - driver["started"]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
            if held.st_uid == os.getuid() and is_same and (folder / SOCKET).exists():
                found.append((held.st_ctime, LiveCluster(folder=folder, driver_pid=process.pid)))
    return [cluster for _, cluster in sorted(found, key=lambda item: item[0])]


def find_cluster(pid: int | None) -> LiveCluster:
    """The one cluster that is up, or the newest of a driver.

    Raises:
        WorkbenchError: there is none, or several drivers have one and none was named.
    """
    clusters = live_clusters()
    of_driver = [cluster for cluster in clusters if pid is None or cluster.driver_pid == pid]
    drivers = sorted({cluster.driver_pid for cluster in of_driver})
    if not of_driver:
        others = ", ".join(str(cluster.driver_pid) for cluster in clusters) or "no driver"
        raise WorkbenchError(
            f"no cluster of yours is up{'' if pid is None else f' in process {pid}'}\n"
            f"looked in {tempfile.gettempdir()}; {others} has one there\nlaunch one, or set TMPDIR as it is for the driver"
        )
    if len(drivers) > 1:
        raise WorkbenchError(
            f"{len(drivers)} drivers have a cluster: {', '.join(map(str, drivers))}\none must be named\nchoose: --pid {drivers[-1]}"
        )
    return of_driver[-1]


@contextmanager
def connect(cluster: LiveCluster, *, timeout_s: float | None = None) -> Iterator[Callable[..., dict[str, Any]]]:
    """A way to ask a cluster's door.

    Args:
        timeout_s: the longest wait for an answer; a driver that is paused, or in native code, gives none.

    Raises:
        WorkbenchError: it does not answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.settimeout(_CONNECT_S)
            sock.connect(str(cluster.folder / SOCKET))
            sock.sendall((cluster.folder / TOKEN).read_bytes())
            sock.settimeout(timeout_s)
        except OSError as error:
            raise WorkbenchError(
                f"the driver {cluster.driver_pid} does not answer: {error}\nits socket is {cluster.folder / SOCKET}\n"
                "it has just ended, or is stopped"
            ) from error

        def asks(**question: Any) -> dict[str, Any]:
            try:
                return ask(sock, **question)
            except TimeoutError as error:
                raise WorkbenchError(
                    f"the driver {cluster.driver_pid} gave no answer within {timeout_s:g} s\n"
                    "it is paused, or runs native code that lets no other thread run\n"
                    f"py-spy dump --pid {cluster.driver_pid} shows where it is"
                ) from error
            except OSError as error:
                raise WorkbenchError(
                    f"the driver {cluster.driver_pid} hung up: {error}\nit has ended, or another user runs it\nattach again"
                ) from error

        yield asks


class _Shell:
    """What is typed, asked of one rank."""

    def __init__(self, rank: int, asks: Callable[..., dict[str, Any]]) -> None:
        self._rank = rank
        self._asks = asks

    def perform(self, line: str) -> bool:
        """Run a line; False where it failed."""
        if not line.startswith(":"):
            return self._run(line)
        verb, _, rest = line[1:].partition(" ")
        verbs: dict[str, Callable[[], bool]] = {
            "where": self._where,
            "locals": lambda: self._locals(rest),
            "diagnose": lambda: self._tell(self._asks(verb="diagnose"), "text"),
            "status": self._status,
            "help": lambda: _said(_HELP),
        }
        return verbs[verb]() if verb in verbs else not _said(f":{verb} is no command\n{_HELP}")

    def _run(self, source: str) -> bool:
        answer = self._asks(verb="run", rank=self._rank, source=source)
        if "busy" in answer:
            return not _said(f"{answer['busy']}\nwhile it runs it can be looked at only: :where, :locals, :diagnose")
        sys.stdout.write(answer.get("stdout", ""))
        sys.stderr.write(answer.get("stderr", ""))
        return self._tell(answer, "result")

    def _where(self) -> bool:
        return self._tell(self._asks(verb="look", rank=self._rank), "stack", otherwise="the rank is idle")

    def _locals(self, rest: str) -> bool:
        answer = self._asks(verb="look", rank=self._rank)
        frames = answer.get("frames", [])
        depth = int(rest) if rest.strip().isdigit() else 0
        if "error" in answer or not frames:
            return self._tell(answer, "stack", otherwise="the rank is idle: type a name to see it")
        place, names = frames[::-1][min(depth, len(frames) - 1)]
        return _said("\n".join([place, *(f"  {name} = {value}" for name, value in names.items())]))

    def _status(self) -> bool:
        answer = self._asks(verb="status")
        lines = [f"  rank {s['rank']} (pid {s['pid']}): {s['state']} {s['waits_in']}".rstrip() for s in answer.get("ranks", [])]
        return _said("\n".join([answer.get("cluster", ""), *lines]))

    def _tell(self, answer: dict[str, Any], key: str, otherwise: str = "") -> bool:
        if "error" in answer:
            print(answer["error"], file=sys.stderr)
            return False
        return _said(answer.get(key, "") or otherwise)


def _said(text: str) -> bool:
    if text:
        print(text.rstrip())
    return True


def _read_source(prompt: str) -> str | None:
    """What was typed, over several lines where Python needs them; None at the end."""
    lines: list[str] = []
    while True:
        try:
            lines.append(input("... " if lines else prompt))
        except EOFError:
            print()
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            print()
            return ""
        source = "\n".join(lines)
        try:
            if source.startswith(":") or codeop.compile_command(source, symbol="exec") is not None and _is_whole(lines):
                return source
        except (SyntaxError, ValueError, OverflowError):
            return source  # the rank tells what is wrong with it


def _is_whole(lines: Sequence[str]) -> bool:
    """A block ends with an empty line."""
    return len(lines) == 1 and not lines[0].rstrip().endswith(":") or not lines[-1].strip()


def _talk(cluster: LiveCluster, rank: int) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    print(f"rank {rank} of the cluster of process {cluster.driver_pid}; :help")
    while (source := _read_source(f"rank {rank}> ")) is not None and source not in (":quit", ":q"):
        if source.strip():
            with connect(cluster) as asks:  # a connection a question: to hang up is to stop it
                try:
                    _Shell(rank, asks).perform(source)
                except KeyboardInterrupt:
                    print("stopped", file=sys.stderr)
    return 0


def main(argv: Sequence[str]) -> int:
    """`workbench attach RANK [--pid DRIVER] [-c SOURCE]`."""
    parser = argparse.ArgumentParser(prog="workbench attach", description="Ask a live rank of a cluster that another process has launched.")
    parser.add_argument("rank", type=int)
    parser.add_argument("--pid", type=int, help="of the driver: the notebook's kernel, or the script")
    parser.add_argument("-c", dest="source", metavar="SOURCE", help="run this and leave; exit code 1 where it fails or the rank is busy")
    arguments = parser.parse_args(argv)
    cluster = find_cluster(arguments.pid)
    with connect(cluster) as asks:
        ranks = [status["rank"] for status in asks(verb="status").get("ranks", [])]
        if arguments.rank not in ranks:
            raise WorkbenchError(
                f"the cluster of process {cluster.driver_pid} has no rank {arguments.rank}\n"
                f"it has ranks 0 to {len(ranks) - 1}\nchoose one of them"
            )
        if arguments.source is not None:
            return int(not _Shell(arguments.rank, asks).perform(arguments.source))
    return _talk(cluster, arguments.rank)
