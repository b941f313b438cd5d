"""Starting and ending ranks: what is refused, what is inherited, what is left (nothing)."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import threading
import time
from typing import Any

import leaks
import psutil
import pytest

import workbench as wb
from workbench.cores import num_usable_cores


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: wb.launch(0), "world_size is 0; it must be between 1 and 512"),
        (lambda: wb.launch(513), "world_size is 513; it must be between 1 and 512"),
        (lambda: wb.launch(True), "world_size is True (bool); it must be an int of at least 1"),
        (lambda: wb.launch(2.0), "world_size is 2.0 (float); it must be an int of at least 1"),
        (lambda: wb.launch(2, seed=-1), "seed is -1; it must be an int of at least 0"),
        (lambda: wb.launch(2, collective_timeout_s=0), "collective_timeout_s is 0; it must be above 0"),
        (lambda: wb.launch(2, start_method="fork"), "start_method is 'fork'; it must be one of ('forkserver', 'spawn')"),
    ],
)
def test_bad_arguments_are_told_before_anything_starts(call, told):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value) == told


def test_ranks_are_seeded_rank_by_rank():
    def draw():
        import random

        import numpy as np
        import torch

        return random.random(), np.random.rand(), torch.rand(1).item()

    with wb.launch(2, seed=3) as one:
        first = one.run(draw)
    with wb.launch(3, seed=2) as two:
        second = two.run(draw)
    assert len({*first[0], *first[1]}) == 6
    assert second[1:] == first  # rank r draws from seed + r


def test_ranks_share_path_folder_and_environment(tmp_path, monkeypatch):
    (tmp_path / "users_own.py").write_text("def where():\n    import os\n    return os.getcwd(), os.environ['USERS_OWN']\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("USERS_OWN", "value")
    users_own = importlib.import_module("users_own")

    with wb.launch(2) as cluster:
        assert cluster.run(users_own.where) == [(str(tmp_path), "value")] * 2


def test_ranks_find_the_names_of_a_torch_launcher():
    def names():
        import os

        import torch

        wanted = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
        return [os.environ[name] for name in wanted], torch.get_num_threads()

    with wb.launch(2) as cluster:
        threads = max(1, num_usable_cores() // 2)
        assert cluster.run(names) == [([str(r), str(r), "2", "2", "127.0.0.1", "lo"], threads) for r in range(2)]


def test_spawned_ranks_work_alike():
    with wb.launch(2, start_method="spawn") as cluster:
        result = cluster.execute("x = torch.ones(1) * rank; dist.all_reduce(x); x.item()")
        assert [result[r].result_text for r in range(2)] == ["1.0", "1.0"]


def test_the_environment_of_a_launcher_is_read_in_a_process_that_is_no_rank(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(wb.WorkbenchError, match=r"in a process that is no rank\n.*RANK, WORLD_SIZE and MASTER_ADDR.*\ncall it inside"):
        wb.current()
    assert wb.is_first_rank()
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert not wb.is_first_rank()


def test_only_the_first_rank_prints():
    with wb.launch(3) as cluster:
        result = cluster.execute("wb.print_first_rank('from', rank, sep='-'); wb.is_first_rank()")
    assert [result[r].stdout for r in range(3)] == ["from-0\n", "", ""]
    assert [result[r].result_text for r in range(3)] == ["True", "False", "False"]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_many_launches_leave_no_descriptors_threads_or_processes():
    wb.launch(4).close()  # the server is warm from here on
    children = {p.pid for p in psutil.Process().children(recursive=True)}
    before = descriptors(), threading.active_count(), num_native_threads()
    server = leaks.own_fork_server()
    held = server.num_fds()
    for _ in range(20):
        with wb.launch(4) as cluster:
            assert cluster.run(lambda: 1) == [1] * 4
    gc.collect()
    limit = time.monotonic() + 5
    while time.monotonic() < limit and (descriptors(), threading.active_count(), num_native_threads()) > before:
        time.sleep(0.05)
    assert (descriptors(), threading.active_count(), num_native_threads()) <= before
    assert server.num_fds() == held and not server.children()  # none that nobody has waited for
    assert not leaks.new_processes(children)


def num_native_threads() -> int:
    return psutil.Process().num_threads()


def test_64_ranks_start_and_meet():
    wb.launch(1).close()
    started = time.monotonic()
    with wb.launch(64) as cluster:
        launched_s = time.monotonic() - started
        assert cluster.run(lambda: wb.current().group.all_reduce(__import__("torch").ones(1)).item()) == [64.0] * 64
    assert launched_s < 20  # 2 s on idle cores; `workbench bench` holds it to 3


def test_an_unreferenced_cluster_closes():
    cluster: Any = wb.launch(2)
    pids, folder = [cluster.pid(0), cluster.pid(1)], cluster.folder
    assert folder.stat().st_mode & 0o777 == 0o700
    cluster.execute("x = 1")
    del cluster
    gc.collect()
    assert wait_for(lambda: not any(map(is_alive, pids)))
    assert wait_for(lambda: not folder.exists())


def test_closing_while_a_cell_runs_tells_who_waits_for_it():
    cluster = wb.launch(2)
    handle = cluster.execute("import time; time.sleep(600)", block=False)
    threading.Timer(0.3, cluster.close).start()
    with pytest.raises(wb.ClusterClosed, match=r"the cluster was closed while cell 1 ran\nits ranks have ended\nstart another"):
        handle.result(timeout_s=10)
    cluster.close()
    with pytest.raises(wb.ClusterClosed, match="the cluster is closed; its ranks have ended"):
        cluster.execute("1")
    assert repr(cluster) == "<Cluster of 2 ranks: closed>" and "closed" in cluster._repr_html_()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_thread_that_serves_ranks_holds_nobody_up(monkeypatch):
    with wb.launch(2) as cluster:
        handle = cluster.execute("import time; time.sleep(600)", block=False)
        monkeypatch.setattr(cluster._conductor, "_tick", lambda cell: 1 // 0)
        with pytest.raises(wb.ClusterClosed):
            handle.result(timeout_s=10)
        with pytest.raises(wb.ClusterClosed):
            cluster.execute("1")


def test_a_bug_in_the_thread_that_listens_to_the_driver_costs_a_rank_nothing():
    with wb.launch(2) as cluster:
        cluster.execute("kept, process = rank, wb.current().process\nprocess._look = lambda message: 1 // 0")
        handle = cluster.execute("import time; time.sleep(1); kept", block=False)
        cluster.diagnose()
        result = handle.result(timeout_s=10)
        assert result[1].result_text == "1" and "ZeroDivisionError" in result[1].stderr


def test_a_fork_of_the_driver_takes_nothing_with_it():
    code = (
        "import os, workbench as wb\nfrom workbench.cli import main\nwith wb.launch(2) as cluster:\n    pid = os.fork()\n"
        "    if pid == 0: raise SystemExit\n    os.waitpid(pid, 0)\n    print(cluster.run(lambda: 1), flush=True)\n"
        "    main(['attach', '1', '--pid', str(os.getpid()), '-c', 'rank + 1'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[1, 1]\n2\n", done.stderr


def test_files_beside_the_driver_do_not_stand_in_for_modules_of_the_ranks(tmp_path):
    script, beside = tmp_path / "scripts" / "experiment.py", tmp_path / "beside"
    script.parent.mkdir()
    beside.mkdir()
    (beside / "numpy.py").write_text("raise ImportError('not the real one')")
    (script.parent / "helper.py").write_text("NUMBER = 7")
    script.write_text(
        "import workbench as wb\nwith wb.launch(2) as cluster:\n"
        "    print(cluster.run(lambda: (float(__import__('numpy').ones(1)[0]), __import__('helper').NUMBER)), flush=True)"
    )
    done = subprocess.run([sys.executable, script], cwd=beside, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[(1.0, 7), (1.0, 7)]\n", done.stderr


def test_importing_does_not_start_anything():
    code = "import workbench as wb, threading, sys; print(threading.active_count(), 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "1 False\n"


def test_a_rank_that_dies_while_it_starts_is_told_with_its_own_words(monkeypatch):
    monkeypatch.setattr("workbench.ranks.link._ENTRY", "os:abort_")
    with pytest.raises(wb.LaunchError) as caught:
        wb.launch(2)
    text = str(caught.value)
    assert "of 2 died while it started: exit code 1" in text and "AttributeError: module 'os' has no attribute 'abort_'" in text
    assert "launch fewer ranks, or look at the memory of this machine" in text


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(is_so: Any, limit_s: float = 5.0) -> bool:
    limit = time.monotonic() + limit_s
    while not is_so() and time.monotonic() < limit:
        time.sleep(0.02)
    return bool(is_so())


def test_object_operations_are_signed_with_a_key_of_the_cluster():
    def keys():
        import os

        from workbench.ranks.wire import KEY_VARIABLE

        return os.environ[KEY_VARIABLE]

    with wb.launch(2) as one, wb.launch(1) as two:
        first, second = one.run(keys)
        assert first == second != two.run(keys)[0] and len(first) == 64
