"""What sleep frees and how long it takes, beside plain writing and reading of the same bytes on the same disk."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.line import Line, Reach

__all__ = ["SleepResult", "measure"]

_PROMPTS = ["1+1=", "12+7=", "the quick brown fox"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepResult:
    """Level 1, a number a repeat; seconds are those of the weights, the KV cache apart.

    Attributes:
        freed_bytes: fall of the engine's PSS, seen from outside.
        write_s, read_s: the weights' bytes from memory to a new file on the same disk, synced, and back into fresh memory.
        kv_wake_s: committing the KV cache's pages on the wake.
        are_tokens_equal: greedy tokens after each wake are those before.
    """

    weights_bytes: int
    kv_cache_bytes: int
    freed_bytes: tuple[int, ...]
    sleep_s: tuple[float, ...]
    wake_s: tuple[float, ...]
    write_s: tuple[float, ...]
    read_s: tuple[float, ...]
    kv_wake_s: tuple[float, ...]
    are_tokens_equal: bool

    def lines(self) -> list[Line]:
        mb = self.weights_bytes / 1e6
        held = (self.weights_bytes + self.kv_cache_bytes) / 1e6
        same = "same greedy tokens after wake" if self.are_tokens_equal else "OTHER TOKENS AFTER WAKE"
        return [
            Line(
                what=f"memory freed by sleep level 1 ({same})",
                unit="MB",
                ours=median(self.freed_bytes) / 1e6,
                theirs=held,
                peer="weights + KV cache",
                reach=Reach(limit=0.97, is_least=True),
            ),
            Line(what=f"sleep, {mb:.0f} MB of weights", unit="s", ours=median(self.sleep_s), theirs=median(self.write_s),
                 peer="write + fsync", reach=Reach(limit=1.5)),
            Line(what=f"wake, {mb:.0f} MB of weights", unit="s", ours=median(self.wake_s), theirs=median(self.read_s),
                 peer="read", reach=Reach(limit=1.5)),
            Line(what=f"wake, {self.kv_cache_bytes / 1e6:.0f} MB of KV cache", unit="s", ours=median(self.kv_wake_s)),
        ]  # fmt: skip


def measure(*, num_parameters: int = 100_000_000, kv_cache_bytes: int = 2**30, repeats: int = 10) -> SleepResult:
    """Sleep, write, wake, read, in turns; the first two warm up."""
    import workbench as wb

    with tempfile.TemporaryDirectory(prefix="workbench-bench-") as folder, wb.launch(1) as cluster:
        model = wb.models.make_dummy(Path(folder, "model"), num_parameters=num_parameters)
        engine = wb.start_engine(cluster, model=str(model), kv_cache_bytes=kv_cache_bytes)
        turns = [_turn(engine, is_plain_first=bool(turn % 2)) for turn in range(repeats + 2)][2:]
    slept, woken, written, read, freed, equal = zip(*turns, strict=True)
    return SleepResult(
        weights_bytes=slept[0].weights_bytes,
        kv_cache_bytes=slept[0].kv_cache_bytes,
        freed_bytes=freed,
        sleep_s=tuple(times.weights_s for times in slept),
        wake_s=tuple(times.weights_s for times in woken),
        write_s=written,
        read_s=read,
        kv_wake_s=tuple(times.kv_cache_s for times in woken),
        are_tokens_equal=all(equal),
    )


def _turn(engine: Any, *, is_plain_first: bool) -> tuple[Any, Any, float, float, int, bool]:
    """Who comes first finds the machine's free pages cold where a host has taken them back (5 times slower), so both take turns."""
    import workbench as wb
    from workbench.rollout.sleep import default_backup_dir

    greedy, folder = wb.Sampling(max_tokens=8, temperature=0.0), default_backup_dir()
    num_bytes = int(engine.memory()["weights_bytes"].sum())
    before = engine.generate(_PROMPTS, greedy).tokens.tolist()
    plain = _write_and_read(folder, num_bytes) if is_plain_first else None
    slept = engine.sleep(1)
    freed_bytes = engine.sleeps[-1].freed_bytes
    woken = engine.wake_up()
    write_s, read_s = plain or _write_and_read(folder, num_bytes)
    return slept, woken, write_s, read_s, freed_bytes, engine.generate(_PROMPTS, greedy).tokens.tolist() == before


def _warm(num_bytes: int) -> None:
    """Touch memory and free it: what wakes takes pages that sleep has just freed, so a plain read gets such pages too."""
    with mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        pass


def _write_and_read(folder: Path, num_bytes: int) -> tuple[float, float]:
    """Seconds of a plain write with fsync, and of a plain read into fresh memory."""
    import numpy as np

    source = memoryview(np.random.default_rng(0).bytes(num_bytes))
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start_s = time.monotonic()
        view = source
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())
        write_s = time.monotonic() - start_s
        file.seek(0)
        _warm(2 * num_bytes)
        target = np.empty(num_bytes, np.uint8)  # not touched yet, as the pages of a sleeping engine
        start_s = time.monotonic()
        left = memoryview(target.data)
        while left:
            left = left[file.readinto(left) :]
        return write_s, time.monotonic() - start_s
