"""What watching and checking collectives costs: calls with the check on, off (board and ledger alone), and in plain torch.

Seconds of a call, and processor time of the thread that makes it, beside plain torch in processes of its own. Where every rank has a core
it waits awake, which costs processor time and saves more, so seconds count. With more ranks than cores a call takes as long as all ranks of
a core together, and 50 us are less than one run differs from the next; a call made again is held to the limits there too, and of the other
ways a rank's processor time is. What C++ calls is met in torch's dispatcher, where an empty Python function takes about as long as the
limit already: there the ledger's row is held to it, timed by leaving it out, and all that watches the call is told beside it.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Any, TypeAlias

from benchmarks.line import Line, Reach
from benchmarks.peers import run_peer, torchrun
from workbench.cores import num_usable_cores

__all__ = ["CollectivesResult", "Timing", "Way", "measure", "seconds_per_call"]

SMALL_BYTES, LARGE_BYTES = 4, 1_000_000
_MOST_ADDED_US = 50.0  # by board and ledger to a small call
_MOST_SHARE_LARGE = 1.01  # of plain torch's time for a large one
_MOST_SHARE_CHECKED = 1.6  # of plain torch's time for a small one, with the check
_NUM_BATCHES = 5
_NUM_SHAPES = 60


class Way(StrEnum):
    """How a call is made.

    Other shapes are up to 240 bytes larger. The last passes torch's functions by, as C++ does that calls a process
    group: so the workbench meets it in torch's dispatcher alone.
    """

    AGAIN = "all_reduce"
    OF_OTHER_SHAPES = "all_reduce (each of another shape)"
    ASYNCHRONOUS = "all_reduce (async_op=True)"
    OF_LISTS = "all_gather"
    AS_CPP = "all_reduce (as from C++)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one call on rank 0, a number a batch of calls.

    Attributes:
        with_check_s: of calls that a loop makes again, alone.
        without_check_cpu_s, plain_cpu_s: processor time of the thread that makes it.
        without_row_cpu_s: the same of calls as from C++ that leave no row in the ledger, by the same ranks.
    """

    way: Way
    num_ranks: int
    num_bytes: int
    with_check_s: tuple[float, ...] = ()
    without_check_s: tuple[float, ...]
    plain_s: tuple[float, ...]
    without_check_cpu_s: tuple[float, ...]
    plain_cpu_s: tuple[float, ...]
    without_row_cpu_s: tuple[float, ...] = ()

    def lines(self) -> list[Line]:
        """Medians beside plain torch, and their difference."""
        off, plain = (1e6 * median(s) for s in (self.without_check_s, self.plain_s))
        is_small = self.num_bytes < LARGE_BYTES
        is_by_seconds = self.way is Way.AGAIN or self.num_ranks <= num_usable_cores()
        added = Reach(limit=_MOST_ADDED_US, is_ours=True)
        whole = None if self.way is Way.AS_CPP else added
        what = f"{self.way} of {self.num_bytes:,} bytes, {self.num_ranks} ranks"
        lines = []
        if self.with_check_s:
            reach = Reach(limit=_MOST_SHARE_CHECKED) if is_small else None
            on = 1e6 * median(self.with_check_s)
            lines.append(Line(what=f"{what}, check on", unit="us", ours=on, theirs=plain, peer="plain torch", reach=reach))
        reach = Reach(limit=_MOST_SHARE_LARGE) if is_by_seconds and not is_small else None
        lines.append(Line(what=f"{what}, check off: ledger alone", unit="us", ours=off, theirs=plain, peer="plain torch", reach=reach))
        if is_small:
            reach = whole if is_by_seconds else None
            lines.append(Line(what=f"{what}: added to a call", unit="us", ours=max(off - plain, 0.0), reach=reach))
        reach = whole if is_small and not is_by_seconds else None
        off_cpu, plain_cpu = (1e6 * median(s) for s in (self.without_check_cpu_s, self.plain_cpu_s))
        lines.append(Line(what=f"{what}: processor time added to a rank", unit="us", ours=off_cpu - plain_cpu, reach=reach))
        if self.without_row_cpu_s:
            row = off_cpu - 1e6 * median(self.without_row_cpu_s)
            lines.append(Line(what=f"{what}: of that its row in the ledger", unit="us", ours=row, reach=added if is_small else None))
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectivesResult:
    timings: tuple[Timing, ...]

    def lines(self) -> list[Line]:
        return [line for timing in self.timings for line in timing.lines()]


def seconds_per_call(way: Way, num_bytes: int, *, num_calls: int, num_batches: int) -> tuple[list[float], list[float]]:
    """Seconds, and seconds of processor time, of one call over the default group, a number a batch; runs in a rank, with one thread.

    Small ones are made in 3 times as many batches of `num_calls`, since what they take changes with how deeply the cores sleep between
    them; large ones in batches of a fifth.
    """
    import torch
    import torch.distributed as dist

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tensor = torch.ones(num_bytes // 4)
    found, processor = [], []
    num_batches, num_calls = (3 * num_batches, num_calls) if num_bytes < LARGE_BYTES else (num_batches, max(1, num_calls // 5))
    for _ in range(1 + num_batches):
        calls = itertools.islice(_calls(way, tensor), num_calls)
        next(calls)()
        dist.barrier()
        num_made, start_s, start_cpu_s = 0, time.perf_counter(), time.thread_time()
        for call in calls:
            call()
            tensor.fill_(1.0)
            num_made += 1
        processor.append((time.thread_time() - start_cpu_s) / num_made)
        found.append((time.perf_counter() - start_s) / num_made)
    torch.set_num_threads(num_threads)
    return found[1:], processor[1:]  # the first warms up


def _calls(way: Way, tensor: Any) -> Iterator[Callable[[], Any]]:
    """What makes one call after another; those of other shapes come to an end."""
    import torch
    import torch.distributed as dist

    if way is Way.OF_OTHER_SHAPES:
        line = eval(compile("lambda tensor: dist.all_reduce(tensor)", "<a line of its own>", "eval"), {"dist": dist})  # no shape is known
        whole = torch.ones(len(tensor) + _NUM_SHAPES)
        return (functools.partial(line, whole[: len(tensor) + num]) for num in range(_NUM_SHAPES))
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    world = dist.group.WORLD
    assert world is not None
    made = {
        Way.AGAIN: lambda: dist.all_reduce(tensor),
        Way.ASYNCHRONOUS: lambda: dist.all_reduce(tensor, async_op=True).wait(),
        Way.OF_LISTS: lambda: dist.all_gather(gathered, tensor),
        Way.AS_CPP: lambda: world.allreduce([tensor]).wait(),
    }
    return itertools.repeat(made[way])


def measure(
    *, world_sizes: Sequence[int] = (2, 4, 8), sizes: Sequence[int] = (SMALL_BYTES, LARGE_BYTES), num_calls: int = 60, repeats: int = 9
) -> CollectivesResult:
    """Time ours and torch's in turns, each time in fresh processes: how those fall on the cores differs more than the calls of one run."""
    timings = []
    for num_ranks in world_sizes:
        rounds = [
            (
                _ours(num_ranks, sizes, num_calls, is_checked=True),
                _ours(num_ranks, sizes, num_calls, is_checked=False),
                _plain(num_ranks, sizes, num_calls),
            )
            for _ in range(repeats)
        ]
        for size, way in itertools.product(sizes, Way):
            (on, _), (off, off_cpu), (plain, plain_cpu) = (
                _all_of([one.get((way, size), _NOTHING) for one in r]) for r in zip(*rounds, strict=True)
            )
            _, no_row_cpu = _all_of([off.get((_NO_ROW, size), _NOTHING) for _, off, _ in rounds] if way is Way.AS_CPP else [])
            timings.append(
                Timing(
                    way=way,
                    num_ranks=num_ranks,
                    num_bytes=size,
                    with_check_s=on,
                    without_check_s=off,
                    plain_s=plain,
                    without_check_cpu_s=off_cpu,
                    plain_cpu_s=plain_cpu,
                    without_row_cpu_s=no_row_cpu,
                )
            )
    return CollectivesResult(timings=tuple(timings))


_Timed: TypeAlias = tuple[Sequence[float], Sequence[float]]  # seconds, and those of the processor
_NOTHING: _Timed = ((), ())
_NO_ROW = "as from C++, without a row in the ledger"


def _all_of(runs: Sequence[_Timed]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(s for seconds, _ in runs for s in seconds), tuple(s for _, processor in runs for s in processor)


def _ours(num_ranks: int, sizes: Sequence[int], num_calls: int, *, is_checked: bool) -> dict[tuple[str, int], _Timed]:
    import workbench as wb

    timed = functools.partial(seconds_per_call, num_calls=num_calls, num_batches=_NUM_BATCHES)
    found: dict[tuple[str, int], _Timed] = {}
    with wb.launch(num_ranks, check_collectives=is_checked) as cluster:
        for size, way in itertools.product(sizes, (Way.AGAIN,) if is_checked else Way):
            found[way, size] = cluster.run(timed, way, size)[0]
            if way is Way.AS_CPP:
                found[_NO_ROW, size] = cluster.run(_without_rows, timed, way, size)[0]
    return found


def _without_rows(timed: Callable[[Way, int], _Timed], way: Way, size: int) -> _Timed:
    """The same where the long way writes no row; runs in a rank."""
    from workbench.ranks.called import carrier

    interceptor: Any = carrier()
    interceptor._note = lambda *_: -1  # no switch of the package's: the ledger is always on
    try:
        return timed(way, size)
    finally:
        del interceptor._note


def _plain(num_ranks: int, sizes: Sequence[int], num_calls: int) -> dict[tuple[str, int], _Timed]:
    numbers = [str(n) for n in (num_calls, _NUM_BATCHES, *sizes)]
    seconds = run_peer(torchrun(num_ranks, "benchmarks.peers.torchrun_ranks", *numbers)).values["seconds"]
    return {(way, size): seconds[str(size)][way] for size in sizes for way in Way}
