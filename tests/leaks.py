"""What a test may not leave behind: child processes, files in shared memory, files in the temporary folder, open figures."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
KEPT_IN_TEMP = ("pymp-", "torchinductor_", "pytest-of-")  # the socket of a fork server that stays; caches; pytest's own
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Belongings:
    """What there is at one time: pids of our descendants, names in shared memory, names in our temporary folder."""

    pids: frozenset[int]
    shared: frozenset[str]
    temporary: frozenset[str]

    @classmethod
    def now(cls) -> Belongings:
        return cls(
            pids=frozenset(p.pid for p in psutil.Process().children(recursive=True)),
            shared=frozenset(os.listdir(SHARED_MEMORY)),
            temporary=frozenset(os.listdir(tempfile.gettempdir())),
        )


def adopt_orphans() -> None:
    """Orphans of this process come to it instead of init, so that they are seen."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def own_temporary_folder() -> str:
    """Make a folder for `tempfile` of this process and its children, removed at the end; its path, short enough for sockets in it."""
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    folder = tempfile.mkdtemp(prefix="wbt-")
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-200)  # after multiprocessing's own, which needs it and has -100
    return folder


def left_since(before: Belongings, *, wait_s: float = 5.0) -> list[str]:
    """What is new since `before` and does not go away within `wait_s`, a line each; [] when all is clean."""
    deadline = time.monotonic() + wait_s
    while True:
        left = new_processes(before.pids) + _new_shared_memory(before) + _new_temporary(before)
        if not left or time.monotonic() > deadline:
            return left
        gc.collect()  # an exception that the test caught may hold frames, and they a queue or a file
        time.sleep(0.1)


def close_figures() -> None:
    """Close pyplot's figures, if a test loaded pyplot."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close("all")


def own_fork_server() -> psutil.Process:
    """The process that forks this one's ranks."""
    return next(p for p in psutil.Process().children() if "forkserver" in command_of(p))


def new_processes(known: Collection[int]) -> list[str]:
    """Descendants with other pids than `known`, a line each; helpers of this very process and what has ended are left out."""
    new = [p for p in psutil.Process().children(recursive=True) if p.pid not in known]
    return [f"process {p.pid}: {command_of(p)[:120]}" for p in new if not _is_helper(p)]


def _is_helper(process: psutil.Process) -> bool:
    """A fork server or resource tracker of this very process, or one that has ended; what a fork server made is no helper."""
    try:
        command = command_of(process)
        return not command or process.ppid() == os.getpid() and ("forkserver" in command or "resource_tracker" in command)
    except psutil.Error:
        return True


def command_of(process: psutil.Process) -> str:
    """Its command line; "" when it has ended, even where nobody has asked for its exit code yet: orphans that came here stay so."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _new_shared_memory(before: Belongings) -> list[str]:
    new = sorted(set(os.listdir(SHARED_MEMORY)) - before.shared)
    foreign = _mapped_elsewhere() if new else set()
    return [f"shared memory {SHARED_MEMORY / name}" for name in new if _inode(SHARED_MEMORY / name) not in foreign | {0}]


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _mapped_elsewhere() -> set[int]:
    """Inodes in shared memory that processes other than ours and our descendants map: another program's work on the same machine.

    Inodes, since a semaphore is mapped under a first name that is gone by the time it has its own.
    """
    own = {os.getpid(), *(p.pid for p in psutil.Process().children(recursive=True))}
    inodes: set[int] = set()
    for pid in set(psutil.pids()) - own:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            continue
        inodes |= {int(line.split(maxsplit=5)[4]) for line in lines if f" {SHARED_MEMORY}/" in line}
    return inodes


def _new_temporary(before: Belongings) -> list[str]:
    folder = tempfile.gettempdir()
    new = set(os.listdir(folder)) - before.temporary
    return [f"temporary file {os.path.join(folder, name)}" for name in sorted(new) if not name.startswith(KEPT_IN_TEMP)]
