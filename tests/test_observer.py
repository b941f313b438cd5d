"""A cluster looked at from outside: what a snapshot holds while ranks are idle, stuck, dead and gone."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator

import pytest

import workbench as wb
from workbench.ranks.cluster import Cluster
from workbench.ranks.observer import Observer
from workbench.records import ClusterSnapshot, EngineNow, RankState, Span
from workbench.view import live


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(3) as launched:
        yield launched


def look_until(observer: Observer, is_so, limit_s: float = 6.0) -> ClusterSnapshot:
    limit = time.monotonic() + limit_s
    while not is_so(snapshot := observer.look()):
        assert time.monotonic() < limit, snapshot
        time.sleep(0.1)
    return snapshot


def test_idle_ranks_and_their_memory(cluster):
    snapshot = cluster.observe().look()
    assert [status.state for status in snapshot.ranks] == [RankState.IDLE] * 3
    assert (snapshot.cell, snapshot.diagnosis, snapshot.engines, snapshot.is_closed) == ("", None, (), False)
    of_ranks = {sample.rank: sample for sample in snapshot.memory if sample.process == "rank"}
    assert {rank: sample.pid for rank, sample in of_ranks.items()} == {rank: cluster.pid(rank) for rank in range(3)}
    assert all(status.rss_bytes == of_ranks[status.rank].rss_bytes > 0 for status in snapshot.ranks)
    assert os.getpid() in {sample.pid for sample in snapshot.memory if sample.process == "driver"}


def test_marks_are_events_once(cluster):
    observer = cluster.observe()
    observer.look()
    cluster.mark("after training")
    assert [event.label for event in observer.look().events] == ["after training"]
    assert observer.look().events == ()


def test_a_wait_is_looked_into_after_two_seconds_and_looks_stay_quick_meanwhile(cluster):
    observer = cluster.observe()
    handle = cluster.execute("import time\nif rank == 1: time.sleep(60)\ndist.barrier()", block=False)
    early = look_until(observer, lambda s: s.ranks[0].waits_s > 0.5)
    assert early.diagnosis is None and early.ranks[0].waits_in.startswith("barrier #") and early.cell == "cell 1"
    slowest_s = 0.0
    for _ in range(40):
        began = time.monotonic()
        snapshot = observer.look()
        slowest_s = max(slowest_s, time.monotonic() - began)
        if snapshot.diagnosis is not None:
            break
        time.sleep(0.1)
    assert snapshot.diagnosis is not None and set(snapshot.diagnosis.waiting) == {0, 2} and set(snapshot.diagnosis.missing) == {1}
    assert snapshot.ranks[0].waits_s >= 2.0 and snapshot.ranks[1].waits_in == ""
    assert slowest_s < 0.25, "the ranks were asked within a look"
    handle.cancel()
    assert look_until(observer, lambda s: not s.cell).diagnosis is None


def test_a_dead_rank_is_seen_and_its_memory_is_gone():
    with wb.launch(2) as cluster:
        observer = cluster.observe()
        observer.look()
        cluster.kill(1)
        snapshot = look_until(observer, lambda s: s.ranks[1].state is RankState.DEAD)
        assert snapshot.ranks[1].rss_bytes == 0 and {s.rank for s in snapshot.memory if s.process == "rank"} == {0}
        cluster.respawn(1)
        snapshot = look_until(observer, lambda s: s.ranks[1].state is RankState.IDLE)
        assert snapshot.generation == 1 and snapshot.ranks[1].rss_bytes > 0
    assert observer.look().is_closed


class Engine:
    """Says what it does, as an engine's handle does."""

    def __init__(self) -> None:
        self.state: EngineNow | None = EngineNow(name="tiny", status="awake", phase="generate", pids=(os.getppid(),))

    def now(self) -> EngineNow | None:
        return self.state

    def events_since(self, time_s: float) -> list[Span]:
        return [Span(step=0, rank=-1, span="generate", start_s=at, end_s=at) for at in (time_s - 1.0, time_s + 1e-6)][1:]

    def ranks_and_pids(self) -> list[tuple[int, int]]:
        return [(-1, os.getppid())]


def test_what_belongs_to_the_cluster_is_seen_until_it_was_closed(cluster):
    engine = Engine()
    cluster.own(lambda: None, engine)
    observer = cluster.observe()
    snapshot = observer.look()
    assert [one.status for one in snapshot.engines] == ["awake"] and [event.span for event in snapshot.events] == ["generate"]
    assert os.getppid() in {sample.pid for sample in snapshot.memory if sample.process == "engine"}
    engine.state = None
    snapshot = observer.look()
    assert snapshot.engines == () and not [sample for sample in snapshot.memory if sample.process == "engine"]


def test_a_panel_closes_before_what_it_shows():
    with wb.launch(1) as cluster:
        panel, engine = live(cluster), Engine()
        cluster.own(lambda: setattr(engine, "state", None), engine)
    assert panel.everything()["is_closed"] and panel.everything()["engines"] == [["tiny", "awake", "generate"]]


def test_a_panel_does_not_keep_a_cluster_that_was_let_go_of():
    cluster = wb.launch(1)
    panel = live(cluster)
    panel.start()
    pid = cluster.pid(0)
    del cluster
    gc.collect()
    limit = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < limit:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")
    assert panel.everything()["is_closed"]
