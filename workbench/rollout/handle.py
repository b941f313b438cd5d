"""The driver's handle of an engine: one process or several, slept, woken, asked and closed together.

Knows clients of engine processes, and tells a session what they were asked. Does not know how they were started, nor rollouts.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from workbench.errors import EngineError
from workbench.ranks.history import History
from workbench.ranks.memory import NvmlMemory, read_held_bytes
from workbench.records import EngineNow, EngineStatus, Prompt, RolloutBatch, Sampling, SleepReport, Span
from workbench.rollout.client import ABORT_LIMIT_S, Address, EngineClient
from workbench.rollout.engine import PhaseTimes
from workbench.rollout.finished import FinishedReader
from workbench.rollout.outcome import told_batch, told_phase, told_weights

if TYPE_CHECKING:
    import pandas as pd
    import torch

__all__ = ["EngineHandle", "EngineSpec", "check_sampling"]

T = TypeVar("T")
_CLOSE_GRACE_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What an engine was asked to be; equal specs may share one engine.

    Attributes:
        ranks_of: the ranks that each process works for, process by process; () where it works for all.
    """

    model: str
    mode: str
    tp: int
    backend: str
    kv_cache_bytes: int | None
    dtype: str | None
    max_model_len: int | None
    device: str
    seed: int
    engine_options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostProcess:
    """One engine process as the driver holds it; `rank` -1 works for all ranks; `end(grace_s)` kills it when it has not gone by then."""

    rank: int
    client: EngineClient
    address: Address
    end: Callable[[float], None]


class EngineHandle:
    """An engine of a cluster; made by `wb.start_engine`. Closed with the cluster, whose session keeps what it was asked."""

    def __init__(self, spec: EngineSpec, hosts: Sequence[HostProcess], history: History) -> None:
        self.spec = spec
        self._history = history
        self.wanted = ""  # the words in which a rollout asked for it, to know it again
        self.spans: list[Span] = []
        self.sleeps: list[SleepReport] = []
        self._hosts = list(hosts)
        self._is_closed = False
        self._step = -1
        self._phases: deque[tuple[float, str]] = deque([(time.monotonic(), "")], maxlen=1000)  # since when it does what
        self._device = NvmlMemory.open()
        self._threads = ThreadPoolExecutor(max_workers=len(hosts), thread_name_prefix="workbench-engine")

    @property
    def mode(self) -> str:
        return self.spec.mode

    @property
    def pids(self) -> list[int]:
        """Processes of the engine, in rank order."""
        return [host.address.pid for host in self._hosts]

    @property
    def status(self) -> str:
        """ "starting", "awake", "weights_only", "asleep" or "dead"."""
        if self._is_closed or any(host.client.status is EngineStatus.DEAD for host in self._hosts):
            return EngineStatus.DEAD
        return self._hosts[0].client.status

    @property
    def is_sleeping(self) -> bool:
        return self.status in (EngineStatus.ASLEEP, EngineStatus.WEIGHTS_ONLY)

    @property
    def weight_version(self) -> int:
        return self._hosts[0].client.weight_version

    def addresses(self) -> dict[int, Address]:
        """rank -> where it calls; {-1: ...} for an engine that works for all."""
        return {host.rank: host.address for host in self._hosts}

    def ranks_and_pids(self) -> list[tuple[int, int]]:
        return [(host.rank, host.address.pid) for host in self._hosts]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, num_samples: Sequence[int] | None = None) -> RolloutBatch:
        """Complete prompts from the driver; in grouped mode the first group does it, in independent mode rank 0's engine.

        Raises:
            EngineError: asleep, dead or failed.
        """
        with self._entry("generate", prompts, sampling, num_samples=num_samples) as given:
            self.check_alive()
            if isinstance(prompts, str):
                raise ValueError(f"prompts is one text, {prompts[:80]!r}; generate takes a list of prompts: [{prompts[:20]!r}]")
            check_sampling(sampling)
            first = self._hosts[: self.spec.tp]
            with self.in_phase("generate"):
                batches = self._each(lambda host: host.client.generate(prompts, sampling, num_samples=num_samples), first)
            given.append(told_batch(batches[0], sampling))
        return batches[0]

    def sleep(self, level: int = 1) -> PhaseTimes:
        """Put every process to sleep.

        Args:
            level: 0 pauses, 1 keeps the weights in a file, 2 discards them (the last version pushed, or the checkpoint, is loaded on wake).

        Returns:
            The slowest process's times, the bytes of all; `note` says where it was a no-op.
        """
        with self._entry("sleep", level) as given:
            self.check_alive()
            if level not in (0, 1, 2):
                raise ValueError(f"sleep level is {level!r}; it must be 0 (pause), 1 (weights to a file) or 2 (weights discarded)")
            times = self._sleep(level)
            given.append(told_phase(self.status, times))
        return times

    def _sleep(self, level: int) -> PhaseTimes:
        before = read_held_bytes(self.pids, self._device)
        start = time.monotonic()
        with self.in_phase("sleep"):
            times = self._each(lambda host: host.client.sleep(level))
        end = time.monotonic()
        after = read_held_bytes(self.pids, self._device)
        if not times[0].note:
            self.spans.append(Span(step=self._step, rank=-1, span="sleep", start_s=start, end_s=end))
            for host, phase, high, low in zip(self._hosts, times, before, after, strict=True):
                self.sleeps.append(_report(self._step, host.rank, phase, high - low, end - start))
        return _together(times)

    def wake_up(self, tags: Sequence[str] | None = None) -> PhaseTimes:
        """Wake every process; `tags` of "weights" and "kv_cache" wake a part."""
        with self._entry("wake_up", tags) as given:
            self.check_alive()
            times = self._wake_up(tags)
            given.append(told_phase(self.status, times))
        return times

    def _wake_up(self, tags: Sequence[str] | None) -> PhaseTimes:
        before = read_held_bytes(self.pids, self._device)
        start = time.monotonic()
        with self.in_phase("wake_up"):
            times = self._each(lambda host: host.client.wake_up(tags))
        end = time.monotonic()
        if not times[0].note:
            self.spans.append(Span(step=self._step, rank=-1, span="wake_up", start_s=start, end_s=end))
            after = read_held_bytes(self.pids, self._device)
            self._complete_reports([high - low for high, low in zip(after, before, strict=True)], end - start)
        return _together(times)

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace weights in every process, all or nothing; see `Engine.update_weights`."""
        if isinstance(named_tensors, Mapping):
            raise TypeError("named_tensors is a dict; update_weights takes pairs of name and tensor: pass its items()")
        pairs = [(name, tensor.detach().cpu()) for name, tensor in named_tensors]
        with self._entry("update_weights", pairs, version) as given:
            self.check_alive()
            start = time.monotonic()
            with self.in_phase("update_weights"):
                self._each(lambda host: host.client.update_weights(pairs, version))
            self.spans.append(Span(step=self._step, rank=-1, span="update_weights", start_s=start, end_s=time.monotonic()))
            given.append(told_weights(pairs, version))

    def memory(self) -> pd.DataFrame:
        """A row a process: rank, pid, weights_bytes, kv_cache_bytes, other_bytes, host_backup_bytes."""
        import pandas as pd

        self.check_alive()
        rows = self._each(lambda host: host.client.memory())
        return pd.DataFrame(
            [{**asdict(row), "rank": host.rank, "pid": host.address.pid} for row, host in zip(rows, self._hosts, strict=True)]
        )

    @contextmanager
    def in_phase(self, phase: str) -> Iterator[None]:
        """Say what the engine does within the block, to who looks on."""
        self._phases.append((time.monotonic(), phase))
        try:
            yield
        finally:
            self._phases.append((time.monotonic(), ""))

    def now(self) -> EngineNow | None:
        """What it is and does at this moment; None once it was closed. From any thread."""
        if self._is_closed:
            return None
        name = f"{self.spec.model}, {self.spec.backend}, {self.spec.mode}"
        return EngineNow(name=name, status=self.status, phase=self._phases[-1][1], pids=tuple(self.pids))

    def events_since(self, time_s: float) -> list[Span]:
        """What it began after a time on the monotonic clock, as spans without length; from any thread."""
        begun = [(at_s, phase) for at_s, phase in self._phases.copy() if phase and at_s > time_s]
        return [Span(step=self._step, rank=-1, span=phase, start_s=at_s, end_s=at_s) for at_s, phase in begun]

    def finished_readers(self) -> list[FinishedReader]:
        """One an engine process: what it tells of completions that have ended."""
        return [FinishedReader(host.address.path) for host in self._hosts]

    def at_step(self, step: int) -> None:
        """Label spans and sleep reports that follow with a rollout's step."""
        self._step = step

    def take_records(self) -> tuple[list[Span], list[SleepReport]]:
        """Spans and sleep reports since the last call."""
        taken = (self.spans, self.sleeps)
        self.spans, self.sleeps = [], []
        return taken

    def ended(self, pid: int) -> None:
        """Hear that a process ended; told by the server's thread."""
        for host in self._hosts:
            if host.address.pid == pid:
                host.client.mark_dead()

    def close(self) -> None:
        """End the engine's processes; may be called twice."""
        if not self._is_closed:
            with self._entry("close"):
                self.end()

    def end(self) -> None:
        """Close it with its cluster: what no session holds."""
        if self._is_closed:
            return
        self._is_closed = True
        alive = [host for host in self._hosts if host.client.status is not EngineStatus.DEAD]
        self._each(lambda host: host.client.close(), alive)
        for host in self._hosts:
            host.end(_CLOSE_GRACE_S)
        self._threads.shutdown(wait=False)

    def __enter__(self) -> EngineHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        size = f", {len(self._hosts)} processes" if len(self._hosts) > 1 else ""
        return f"<engine {self.spec.model} ({self.spec.backend}, {self.spec.mode}{size}): {self.status}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an engine's handle stays in the process that started it; call it there, or have wb.rollout call it from the ranks")

    def __digest__(self) -> EngineSpec:
        """What must be equal of an engine that is started again."""
        return self.spec

    def _entry(self, verb: str, *args: Any, **kwargs: Any) -> AbstractContextManager[list[Any]]:
        """What is asked within the block stands in the cluster's session, with what is appended."""
        return self._history.method(self, f"engine.{verb}", args, kwargs)

    def check_alive(self) -> None:
        """Refuse to go on with an engine that was closed.

        Raises:
            EngineError: it was.
        """
        if self._is_closed:
            raise EngineError("the engine is closed\nstart another: wb.start_engine(cluster, ...)")

    def _each(self, call: Callable[[HostProcess], T], hosts: Sequence[HostProcess] | None = None) -> list[T]:
        """The same call to every process at once: those of one tensor-parallel engine must run together."""
        chosen = self._hosts if hosts is None else list(hosts)
        if len(chosen) == 1:
            return [call(chosen[0])]
        futures = [self._threads.submit(call, host) for host in chosen]
        try:
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            for host in chosen:
                host.client.abort()
            wait(futures, timeout=ABORT_LIMIT_S)  # each hears that it was interrupted; then the engine is free for the next call
            raise

    def _complete_reports(self, regained: Sequence[int], wake_s: float) -> None:
        """Fill in the wake of the latest sleep of each process."""
        for host, num_bytes in zip(self._hosts, regained, strict=True):
            for index in range(len(self.sleeps) - 1, -1, -1):
                if self.sleeps[index].rank == host.rank:
                    if math.isnan(self.sleeps[index].wake_s):
                        self.sleeps[index] = replace(self.sleeps[index], regained_bytes=num_bytes, wake_s=wake_s)
                    break


def check_sampling(sampling: Any) -> None:
    """Refuse what is no `Sampling` before it is sent."""
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling is {sampling!r} ({type(sampling).__name__}); pass wb.Sampling(n=..., max_tokens=...)")


def _report(step: int, rank: int, times: PhaseTimes, freed_bytes: int, sleep_s: float) -> SleepReport:
    return SleepReport(
        step=step,
        rank=rank,
        level=times.level,
        weights_bytes=times.weights_bytes,
        kv_cache_bytes=times.kv_cache_bytes,
        freed_bytes=freed_bytes,
        regained_bytes=0,
        sleep_s=sleep_s,
        wake_s=math.nan,
    )


def _together(times: Sequence[PhaseTimes]) -> PhaseTimes:
    return replace(
        times[0],
        weights_s=max(t.weights_s for t in times),
        kv_cache_s=max(t.kv_cache_s for t in times),
        tidy_s=max(t.tidy_s for t in times),
        weights_bytes=sum(t.weights_bytes for t in times),
        kv_cache_bytes=sum(t.kv_cache_bytes for t in times),
    )
