"""The live panel and the live rollout as the kernel sees them: what the page is told, when, and the picture that stays."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from overlaps import check_texts
from run_builders import make_memory, make_run

import workbench as wb
from workbench.live import LiveRun
from workbench.records import (
    Absent,
    ClusterSnapshot,
    Diagnosis,
    EngineNow,
    FinishedCompletion,
    MemorySample,
    RankState,
    RankStatus,
    Span,
    Waiter,
)
from workbench.view import live, live_rollout, moving
from workbench.view.memory_history import MAX_POINTS, MemoryHistory
from workbench.view.moving import _Pulse
from workbench.view.tiles import plot_tiles

MIB = 2**20
STUCK = Diagnosis(
    waiting={0: Waiter(rank=0, op="barrier", sequence=2, group="world", missing=(1,), for_s=2.5, line=3, source="dist.barrier()")},
    missing={1: Absent(rank=1, cause="is still computing", where="line 2: time.sleep(60)")},
    sentence="rank 0 waits in barrier (line 3); rank 1 is still computing, line 2: time.sleep(60)",
)


def make_status(rank: int, *, state: RankState = RankState.IDLE, waits_in: str = "", waits_s: float = 0.0) -> RankStatus:
    cell = 7 if state is RankState.RUNNING else None
    held: dict[str, Any] = dict(rss_bytes=30 * MIB, private_bytes=0)
    return RankStatus(rank=rank, pid=100 + rank, state=state, cell=cell, waits_in=waits_in, waits_s=waits_s, **held)


def make_snapshot(*, num_ranks: int = 2, time_s: float = 50.0, **changes: Any) -> ClusterSnapshot:
    held: dict[str, Any] = dict(rss_bytes=30 * MIB, pss_bytes=20 * MIB, device_used_bytes=0, phase="")
    memory = [MemorySample(time_s=time_s, rank=rank, pid=100 + rank, process="rank", **held) for rank in range(num_ranks)]
    memory += [MemorySample(time_s=time_s, rank=-1, pid=99, process="driver", **held)]
    idle = ClusterSnapshot(
        time_s=time_s,
        generation=0,
        cell="",
        cell_s=0.0,
        ranks=tuple(make_status(rank) for rank in range(num_ranks)),
        diagnosis=None,
        engines=(),
        memory=tuple(memory),
        events=(),
        is_closed=False,
    )
    return replace(idle, **changes)


def stuck_snapshot() -> ClusterSnapshot:
    ranks = (make_status(0, state=RankState.RUNNING, waits_in="barrier #2 of world", waits_s=2.5), make_status(1, state=RankState.RUNNING))
    return make_snapshot(ranks=ranks, cell="cell 7", cell_s=2.6, diagnosis=STUCK)


class ScriptedCluster:
    """Gives the snapshots it was given, the last one again and again, and notes what it is asked to do."""

    def __init__(self, *snapshots: ClusterSnapshot) -> None:
        self.snapshots = list(snapshots) or [make_snapshot()]
        self.asked: list[str] = []
        self.owned: list[Callable[[], None]] = []
        self.is_closed = False
        self.refuses = False

    @property
    def world_size(self) -> int:
        return len(self.snapshots[0].ranks)

    def observe(self) -> ScriptedCluster:
        return self

    def look(self) -> ClusterSnapshot:
        snapshot = self.snapshots.pop(0)
        self.snapshots = self.snapshots or [replace(snapshot, time_s=snapshot.time_s + 0.2, events=())]
        return snapshot

    def own_view(self, close: Callable[[], None]) -> None:
        self.owned.append(close)

    def interrupt(self) -> None:
        self.asked.append("interrupt")

    def diagnose(self) -> Diagnosis:
        self.asked.append("diagnose")
        return STUCK

    def respawn(self, rank: int) -> None:
        if self.refuses:
            raise wb.ClusterBusy("cell 7 still runs")
        self.asked.append(f"respawn {rank}")


def shown(panel: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the page is sent from now on; each message must be plain JSON."""
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(panel, "send", lambda message: sent.append(json.loads(json.dumps(message))["news"]))
    return sent


def until(is_so: Callable[[], Any], limit_s: float = 5.0) -> None:
    limit = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.01)


# What the page is told


def test_the_page_begins_with_everything_and_gets_only_what_is_new(monkeypatch):
    cluster = ScriptedCluster(make_snapshot(num_ranks=2), stuck_snapshot())
    panel = live(cluster)
    sent = shown(panel, monkeypatch)
    panel.step()
    scene = json.loads(json.dumps(panel.get_state("scene")["scene"]))
    assert [layer["name"] for layer in scene["layers"]] == ["engine", "rank 0", "rank 1", "driver"]
    assert len(scene["memory"]) == 2 and len(sent[0]["memory"]) == 1 and sent[0]["memory"][0][1:] == [[0.0, 20.0, 20.0, 20.0], 0.0]
    assert sent[0]["ranks"] == [["running", 7, "barrier #2 of world", 2.5, 20.0], ["running", 7, "", 0.0, 20.0]]
    assert (sent[0]["cell"], sent[0]["cell_s"], sent[0]["is_closed"]) == ("cell 7", 2.6, False)


def test_who_waits_for_whom_is_told_as_diagnose_finds_it(monkeypatch):
    panel = live(ScriptedCluster(make_snapshot(), stuck_snapshot()))
    sent = shown(panel, monkeypatch)
    assert panel.everything()["waits"] == {}
    panel.step()
    assert sent[0]["waits"] == {
        "sentence": STUCK.sentence,
        "waiting": [[0, [1], "barrier #2 of world", "line 3: dist.barrier()"]],
        "missing": [[1, "is still computing", "line 2: time.sleep(60)"]],
        "is_certain": False,
    }


def test_sleeps_and_marks_are_events_and_the_time_asleep_is_a_stretch(monkeypatch):
    awake, asleep = (EngineNow(name="tiny", status=status, phase="", pids=(9,)) for status in ("awake", "asleep"))
    events = (
        Span(step=0, rank=-1, span="sleep", start_s=51.0, end_s=51.0),
        Span(step=0, rank=-1, span="mark", start_s=51.5, end_s=51.5, label="x"),
    )
    steps = [
        make_snapshot(engines=(awake,)),
        make_snapshot(engines=(asleep,), events=events, time_s=52.0),
        make_snapshot(engines=(asleep,), time_s=53.0),
    ]
    panel = live(ScriptedCluster(*steps, make_snapshot(engines=(awake,), time_s=54.0)))
    sent = shown(panel, monkeypatch)
    for _ in range(3):
        panel.step()
    assert [name for _, name in sent[0]["events"]] == ["sleep", "x"] and sent[1]["events"] == []
    assert [[round(low), round(high)] for low, high, _ in sent[2]["asleep"]] == [[2, 4]]
    assert sent[1]["engines"] == [["tiny", "asleep", ""]]


def test_1024_ranks_fit_into_a_small_message(monkeypatch):
    panel = live(ScriptedCluster(make_snapshot(num_ranks=1024)))
    sent = shown(panel, monkeypatch)
    panel.step()
    assert len(json.dumps(sent[0])) < 40_000 and len(sent[0]["memory"][0][1]) == 10


def test_hours_of_memory_stay_bounded_and_cover_the_whole_time():
    history = MemoryHistory(start_s=0.0)
    for tick in range(4 * MAX_POINTS):
        history.add(make_snapshot(num_ranks=1, time_s=float(tick)).memory)
    points = history.points()
    assert len(points) <= MAX_POINTS and points[0][0] == 0.0 and points[-1][0] == 4 * MAX_POINTS - 1
    assert [t for t, *_ in points] == sorted(t for t, *_ in points)


# Moving


def test_it_moves_while_the_main_thread_computes(monkeypatch):
    panel = live(ScriptedCluster())
    sent = shown(panel, monkeypatch)
    panel.start()
    limit, count = time.monotonic() + 1.5, 0
    while time.monotonic() < limit:
        count += 1
    panel.close()
    assert 5 <= len(sent) <= 10  # 5 a second, and the last one


def test_without_anybody_to_see_it_it_moves_once_a_second(monkeypatch):
    panel = live(ScriptedCluster())
    sent = shown(panel, monkeypatch)
    panel.num_seen = 0
    until(lambda: panel._thread is not None)
    time.sleep(1.3)
    assert len(sent) == 1
    panel.close()


def test_closed_with_its_cluster_it_says_so_once_and_closing_again_is_fine(monkeypatch):
    cluster = ScriptedCluster()
    panel = live(cluster)
    sent = shown(panel, monkeypatch)
    panel.start()
    (close,) = cluster.owned
    close()
    assert sent[-1]["is_closed"] and [news["is_closed"] for news in sent].count(True) == 1
    told = len(sent)
    panel.close()
    panel.start()
    assert not panel.step() and len(sent) == told and panel._thread is not None and not panel._thread.is_alive()


def test_a_cluster_that_was_let_go_of_ends_the_panel(monkeypatch):
    panel = live(ScriptedCluster(make_snapshot(), make_snapshot(is_closed=True)))
    sent = shown(panel, monkeypatch)
    panel.start()
    until(lambda: sent and panel._thread is not None and not panel._thread.is_alive())
    assert sent[-1]["is_closed"]


def test_a_closed_cluster_is_refused():
    cluster = ScriptedCluster()
    cluster.is_closed = True
    text = "the cluster is closed: there is nothing to watch\nstart another: cluster = wb.launch(...)"
    with pytest.raises(wb.ClusterClosed, match=f"^{re.escape(text)}$"):
        live(cluster)


def test_an_error_while_it_looks_is_said_on_the_page_and_ends_it(monkeypatch):
    cluster = ScriptedCluster()
    panel = live(cluster)
    sent = shown(panel, monkeypatch)
    monkeypatch.setattr(panel, "_observer", None)
    panel.start()
    until(lambda: sent)
    assert sent == [{"told": "this view stopped: AttributeError: 'NoneType' object has no attribute 'look'", "is_closed": True}]


def test_buttons_are_told_apart_from_a_blocked_kernel():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    pulse = _Pulse(loop)
    for _ in range(20):
        assert pulse.is_free()
        time.sleep(0.01)
    loop.call_soon_threadsafe(time.sleep, 1.2)  # a cell that blocks
    until(lambda: not pulse.is_free())
    until(pulse.is_free)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()
    assert not pulse.is_free() and not _Pulse.here().is_free()


# Buttons


@pytest.mark.parametrize(
    "act, asked, told",
    [
        ("interrupt", "interrupt", "asked cell 7 to stop"),
        ("diagnose", "diagnose", "rank 0 waits in barrier (line 3)"),
        ("respawn", "respawn 1", "started afresh, empty: rank 1"),
    ],
)
def test_a_button_acts_and_the_page_says_what_came_of_it(act, asked, told, monkeypatch):
    dead = stuck_snapshot().ranks[0], make_status(1, state=RankState.DEAD)
    cluster = ScriptedCluster(make_snapshot(ranks=dead, cell="cell 7"))
    panel = live(cluster)
    sent = shown(panel, monkeypatch)
    panel._handle_custom_msg({"act": act}, [])
    until(lambda: sent)
    assert cluster.asked == [asked] and sent[0]["told"].startswith(told) and panel.everything()["told"] == panel.told


def test_what_the_cluster_refuses_is_said(monkeypatch):
    cluster = ScriptedCluster(make_snapshot(ranks=(make_status(0, state=RankState.DEAD),), num_ranks=1))
    cluster.refuses = True
    panel = live(cluster)
    sent = shown(panel, monkeypatch)
    panel._handle_custom_msg({"act": "respawn"}, [])
    until(lambda: sent)
    assert sent[0]["told"] == "ClusterBusy: cell 7 still runs"


def test_a_page_cannot_ask_for_anything_else(monkeypatch):
    cluster = ScriptedCluster()
    panel = live(cluster)
    sent = shown(panel, monkeypatch)
    for message in ({"act": "close"}, {"act": "asked"}, {}, "interrupt"):
        panel._handle_custom_msg(message, [])
    time.sleep(0.1)
    assert cluster.asked == [] and sent == []


# The picture that stays


def face(widget: Any) -> tuple[bytes, str]:
    data, _ = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    return base64.b64decode(data["image/png"]), data["text/plain"]


def test_a_saved_notebook_shows_a_picture_and_words():
    panel = live(ScriptedCluster(stuck_snapshot()))
    png, words = face(panel)
    assert png.startswith(b"\x89PNG") and words.startswith(
        "2 ranks: 1 running, 1 waits; cell 7 since 3 s; rank 0 waits in barrier (line 3)"
    )
    assert "60 MiB at the most" in words


def test_closing_replaces_the_picture_by_the_last_one(monkeypatch):
    calls: list[tuple[str, dict[str, Any], str]] = []
    monkeypatch.setattr(moving, "display", lambda data, *, metadata, raw, display_id: calls.append(("display", data, display_id)))
    monkeypatch.setattr(moving, "update_display", lambda data, *, metadata, raw, display_id: calls.append(("update", data, display_id)))
    panel = live(ScriptedCluster(make_snapshot(), stuck_snapshot()))
    monkeypatch.setattr(panel, "send", lambda message: None)
    panel._ipython_display_()
    until(lambda: panel.snapshot.cell)
    panel.close()
    panel.close()
    assert [kind for kind, _, _ in calls] == ["display", "update"] and calls[0][2] == calls[1][2]
    assert calls[0][1]["text/plain"].startswith("2 ranks: 2 idle") and "1 waits" in calls[1][1]["text/plain"]
    assert calls[0][1]["image/png"] != calls[1][1]["image/png"]
    assert set(calls[1][1]) == {"image/png", "text/html", "text/plain"}  # no widget that a page without a kernel would look for


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("num_ranks", [1, 4, 16, 17, 256])
def test_no_two_texts_of_the_tiles_overlap(num_ranks, scale):
    ranks = [
        make_status(r, state=RankState.RUNNING, waits_in="reduce_scatter #123456 of tensor parallel 3", waits_s=99.9)
        for r in range(num_ranks)
    ]
    ranks[-1] = make_status(num_ranks - 1, state=RankState.DEAD)
    ax = plot_tiles(make_snapshot(ranks=tuple(ranks), cell="cell 12", cell_s=100.0, diagnosis=STUCK))
    check_texts(ax, scale=scale, least=num_ranks + 1)


# A rollout that runs


def completions(count: int) -> list[FinishedCompletion]:
    common: dict[str, Any] = dict(step=0, origin_rank=0, sample_index=0, at_s=1.0)
    return [FinishedCompletion(prompt_index=i, length_tokens=3 + i, finish_reason="stop", **common) for i in range(count)]


def test_lengths_appear_as_completions_finish_and_memory_as_it_moves(monkeypatch):
    live_run, memory = LiveRun(num_steps=2, start_s=10.0), make_memory(num_ranks=2, start_s=10.0)
    live_run.read_memory_from(lambda since_s: [sample for sample in memory if since_s < sample.time_s <= live_run.start_s + live_run.step])
    widget = live_rollout(live_run)
    sent = shown(widget, monkeypatch)
    live_run.phase = "generate"
    live_run.add(completions(2))
    widget.step()
    live_run.step = 1
    live_run.add(completions(5))
    widget.step()
    assert sent[0]["lengths"] == [[3, "stop"], [4, "stop"]] and sent[1]["lengths"] == [[5, "stop"], [6, "stop"], [7, "stop"]]
    assert len(sent[0]["memory"]) == 1 and len(sent[1]["memory"]) == 10 and sent[1]["memory"][-1][0] == 1.0
    assert sent[1]["layers"] == widget.get_state("scene")["scene"]["layers"] and len(widget.everything()["lengths"]) == 5
    assert (sent[1]["phase"], sent[1]["num_steps"], sent[1]["is_done"]) == ("generate", 2, False)


def test_its_last_picture_is_that_of_the_run(monkeypatch):
    live_run = LiveRun(num_steps=1)
    widget = live_rollout(live_run)
    sent = shown(widget, monkeypatch)
    assert face(widget)[1].startswith("no completions to show")
    live_run.add(completions(3))
    assert face(widget)[1].startswith("3 completions: median 4 tokens")
    run = make_run(num_ranks=2)
    live_run.finish(run)
    widget.close()
    assert sent[-1]["is_done"] and face(widget)[1].startswith(f"{len(run.lengths)} completions")


def test_a_rollout_that_failed_says_why(monkeypatch):
    live_run = LiveRun(num_steps=1)
    widget = live_rollout(live_run)
    sent = shown(widget, monkeypatch)
    live_run.finish(error="EngineError: the engine is dead")
    widget.close()
    assert sent[-1]["error"] == "EngineError: the engine is dead" and sent[-1]["is_done"]
