"""What watching and checking collectives costs: an all_reduce with the check on, off (board and ledger alone), and in plain torch.

Seconds of a call, beside plain torch in processes of its own; and processor time of a rank, beside the same ranks let through unwatched.
With more ranks than cores a call takes as long as all ranks of a core together; where every rank has a core it waits awake, which costs
processor time and saves more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

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
        watched_cpu_s, unwatched_cpu_s: processor time of the thread that calls, on all ranks, without the check.
    """

    num_ranks: int
    num_bytes: int
    with_check_s: tuple[float, ...]
    without_check_s: tuple[float, ...]
    plain_s: tuple[float, ...]
    watched_cpu_s: tuple[float, ...]
    unwatched_cpu_s: tuple[float, ...]

    def lines(self) -> list[Line]:
        """Medians beside plain torch, and their difference."""
        on, off, plain = (1e6 * median(s) for s in (self.with_check_s, self.without_check_s, self.plain_s))
        is_small = self.num_bytes < LARGE_BYTES
        checked = Reach(limit=_MOST_SHARE_CHECKED) if is_small else None
        watched = None if is_small else Reach(limit=_MOST_SHARE_LARGE)
        what = f"all_reduce of {self.num_bytes:,} bytes, {self.num_ranks} ranks"
        lines = [
            Line(what=f"{what}, check on", unit="us", ours=on, theirs=plain, peer="plain torch", reach=checked),
            Line(what=f"{what}, check off: ledger alone", unit="us", ours=off, theirs=plain, peer="plain torch", reach=watched),
        ]
        if is_small:
            reach = Reach(limit=_MOST_ADDED_US, is_ours=True)
            lines.append(Line(what=f"{what}: added by the ledger", unit="us", ours=max(off - plain, 0.0), reach=reach))
        of_rank = 1e6 * (median(self.watched_cpu_s) - median(self.unwatched_cpu_s))
        lines.append(Line(what=f"{what}: processor time added to a rank", unit="us", ours=of_rank))
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectivesResult:
    timings: tuple[Timing, ...]

    def lines(self) -> list[Line]:
        return [line for timing in self.timings for line in timing.lines()]


def seconds_per_call(num_bytes: int, *, num_calls: int, num_batches: int) -> list[float]:
    """Seconds of one all_reduce over the default group, a number a batch; runs in a rank, with one thread.

    Small ones are made in 3 times as many batches of `num_calls`, since what they take changes with how deeply the cores sleep between
    them; large ones in batches of a fifth.
    """
    import torch
    import torch.distributed as dist

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tensor = torch.ones(num_bytes // 4)
    found = []
    num_batches, num_calls = (3 * num_batches, num_calls) if num_bytes < LARGE_BYTES else (num_batches, max(1, num_calls // 5))
    for _ in range(1 + num_batches):
        dist.barrier()
        start_s = time.perf_counter()
        for _ in range(num_calls):
            dist.all_reduce(tensor)
            tensor.fill_(1.0)
        found.append((time.perf_counter() - start_s) / num_calls)
    torch.set_num_threads(num_threads)
    return found[1:]  # the first warms up


def processor_seconds_per_call(num_bytes: int, *, num_calls: int, num_batches: int) -> tuple[list[float], list[float]]:
    """Processor time of this thread for one all_reduce, a number a batch: watched, and let through by the same interceptor, in turns."""
    import torch
    import torch.distributed as dist

    from workbench.ranks.called import carrier

    groups = cast(Any, carrier()).groups  # in a rank the carrier is the interceptor
    find, num_threads = groups.find, torch.get_num_threads()
    torch.set_num_threads(1)
    tensor = torch.ones(num_bytes // 4)
    ways: tuple[tuple[list[float], Any], ...] = (([], find), ([], lambda process_group: None))
    num_calls = num_calls if num_bytes < LARGE_BYTES else max(1, num_calls // 5)
    try:
        for _ in range(num_batches):
            for found, groups.find in ways:
                dist.barrier()
                dist.all_reduce(tensor)
                start_s = time.thread_time()
                for _ in range(num_calls):
                    dist.all_reduce(tensor)
                    tensor.fill_(1.0)
                found.append((time.thread_time() - start_s) / num_calls)
    finally:
        groups.find = find
        torch.set_num_threads(num_threads)
    return ways[0][0], ways[1][0]


def measure(
    *, world_sizes: Sequence[int] = (2, 4, 8), sizes: Sequence[int] = (SMALL_BYTES, LARGE_BYTES), num_calls: int = 100, repeats: int = 9
) -> CollectivesResult:
    """Time all three ways in turns, each time in fresh processes: how those fall on the cores differs more than the calls of one run."""
    timings = []
    for num_ranks in world_sizes:
        rounds = [(_ours(num_ranks, sizes, num_calls, True), _ours(num_ranks, sizes, num_calls, False), _plain(num_ranks, sizes, num_calls))
                  for _ in range(repeats)]  # fmt: skip
        processor = _processor(num_ranks, sizes, num_calls, repeats)
        for size in sizes:
            on, off, plain = (tuple(s for way in ways for s in way[size]) for ways in zip(*rounds, strict=True))
            watched, unwatched = processor[size]
            timings.append(
                Timing(
                    num_ranks=num_ranks,
                    num_bytes=size,
                    with_check_s=on,
                    without_check_s=off,
                    plain_s=plain,
                    watched_cpu_s=watched,
                    unwatched_cpu_s=unwatched,
                )
            )
    return CollectivesResult(timings=tuple(timings))


_NUM_BATCHES = 5


def _ours(num_ranks: int, sizes: Sequence[int], num_calls: int, is_checked: bool) -> dict[int, list[float]]:
    import workbench as wb

    with wb.launch(num_ranks, check_collectives=is_checked) as cluster:
        return {size: cluster.run(seconds_per_call, size, num_calls=num_calls, num_batches=_NUM_BATCHES)[0] for size in sizes}


def _processor(num_ranks: int, sizes: Sequence[int], num_calls: int, repeats: int) -> dict[int, list[tuple[float, ...]]]:
    """Of each size, numbers of all ranks: watched, unwatched."""
    import workbench as wb

    found = {}
    with wb.launch(num_ranks, check_collectives=False) as cluster:
        for size in sizes:
            ranks = cluster.run(processor_seconds_per_call, size, num_calls=num_calls, num_batches=_NUM_BATCHES * repeats)
            found[size] = [tuple(s for rank in ranks for s in rank[way]) for way in (0, 1)]
    return found


def _plain(num_ranks: int, sizes: Sequence[int], num_calls: int) -> dict[int, list[float]]:
    numbers = [str(n) for n in (num_calls, _NUM_BATCHES, *sizes)]
    answer = run_peer(torchrun(num_ranks, "benchmarks.peers.torchrun_ranks", *numbers))
    return {size: answer.values["seconds"][str(size)] for size in sizes}
