"""`workbench doctor`: what of ours was left behind, whether this machine will do, and who waits for whom in clusters that are up.

Every private folder of ours holds owner.json, the journal: the process that made it and its fork servers, by pid and start time. Only what
stands there is ours, and what carries the folder's name in its environment; a pid that was given to another process since has another
start time and is never touched. Knows folders, processes and limits. Does not know cells."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from workbench.errors import WorkbenchError
from workbench.ranks.forkserver import FOLDER_VARIABLE

__all__ = ["Check", "Leftover", "check_machine", "find_leftovers", "main", "own_folder", "remove", "write_owner"]

PREFIX = "workbench-"
_OWNER = "owner.json"
_GIB = 2**30
_ANSWER_LIMIT_S = 30.0  # native stacks of many ranks take seconds
_OPEN = """\
open on loopback: gloo and the TCPStore talk without passwords: who can log in to this machine can reach them,
  join the rendezvous of a group and read or change what it sends; where that matters, use a machine of your own
closed to others: control channels, engines, tapes, sessions and folders (0700, a token); objects that our own
  operations carry are signed"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """A folder of a cluster or engine whose process is gone, and processes of it that still live (pids)."""

    folder: Path
    driver_pid: int
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing looked at; `remedy` is "" where it is well."""

    what: str
    seen: str
    remedy: str = ""


def write_owner(folder: Path, server_pids: Sequence[int]) -> None:
    """Say in a folder who made it."""
    owner = {"driver": _identity(os.getpid()), "servers": [_identity(pid) for pid in server_pids]}
    (folder / _OWNER).write_text(json.dumps(owner))


def own_folder(kind: str) -> Path:
    """A private folder "workbench-KIND-..." for what this process keeps.

    In a rank or engine of a cluster it lies in the cluster's, which goes with the driver; elsewhere the doctor finds it once this process
    is gone.
    """
    cluster = os.environ.get(FOLDER_VARIABLE, "")
    if os.path.isdir(cluster):
        return Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=cluster))  # short: the paths of sockets in it are limited
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-"))
    write_owner(folder, [])
    return folder


def find_leftovers(root: Path | None = None) -> list[Leftover]:
    """Folders of ours whose driver is gone."""
    found = []
    for folder in sorted((root or Path(tempfile.gettempdir())).glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if folder.stat().st_uid != os.getuid():
                continue
            owner = json.loads((folder / _OWNER).read_text())
            if not _is_alive(owner["driver"]):
                alive = [one for one in owner["servers"] if _is_alive(one)]
                pids = sorted({*_with_children(alive), *_marked(folder)})
                found.append(Leftover(folder=folder, driver_pid=int(owner["driver"]["pid"]), pids=tuple(pids)))
    return found


def remove(leftover: Leftover) -> None:
    """End its processes and remove its folder."""
    processes = []
    for pid in leftover.pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            process.kill()
            processes.append(process)
    psutil.wait_procs(processes, timeout=3.0)
    shutil.rmtree(leftover.folder, ignore_errors=True)


def check_machine() -> list[Check]:
    """Look at what ranks and engines need."""
    checks: list[Callable[[], Check]] = [_loopback, _gloo, _ptrace, _shared_memory, _open_files, _memory, _disk]
    return [check() for check in checks]


def _identity(pid: int) -> dict[str, float]:
    return {"pid": pid, "started": psutil.Process(pid).create_time()}


def _is_alive(identity: dict[str, float]) -> bool:
    try:
        process = psutil.Process(int(identity["pid"]))
        return abs(process.create_time() - identity["started"]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _with_children(identities: Sequence[dict[str, float]]) -> tuple[int, ...]:
    pids: list[int] = []
    for identity in identities:
        process = psutil.Process(int(identity["pid"]))
        pids += [process.pid, *(child.pid for child in process.children(recursive=True))]
    return tuple(pids)


def _marked(folder: Path) -> Iterator[int]:
    """Processes that carry the mark of this cluster in their environment: what ranks had started, and nobody ended."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(FOLDER_VARIABLE) == str(folder):
                yield process.pid


def _loopback() -> Check:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=2.0):
            return Check(what="loopback", seen="127.0.0.1 answers")
    except OSError as error:
        return Check(what="loopback", seen=str(error), remedy="bring it up: ip link set lo up")


def _gloo() -> Check:
    from workbench.ranks.launch import launch

    try:
        with launch(2) as cluster:
            total = cluster.run(_sum, timeout_s=20.0)[0]
    except WorkbenchError as error:
        return Check(
            what="gloo",
            seen=str(error).splitlines()[0],
            remedy="see the text above; a firewall on lo or a memory limit are the usual causes",
        )
    return Check(what="gloo", seen=f"2 ranks added up to {total:.0f}")


def _sum() -> float:
    import torch
    import torch.distributed as dist

    value = torch.ones(1) + dist.get_rank()
    dist.all_reduce(value)
    return value.item()


def _ptrace() -> Check:
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):
        scope = 0
    if scope == 0 or os.getuid() == 0:
        return Check(what="native stacks (ptrace)", seen="allowed")
    if scope == 1:  # each process says who may look at it besides its ancestors
        return Check(what="native stacks (ptrace)", seen="yama ptrace_scope is 1: ranks and engines let their driver look")
    remedy = "Python stacks are shown all the same; for native ones: sysctl kernel.yama.ptrace_scope=0"
    return Check(what="native stacks (ptrace)", seen=f"yama ptrace_scope is {scope}", remedy=remedy)


def _shared_memory() -> Check:
    size = os.statvfs("/dev/shm")
    free = size.f_bavail * size.f_frsize
    remedy = "" if free >= 2**26 else "make it larger: mount -o remount,size=1G /dev/shm; in a container --shm-size=1g"
    return Check(what="shared memory", seen=f"{free / _GIB:.1f} GiB free in /dev/shm", remedy=remedy)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_enough = hard == resource.RLIM_INFINITY or hard >= 1024
    return Check(
        what="open files", seen=f"limit {soft}, at most {hard}", remedy="" if is_enough else "raise the hard limit: ulimit -Hn 4096"
    )


def _memory() -> Check:
    free = psutil.virtual_memory().available
    remedy = "" if free >= 2 * _GIB else "close something: an engine on a CPU needs about 1 GiB beside its model and KV cache"
    return Check(what="memory", seen=f"{free / _GIB:.1f} GiB available", remedy=remedy)


def _disk() -> Check:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    remedy = "" if free >= 2 * _GIB else "free some, or set TMPDIR to a larger disk: a sleeping engine keeps its weights there"
    return Check(what="disk", seen=f"{free / _GIB:.1f} GiB free under {folder}", remedy=remedy)


def main(argv: Sequence[str]) -> int:
    """`workbench doctor [--clean] [--attach [PID]]`: exit code 1 where something needs a remedy or was left behind."""
    parser = argparse.ArgumentParser(prog="workbench doctor", description="What was left behind, and whether this machine will do.")
    parser.add_argument("--clean", action="store_true", help="end leftover processes of ours and remove their folders")
    parser.add_argument(
        "--attach",
        nargs="?",
        type=int,
        const=0,
        metavar="PID",
        help="only tell who waits for whom in the clusters that are up: of the driver PID (a notebook's kernel, a script), or of all",
    )
    parser.add_argument("--native", action="store_true", help="with --attach: native stacks of all ranks that run (py-spy; seconds)")
    arguments = parser.parse_args(argv)
    if arguments.attach is not None:
        return _tell_live_clusters(arguments.attach or None, native=arguments.native)
    checks = check_machine()
    is_left = _tell(checks, is_cleaning=arguments.clean)
    return int(any(check.remedy for check in checks) or (is_left and not arguments.clean))


def _tell(checks: Sequence[Check], *, is_cleaning: bool) -> bool:
    """Print what was found; whether something of ours was left."""
    from rich.console import Console
    from rich.table import Table

    from workbench.ranks.attach import live_clusters

    console = Console()
    table = Table("looked at", "seen", "remedy", title="this machine")
    for check in checks:
        table.add_row(check.what, check.seen, check.remedy or "well")
    console.print(table)
    for cluster in live_clusters():
        console.print(f"up: the cluster of process {cluster.driver_pid}; workbench doctor --attach {cluster.driver_pid} looks into it")
    leftovers = find_leftovers()
    for leftover in leftovers:
        lives = f", processes {list(leftover.pids)}" if leftover.pids else ""
        console.print(f"left by process {leftover.driver_pid}: {leftover.folder}{lives}")
        if is_cleaning:
            remove(leftover)
    if leftovers:
        console.print("removed" if is_cleaning else "workbench doctor --clean removes them")
    else:
        console.print("nothing of ours was left behind")
    print(_OPEN)
    sys.stdout.flush()
    return bool(leftovers)


def _tell_live_clusters(pid: int | None, *, native: bool) -> int:
    """Print each cluster's ranks and who waits for whom; 1 where one does not answer.

    Raises:
        WorkbenchError: there is none.
    """
    from workbench.ranks.attach import connect, find_cluster, live_clusters

    code = 0
    for cluster in [find_cluster(pid)] if pid is not None else live_clusters() or [find_cluster(None)]:
        print(f"cluster of process {cluster.driver_pid}, {cluster.folder}")
        try:
            with connect(cluster, timeout_s=_ANSWER_LIMIT_S) as asks:
                status = asks(verb="status")
                print(status.get("cluster", status.get("error", "")))
                for rank in status.get("ranks", []):
                    in_cell = f"cell {rank['cell']} " if rank["cell"] is not None else ""
                    print(f"  rank {rank['rank']} (pid {rank['pid']}): {rank['state']} {in_cell}{rank['waits_in']}".rstrip())
                answer = asks(verb="diagnose", native=native)
                print(answer.get("text", answer.get("error", "")), flush=True)
        except WorkbenchError as error:
            print(error, file=sys.stderr)
            code = 1
    return code
