"""Memory of processes over time, read from outside them: the curve keeps moving while a rank is stuck.

Knows pids and the names they were given. Does not know cells, engines or spans: who runs a rollout or a live view tells it what to watch
and which phase it is.

The kernel walks every page of a process to tell its PSS: 30 ms of CPU for 1 GiB, 1 ms for an idle rank. Ten times a second that would slow
down what is watched. So readings of PSS take at most 1 % of one core (`MAX_LOAD`), all samplers of this process share them, and between
two readings PSS moves with RSS, which costs 20 microseconds; the next reading puts right what sharing changed meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import psutil

from workbench.records import MemorySample

__all__ = ["DeviceMemory", "MemorySampler", "NvmlMemory", "read_held_bytes", "read_pss_bytes"]


def read_pss_bytes(pid: int) -> int:
    """Proportional memory of a process, bytes; 0 where the kernel does not let us read it or the process is gone.

    Source: Linux, Documentation/filesystems/proc.rst, smaps_rollup.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    except OSError:
        return 0


class DeviceMemory(Protocol):
    """What a GPU's driver says about its memory."""

    def used_bytes_by_pid(self) -> dict[int, int]:
        """Bytes in use by each process on all devices together."""
        ...


def read_held_bytes(pids: Sequence[int], device: DeviceMemory | None) -> list[int]:
    """What each process holds, seen from outside: on the GPU where it has memory there, else its PSS."""
    on_device = {} if device is None else device.used_bytes_by_pid()
    return [on_device.get(pid) or read_pss_bytes(pid) for pid in pids]


class NvmlMemory:
    """NVIDIA's management library; `open` gives None where there is no GPU, no driver or no `nvidia-ml-py`."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._devices = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]

    @classmethod
    def open(cls) -> NvmlMemory | None:
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            return cls(pynvml)
        except pynvml.NVMLError:
            return None

    def used_bytes_by_pid(self) -> dict[int, int]:
        used: dict[int, int] = {}
        for device in self._devices:
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(device):
                used[process.pid] = used.get(process.pid, 0) + int(process.usedGpuMemory or 0)  # None where the driver hides it
        return used


MAX_LOAD = 0.01  # cores that readings of PSS may take, all processes together


@dataclass(frozen=True, slots=True)
class _Reading:
    """PSS as it was read, RSS at that time, and when the next reading is due, on the monotonic clock."""

    pss_bytes: int
    rss_bytes: int
    next_s: float


_readings: dict[psutil.Process, _Reading] = {}  # a process that ended goes when that is seen


@dataclass(slots=True)
class _Watched:
    handle: psutil.Process  # knows the start time, so a pid used again is not taken for the old process
    name: str
    rank: int

    def pss_now(self, rss_bytes: int, *, num_watched: int, max_load: float) -> int:
        """PSS read or, when it is not yet due, moved with RSS; bytes."""
        began_s = time.monotonic()
        last = _readings.get(self.handle)
        if last is None or began_s >= last.next_s:
            pss_bytes = read_pss_bytes(self.handle.pid)
            took_s = time.monotonic() - began_s
            last = _readings[self.handle] = _Reading(pss_bytes, rss_bytes, began_s + took_s * num_watched / max_load)
        if last.pss_bytes == 0:  # cannot be read
            return 0
        return max(0, min(rss_bytes, last.pss_bytes + rss_bytes - last.rss_bytes))


class MemorySampler:
    """Samples chosen processes from a thread of the driver's, in a `with` block or from `start` to `stop`.

    Args:
        max_load: cores that readings of PSS may take, all processes together.
        interval_s: seconds between samples. Each sample of all processes is one tick and carries one time.
        max_samples: when more are held, every second tick is dropped and the interval doubles: the whole time stays covered, ever coarser;
            `num_dropped` counts them.
        device: where device memory is read; by default NVML where there is a GPU.
    """

    def __init__(
        self, *, interval_s: float = 0.1, max_samples: int = 100_000, device: DeviceMemory | None = None, max_load: float = MAX_LOAD
    ) -> None:
        self.interval_s = interval_s
        self._max_load = max_load
        self.phase = ""
        self.num_dropped = 0
        self._max_samples = max_samples
        self._device = device if device is not None else NvmlMemory.open()
        self._watched: dict[int, _Watched] = {}
        self._ticks: list[list[MemorySample]] = []
        self._num_held = 0
        self._lock = threading.Lock()
        self._tick_lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, pid: int, process: str, *, rank: int = -1) -> None:
        """Sample `pid` from now on, under the name `process`; a process that has ended already is passed over."""
        try:
            watched = _Watched(psutil.Process(pid), process, rank)
        except psutil.NoSuchProcess:
            return
        with self._lock:
            self._watched[pid] = watched

    def unwatch(self, pid: int) -> None:
        """Sample `pid` no longer; what was sampled stays."""
        with self._lock:
            self._watched.pop(pid, None)

    @property
    def samples(self) -> tuple[MemorySample, ...]:
        """Everything sampled so far, in order of time; may be asked while it runs."""
        with self._lock:
            return tuple(sample for tick in self._ticks for sample in tick)

    def samples_since(self, time_s: float) -> list[MemorySample]:
        """What was sampled after a time; may be asked while it runs."""
        with self._lock:
            return [sample for tick in self._ticks if tick and tick[0].time_s > time_s for sample in tick]

    def start(self) -> None:
        """Begin sampling; the first sample is taken at once. Again while it runs: nothing happens."""
        if self._thread is not None:
            return
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="workbench-memory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end the thread; may be called twice."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping.set()
            thread.join(timeout=10.0)

    def __enter__(self) -> MemorySampler:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def sample(self) -> None:
        """Take one sample of every process now, from the calling thread."""
        with self._tick_lock:  # ticks stay in order of time, whoever takes them
            tick = self.read()
            self._append(tick)

    def _append(self, tick: list[MemorySample]) -> None:
        with self._lock:
            self._ticks.append(tick)
            self._num_held += len(tick)
            self._thin_out()

    def read(self) -> list[MemorySample]:
        """One sample of every process that lives, not kept."""
        with self._lock:
            watched = list(self._watched.values())
        device = self._read_device()
        now_s, phase = time.monotonic(), self.phase
        found = (_read(one, device, now_s, phase, num_watched=len(watched), max_load=self._max_load) for one in watched)
        return [sample for sample in found if sample is not None]

    def _run(self) -> None:
        next_s = time.monotonic()
        while True:
            self.sample()
            next_s = max(next_s + self.interval_s, time.monotonic())  # a tick that took too long is not caught up
            if self._stopping.wait(next_s - time.monotonic()):
                break
        self.sample()

    def _read_device(self) -> dict[int, int]:
        if self._device is None:
            return {}
        try:
            return self._device.used_bytes_by_pid()
        except Exception:  # NVML's errors derive from Exception only; a lost GPU must not end the curve of the rest
            self._device = None
            return {}

    def _thin_out(self) -> None:
        if self._num_held > self._max_samples:
            self._ticks = self._ticks[::2]
            self.interval_s *= 2
            num_kept = sum(map(len, self._ticks))
            self.num_dropped += self._num_held - num_kept
            self._num_held = num_kept


def _read(one: _Watched, device: dict[int, int], now_s: float, phase: str, *, num_watched: int, max_load: float) -> MemorySample | None:
    """A sample of one process; None once it has ended."""
    pid = one.handle.pid
    rss_bytes = _rss_now(one.handle)
    if rss_bytes == 0:
        _readings.pop(one.handle, None)
        return None
    return MemorySample(
        time_s=now_s,
        rank=one.rank,
        pid=pid,
        process=one.name,
        rss_bytes=rss_bytes,
        pss_bytes=one.pss_now(rss_bytes, num_watched=num_watched, max_load=max_load),
        device_used_bytes=device.get(pid, 0),
        phase=phase,
    )


def _rss_now(handle: psutil.Process) -> int:
    """Resident bytes; 0 for a process that has ended, a zombie too."""
    try:
        return int(handle.memory_info().rss) if handle.is_running() else 0
    except psutil.Error:
        return 0
