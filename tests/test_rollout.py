"""Rollouts over ranks with real vLLM: prompts in each form, ragged and empty ranks, what each rank gets back, what a run leaves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from workbench.ranks.cluster import Cluster
from workbench.rollout.handle import EngineHandle

GREEDY = wb.Sampling(max_tokens=24, temperature=0.0)
KV_CACHE_BYTES = 64 * 2**20
RAGGED = [["1+1=", "20+30="], [], ["7+8="], ["4+4=", "12+30=", "6+6="]]
FLAT = [prompt for prompts in RAGGED for prompt in prompts]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(4) as made:
        yield made


@pytest.fixture(scope="module")
def engine(cluster) -> EngineHandle:
    return wb.start_engine(cluster, model="tiny", kv_cache_bytes=KV_CACHE_BYTES)


@pytest.fixture(scope="module")
def expected(engine) -> dict[str, str]:
    """What the engine itself completes each prompt with."""
    return dict(zip(FLAT, engine.generate(FLAT, GREEDY).texts, strict=True))


def texts(run: wb.Run) -> list[tuple[int, str, str]]:
    frame = run.completions.sort_values(["origin_rank", "prompt_index", "sample_index"])
    return list(zip(frame.origin_rank, frame.prompt, frame.text, strict=True))


def roll(cluster: Cluster, prompts: object, engine: EngineHandle, **options: object) -> wb.Run:
    return wb.rollout(cluster, prompts, engine=engine, **{"sampling": GREEDY, "sleep_level": None, "keep": False, **options})


def test_each_rank_gets_its_own_completions_back(cluster, engine, expected):
    run = roll(cluster, RAGGED, engine)
    assert texts(run) == [(rank, prompt, expected[prompt]) for rank, prompts in enumerate(RAGGED) for prompt in prompts]
    for rank, (prompts, found) in enumerate(cluster.pull("(batch.prompts, batch.texts)")):
        assert list(prompts) == RAGGED[rank] and list(found) == list(run.batch(rank).texts) == [expected[p] for p in RAGGED[rank]]


def test_a_flat_list_is_cut_in_blocks_the_first_ranks_one_longer(cluster, engine, expected):
    assert texts(roll(cluster, FLAT, engine)) == [(rank, p, expected[p]) for rank, p in zip([0, 0, 1, 1, 2, 3], FLAT, strict=True)]


def test_prompts_may_live_on_the_ranks(cluster, engine, expected):
    cluster.execute(f"questions = {RAGGED!r}[rank]")
    by_name = roll(cluster, "questions", engine)

    def give():
        return [["1+1="], [], ["7+8="], []][wb.current().rank]

    assert texts(by_name) == texts(roll(cluster, RAGGED, engine))
    assert texts(roll(cluster, give, engine)) == [(0, "1+1=", expected["1+1="]), (2, "7+8=", expected["7+8="])]


def test_token_ids_are_prompts_too(cluster, engine):
    run = roll(cluster, [[[5, 6, 7]], [], [[5, 6, 7], "1+1="], []], engine)
    frame = run.completions
    ids = frame[frame.prompt_index == 0]
    assert len(frame) == 3 and ids.text.nunique() == 1 and cluster.pull("batch.prompts[0]", ranks=[0, 2]) == [[5, 6, 7]] * 2


def test_counts_per_prompt_zero_included(cluster, engine):
    run = roll(cluster, RAGGED, engine, num_samples=[[2, 0], [], [1], [0, 3, 1]], sampling=wb.Sampling(max_tokens=8, seed=1))
    counts = run.completions.groupby(["origin_rank", "prompt_index"]).size().to_dict()
    assert counts == {(0, 0): 2, (2, 0): 1, (3, 1): 3, (3, 2): 1}
    assert [len(run.batch(r).prompts) for r in range(4)] == [2, 0, 1, 3]
    again = roll(cluster, RAGGED, engine, num_samples=[[2, 0], [], [1], [0, 3, 1]], sampling=wb.Sampling(max_tokens=8, seed=1))
    assert texts(again) == texts(run)


def test_no_prompts_at_all_are_a_rollout_too(cluster, engine):
    run = roll(cluster, [[], [], [], []], engine)
    assert len(run.completions) == 0 and all(len(run.batch(r)) == 0 for r in range(4))


@pytest.mark.parametrize("scatter", ["scatter", "broadcast"])
def test_the_way_back_is_chosen_and_recorded(cluster, engine, scatter):
    run = roll(cluster, RAGGED, engine, scatter=scatter)
    spans = run.timeline
    assert {"gather", "generate", "scatter"} <= set(spans.span) and (spans.end_s >= spans.start_s).all() and (spans.start_s >= 0).all()
    back = spans[spans.span == "scatter"].set_index("rank").num_bytes
    others = back.loc[[1, 3]]
    assert others[3] > others[1] if scatter == "scatter" else others[3] == others[1]  # rank 1 has no prompts


def test_the_way_back_may_stand_in_the_environment(monkeypatch):
    monkeypatch.setenv("WORKBENCH_SCATTER", "broadcast")  # ranks have the environment of their launch
    with wb.launch(2) as cluster, wb.start_engine(cluster, backend="hf") as engine:
        back = roll(cluster, [["1+1=", "7+8="], []], engine).timeline
        by_rank = back[back.span == "scatter"].set_index("rank").num_bytes
        assert by_rank[1] > 100  # the empty rank hears of both completions
        cluster.execute("import os; os.environ['WORKBENCH_SCATTER'] = 'scater'")
        with pytest.raises(ValueError, match="scater"):
            roll(cluster, [["1+1="], []], engine)


@pytest.mark.parametrize(
    "prompts, options, told",
    [
        ("nowhere", {}, "nowhere"),
        ("not a name", {}, "not a name"),
        ([["1+1="]], {}, "4"),
        ([[1.5], [], [], []], {}, "1.5"),
        (FLAT, {"num_samples": [1, 2]}, "num_samples"),
        (FLAT, {"num_steps": 0}, "num_steps is 0; it must be an int of at least 1"),
        (FLAT, {"sleep_level": 3}, "sleep_level is 3; it must be one of None, 0, 1, 2"),
        (FLAT, {"scatter": "scater"}, "scatter is 'scater'; it must be one of None, 'scatter', 'broadcast'"),
        (FLAT, {"on_error": "ignore"}, "on_error is 'ignore'; it must be one of 'raise', 'keep'"),
        (lambda: 5, {}, "5"),
    ],
)
def test_prompts_that_cannot_be_are_told_and_harm_nothing(cluster, engine, prompts, options, told):
    with pytest.raises(ValueError) as caught:
        roll(cluster, prompts, engine, **options)
    assert told in str(caught.value)
    assert engine.status == "awake" and cluster.execute("group.barrier(); 1")[3].result_text == "1"


def test_a_name_that_ranks_do_not_have_starts_no_engine(cluster):
    started = time.monotonic()
    with pytest.raises(ValueError, match="rank 0 has no variable 'nowhere', named by prompts"):
        wb.rollout(cluster, "nowhere")
    assert time.monotonic() - started < 2  # an engine takes seconds


@pytest.mark.parametrize(
    "options, told",
    [
        ({"max_tokens": 5, "n": 2}, "max_tokens is part of the sampling; pass sampling=wb.Sampling(max_tokens=5, n=2)"),
        ({"sampling": {"n": 2}}, "sampling is {'n': 2} (dict); pass wb.Sampling(n=..., max_tokens=...)"),
        ({"num_step": 2}, "rollout has no option 'num_step'; options of a new engine do not go with engine="),
    ],
)
def test_options_that_cannot_be_are_told_before_anything_starts(cluster, engine, options, told):
    with pytest.raises(TypeError) as caught:
        roll(cluster, FLAT, engine, **options)
    assert told in str(caught.value)


def test_what_is_no_cluster_is_told():
    with pytest.raises(TypeError, match=r"rollout takes a cluster first, not int: 4; cluster = wb.launch\(4\) is one"):
        wb.rollout(4, FLAT)


def test_an_engine_that_was_closed_is_told_and_no_rank_waits_for_it(cluster):
    closed = wb.start_engine(cluster, backend="hf")
    with pytest.raises(TypeError, match=r"named_tensors is a dict; update_weights takes pairs of name and tensor: pass its items\(\)"):
        closed.update_weights({}, version=1)
    with pytest.raises(TypeError, match="sampling is 5 "):
        closed.generate(["1+1="], 5)
    with pytest.raises(TypeError, match="an engine's handle stays in the process that started it"):
        cluster.push({"engine": closed})
    closed.close()
    with pytest.raises(wb.EngineError, match="the engine is closed\nstart another"):
        roll(cluster, FLAT, closed)


def test_who_waits_for_the_engine_is_told_with_the_file_and_no_line_of_a_cell(cluster, engine):
    os.kill(engine.pids[0], signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as pool:
            rolling = pool.submit(roll, cluster, FLAT, engine)
            told, until = "", time.monotonic() + 10
            while "client.py" not in told and time.monotonic() < until:
                told = cluster.diagnose().sentence
            os.kill(engine.pids[0], signal.SIGCONT)
            assert "rank 0 sleeps, or waits for something that is no collective, in workbench/rollout/client.py:" in told
            rolling.result()
    finally:
        os.kill(engine.pids[0], signal.SIGCONT)


def test_a_function_that_raises_on_one_rank_is_that_ranks_failure(cluster, engine):
    def give():
        if wb.current().rank == 2:
            raise KeyError("no file")
        return ["1+1="]

    with pytest.raises(wb.RankFailed, match="rank 2 of 4 failed in .*KeyError: 'no file'"):
        roll(cluster, give, engine)
    assert len(roll(cluster, RAGGED, engine).completions) == 6


def test_a_prompt_that_fails_is_kept_or_raised(cluster, engine, expected):
    bad = [["1+1=", "9" * 5000], [], ["7+8="], []]  # longer than the model reads
    with pytest.raises(wb.EngineError, match="5000|5,000|512"):
        roll(cluster, bad, engine)
    frame = roll(cluster, bad, engine, on_error="keep").completions.set_index(["origin_rank", "prompt_index"])
    assert frame.finish_reason.to_dict() == {(0, 0): frame.finish_reason[0, 0], (0, 1): "error", (2, 0): frame.finish_reason[2, 0]}
    assert frame.text[0, 0] == expected["1+1="] and frame.text[2, 0] == expected["7+8="] and "error" not in frame.finish_reason[0, 0]


def test_it_sleeps_between_steps_and_gives_the_same_again(cluster, engine, expected):
    run = roll(cluster, RAGGED, engine, sleep_level=1, num_steps=2)
    assert engine.status == "asleep"
    assert sorted(set(run.completions.step)) == [0, 1]
    by_step = [texts_of.text.tolist() for _, texts_of in run.completions.groupby("step")]
    assert by_step[0] == by_step[1]
    report = run.sleep_report
    assert list(report.level) == [1, 1] and (report.weights_bytes > 1e6).all() and (report.kv_cache_bytes >= KV_CACHE_BYTES * 0.9).all()
    assert report.freed_bytes.iloc[0] > 0.5 * (report.weights_bytes + report.kv_cache_bytes).iloc[0] and np.isfinite(report.wake_s.iloc[0])
    assert {"sleep", "wake_up"} <= set(run.timeline.span)
    assert {"driver", "rank", "engine"} == set(run.memory.process) and (run.memory.time_s.diff().dropna() >= -1e-6).all()
    held = run.memory[run.memory.process == "engine"].groupby("phase").rss_bytes  # however short a sleep was
    assert held.max()["generate"] - held.min()["asleep"] > 0.5 * report.weights_bytes.iloc[0] + 0.5 * report.kv_cache_bytes.iloc[0]
    engine.wake_up()
    assert engine.generate(["1+1="], GREEDY).texts[0] == expected["1+1="]


def test_ranks_stopped_and_mended_in_between_keep_the_engine(engine):
    with wb.launch(2) as cluster, wb.start_engine(cluster, kv_cache_bytes=KV_CACHE_BYTES) as own:
        before = texts(roll(cluster, RAGGED[:2], own))
        with pytest.raises(wb.RankDeadlock):
            cluster.execute("if rank: dist.barrier()")
        cluster.restart()
        assert texts(roll(cluster, RAGGED[:2], own)) == before and own.status == "awake"
    assert own.status == "dead" and engine.status == "awake"


def test_a_run_is_saved_whole(cluster, engine, tmp_path):
    run = roll(cluster, RAGGED, engine, sampling=wb.Sampling(max_tokens=8, temperature=0.0, logprobs=True))
    run.save(tmp_path / "run")
    back = wb.load_run(tmp_path / "run")
    pd.testing.assert_frame_equal(back.completions, run.completions)
    assert (run.completions.sum_logprob <= 0).all()


def test_an_engine_of_its_own_is_kept_asleep_for_equal_options():
    options = {"backend": "hf", "sampling": GREEDY, "keep": False}
    with wb.launch(2) as cluster:
        first = wb.rollout(cluster, RAGGED[:2], **options)
        assert "start" in set(first.timeline.span)
        second = wb.rollout(cluster, RAGGED[:2], **options)
        assert "start" not in set(second.timeline.span) and texts(second) == texts(first)
        begun = second.timeline[second.timeline.span == "generate"].start_s.min()
        assert begun < 3  # 0.1 s on idle cores
        other = wb.rollout(cluster, RAGGED[:2], mode="independent", **options)  # not what was kept: another engine
        assert "start" in set(other.timeline.span) and texts(other) == texts(first)
