"""Ranks that die, and come back: told at once, the others freed, names of the others kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import workbench as wb
from workbench.ranks.cluster import Cluster
from workbench.ranks.servers import describe_exit


def died(cluster: Cluster, source: str, *, within_s: float = 3.0) -> wb.RankFailed:
    started = time.monotonic()
    with pytest.raises(wb.RankFailed) as caught:
        cluster.execute(source, timeout_s=30)
    assert time.monotonic() - started < within_s
    return caught.value


def sums(cluster: Cluster) -> set[str]:
    result = cluster.execute("t = torch.ones(1); dist.all_reduce(t); t.item()", timeout_s=20)
    return {output.result_text for output in result.values()}


@pytest.mark.parametrize(
    "cause, exit_code, signal_name, told",
    [
        ("os._exit(3)", 3, None, "exit code 3 (the code called os._exit or exit)"),
        ("os._exit(0)", 0, None, "exit code 0 (it ended by itself)"),
        ("os.kill(os.getpid(), 9)", -9, "SIGKILL", "SIGKILL (killed from outside: by the kernel when memory ran out, or by a kill -9)"),
        ("ctypes.string_at(0)", -11, "SIGSEGV", "SIGSEGV (a crash in native code)"),
        ("os.abort()", -6, "SIGABRT", "SIGABRT (native code gave up (abort))"),
    ],
)
@pytest.mark.parametrize("check_collectives", [True, False])
def test_a_rank_that_dies_in_a_cell_is_told_and_comes_back(cause, exit_code, signal_name, told, check_collectives):
    with wb.launch(3, check_collectives=check_collectives) as cluster:
        cluster.execute("import os, ctypes, sys\nkept = rank")
        error = died(cluster, f"if rank == 1:\n    print('last words', file=sys.stderr, flush=True)\n    {cause}\ndist.barrier()")
        assert (error.rank, error.world_size, error.exit_code, error.signal_name) == (1, 3, exit_code, signal_name)
        text = str(error)
        assert text.startswith(f"rank 1 of 3 died in cell 2: {told}\nits last output:\n") and "last words" in text
        assert "cluster.respawn(1) brings it back, cluster.restart() starts all afresh" in text
        cluster.respawn(1)
        assert cluster.pull("kept", ranks=[0, 2]) == [0, 2] and cluster.generation == 1
        assert sums(cluster) == {"3.0"}


def test_a_segfault_leaves_the_stack_where_it_happened():
    with wb.launch(1) as cluster:
        text = str(died(cluster, "import ctypes\ndef deep():\n    ctypes.string_at(0)\ndeep()"))
        assert "in deep" in text and "Fatal Python error: Segmentation fault" in text


def test_a_death_while_idle_is_told_before_anything_is_sent():
    with wb.launch(2) as cluster:
        cluster.execute("import sys; print('was here', file=sys.stderr)")
        pid = cluster.pid(1)
        os.kill(pid, signal.SIGKILL)
        limit = time.monotonic() + 2
        while cluster.status()[1].state != "dead" and time.monotonic() < limit:
            time.sleep(0.01)
        assert repr(cluster) == "<Cluster of 2 ranks: idle, generation 0, dead: [1]>" and "dead" in cluster._repr_html_()
        with pytest.raises(wb.RankFailed) as caught:
            cluster.execute("1")
        assert str(caught.value) == (
            "rank 1 of 2 is dead: SIGKILL (killed from outside: by the kernel when memory ran out, or by a kill -9)\n"
            "its last output:\nwas here\nnothing was sent\ncluster.respawn(1) brings it back; ranks=[0] leaves it out"
        )
        assert cluster.execute("rank", ranks=[0])[0].result_text == "0"
        cluster.respawn(1)
        assert cluster.pid(1) != pid and sums(cluster) == {"2.0"}


def test_the_first_failure_in_time_is_the_one_told():
    with wb.launch(3) as cluster:
        error = died(cluster, "import time, os\nif rank == 2: raise ValueError('first')\ntime.sleep(1.0)\nos._exit(4)", within_s=5)
        assert error.rank == 2 and "ValueError: first" in str(error)


def test_all_ranks_may_die():
    with wb.launch(3) as cluster:
        assert died(cluster, "import os; os._exit(7)").exit_code == 7
        cluster.respawn(2)  # brings back all that are dead
        assert [s.state for s in cluster.status()] == ["idle"] * 3 and sums(cluster) == {"3.0"}


def test_kill_respawn_and_restart_keep_the_layout():
    with wb.launch(4) as cluster:
        cluster.use(wb.Layout(world_size=4, tp=2, dp=2))
        cluster.execute("kept = rank")
        cluster.kill(3)
        cluster.respawn(3)
        cell = "(groups['tp'].all_gather(torch.ones(1)).tolist(), groups['dp'].ranks, wb.current().generation, 'kept' in globals())"
        assert {r: o.result_text for r, o in cluster.execute(cell, timeout_s=20).items()} == {
            0: "([1.0, 1.0], (0, 2), 1, True)",
            1: "([1.0, 1.0], (1, 3), 1, True)",
            2: "([1.0, 1.0], (0, 2), 1, True)",
            3: "([1.0, 1.0], (1, 3), 1, False)",
        }
        started = time.monotonic()
        cluster.restart()
        assert time.monotonic() - started < 5  # 0.2 s on idle cores
        assert cluster.execute(cell, ranks="dp=1", timeout_s=20)[3].result_text == "([1.0, 1.0], (1, 3), 2, False)"


def test_restarting_ends_a_cell_that_runs():
    with wb.launch(2) as cluster:
        handle = cluster.execute("import time; time.sleep(600)", block=False)
        time.sleep(0.2)
        cluster.restart()
        with pytest.raises(wb.RankFailed, match="died in cell 1: SIGKILL"):
            handle.result(timeout_s=5)
        assert sums(cluster) == {"2.0"}


def test_a_death_is_noticed_at_once():
    with wb.launch(2) as cluster:
        handle = cluster.execute("import time; time.sleep(600)", block=False)
        time.sleep(0.3)
        killed_s = time.monotonic()
        os.kill(cluster.pid(0), signal.SIGKILL)
        while cluster.status()[0].state != "dead" and time.monotonic() - killed_s < 5:
            time.sleep(0.005)
        assert time.monotonic() - killed_s < 0.5
        with pytest.raises(wb.RankFailed):
            handle.result(timeout_s=10)


@pytest.mark.parametrize("end", ["kill", "restart", "close", "exit"])
def test_what_a_rank_has_started_goes_with_it(end):
    with wb.launch(2) as cluster:
        cluster.execute("import os, subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])")
        children = cluster.pull("child.pid")
        stay = children[:1] if end in ("kill", "exit") else []
        if end == "kill":
            cluster.kill(1)
        elif end == "restart":
            cluster.restart()
        elif end == "close":
            cluster.close()
        else:
            died(cluster, "if rank: os._exit(1)")
        limit = time.monotonic() + 3
        while [pid for pid in children if psutil.pid_exists(pid)] != stay and time.monotonic() < limit:
            time.sleep(0.01)
        assert [pid for pid in children if psutil.pid_exists(pid)] == stay


SHARES = """
import multiprocessing, os
from multiprocessing.shared_memory import SharedMemory
shared = SharedMemory(create=True, size=1 << 20)
worker = multiprocessing.get_context("fork").Process(target=__import__("time").sleep, args=(60,), daemon=True)
worker.start()
"""


@pytest.mark.parametrize("end", ["kill", "exit", "restart", "close"])
def test_shared_memory_that_a_rank_made_goes_with_it_however_it_ends(end):
    with wb.launch(2) as cluster:
        cluster.execute(SHARES)
        files, workers = ([Path("/dev/shm") / name for name in cluster.pull("shared.name")], cluster.pull("worker.pid"))
        assert all(file.exists() for file in files)
        if end == "exit":
            died(cluster, "if rank: os._exit(1)")
        else:
            {"kill": lambda: cluster.kill(1), "restart": cluster.restart, "close": cluster.close}[end]()
        stay = end in ("kill", "exit")
        limit = time.monotonic() + 3
        while ([file.exists() for file in files], psutil.pid_exists(workers[1])) != ([stay, False], False) and time.monotonic() < limit:
            time.sleep(0.01)
        assert [file.exists() for file in files] == [stay, False] and not psutil.pid_exists(workers[1])


def test_shared_memory_of_ranks_goes_when_the_driver_is_killed():
    told = "print(*cluster.pull('shared.name'), flush=True)\ntime.sleep(60)"
    script = f"import workbench as wb, time\ncluster = wb.launch(2)\ncluster.execute({SHARES!r})\n{told}"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        files = [Path("/dev/shm") / name for name in driver.stdout.readline().split()]
        assert len(files) == 2 and all(file.exists() for file in files)
        driver.kill()
    limit = time.monotonic() + 3
    while any(file.exists() for file in files) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not any(file.exists() for file in files)


def test_a_child_that_a_rank_left_behind_in_a_session_of_its_own_does_not_hold_its_output():
    with wb.launch(2) as cluster:
        cell = "import subprocess\nif rank: child = subprocess.Popen(['sleep', '60'], start_new_session=True)\nchild.pid if rank else None"
        pid = int(cluster.execute(cell)[1].result_text)
        cluster.kill(1)
        cluster.respawn(1)
        assert sums(cluster) == {"2.0"}
        os.kill(pid, signal.SIGKILL)


def test_a_rank_that_dies_while_others_form_a_group_leaves_nobody_waiting():
    with wb.launch(3) as cluster:
        error = died(cluster, "import os\nif rank == 1: os._exit(5)\ndist.new_group([0, 1, 2])")
        assert error.exit_code == 5
        cluster.respawn(1)
        cluster.execute("g = dist.new_group([0, 1, 2]); dist.barrier(group=g)", timeout_s=20)


def test_deaths_at_random_moments_lose_nothing_of_the_others():
    import random

    draw = random.Random(1)
    with wb.launch(3) as cluster:
        cluster.execute("kept = rank + 5", ranks=[0, 2])
        for _ in range(5):
            handle = cluster.execute("for i in range(10**6): dist.all_reduce(torch.ones(100))", block=False)
            threading.Timer(0.05 + 0.1 * draw.random(), os.kill, (cluster.pid(1), signal.SIGKILL)).start()
            with pytest.raises(wb.RankFailed, match="rank 1 of 3 died"):
                handle.result(timeout_s=10)
            cluster.respawn(1)
            assert sums(cluster) == {"3.0"}
        assert cluster.pull("kept", ranks="0,2") == [5, 7]


@pytest.mark.parametrize("code, told", [("raise SystemExit(2)", (2, None)), ("import os; os.kill(os.getpid(), 15)", (-15, "SIGTERM"))])
def test_exits_are_described_by_code_and_signal(code, told):
    status = subprocess.run([sys.executable, "-c", code]).returncode
    wait_status = -status if status < 0 else status << 8
    assert describe_exit(wait_status)[:2] == told


LINGERS = "import time; dist.destroy_process_group = lambda: time.sleep(60)"


def test_a_paused_rank_beside_the_cell_is_continued_to_form_the_next_generation():
    with wb.launch(3, check_collectives=False) as cluster:
        os.kill(cluster.pid(2), signal.SIGSTOP)
        with pytest.raises(wb.RankDeadlock):
            cluster.execute("dist.barrier()", ranks="0-1", timeout_s=20)
        assert sums(cluster) == {"3.0"}


def test_a_rank_that_dies_while_the_others_form_a_generation_is_told_at_once():
    with wb.launch(4) as cluster:
        cluster.use(wb.Layout(world_size=4, tp=2, dp=2))
        cluster.execute("kept = rank")
        cluster.kill(0)
        cluster.execute(LINGERS, ranks=2)  # the new generation waits for it
        threading.Timer(0.5, os.kill, (cluster.pid(2), signal.SIGKILL)).start()
        started = time.monotonic()
        with pytest.raises(wb.RankFailed) as caught:
            cluster.respawn(0)
        assert time.monotonic() - started < 5 and (caught.value.rank, caught.value.signal_name) == (2, "SIGKILL")
        assert str(caught.value) == (
            "rank 2 of 4 died while the ranks formed generation 1: SIGKILL (killed from outside: by the kernel when memory ran out, "
            "or by a kill -9)\nit had written nothing\nthe other ranks keep their names, but have no process group until it is back\n"
            "cluster.respawn(2) brings it back, cluster.restart() starts all afresh"
        )
        assert cluster.execute("kept, dist.is_initialized()", ranks="1,3")[3].result_text == "(3, False)"
        cluster.respawn(2)
        assert cluster.pull("kept", ranks="1,3") == [1, 3] and sums(cluster) == {"4.0"}
        assert cluster.execute("groups['tp'].all_reduce(torch.ones(1)).item()")[0].result_text == "2.0"


def test_a_rank_that_dies_while_a_stop_forms_a_generation_does_not_hold_the_cell():
    with wb.launch(3, check_collectives=False) as cluster:
        cluster.execute("kept = rank")
        pids = [cluster.pid(r) for r in range(3)]
        cluster.execute(LINGERS, ranks=2)
        handle = cluster.execute("dist.barrier()", ranks="0-1", block=False)  # a deadlock, ended inside gloo: a generation must be formed
        threading.Timer(1.5, os.kill, (pids[2], signal.SIGKILL)).start()
        with pytest.raises(wb.RankDeadlock, match="rank 2 of 3 died while the ranks formed generation 1: SIGKILL"):
            handle.result(timeout_s=10)
        cluster.respawn(2)
        assert [cluster.pid(r) for r in range(2)] == pids[:2] and cluster.pull("kept", ranks="0-1") == [0, 1] and sums(cluster) == {"3.0"}


def test_ranks_that_make_a_group_without_a_peer_are_freed_and_keep_their_names():
    with wb.launch(3, check_collectives=False) as cluster:  # with checks they wait on the board
        cluster.execute("kept = rank")
        pids = [cluster.pid(r) for r in range(3)]
        for _ in range(2):
            started = time.monotonic()
            with pytest.raises(wb.RankTimeout):
                cluster.execute("import time\ndist.new_group([0, 1, 2]) if rank else time.sleep(60)", timeout_s=0.3)
            assert time.monotonic() - started < 4  # killed they would be after 5 s
            assert [cluster.pid(r) for r in range(3)] == pids and cluster.pull("kept") == [0, 1, 2]
            assert (
                cluster.execute("g = dist.new_group([0, 1, 2]); t = torch.ones(1); dist.all_reduce(t, group=g); t.item()")[1].result_text
                == "3.0"
            )
