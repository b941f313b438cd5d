"""What watching and checking collectives costs: an all_reduce with the check on, off (board and ledger alone), and in plain torch.

Seconds of a call, and processor time of the thread that makes it, beside plain torch in processes of its own. With more ranks than cores
a call takes as long as all ranks of a core together; where every rank has a core it waits awake, which costs processor time and saves more.
A call is quicker from its second time on (`workbench.ranks.shortcut`); one made anew each time is timed too, by the same limits.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

from benchmarks.line import Line, Reach
from benchmarks.peers import run_peer, torchrun

__all__ = ["CollectivesResult", "Timing", "measure", "seconds_per_call"]

SMALL_BYTES, LARGE_BYTES = 4, 1_000_000
_MOST_ADDED_US = 50.0  # by board and ledger to a small call
_MOST_SHARE_LARGE = 1.01  # of plain torch's time for a large one
_MOST_SHARE_CHECKED = 1.6  # of plain torch's time for a small one, with the check


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one all_reduce on rank 0, a number a batch of calls.

    Attributes:
        anew_s: without the check, each as if it were the first of its kind.
        without_check_cpu_s, plain_cpu_s: processor time of the thread that makes it.
    """

    num_ranks: int
    num_bytes: int
    with_check_s: tuple[float, ...]
    without_check_s: tuple[float, ...]
    anew_s: tuple[float, ...]
    plain_s: tuple[float, ...]
    without_check_cpu_s: tuple[float, ...]
    plain_cpu_s: tuple[float, ...]

    def lines(self) -> list[Line]:
        """Medians beside plain torch, and their difference."""
        on, off, anew, plain = (1e6 * median(s) for s in (self.with_check_s, self.without_check_s, self.anew_s, self.plain_s))
        is_small = self.num_bytes < LARGE_BYTES
        checked = Reach(limit=_MOST_SHARE_CHECKED) if is_small else None
        watched = None if is_small else Reach(limit=_MOST_SHARE_LARGE)
        what = f"all_reduce of {self.num_bytes:,} bytes, {self.num_ranks} ranks"
        lines = [
            Line(what=f"{what}, check on", unit="us", ours=on, theirs=plain, peer="plain torch", reach=checked),
            Line(what=f"{what}, check off: ledger alone", unit="us", ours=off, theirs=plain, peer="plain torch", reach=watched),
        ]
        lines.append(Line(what=f"{what}, check off: made anew", unit="us", ours=anew, theirs=plain, peer="plain torch", reach=watched))
        if is_small:
            reach = Reach(limit=_MOST_ADDED_US, is_ours=True)
            lines.append(Line(what=f"{what}: added by the ledger", unit="us", ours=max(off - plain, 0.0), reach=reach))
            lines.append(Line(what=f"{what}: added when made anew", unit="us", ours=max(anew - plain, 0.0), reach=reach))
        of_rank = 1e6 * (median(self.without_check_cpu_s) - median(self.plain_cpu_s))
        lines.append(Line(what=f"{what}: processor time added to a rank", unit="us", ours=of_rank))
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectivesResult:
    timings: tuple[Timing, ...]

    def lines(self) -> list[Line]:
        return [line for timing in self.timings for line in timing.lines()]


def seconds_per_call(num_bytes: int, *, num_calls: int, num_batches: int, is_anew: bool = False) -> tuple[list[float], list[float]]:
    """Seconds, and seconds of processor time, of one all_reduce over the default group, a number a batch; runs in a rank, with one thread.

    Small ones are made in 3 times as many batches of `num_calls`, since what they take changes with how deeply the cores sleep between
    them; large ones in batches of a fifth. With `is_anew` each is described and placed again, as one that differs from those before.
    """
    import torch
    import torch.distributed as dist

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tensor = torch.ones(num_bytes // 4)
    found, processor = [], []
    num_batches, num_calls = (3 * num_batches, num_calls) if num_bytes < LARGE_BYTES else (num_batches, max(1, num_calls // 5))
    for _ in range(1 + num_batches):
        dist.barrier()
        start_s, start_cpu_s = time.perf_counter(), time.thread_time()
        for _ in range(num_calls):
            dist.all_reduce(tensor=tensor) if is_anew else dist.all_reduce(tensor)  # by its name a tensor takes no shortcut
            tensor.fill_(1.0)
        processor.append((time.thread_time() - start_cpu_s) / num_calls)
        found.append((time.perf_counter() - start_s) / num_calls)
    torch.set_num_threads(num_threads)
    return found[1:], processor[1:]  # the first warms up


def measure(
    *, world_sizes: Sequence[int] = (2, 4, 8), sizes: Sequence[int] = (SMALL_BYTES, LARGE_BYTES), num_calls: int = 100, repeats: int = 9
) -> CollectivesResult:
    """Time all four ways in turns, each time in fresh processes: how those fall on the cores differs more than the calls of one run."""
    timings = []
    for num_ranks in world_sizes:
        rounds = [
            (
                _ours(num_ranks, sizes, num_calls, is_checked=True),
                _ours(num_ranks, sizes, num_calls, is_checked=False),
                _ours(num_ranks, sizes, num_calls, is_checked=False, is_anew=True),
                _plain(num_ranks, sizes, num_calls),
            )
            for _ in range(repeats)
        ]
        for size in sizes:
            found = [_all_of([way[size] for way in ways]) for ways in zip(*rounds, strict=True)]
            (on, _), (off, off_cpu), (anew, _), (plain, plain_cpu) = found
            timings.append(
                Timing(
                    num_ranks=num_ranks,
                    num_bytes=size,
                    with_check_s=on,
                    without_check_s=off,
                    anew_s=anew,
                    plain_s=plain,
                    without_check_cpu_s=off_cpu,
                    plain_cpu_s=plain_cpu,
                )
            )
    return CollectivesResult(timings=tuple(timings))


_NUM_BATCHES = 5
_Timed: TypeAlias = tuple[Sequence[float], Sequence[float]]  # seconds, and those of the processor


def _all_of(runs: Sequence[_Timed]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(s for seconds, _ in runs for s in seconds), tuple(s for _, processor in runs for s in processor)


def _ours(num_ranks: int, sizes: Sequence[int], num_calls: int, *, is_checked: bool, is_anew: bool = False) -> dict[int, _Timed]:
    import workbench as wb

    timed = functools.partial(seconds_per_call, num_calls=num_calls, num_batches=_NUM_BATCHES, is_anew=is_anew)
    with wb.launch(num_ranks, check_collectives=is_checked) as cluster:
        return {size: cluster.run(timed, size)[0] for size in sizes}


def _plain(num_ranks: int, sizes: Sequence[int], num_calls: int) -> dict[int, _Timed]:
    numbers = [str(n) for n in (num_calls, _NUM_BATCHES, *sizes)]
    answer = run_peer(torchrun(num_ranks, "benchmarks.peers.torchrun_ranks", *numbers))
    return {size: answer.values["seconds"][str(size)] for size in sizes}
