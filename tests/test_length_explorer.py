"""The length explorer: the page's arithmetic against the package's, what it is given, and how it follows a rollout that runs."""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest
from javascript import evaluate
from overlaps import check_texts
from run_builders import make_batch, make_run

import workbench as wb
from workbench.live import LiveRun
from workbench.records import FinishedCompletion
from workbench.run import Run
from workbench.view import length_explorer, plot_idle
from workbench.view.idle import idle_by_rank
from workbench.view.length_explorer import COLUMNS

WHOLE = "m.groupsBy(c, '')[0].indices"


def make_finished(count: int, *, start: int = 0) -> list[FinishedCompletion]:
    return [
        FinishedCompletion(
            step=0, origin_rank=k % 2, prompt_index=k, sample_index=0, length_tokens=3 + k, finish_reason="stop", at_s=float(k)
        )
        for k in range(start, start + count)
    ]  # fmt: skip


def columns_of(run: Run) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = length_explorer(run).everything()["columns"]
    return columns


# The page's arithmetic


def test_the_page_has_the_packages_percentiles_and_shares():
    run = make_run(num_ranks=6)
    columns, lengths = columns_of(run), run.lengths
    stats = wb.length_stats(lengths.length_tokens, lengths.finish_reason.tolist())
    page = evaluate("length_stats.js", f"m.statsOf(c, {WHOLE}, 1e9)", c=columns)
    assert page["n"] == stats.num_completions and page["mean"] == pytest.approx(stats.mean) and page["max"] == stats.max
    assert [page["marks"][str(p)] for p in (50, 90, 95, 99)] == pytest.approx([stats.percentile(p) for p in (50, 90, 95, 99)])
    assert page["cutShare"] == pytest.approx(stats.truncated_share) and page["savedShare"] == 0


def test_another_max_tokens_cuts_what_is_longer_and_what_was_cut_before():
    columns = columns_of(Run(batches={0: {0: make_batch(prompts=["a"], lengths=[[10, 20, 64, 30]])}}))
    page = evaluate("length_stats.js", f"m.statsOf(c, {WHOLE}, 20)", c=columns)
    assert (page["cut"], page["max"], page["total"]) == (2, 20, 70) and page["savedShare"] == pytest.approx(1 - 70 / 124)


@pytest.mark.parametrize("way", ["sum", "max"])
def test_the_page_and_the_figure_agree_on_who_waits(way):
    run = make_run(num_ranks=5, num_steps=3)
    page = evaluate("length_stats.js", "m.idleOf(c, ranks, 1e9, way)", c=columns_of(run), ranks=list(range(5)), way=way)
    busy, total = idle_by_rank(run.lengths, range(5), time=way)
    assert page["total"] == total and [tokens for _, tokens in page["busy"]] == busy.tolist() and busy[0] == 0


def test_idle_time_is_that_of_length_stats_in_one_step_and_falls_with_max_tokens():
    run = make_run(num_ranks=5, num_steps=1)
    stats = wb.length_stats(run.lengths.length_tokens, ranks=run.lengths.origin_rank, num_ranks=5)
    shares = evaluate("length_stats.js", "caps.map((cap) => m.idleOf(c, ranks, cap, 'sum').idleShare)", c=columns_of(run),
                      ranks=list(range(5)), caps=[1000, 1])  # fmt: skip
    assert shares[0] == pytest.approx(stats.idle_share) and shares[1] == pytest.approx(1 - (0 + 1 + 2 + 3 + 0) / (5 * 3))


@pytest.mark.parametrize(
    "by, names",
    [
        ("", ["all"]),
        ("origin_rank", ["ranks 1-3", "ranks 5-7", "ranks 9-11", "ranks 13-15"]),
        ("step", ["step 0", "step 1"]),
        ("finish_reason", ["length", "stop"]),
    ],
)
def test_parts_are_few_and_hold_every_completion_once(by, names):
    columns = columns_of(make_run(num_ranks=16))
    groups = evaluate("length_stats.js", "m.groupsBy(c, by, 4)", c=columns, by=by)
    assert [group["name"] for group in groups] == names
    assert sorted(i for group in groups for i in group["indices"]) == list(range(len(columns["step"])))


def test_of_many_prompts_the_longest_are_shown():
    run = make_run(num_ranks=16)
    groups = evaluate("length_stats.js", "m.groupsBy(c, 'prompt_index')", c=columns_of(run))
    means = run.lengths.groupby(["step", "origin_rank", "prompt_index"]).length_tokens.mean().sort_values(ascending=False)
    step, rank, prompt = means.index[0]
    assert len(groups) == 8 and groups[0]["name"] == (f"step {step}, " if step else "") + f"rank {rank}, prompt {prompt}"


# What it is given


def test_the_page_gets_each_length_with_what_it_is_looked_at_by_and_ranks_without_any():
    batches = {
        0: make_batch(lengths=((3, 64),)),
        1: make_batch(rank=1, lengths=((5, 7),), failed=(1,)),
        2: make_batch(rank=2, lengths=((),)),
    }
    assert length_explorer(Run(batches={0: batches})).everything() == {
        "columns": {
            "length_tokens": [3, 64, 5],
            "origin_rank": [0, 0, 1],
            "prompt_index": [0, 0, 0],
            "step": [0, 0, 0],
            "finish_reason": ["stop", "length", "stop"],
        },
        "ranks": [0, 1, 2],
        "isLive": False,
    }


@pytest.mark.parametrize(
    "run, texts",
    [(make_run(num_ranks=2), ("median", "would wait")), (Run(batches={}), ("no completions to show",))],
    ids=["run", "empty"],
)
def test_a_saved_notebook_has_a_picture_and_words(run, texts):
    data, _ = length_explorer(run)._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG") and all(text in data["text/plain"] for text in texts)
    assert "application/vnd.jupyter.widget-view+json" in data


# A rollout that runs


def test_lengths_appear_as_requests_finish_and_the_run_takes_their_place():
    live = LiveRun(num_steps=1)
    explorer = length_explorer(live)
    assert explorer.news() is None and explorer.everything()["isLive"]
    live.add(make_finished(2))
    assert explorer.news() == {"more": {name: [getattr(one, name) for one in make_finished(2)] for name in COLUMNS}}
    live.add(make_finished(1, start=2))
    assert explorer.news()["more"]["length_tokens"] == [5]  # type: ignore[index]
    assert explorer.everything()["columns"]["length_tokens"] == [3, 4, 5]
    live.finish(run := make_run(num_ranks=3))
    assert explorer.news() == length_explorer(run).everything() and explorer.news() is None


def test_it_moves_by_itself_and_stops_with_the_rollout(monkeypatch):
    live, sent = LiveRun(num_steps=1), list[Any]()
    explorer = length_explorer(live)
    monkeypatch.setattr(explorer, "send", sent.append)
    explorer.start()
    live.add(make_finished(3))
    deadline = time.monotonic() + 20
    while not sent and time.monotonic() < deadline:
        time.sleep(0.02)
    live.finish(error="the engine died")
    while not any("columns" in one["news"] for one in sent) and time.monotonic() < deadline:
        time.sleep(0.02)
    explorer.close()
    assert sent[0]["news"]["more"]["length_tokens"] == [3, 4, 5]
    assert sent[-1]["news"]["columns"]["length_tokens"] == [3, 4, 5] and not sent[-1]["news"]["isLive"]


# The figure of waiting


def test_ranks_work_and_wait_for_the_longest():
    frame = pd.DataFrame({"step": 0, "origin_rank": [0, 0, 1, 1], "length_tokens": [4, 4, 8, 64], "finish_reason": "stop"})
    for way, work, total in (("sum", [8, 72], 72), ("max", [4, 64], 64)):
        busy, all_take = idle_by_rank(frame, time=way)
        assert busy.tolist() == work and all_take == total
    ax = plot_idle(frame)
    heights = [bar.get_height() for bar in ax.patches]  # type: ignore[attr-defined]
    assert heights == [8, 72, 64, 0] and ax.get_title(loc="left") == "2 ranks would wait 44 % of their time for the longest"


def test_each_step_has_its_own_longest():
    frame = pd.DataFrame({"step": [0, 0, 1, 1], "origin_rank": [0, 1, 0, 1], "length_tokens": [10, 1, 1, 10]})
    busy, total = idle_by_rank(frame)
    assert busy.tolist() == [11, 11] and total == 20


@pytest.mark.parametrize("num_ranks", [1, 4, 32, 200])
def test_no_two_texts_of_the_waiting_figure_overlap(num_ranks):
    ax = plot_idle(make_run(num_ranks=num_ranks, num_steps=1))
    for scale in (1, 2):
        check_texts(ax, scale=scale, least=4)


def test_an_unknown_time_is_told_and_an_empty_run_says_so():
    with pytest.raises(ValueError, match=r"plot_idle\(time='mean'\): a rank's time is the 'sum' or the 'max' of its completions' tokens"):
        plot_idle(make_run(), time="mean")
    assert plot_idle(Run(batches={})).texts[0].get_text() == "no completions to show"
    assert np.isfinite(idle_by_rank(make_run().lengths)[1])
