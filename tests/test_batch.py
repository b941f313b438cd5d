"""The packed layout: what goes in comes out, and cutting and joining undo each other."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine

from workbench.records import FinishReason, Prompt, RolloutBatch, Sampling
from workbench.rollout.batch import Completion, concat, empty_batch, pack_completions, select
from workbench.rollout.bisect import generate_bisected
from workbench.rollout.engine import Origin
from workbench.rollout.requests import expand


def assert_equal(one: RolloutBatch, two: RolloutBatch) -> None:
    for f in fields(RolloutBatch):
        a, b = getattr(one, f.name), getattr(two, f.name)
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b, err_msg=f.name)
            assert a.dtype == b.dtype, f.name
        else:
            assert a == b, f.name


def batch_of(counts: list[int], *, logprobs: bool = True) -> RolloutBatch:
    sampling = Sampling(max_tokens=9, seed=1, logprobs=logprobs)
    return ScriptedEngine().generate([f"{i}+" for i in range(len(counts))], sampling, num_samples=counts)


def test_packing_keeps_tokens_texts_and_reasons() -> None:
    requests = expand(["ab", [5, 6]], Sampling(), num_samples=[2, 1], origins=[Origin(rank=1, index=4), Origin(rank=2, index=0)])
    done = [
        Completion([7, 8, 9], "xyz", FinishReason.LENGTH, requests[0].prompt_hash, [-0.5, None, -1.5]),
        Completion([], "", FinishReason.ERROR, requests[1].prompt_hash, None, "choked"),
        Completion([3], "q", FinishReason.STOP, requests[2].prompt_hash, [-0.25]),
    ]
    batch = pack_completions(["ab", [5, 6]], requests, done, num_prompt_tokens=[2, 2], weight_version=3, with_logprobs=True)
    assert batch.tokens.tolist() == [7, 8, 9, 3] and batch.tokens.dtype == np.int32
    assert batch.offsets.tolist() == [0, 3, 3, 4] and batch.offsets.dtype == np.int64
    assert batch.logprobs is not None and batch.logprobs.dtype == np.float32
    np.testing.assert_array_equal(batch.logprobs, np.array([-0.5, np.nan, -1.5, -0.25], np.float32))
    assert batch.finish_reasons == ("length", "error", "stop") and batch.errors == (None, "choked", None)
    assert batch.prompt_index.tolist() == [0, 0, 1] and batch.sample_index.tolist() == [0, 1, 0]
    assert batch.origin_ranks.tolist() == [1, 1, 2] and batch.origin_indices.tolist() == [4, 4, 0]
    assert batch.weight_versions.tolist() == [3, 3, 3] and batch.prompt_hashes.tolist() == [r.prompt_hash for r in requests]


def test_a_batch_is_shown_in_a_few_lines() -> None:
    prompts: list[Prompt] = ["ab", list(range(20)), "c" * 99]
    requests = expand(prompts, Sampling(), num_samples=[2, 1, 4])
    done = [Completion([7, 8], "xyz", FinishReason.LENGTH, r.prompt_hash) for r in requests]
    done[1] = Completion([], "", FinishReason.ERROR, requests[1].prompt_hash, error="choked")
    batch = pack_completions(prompts, requests, done, num_prompt_tokens=[2, 20, 99], weight_version=0, with_logprobs=False)
    head, *lines = repr(batch).splitlines()
    assert head == "RolloutBatch: 7 completions of 3 prompts, 12 tokens, 6 cut at the limit, 1 failed"
    assert lines[:3] == ["  'ab' -> 'xyz'", "  'ab' -> failed: choked", "  [0, 1, 2, 3, 4, 5, 6, 7, ...] -> 'xyz'"]
    assert lines[3].startswith("  'ccc") and len(lines[3]) < 70 and lines[4:] == ["  ... and 3 more"]
    assert repr(empty_batch()) == "RolloutBatch: 0 completions of 0 prompts, 0 tokens, 0 cut at the limit"


def test_a_missing_completion_is_told() -> None:
    with pytest.raises(ValueError, match="0 completions for 1 requests"):
        pack_completions(["a"], expand(["a"], Sampling()), [], num_prompt_tokens=[1], weight_version=0, with_logprobs=False)


@given(st.lists(st.integers(0, 3), max_size=7), st.data(), st.booleans())
def test_cutting_and_joining_undo_each_other(counts: list[int], data: st.DataObject, logprobs: bool) -> None:
    batch = batch_of(counts, logprobs=logprobs)
    batch = replace(batch, metadata=tuple({"n": i} for i in range(len(batch))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(counts)), max_size=4)))
    bounds = [0, *cuts, len(counts)]
    parts = [select(batch, a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    assert [len(p.prompts) for p in parts] == np.diff(bounds).tolist()
    assert_equal(concat(parts), batch)


def test_joining_nothing_is_an_empty_batch() -> None:
    assert len(concat([])) == 0 and len(empty_batch(["a"]).prompts) == 1


def test_a_bad_prompt_is_found_by_halving_and_the_others_stay_whole() -> None:
    prompts = [f"{i}+1=" for i in range(16)]
    sampling = Sampling(n=2, max_tokens=8, seed=3, logprobs=True)
    whole = ScriptedEngine().generate(prompts, sampling)
    engine = ScriptedEngine(fails_on="11+")
    batch = generate_bisected(engine, prompts, sampling)
    assert [i for i, error in enumerate(batch.errors) if error] == [22, 23]
    assert "chokes" in str(batch.errors[22]) and batch.finish_reasons[22] == "error" and batch.lengths[22] == 0
    assert_equal(select(batch, 0, 11), select(whole, 0, 11))
    assert_equal(select(batch, 12, 16), select(whole, 12, 16))
    assert len(engine.calls) == 9  # 16, then two halves at each of four levels


def test_a_sleeping_engine_is_not_bisected() -> None:
    engine = ScriptedEngine()
    engine.sleep(1)
    with pytest.raises(Exception, match="wake_up"):
        generate_bisected(engine, ["a", "b"], Sampling())
    assert engine.calls == []
