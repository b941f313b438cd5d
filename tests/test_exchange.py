"""Buffers between real gloo ranks, and what is packed into them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scripted_engine import ScriptedEngine
from worlds import run_world

import workbench as wb
from workbench.rollout.batch import empty_batch, select
from workbench.rollout.exchange import SIZES, Exchange, Phase
from workbench.rollout.packing import pack_batch, pack_prompts, unpack_batch, unpack_prompts

PROMPTS: list[Any] = ["1+1=", [1, 2, 300_000], "", "été 数 \ud800", {"prompt": "<image> a", "images": [np.eye(2)]}]


def batch_of(prompts, **options):
    return ScriptedEngine().generate(prompts, wb.Sampling(n=2, seed=1, max_tokens=9, **options))


def assert_same(one, two):
    for name in one.__dataclass_fields__:
        left, right = getattr(one, name), getattr(two, name)
        if isinstance(left, np.ndarray):
            assert right.dtype == left.dtype and np.array_equal(left, right, equal_nan=left.dtype.kind == "f"), name
        elif name != "prompts":
            assert left == right, name


def test_prompts_come_back_as_they_were():
    again: list[Any] = unpack_prompts(pack_prompts(PROMPTS))
    assert again[:4] == PROMPTS[:4] and [type(i) for i in again[1]] == [int] * 3
    assert again[4]["prompt"] == "<image> a" and np.array_equal(again[4]["images"][0], np.eye(2))
    assert unpack_prompts(pack_prompts([])) == []


@pytest.mark.parametrize("logprobs", [True, False])
def test_a_batch_comes_back_whole(logprobs):
    batch = batch_of(PROMPTS[:4], logprobs=logprobs)
    if logprobs:
        batch.logprobs[0] = np.nan
    errors = tuple("bad é" if i == 3 else None for i in range(len(batch)))
    batch = replace(batch, errors=errors, metadata=tuple({"score": i} for i in range(len(batch))))
    again = unpack_batch(pack_batch(batch))
    assert_same(batch, again)
    assert again.prompts == batch.prompts


def test_slices_and_empty_batches_come_back_whole():
    batch = batch_of(["a", "b", "c"], logprobs=True)
    part = select(batch, 1, 2)
    assert_same(part, unpack_batch(pack_batch(part)))
    for empty in (empty_batch(), empty_batch(["a"], with_logprobs=True), select(batch, 1, 1)):
        assert_same(empty, unpack_batch(pack_batch(empty)))


@pytest.mark.parametrize("damage", ["cut", "longer", "magic", "count", "nothing"])
def test_a_damaged_buffer_is_refused_whole(damage):
    buffer = pack_batch(batch_of(["a"])).copy()
    if damage == "magic":
        buffer[:8] = 0
    if damage == "count":
        buffer.view(np.int64)[1] = 2**40
    buffer = {"cut": buffer[:-8], "longer": np.concatenate([buffer, buffer[:8]]), "nothing": buffer[:0]}.get(damage, buffer)
    with pytest.raises(wb.GroupError, match=f"a message of {len(buffer)} bytes between ranks is damaged.*\n.*head.*\n.*group of its own"):
        unpack_batch(buffer)


def test_pickled_parts_are_not_read_without_the_world_s_key(monkeypatch):
    monkeypatch.setenv("WORKBENCH_KEY", "one")
    packed = pack_prompts([{"prompt": "a"}])
    assert unpack_prompts(packed) == [{"prompt": "a"}]
    monkeypatch.setenv("WORKBENCH_KEY", "another")
    with pytest.raises(wb.GroupError, match="not unpickled"):
        unpack_prompts(packed)


def test_metadata_that_cannot_be_pickled_is_told():
    batch = replace(batch_of(["a"]), metadata=(iter([]).__class__, (i for i in range(2))))
    with pytest.raises(ValueError, match="cannot be sent to other ranks"):
        pack_batch(batch)


def test_metadata_of_another_number_is_told():
    batch = replace(batch_of(["a"]), metadata=(1,))
    with pytest.raises(wb.EngineError, match="1 metadata came back with 2 completions\npass one a completion"):
        unpack_batch(pack_batch(batch))


def everything(rank):
    """Every operation once: ragged sizes, an empty buffer, a root that is not 0."""
    import torch.distributed as dist

    exchange = Exchange(dist.group.WORLD)
    size = exchange.size
    own = np.arange(rank * 5, dtype=np.uint8)
    sizes = np.array([r * 5 for r in range(size)])
    root = size - 1
    parts = [np.full(r + 1, r, np.uint8) for r in range(size)] if rank == root else None
    table = exchange.meet(Phase.GATHER, rank, -rank, buffers=parts)
    met, told = table.tolist(), table[root, SIZES]
    gathered = exchange.gather_buffers(own, sizes, root)
    alike = [b.tolist() for b in exchange.all_gather_buffers(own, sizes)]
    scattered = exchange.scatter_buffers(parts, told, root).tolist()
    joined = exchange.broadcast_buffers(parts, told, root).tolist()
    return met, None if gathered is None else [b.tolist() for b in gathered], alike, scattered, joined, exchange.num_bytes


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_buffers_reach_the_ranks_they_are_for(world_size):
    told = run_world(world_size, everything)
    buffers = [list(range(r * 5)) for r in range(world_size)]
    for rank, (met, gathered, alike, scattered, joined, num_bytes) in enumerate(told):
        sizes = [r + 1 for r in range(world_size)]
        assert met == [[r, -r, 0, 0, 0, *(sizes if r == world_size - 1 else [0] * world_size)] for r in range(world_size)]
        assert gathered == (buffers if rank == world_size - 1 else None)
        assert alike == buffers
        assert scattered == joined == [rank] * (rank + 1)
        assert (num_bytes > 0) == (world_size > 1)


def failing(rank):
    import torch.distributed as dist

    exchange = Exchange(dist.group.WORLD)
    texts: list[Any] = []
    for errors in (
        {2: ValueError("two é")},
        {1: wb.EngineError("one\nmore"), 3: KeyError("three")},
        {3: KeyError("x")},
        {0: wb.StaleGroupError("old")},
    ):
        try:
            exchange.meet(Phase.SCATTER, error=errors.get(rank))
        except (ValueError, wb.WorkbenchError) as error:
            texts.append((type(error).__name__, str(error), error.__cause__ is errors.get(rank)))
    try:
        exchange.meet(Phase.SCATTER if rank == 1 else Phase.GATHER)
    except ValueError as error:
        texts.append(str(error))
    return texts, exchange.meet(Phase.GATHER, 7)[:, 0].tolist()


def test_one_error_is_the_same_error_on_every_rank_and_the_group_goes_on():
    for texts, after in run_world(4, failing):
        assert texts[:4] == [
            ("ValueError", "two é", True),
            ("EngineError", "one\nmore\nalso rank 3: KeyError: 'three'", True),
            ("EngineError", "KeyError: 'x'", True),
            ("StaleGroupError", "old", True),
        ]
        assert texts[4].splitlines() == [
            "ranks of one rollout are in different steps",
            "seen: rank 0: gather_prompts; rank 1: scatter_completions; rank 2: gather_prompts; rank 3: gather_prompts",
            "every rank of the group must call gather_prompts, scatter_completions and generate in the same order",
        ]
        assert after == [7] * 4


def test_what_is_no_group_is_told():
    for what in (3, "world", -100):
        with pytest.raises(ValueError, match="a rollout cannot run over .*\nneeded: a Group, an accelerate Accelerator.*\npass wb.current"):
            Exchange(what)
