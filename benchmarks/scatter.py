"""Giving completions back from the root to their ranks: packed, beside `scatter_object_list`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

from benchmarks.line import Line, Reach

__all__ = ["Job", "ScatterResult", "Timing", "measure"]

_HEAD_START_S = 0.02  # for the ranks that receive: in a rollout they have long been waiting when the engine is done


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds from the root's start, the others waiting, to the last rank's end, a number a repeat.

    Attributes:
        num_samples: completions of each prompt.
        has_logprobs: a logprob travels with each token.
        packed_s: `RootedRollout.scatter_completions`, with its checks.
        objects_s: `dist.scatter_object_list` of what engines return: a tuple a completion of token ids, text and logprobs, plain lists.
        packed_objects_s: `dist.scatter_object_list` of our own packed batches, cut beforehand.
    """

    num_ranks: int
    num_completions: int
    num_samples: int
    length_tokens: int
    has_logprobs: bool
    packed_s: tuple[float, ...]
    objects_s: tuple[float, ...]
    packed_objects_s: tuple[float, ...]

    def lines(self) -> list[Line]:
        ours, objects, packed = (1e3 * median(s) for s in (self.packed_s, self.objects_s, self.packed_objects_s))
        what = f"give back {self.num_completions:,} completions of {self.length_tokens} tokens to {self.num_ranks} ranks"
        what += f" ({self.num_samples} a prompt{', logprobs too' if self.has_logprobs else ''})"
        return [
            Line(what=what, unit="ms", ours=ours, theirs=objects, peer="scatter_object_list", reach=Reach(limit=1 / 5)),
            Line(what=what, unit="ms", ours=ours, theirs=packed, peer="the same, of our packed slices"),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScatterResult:
    timings: tuple[Timing, ...]

    def lines(self) -> list[Line]:
        return [line for timing in self.timings for line in timing.lines()]


def measure(
    *, num_ranks: int = 4, num_completions: int = 4096, num_samples: int = 8, length_tokens: int = 512, repeats: int = 21
) -> ScatterResult:
    """All ways in turns in one cluster, without and with logprobs; the first turn warms up."""
    import workbench as wb

    timings = []
    with wb.launch(num_ranks) as cluster:
        for has_logprobs in (False, True):
            job = Job(num_completions=num_completions, num_samples=num_samples, length_tokens=length_tokens, has_logprobs=has_logprobs)
            times = zip(*cluster.run(_give_back, job, repeats + 1), strict=True)
            ways = [tuple(max(end for _, end in turn) - turn[0][0] for turn in zip(*way, strict=True))[1:] for way in times]
            timings.append(Timing(num_ranks=num_ranks, **asdict(job), packed_s=ways[0], objects_s=ways[1], packed_objects_s=ways[2]))
    return ScatterResult(timings=tuple(timings))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is given back; see `Timing`."""

    num_completions: int
    num_samples: int
    length_tokens: int
    has_logprobs: bool


def _give_back(job: Job, repeats: int) -> list[list[tuple[float, float]]]:
    """In a rank: (start, end) of each way and repeat, [3][repeats]."""
    import torch.distributed as dist

    import workbench as wb
    from workbench.rollout.batch import select

    me = wb.current()
    rollout = wb.RootedRollout(me.group, None, scatter="scatter")
    batch, offsets = _made_up(job, me.world_size)
    is_root = me.rank == 0
    slices = [select(batch, low, high) for low, high in zip(offsets[:-1], offsets[1:], strict=True)] if is_root else None
    objects = [_as_lists(one) for one in slices] if slices else None

    def packed() -> Any:
        return rollout.scatter_completions(batch if is_root else None, offsets)

    def by_objects(parts: Any) -> Any:
        out: list[Any] = [None]
        dist.scatter_object_list(out, parts, src=0)
        return out[0]

    ways: tuple[Callable[[], Any], ...] = (packed, partial(by_objects, objects), partial(by_objects, slices))
    times: list[list[tuple[float, float]]] = [[] for _ in ways]
    for _ in range(repeats):
        for way, found in zip(ways, times, strict=True):
            dist.barrier()
            time.sleep(_HEAD_START_S if is_root else 0.0)
            start_s = time.monotonic()
            got = way()
            found.append((start_s, time.monotonic()))
            assert len(got) == job.num_completions // me.world_size
    return times


def _as_lists(batch: Any) -> list[tuple[Any, ...]]:
    """A tuple a completion, of Python's own lists and numbers, as engines return them."""
    starts = batch.offsets.tolist()
    logprobs = [None] * len(batch) if batch.logprobs is None else [batch.logprobs[a:b].tolist() for a, b in pairwise(starts)]
    return [(batch.tokens_of(i).tolist(), batch.texts[i], logprobs[i]) for i in range(len(batch))]


def _made_up(job: Job, num_ranks: int) -> tuple[Any, list[int]]:
    """A batch of equally many prompts a rank, and where each rank's prompts begin."""
    import numpy as np

    from workbench.records import FinishReason, Sampling
    from workbench.rollout.batch import Completion, pack_completions
    from workbench.rollout.engine import Origin
    from workbench.rollout.requests import expand

    each = job.num_completions // job.num_samples // num_ranks
    prompts = [f"{rank}+{index}=" for rank in range(num_ranks) for index in range(each)]
    origins = [Origin(rank=rank, index=index) for rank in range(num_ranks) for index in range(each)]
    requests = expand(prompts, Sampling(n=job.num_samples, seed=0), origins=origins)
    numbers, text = np.random.default_rng(0), "x" * job.length_tokens
    tokens = numbers.integers(0, 100_000, (len(requests), job.length_tokens)).tolist()
    logprobs = (-numbers.random(job.length_tokens)).tolist() if job.has_logprobs else None
    completions = [Completion(tokens[i], text, FinishReason.STOP, r.prompt_hash, logprobs) for i, r in enumerate(requests)]
    batch = pack_completions(
        prompts, requests, completions, num_prompt_tokens=[8] * len(prompts), weight_version=0, with_logprobs=job.has_logprobs
    )
    return batch, [each * rank for rank in range(num_ranks + 1)]
