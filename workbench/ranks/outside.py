"""A rank's process as seen from outside, without its help: paused, swapped out, computing; its native stack where py-spy may look.

Knows /proc and py-spy. Does not know collectives.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["NativeLook", "ProcessLook", "find_py_spy", "look_at"]

_GIB = 2**30
_MUCH_SWAPPED_BYTES = 2**26  # less is the ordinary tidying of an idle system
_MOST_FRAMES = 16
_PY_SPY_LIMIT_S = 10.0
_HERE = str(Path(__file__).parent)
_NUMBERS = ("VmRSS", "VmSwap", "TracerPid")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLook:
    """One process at one moment.

    Attributes:
        state: of its main thread, as in /proc: "R" runs, "S" sleeps, "D" waits for a disk, "T" is paused.
        rss_bytes, swap_bytes: its memory that is resident, and that is swapped out.
    """

    state: str
    rss_bytes: int = 0
    swap_bytes: int = 0

    @property
    def is_paused(self) -> bool:
        return self.state in ("T", "t")

    @property
    def is_computing(self) -> bool:
        return self.state == "R"

    @property
    def trouble(self) -> str:
        """What keeps it from going on, whatever it does; "" where nothing does."""
        if self.is_paused:
            return "is paused (SIGSTOP, or a debugger holds it); kill -CONT lets it go on"
        if self.swap_bytes > max(_MUCH_SWAPPED_BYTES, self.rss_bytes):
            size = self.swap_bytes + self.rss_bytes
            return f"is swapped out ({self.swap_bytes / _GIB:.1f} of its {size / _GIB:.1f} GiB): the machine is short of memory"
        return "waits for a disk, or for memory to come back from one" if self.state == "D" else ""

    @property
    def doing(self) -> str:
        return "is computing" if self.is_computing else "sleeps, or waits for something that is no collective"


def look_at(pid: int) -> ProcessLook | None:
    """The process now; None when it is gone."""
    try:
        # the name stands in brackets and may hold spaces and brackets itself
        state = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (OSError, IndexError):
        return None
    numbers = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if name in _NUMBERS}
    if state == "t" and _is_child(numbers.get("TracerPid", 0)):
        state = "S"  # held for a moment by our own reading of its stack
    return ProcessLook(state=state, rss_bytes=numbers.get("VmRSS", 0) * 1024, swap_bytes=numbers.get("VmSwap", 0) * 1024)


def _is_child(pid: int) -> bool:
    """Whether this process started that one."""
    try:
        return f"\nPPid:\t{os.getpid()}\n" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _is_half_stopped(pid: int) -> bool:
    """Whether some of its threads stand still, which nobody asks for: a pause stops all."""
    states = set()
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError, IndexError):
            states.add(task.read_text().rpartition(")")[2].split()[0])
    return "T" in states and len(states) > 1


def find_py_spy() -> str | None:
    """The py-spy of this environment, or the one on the PATH."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy")


class NativeLook:
    """Reads the innermost frames of a process's main thread, C ones too, in a thread of its own: it may take seconds.

    py-spy holds a process while it reads. A signal that comes meanwhile can leave it, or threads of it, stopped: SIGCONT then has to come
    once more.

    Attributes:
        text: a line a frame; "" until it is read, with no py-spy, or where that may not look.
        before: the process before py-spy held it.
        is_to_go_on: the process was sent SIGCONT meanwhile.
    """

    def __init__(self, pid: int) -> None:
        self.text = ""
        self.is_to_go_on = False
        self.before = look_at(pid)
        self._pid = pid
        self._thread = threading.Thread(target=self._read, name="workbench-py-spy", daemon=True)
        self._thread.start()

    @property
    def is_reading(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join(_PY_SPY_LIMIT_S + 1)

    def _read(self) -> None:
        program = find_py_spy()
        if program is None or (self.before is not None and self.before.is_paused):
            return  # py-spy gives up on a process that stands still, and may leave threads of it so
        command = [program, "dump", "--native", "--json", "--pid", str(self._pid)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_PY_SPY_LIMIT_S, stdin=subprocess.DEVNULL)
            threads: list[dict[str, Any]] = json.loads(done.stdout) if done.returncode == 0 else []
        except (OSError, subprocess.TimeoutExpired, ValueError):
            return
        finally:
            if self.is_to_go_on or _is_half_stopped(self._pid):
                with suppress(OSError):
                    os.kill(self._pid, signal.SIGCONT)
        frames: list[dict[str, Any]] = next((thread["frames"] for thread in threads if thread.get("thread_name") == "MainThread"), [])
        ours = next((place for place, frame in enumerate(frames) if frame["filename"].startswith(_HERE)), 0)
        frames = frames[: ours or len(frames)]  # what called the cell is of no interest
        self.text = "\n".join(f"{f['name']} ({f.get('short_filename') or f['filename']}:{f['line']})" for f in frames[:_MOST_FRAMES])
