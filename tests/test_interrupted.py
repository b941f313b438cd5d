"""The stop button while the driver itself is at work, not its ranks: what it has begun it ends, or takes back."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import workbench as wb
from workbench.errors import LaunchError
from workbench.ranks.cluster import Cluster
from workbench.ranks.conductor import Conductor
from workbench.ranks.history import History
from workbench.ranks.processes import Processes
from workbench.ranks.servers import ForkServer


def press_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int = 1) -> None:
    """Press when the `at`th call of a function has returned, before its caller has what it gave."""
    real, calls = getattr(owner, name), iter(range(1, 1000))

    def pressed(*args: Any, **kwargs: Any) -> Any:
        given = real(*args, **kwargs)
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return given

    monkeypatch.setattr(owner, name, pressed)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with wb.launch(3) as cluster:
        cluster.execute("kept = rank")
        yield cluster


def assert_whole(cluster: Cluster) -> None:
    result = cluster.execute("t = torch.ones(1); dist.all_reduce(t); t.item()", timeout_s=20)
    assert [output.result_text for output in result.values()] == ["3.0"] * 3


@pytest.mark.parametrize("at", [1, 2, 3])
def test_while_ranks_are_started_anew(cluster, monkeypatch, at):
    press_after(monkeypatch, Processes, "_launch", at)
    with pytest.raises(KeyboardInterrupt):
        cluster.restart()
    assert_whole(cluster)


@pytest.mark.parametrize(("owner", "name"), [(Conductor, "begin_generation"), (ForkServer, "spawn"), (socket, "send_fds")])
def test_while_a_rank_is_brought_back(cluster, monkeypatch, owner, name):
    cluster.kill(1)
    press_after(monkeypatch, owner, name)
    with pytest.raises(KeyboardInterrupt):
        cluster.respawn(1)
    assert_whole(cluster)
    assert cluster.pull("kept", ranks=[0, 2]) == [0, 2]


def test_a_rank_that_could_not_be_started_holds_up_nobody_and_the_next_try_brings_it_back(cluster, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> int:
        raise LaunchError("no more processes\nask for more")

    cluster.kill(1)
    with monkeypatch.context() as patch:
        patch.setattr(ForkServer, "spawn", refuse)
        with pytest.raises(LaunchError, match="no more processes"):
            cluster.respawn(1)
    with pytest.raises(wb.RankFailed, match="it could not join the world: LaunchError: no more processes\nask for more"):
        cluster.execute("1", ranks=1)
    cluster.respawn(1)
    assert_whole(cluster)
    assert cluster.pull("kept", ranks=[0, 2]) == [0, 2]


@pytest.mark.parametrize(("owner", "name"), [(Processes, "__init__"), (Processes, "_launch"), (socket, "send_fds"), (Cluster, "__init__")])
def test_while_ranks_are_launched_leaves_nothing_and_the_next_launch_is_well(monkeypatch, owner, name):
    wb.launch(1).close()  # what is tried is no import
    with monkeypatch.context() as patch:
        press_after(patch, owner, name)
        with pytest.raises(KeyboardInterrupt):
            wb.launch(2)
    with wb.launch(2) as cluster:
        assert cluster.run(abs, -1) == [1, 1]


@pytest.mark.parametrize("block", [True, False])
def test_while_a_cell_is_begun_ends_that_cell(cluster, monkeypatch, block, capsys):
    with monkeypatch.context() as patch:
        press_after(patch, History, "add")
        with pytest.raises(KeyboardInterrupt):
            cluster.execute("while True: pass", block=block)
    assert "interrupted; ranks free after" in capsys.readouterr().err
    assert_whole(cluster)
    assert cluster.pull("kept") == [0, 1, 2]


def test_while_the_cluster_is_closed_closes_it(monkeypatch):
    cluster = wb.launch(2)
    pids = [cluster.pid(rank) for rank in range(2)]
    press_after(monkeypatch, Conductor, "abandon")
    with pytest.raises(KeyboardInterrupt):
        cluster.close()
    assert not cluster.folder.exists()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


FAILS = """
import time
from workbench.ranks import forming
form = forming.form_groups
def form_groups(layout):
    forming.form_groups = form
    form(layout)
    {what}
forming.form_groups = form_groups
"""


@pytest.mark.parametrize("what", ["raise ValueError('on purpose')", "time.sleep(60)"])
def test_a_layout_that_only_some_ranks_have_come_to_use_is_taken_back(cluster, what):
    cluster.use(wb.Layout(world_size=3, tp=3))
    cluster.execute(FAILS.format(what=what), ranks=1)
    if "sleep" in what:
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            cluster.use(wb.Layout(world_size=3, dp=3))
        timer.join()
    else:
        with pytest.raises(wb.RankFailed, match="on purpose"):
            cluster.use(wb.Layout(world_size=3, dp=3))
    assert cluster.layout == wb.Layout(world_size=3, tp=3)
    assert set(cluster.pull("wb.current().layout")) == {cluster.layout}
    assert cluster.pull("groups['tp'].all_reduce(torch.ones(1)).item()") == [3.0] * 3
    cluster.kill(2)
    cluster.respawn(2)
    assert cluster.pull("groups['tp'].all_reduce(torch.ones(1)).item()") == [3.0] * 3
    assert cluster.pull("kept", ranks=[0, 1]) == [0, 1]
