"""`workbench attach`: a live rank asked from a shell, while it is idle and while it runs; who may not is refused."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import workbench as wb
from workbench.cli import main
from workbench.ranks import attach
from workbench.ranks.cluster import Cluster

BUSY = """
import time
def wait_long(step, values):
    total = sum(values)
    time.sleep(60)
if rank == 1:
    wait_long(7, [1, 2, 3])
else:
    dist.barrier()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(2) as cluster:
        cluster.execute("weights = torch.arange(4.0) + rank")
        yield cluster


@pytest.fixture
def busy(cluster) -> Iterator[Any]:
    handle = cluster.execute(BUSY, block=False)
    time.sleep(0.5)
    yield handle
    cluster.interrupt()
    with pytest.raises(wb.WorkbenchError):
        handle.result(timeout_s=10)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "workbench.cli", "attach", *words, "--pid", str(os.getpid())]


def test_an_expression_is_evaluated_in_the_ranks_names(cluster, capsys):
    assert main(["attach", "1", "-c", "print('here'); weights.sum().item() + rank"]) == 0
    assert capsys.readouterr().out == "here\n11.0\n"
    assert main(["attach", "0", "-c", "added = 5"]) == 0 and cluster.pull("added", ranks=0) == [5]


def test_what_fails_is_told_with_the_ranks_own_traceback(cluster, capsys):
    assert main(["attach", "1", "-c", "1 / 0"]) == 1
    assert "rank 1 of 2 failed in" in (told := capsys.readouterr().err) and "ZeroDivisionError: division by zero" in told
    assert main(["attach", "1", "-c", "1 +"]) == 1 and "invalid syntax" in capsys.readouterr().err
    assert main(["attach", "5", "-c", "1"]) == 1
    assert capsys.readouterr().err.endswith("has no rank 5\nit has ranks 0 to 1\nchoose one of them\n")


def test_a_busy_rank_can_be_looked_at(cluster, busy, capsys):
    assert main(["attach", "1", "-c", "weights"]) == 1
    assert (
        f"{busy!r}"[1:].partition(":")[0] in (told := capsys.readouterr().out) and "while it runs it can be looked at only: :where" in told
    )
    assert main(["attach", "1", "-c", ":where"]) == 0 and "time.sleep(60)" in capsys.readouterr().out
    assert main(["attach", "1", "-c", ":locals"]) == 0
    told = capsys.readouterr().out
    assert "line 5, in wait_long" in told and "  step = 7\n  values = [1, 2, 3]\n  total = 6" in told
    assert main(["attach", "1", "-c", ":locals 1"]) == 0
    assert ", in <module>" in (told := capsys.readouterr().out) and "  weights = tensor([1., 2., 3., 4.])" in told
    assert main(["attach", "0", "-c", ":diagnose"]) == 0 and "rank 0 waits in barrier" in capsys.readouterr().out
    assert main(["attach", "0", "-c", ":status"]) == 0 and "): running barrier #" in capsys.readouterr().out
    assert main(["attach", "0", "-c", ":walk"]) == 1 and ":walk is no command\nPython runs" in capsys.readouterr().out


def test_an_idle_rank_has_no_stack(cluster, capsys):
    assert main(["attach", "1", "-c", ":where"]) == 0 and capsys.readouterr().out == "the rank is idle\n"
    assert main(["attach", "1", "-c", ":locals"]) == 0 and "type a name to see it" in capsys.readouterr().out


def test_a_conversation_over_several_lines(cluster):
    typed = "def double(x):\n    return 2 * x\n\ndouble(rank + 20)\n1 / 0\n:status\n:quit\n"
    done = subprocess.run(command("1"), input=typed, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "42\n" in done.stdout and "<Cluster of 2 ranks: idle, generation 0>" in done.stdout
    assert "ZeroDivisionError" in done.stderr and cluster.pull("double(3)", ranks=1) == [6]


def test_to_interrupt_the_shell_stops_the_rank(cluster):
    with subprocess.Popen(
        command("0", "-c", "kept = 9\nwhile True: pass"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as shell:
        limit = time.monotonic() + 30
        while "runs" not in repr(cluster) and time.monotonic() < limit:
            time.sleep(0.05)
        with pytest.raises(wb.ClusterBusy):
            cluster.execute("1")
        time.sleep(0.3)
        shell.send_signal(signal.SIGINT)
        shell.communicate(timeout=10)
    limit = time.monotonic() + 5
    while "runs" in repr(cluster) and time.monotonic() < limit:
        time.sleep(0.05)
    assert cluster.pull("kept", ranks=0) == [9]


def test_without_the_token_nothing_is_read(cluster, tmp_path):
    class Bomb:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "ran"), "w")

    question = json.dumps({"verb": "run", "rank": 0, "source": f"open({str(tmp_path / 'ran')!r}, 'w')"}).encode() + b"\n"
    token = (cluster.folder / "door.token").read_bytes()
    for first in (
        b"0" * 64 + question,
        question,
        token[:-1] + b"x" + question,
        pickle.dumps(Bomb()) + bytes(100),
        token + pickle.dumps(Bomb()) + b"\n",
    ):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(cluster.folder / "door.sock"))
            sock.sendall(first)
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(10)
            try:
                assert sock.recv(100) == b""
            except ConnectionResetError:
                continue  # it hung up before it had read all
    time.sleep(0.2)
    assert not (tmp_path / "ran").exists()
    with attach.connect(attach.find_cluster(os.getpid())) as asks:
        assert "'dance' cannot be asked; it must be one of status, diagnose, look, run" in asks(verb="dance")["error"]


def test_which_cluster_must_be_clear(monkeypatch, tmp_path):
    with pytest.raises(wb.WorkbenchError, match="no cluster of yours is up in process 1\nlooked in .*\nlaunch one, or set TMPDIR"):
        attach.find_cluster(1)
    two = [attach.LiveCluster(folder=tmp_path, driver_pid=pid) for pid in (11, 12)]
    monkeypatch.setattr(attach, "live_clusters", lambda: two)
    with pytest.raises(wb.WorkbenchError, match="2 drivers have a cluster: 11, 12\none must be named\nchoose: --pid 12"):
        attach.find_cluster(None)
    assert attach.find_cluster(11) == two[0]


def test_a_driver_that_has_gone_is_told(tmp_path):
    (tmp_path / "door.token").write_bytes(b"0" * 64)
    with pytest.raises(wb.WorkbenchError, match="the driver 11 does not answer: .*\nits socket is .*door.sock\nit has just ended"):
        with attach.connect(attach.LiveCluster(folder=tmp_path, driver_pid=11)):
            pass
    cluster = wb.launch(1)
    with attach.connect(attach.find_cluster(os.getpid())) as asks:
        assert asks(verb="status")["cluster"] == "<Cluster of 1 ranks: idle, generation 0>"
        cluster.close()
        assert asks(verb="status") == {"error": "the cluster is closed"}
    assert cluster.folder not in [found.folder for found in attach.live_clusters()]


def test_letting_go_of_a_cluster_still_ends_it():
    import gc

    cluster = wb.launch(1)
    pid, folder = cluster.pid(0), cluster.folder
    del cluster
    gc.collect()
    limit = time.monotonic() + 5
    while folder.exists() and time.monotonic() < limit:
        time.sleep(0.05)
    assert not folder.exists() and not Path(f"/proc/{pid}").exists()
