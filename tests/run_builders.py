"""Records of made-up runs, built by keyword: what tests of tables, folders and figures start from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from workbench.records import FinishReason, MemorySample, Prompt, RolloutBatch, SleepReport, Span
from workbench.run import Run

MIB = 2**20
SPANS = (("wake_up", 0.0, 0.3), ("gather", 0.3, 0.35), ("generate", 0.35, 1.6), ("scatter", 1.6, 1.65), ("sleep", 1.65, 1.9))


def make_batch(
    *,
    rank: int = 0,
    prompts: Sequence[Prompt] = ("1+1=",),
    lengths: Sequence[Sequence[int]] = ((3,),),
    limit: int = 64,
    with_logprobs: bool = True,
    version: int = 0,
    failed: Sequence[int] = (),
    metadata: tuple[object, ...] | None = None,
) -> RolloutBatch:
    """A batch whose prompt i has completions of `lengths[i]` tokens; those at `limit` are cut, those numbered in `failed` failed."""
    flat = [0 if k in failed else n for k, n in enumerate(n for of_prompt in lengths for n in of_prompt)]
    owner = [i for i, of_prompt in enumerate(lengths) for _ in of_prompt]
    num_tokens, rng = sum(flat), np.random.default_rng([rank, len(flat), version])
    codes = [FinishReason.ERROR if k in failed else FinishReason.LENGTH if n >= limit else FinishReason.STOP for k, n in enumerate(flat)]
    return RolloutBatch(
        prompts=tuple(prompts),
        texts=tuple("" if k in failed else f"text {rank}.{k} ünï" for k in range(len(flat))),
        tokens=rng.integers(0, 2**31 - 1, num_tokens).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(flat)]).astype(np.int64),
        logprobs=-rng.random(num_tokens).astype(np.float32) if with_logprobs else None,
        finish_codes=np.array(codes, np.int8),
        weight_versions=np.full(len(flat), version, np.int64),
        prompt_index=np.array(owner, np.int32),
        sample_index=np.array([s for of_prompt in lengths for s in range(len(of_prompt))], np.int32),
        origin_ranks=np.full(len(flat), rank, np.int32),
        origin_indices=np.array(owner, np.int32),
        prompt_hashes=rng.integers(0, 2**64 - 1, len(flat), dtype=np.uint64),
        num_prompt_tokens=np.arange(4, 4 + len(prompts), dtype=np.int32),
        errors=tuple("prompt too long" if k in failed else None for k in range(len(flat))) if failed else (),
        metadata=metadata,
    )


def make_spans(*, num_ranks: int, num_steps: int = 2, start_s: float = 0.0, period_s: float = 2.2) -> list[Span]:
    """The rooted pipeline: the engine (rank -1) wakes, generates and sleeps; ranks gather and scatter."""
    spans = []
    for step in range(num_steps):
        for name, low, high in SPANS:
            ranks = [-1] if name in ("wake_up", "generate", "sleep") else range(num_ranks)
            at = start_s + step * period_s
            spans += [Span(step=step, rank=r, span=name, start_s=at + low, end_s=at + high, num_bytes=100 + 8 * max(r, 0)) for r in ranks]
    return spans


def make_memory(*, num_ranks: int, duration_s: float = 4.2, start_s: float = 0.0, engine_mib: int = 900) -> list[MemorySample]:
    """10 Hz; the engine holds `engine_mib` while awake and a third of it while it sleeps."""
    samples = []
    for tick in range(int(duration_s * 10)):
        time_s = tick / 10
        awake = 0.3 <= time_s % 2.2 <= 1.8
        who = [(-1, 100, "engine", engine_mib if awake else engine_mib // 3), (-1, 99, "driver", 180)]
        who += [(rank, 200 + rank, "rank", 20 + rank % 5) for rank in range(num_ranks)]
        samples += [
            MemorySample(
                time_s=start_s + time_s, rank=rank, pid=pid, process=name, rss_bytes=(mib + 150) * MIB, pss_bytes=mib * MIB,
                device_used_bytes=0, phase="generate" if awake else "asleep",
            )
            for rank, pid, name, mib in who
        ]  # fmt: skip
    return samples


def make_sleep(*, step: int = 0, wake_s: float = 0.3) -> SleepReport:
    return SleepReport(
        step=step, rank=-1, level=1, weights_bytes=400 * MIB, kv_cache_bytes=200 * MIB, freed_bytes=590 * MIB,
        regained_bytes=0 if np.isnan(wake_s) else 590 * MIB, sleep_s=0.25, wake_s=wake_s,
    )  # fmt: skip


def make_run(*, num_ranks: int = 4, num_steps: int = 2, start_s: float = 1000.0, limit: int = 64) -> Run:
    """A ragged run: rank r has r % 4 prompts (rank 0 of several has none) with four completions each, a long tail, some cut at `limit`."""
    batches = {}
    for step in range(num_steps):
        rng = np.random.default_rng(step)
        counts = [rank % 4 if num_ranks > 1 else 8 for rank in range(num_ranks)]
        batches[step] = {
            rank: make_batch(
                rank=rank,
                version=step,
                limit=limit,
                prompts=[f"{rank}+{i}=" for i in range(count)],
                lengths=[np.minimum(rng.geometric(0.04, 4), limit).tolist() for _ in range(count)],
            )
            for rank, count in enumerate(counts)
        }
    return Run(
        batches=batches,
        spans=make_spans(num_ranks=num_ranks, num_steps=num_steps, start_s=start_s),
        memory=make_memory(num_ranks=num_ranks, start_s=start_s),
        sleeps=[make_sleep(step=step, wake_s=0.3 if step + 1 < num_steps else float("nan")) for step in range(num_steps)],
        marks=[Span(step=0, rank=-1, span="mark", start_s=start_s + 2.05, end_s=start_s + 2.05, label="after training")],
        manifest={"model": "tiny", "mode": "rooted", "seed": 0, "sampling": {"n": 4, "stop": ("\n",)}},
        start_s=start_s,
    )
