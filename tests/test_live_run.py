"""A rollout that is followed while it runs: what engine processes tell, what a reader of `LiveRun` sees."""

from __future__ import annotations

import stat
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import workbench as wb
from workbench.live import LiveRun
from workbench.ranks.cluster import Cluster
from workbench.records import FinishedCompletion, MemorySample
from workbench.rollout.finished import FinishedReader, FinishedWriter
from workbench.view import moving

MIB = 2**20
PROMPTS = [["1+1=", "12+34="], ["7+8="]]
SAMPLING = wb.Sampling(n=3, max_tokens=24, seed=0)


def finished(
    *, step: int = 0, rank: int = 0, prompt: int = 0, sample: int = 0, length: int = 5, reason: str = "stop"
) -> FinishedCompletion:
    return FinishedCompletion(
        step=step,
        origin_rank=rank,
        prompt_index=prompt,
        sample_index=sample,
        length_tokens=length,
        finish_reason=reason,
        at_s=1.5,
    )


def sample(pid: int, time_s: float, mib: int) -> MemorySample:
    held: dict[str, Any] = dict(rss_bytes=mib * MIB, pss_bytes=mib * MIB, device_used_bytes=0)
    return MemorySample(time_s=time_s, rank=-1, pid=pid, process="engine", phase="", **held)


# LiveRun


def test_a_reader_gets_each_completion_once_also_one_that_was_generated_again():
    live_run = LiveRun(num_steps=1)
    live_run.add([finished(), finished(sample=1)])
    live_run.add([finished(sample=1, length=9), finished(rank=1)])
    assert live_run.completions == (finished(), finished(sample=1), finished(rank=1))
    assert live_run.completions_since(2) == [finished(rank=1)]


def test_its_line_says_how_far_it_is_and_what_is_held():
    live_run = LiveRun(num_steps=3)
    live_run.read_memory_from(lambda since_s: [sample(1, since_s + 1, 10), sample(1, since_s + 2, 30), sample(2, since_s + 2, 20)])
    live_run.step, live_run.phase = 1, "generate"
    live_run.add([finished(length=5), finished(sample=1, length=1200)])
    assert live_run.line() == "rollout: step 2 of 3, generate, 2 completions, 1,205 tokens, 50 MiB held"


def test_in_a_log_the_last_line_is_printed_whole(capfd):
    live_run = LiveRun(num_steps=1)
    with live_run.shown(is_notebook=False):
        live_run.add([finished()])
    assert capfd.readouterr().err == "rollout: starting, 1 completions, 5 tokens\n"
    assert live_run.is_done


# The file between an engine process and the driver


def test_what_is_written_is_read_once_and_in_order(tmp_path):
    reader = FinishedReader(str(tmp_path / "engine.sock"))
    reader.open()
    writer = FinishedWriter.open(str(tmp_path / "engine.sock"))
    assert writer is not None
    writer(finished(rank=3, length=7, reason="length"))
    writer(finished(step=2, reason="abort"))
    assert reader.read() == [finished(rank=3, length=7, reason="length"), finished(step=2, reason="abort")]
    assert reader.read() == []
    writer(finished(sample=4))
    assert reader.read() == [finished(sample=4)]
    writer.close()
    reader.close()
    assert list(tmp_path.iterdir()) == [] and reader.read() == []


def test_half_a_row_is_left_for_the_next_read(tmp_path):
    reader = FinishedReader(str(tmp_path / "engine.sock"))
    reader.open()
    (path,) = tmp_path.iterdir()
    writer = FinishedWriter.open(str(tmp_path / "engine.sock"))
    assert writer is not None
    writer(finished())
    writer.close()
    row = path.read_bytes()
    path.write_bytes(row + row[:20])
    assert reader.read() == [finished()]
    path.write_bytes(row + row)
    assert reader.read() == [finished()]


def test_nobody_else_may_read_it_and_without_a_reader_there_is_none(tmp_path):
    assert FinishedWriter.open(str(tmp_path / "engine.sock")) is None
    FinishedReader(str(tmp_path / "engine.sock")).open()
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# Real rollouts


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(2) as launched:
        yield launched


@pytest.fixture(scope="module", params=["vllm", "hf"])
def engine(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[wb.EngineHandle]:
    with wb.start_engine(cluster, backend=request.param, kv_cache_bytes=64 * MIB) as started:
        yield started


def test_completions_are_told_while_others_still_run_and_agree_with_the_run(cluster, engine):
    taken: list[LiveRun] = []
    grew: list[tuple[int, float]] = []

    def follow(live_run: LiveRun) -> None:
        taken.append(live_run)
        threading.Thread(target=lambda: grew.extend(_growth(live_run)), daemon=True).start()

    run = wb.rollout(cluster, PROMPTS, engine=engine, sampling=wb.Sampling(n=24, max_tokens=48, seed=0), live=follow, keep=False)
    (live_run,) = taken
    columns = ["step", "origin_rank", "prompt_index", "sample_index", "length_tokens", "finish_reason"]
    told = sorted(tuple(getattr(one, name) for name in columns) for one in live_run.completions)
    assert told == sorted(run.completions[columns].itertuples(index=False, name=None))
    assert len({one.at_s for one in live_run.completions}) > 3  # told one by one, not all at the end
    generate = [span for span in run.spans if span.span == "generate" and span.rank < 0]
    assert all(generate[0].start_s <= one.at_s <= generate[0].end_s for one in live_run.completions)
    assert live_run.is_done and live_run.run is run and grew[-1][1] > 0
    assert not list(Path(cluster.folder).glob("*.finished"))


def _growth(live_run: LiveRun) -> Iterator[tuple[int, float]]:
    """(completions, newest memory, bytes) until it is done."""
    while not live_run.wait(0.02):
        memory = live_run.memory_since(float("-inf"))
        yield len(live_run.completions), float(memory[-1].pss_bytes if memory else 0)


def test_a_rollout_that_fails_says_why_to_who_follows_and_leaves_nothing(cluster, engine):
    taken: list[LiveRun] = []
    with pytest.raises(wb.EngineError):
        wb.rollout(cluster, [["1+" * 9000], []], engine=engine, sampling=SAMPLING, live=taken.append)
    assert taken[0].is_done and taken[0].run is None and taken[0].error.startswith("EngineError: ")
    assert not list(Path(cluster.folder).glob("*.finished"))
    run = wb.rollout(cluster, PROMPTS, engine=engine, sampling=SAMPLING, keep=False)
    assert len(run.completions) == 9


def test_in_a_notebook_a_widget_is_told_how_it_ended_and_leaves_a_picture(cluster, engine, monkeypatch):
    shown: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(import_module("workbench.rollout.following"), "is_notebook", lambda: True)
    monkeypatch.setattr(moving, "display", lambda data, **_: shown.append(data))
    monkeypatch.setattr(moving, "update_display", lambda data, **_: shown.append(data))
    monkeypatch.setattr(moving.MovingWidget, "send", lambda _, message: told.append(message["news"]))
    run = wb.rollout(cluster, PROMPTS, engine=engine, sampling=SAMPLING, live=True, keep=False)
    assert ["image/png" in data for data in shown] == [False, True] and shown[1]["text/plain"].startswith(f"{len(run.lengths)} completions")
    assert told[-1]["is_done"] and sum(len(news["lengths"]) for news in told) == len(run.completions) and told[-1]["error"] == ""
    with pytest.raises(wb.EngineError):
        wb.rollout(cluster, [["1+" * 9000], []], engine=engine, sampling=SAMPLING, live=True)
    assert told[-1]["is_done"] and told[-1]["error"].startswith("EngineError: ") and len(shown) == 4


def test_without_a_notebook_a_line_tells_how_far_it_is(cluster, engine, capfd):
    run = wb.rollout(cluster, PROMPTS, engine=engine, sampling=SAMPLING, live=True, keep=False)
    tokens = int(run.completions["length_tokens"].sum())
    assert f"9 completions, {tokens:,} tokens" in capfd.readouterr().err
