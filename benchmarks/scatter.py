"""Giving completions back from the root to their ranks: packed, beside `scatter_object_list`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from benchmarks.line import Line, Reach

__all__ = ["ScatterResult", "measure"]

_HEAD_START_S = 0.02  # for the ranks that receive: in a rollout they have long been waiting when the engine is done


@dataclass(frozen=True, slots=True, kw_only=True)
class ScatterResult:
    """Seconds from the root's start, the others waiting, to the last rank's end, a number a repeat.

    Attributes:
        packed_s: `RootedRollout.scatter_completions`, with its checks.
        objects_s: `dist.scatter_object_list` of what engines return: per rank a list of (token ids as a list, text).
        packed_objects_s: `dist.scatter_object_list` of our own packed batches, cut beforehand.
    """

    num_ranks: int
    num_completions: int
    length_tokens: int
    packed_s: tuple[float, ...]
    objects_s: tuple[float, ...]
    packed_objects_s: tuple[float, ...]

    def lines(self) -> list[Line]:
        ours, objects, packed = (1e3 * median(s) for s in (self.packed_s, self.objects_s, self.packed_objects_s))
        what = f"give back {self.num_completions:,} completions of {self.length_tokens} tokens to {self.num_ranks} ranks"
        return [
            Line(what=what, unit="ms", ours=ours, theirs=objects, peer="scatter_object_list", reach=Reach(limit=1 / 5)),
            Line(what=what, unit="ms", ours=ours, theirs=packed, peer="scatter_object_list of our packed slices"),
        ]


def measure(*, num_ranks: int = 4, num_completions: int = 4096, length_tokens: int = 512, repeats: int = 21) -> ScatterResult:
    """All three ways in turns in one cluster; the first of each warms up."""
    import workbench as wb

    with wb.launch(num_ranks) as cluster:
        times = cluster.run(_give_back, num_completions, length_tokens, repeats + 1)
    ways = [
        [max(end for _, end in turn) - turn[0][0] for turn in zip(*way, strict=True)][1:]
        for way in zip(*times, strict=True)
    ]
    return ScatterResult(
        num_ranks=num_ranks,
        num_completions=num_completions,
        length_tokens=length_tokens,
        packed_s=tuple(ways[0]),
        objects_s=tuple(ways[1]),
        packed_objects_s=tuple(ways[2]),
    )


def _give_back(num_completions: int, length_tokens: int, repeats: int) -> list[list[tuple[float, float]]]:
    """In a rank: (start, end) of each way and repeat, [3][repeats]."""
    import torch.distributed as dist

    import workbench as wb
    from workbench.rollout.batch import select

    me = wb.current()
    rollout = wb.RootedRollout(me.group, None, scatter="scatter")
    batch, offsets = _made_up(num_completions, length_tokens, me.world_size)
    is_root = me.rank == 0
    cuts = list(zip(offsets[:-1], offsets[1:], strict=True))
    slices = [select(batch, low, high) for low, high in cuts] if is_root else None
    objects = [[(one.tokens_of(i).tolist(), one.texts[i]) for i in range(len(one))] for one in slices] if slices else None

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
            assert len(got) == num_completions // me.world_size
    return times


def _made_up(num_completions: int, length_tokens: int, num_ranks: int) -> tuple[Any, list[int]]:
    """A batch of equally many prompts a rank, one completion each, and where each rank's prompts begin."""
    import numpy as np

    from workbench.records import FinishReason, Sampling
    from workbench.rollout.batch import Completion, pack_completions
    from workbench.rollout.engine import Origin
    from workbench.rollout.requests import expand

    each = num_completions // num_ranks
    prompts = [f"{rank}+{index}=" for rank in range(num_ranks) for index in range(each)]
    origins = [Origin(rank=rank, index=index) for rank in range(num_ranks) for index in range(each)]
    requests = expand(prompts, Sampling(seed=0), origins=origins)
    tokens = np.random.default_rng(0).integers(0, 100_000, (len(requests), length_tokens)).tolist()
    text = "x" * length_tokens
    completions = [Completion(tokens[i], text, FinishReason.STOP, request.prompt_hash) for i, request in enumerate(requests)]
    batch = pack_completions(prompts, requests, completions, num_prompt_tokens=[8] * len(prompts), weight_version=0, with_logprobs=False)
    return batch, [each * rank for rank in range(num_ranks + 1)]
