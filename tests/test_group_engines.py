"""Our groups in ranks that hold real vLLM engines, made by hand: one of two tensor-parallel ranks, and one in each rank."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest

import workbench as wb

KV_BYTES = 2**25
PROMPTS = [["1+1=", "2+3=", "7+1="], ["4+4="]]  # ragged: three of rank 0, one of rank 1


def ours(number: int) -> list[Any]:
    """Some of each kind of operation; equal on both ranks."""
    import torch

    g = wb.current().group
    values = {"h": torch.arange(3000.0) * number, "n": number} if g.rank == 1 else None
    received = g.broadcast_tensor_dict(values, src=1)
    assert received is not None
    g.barrier()
    return [
        g.all_reduce(torch.full((4,), float(number + g.rank))).tolist(),
        g.all_gatherv(torch.full((g.rank + 1,), number)).tolist(),
        g.all_gather_object(("x" * 3000 * g.rank, number))[1][1],
        received["h"].sum().item(),
        received["n"],
    ]


def expected(number: int) -> list[Any]:
    return [[2.0 * number + 1] * 4, [number] * 3, number, 2999 * 1500.0 * number, number]


def tokens(batch: wb.RolloutBatch) -> list[list[int]]:
    return [batch.tokens[start:end].tolist() for start, end in pairwise(batch.offsets.tolist())]


def tensor_parallel(prompts: list[list[str]]) -> dict[str, Any]:
    """An engine over both ranks in grouped mode; vLLM's own groups and ours take turns."""
    import torch

    here, seen = wb.current(), [ours(1)]
    engine = wb.VLLMEngine("tiny", tp=2, process_group=here.group, kv_cache_bytes=KV_BYTES)
    try:
        from vllm.distributed.parallel_state import get_tp_group

        theirs, sums = get_tp_group(), []
        rollout, batches = wb.GroupedRollout(here.group, engine), []
        for step in (2, 3):
            seen.append(ours(step))
            batches.append(rollout.generate(prompts[here.rank], wb.Sampling(max_tokens=6, temperature=0.0)))
            sums.append([theirs.all_reduce(torch.ones(2)).tolist(), theirs.broadcast_object(here.rank, src=0), theirs.world_size])
            sums.append(here.group.all_reduce(torch.ones(2)).tolist())
        asleep = [engine.sleep(1).level, *ours(4)]
        engine.wake_up()
        batches.append(rollout.generate(prompts[here.rank], wb.Sampling(max_tokens=6, temperature=0.0)))
    finally:
        engine.close()
    seen.append(ours(5))
    return {"seen": seen, "sums": sums, "asleep": asleep, "texts": [b.texts for b in batches], "tokens": [tokens(b) for b in batches]}


def independent(prompts: list[str]) -> dict[str, Any]:
    """An engine in each rank, of its own world; ours before, between and after."""
    seen = [ours(1)]
    engine = wb.VLLMEngine("tiny", kv_cache_bytes=KV_BYTES)
    try:
        sampling = wb.Sampling(n=2, max_tokens=6, seed=7)
        batch = engine.generate(prompts, sampling)
        seen.append(ours(2))
        gathered = wb.current().group.all_gather_object(tokens(batch))
        again = tokens(engine.generate(prompts, sampling))
    finally:
        engine.close()
    return {"seen": [*seen, ours(3)], "gathered": gathered, "again": again}


def formed_beside_one() -> list[Any]:
    """Groups made and destroyed while an engine lives."""
    import torch

    engine = wb.VLLMEngine("tiny", kv_cache_bytes=KV_BYTES)
    made = [wb.Group.create([1, 0], f"pair {n}") for n in range(3)]
    summed = [g.all_reduce(torch.ones(1)).item() for g in made]
    batch = engine.generate(["1+1="], wb.Sampling(max_tokens=4, temperature=0.0))
    for g in made:
        g.destroy()
    after = engine.generate(["1+1="], wb.Sampling(max_tokens=4, temperature=0.0))
    engine.close()
    return [summed, tokens(batch) == tokens(after), made[0].rank_in_group]


@pytest.mark.slow
def test_our_groups_work_before_between_and_after_the_calls_of_engines_in_ranks() -> None:
    """One test, for vLLM is imported once: an engine of two tensor-parallel ranks, one in each rank, groups made beside one."""
    with wb.launch(2) as cluster:
        for rank, one in enumerate(cluster.run(tensor_parallel, PROMPTS, timeout_s=200)):
            assert one["seen"] == [expected(n) for n in (1, 2, 3, 5)] and one["asleep"] == [1, *expected(4)]
            assert one["sums"] == [[[2.0, 2.0], 0, 2], [2.0, 2.0]] * 2
            first, again, awake = one["tokens"]
            assert first == again == awake and len(first) == len(PROMPTS[rank]) and all(ids for ids in first)
        for one in cluster.run(independent, ["1+1=", "2+3="], timeout_s=200):
            assert one["seen"] == [expected(n) for n in (1, 2, 3)]
            assert one["gathered"][0] == one["gathered"][1] == one["again"] and len(one["again"]) == 4
        assert cluster.run(formed_beside_one, timeout_s=200) == [[[2.0] * 3, True, 1], [[2.0] * 3, True, 0]]
        assert cluster.execute("group.all_gather_object(rank)")[0].result_text == "[0, 1]" and cluster.generation == 0
        stopped_in_generate(cluster)  # and its files go with the cluster


LEFT_OPEN = f"engine = wb.VLLMEngine('tiny', tp=2, process_group=group, kv_cache_bytes={KV_BYTES}); kept = rank"
GENERATE = "engine.generate(['1+1='], wb.Sampling(max_tokens=8))"


def stopped_in_generate(cluster: Any) -> None:
    """A stop reaches a rank that waits for its peer inside vLLM; that engine is out of step and says so."""
    cluster.execute(LEFT_OPEN, timeout_s=200)
    pids = [cluster.pid(rank) for rank in range(2)]
    handle = cluster.execute(f"while True: {GENERATE}", block=False)
    time.sleep(2.0)
    cluster.interrupt()
    with pytest.raises(wb.RankInterrupted):
        handle.result(timeout_s=20)
    assert [cluster.pid(rank) for rank in range(2)] == pids and cluster.pull("kept") == [0, 1]
    with pytest.raises(wb.RankFailed, match="EngineError"):
        cluster.execute(GENERATE, timeout_s=20)
