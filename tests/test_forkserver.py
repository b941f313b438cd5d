"""The server that forks ranks: what children get, how their end is told, and that nothing outlives the driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue

import psutil
import pytest

import workbench as wb
from workbench.ranks.forkserver import _end_session
from workbench.ranks.servers import ForkServer, fork_server


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    made = ForkServer((), {})
    yield made
    made.close()


def spawn(server: ForkServer, entry: str, config: object = None, **environment: str) -> tuple[int, int, str]:
    """Pid, exit status and output of a child that ran to its end."""
    reading, writing = os.pipe()
    ended: Queue[int] = Queue()
    try:
        pid = server.spawn(entry, config, fds=[writing, writing], environment={**os.environ, **environment}, on_exit=ended.put)
    finally:
        os.close(writing)
    with os.fdopen(reading) as output:
        said = output.read()
    return pid, ended.get(timeout=10), said


def show(config: object, fds: list[int]) -> None:
    """Entry of a child: what it finds."""
    own = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1]
    handler = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print(config, fds, own, os.getsid(0) == os.getpid(), handler, os.environ.get("WORD"), os.getcwd(), sep="|")


def fail(config: object, fds: list[int]) -> None:
    raise ValueError(f"in the child: {config}")


def leave(config: int, fds: list[int]) -> None:
    os._exit(config)


def test_a_child_gets_its_config_environment_and_folder_and_no_other_descriptor(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    pid, status, said = spawn(server, "test_forkserver:show", {"a": 1}, WORD="given")
    assert said == f"{{'a': 1}}|[]|[0, 1, 2]|True|True|given|{tmp_path}\n" and status == 0 and pid != server.pid


def test_an_entry_that_raises_is_told_by_its_own_words(server, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    _, status, said = spawn(server, "test_forkserver:fail", 7)
    assert os.waitstatus_to_exitcode(status) == 1 and said.endswith("ValueError: in the child: 7\n")
    _, status, said = spawn(server, "no_such_module:main")
    assert os.waitstatus_to_exitcode(status) == 1 and "No module named 'no_such_module'" in said


def test_exits_are_told_in_any_number(server, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert [os.waitstatus_to_exitcode(spawn(server, "test_forkserver:leave", code)[1]) for code in (0, 3, 9)] == [0, 3, 9]


def test_a_server_that_is_gone_says_so():
    server = ForkServer((), {})
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(
        wb.LaunchError, match=r"a process could not be started: .*\nthe fork server \(pid \d+\) said: nothing\ncheck the memory"
    ):
        server.spawn("os:abort", None, fds=[1, 2], environment={}, on_exit=lambda status: None)
    assert wait_for(lambda: not server.is_alive, 2)
    server.close()


def test_a_server_that_cannot_import_says_what_it_said():
    server = ForkServer(("no_such_module",), {})
    with pytest.raises(wb.LaunchError, match="No module named 'no_such_module'"):
        server.spawn("os:abort", None, fds=[1, 2], environment={}, on_exit=lambda status: None)
    server.close()


def test_what_an_interrupted_caller_asked_for_is_killed_and_the_next_gets_its_own(monkeypatch):
    """The server still imports when the first caller is interrupted, as with the first engine of a session."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    server = ForkServer(("workbench.ranks.rank",), {})
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        server.spawn("test_forkserver:linger", None, fds=[1, 2], environment=dict(os.environ), on_exit=lambda status: None)
    pid, status, _ = spawn(server, "test_forkserver:leave", 5)
    assert os.waitstatus_to_exitcode(status) == 5 and pid not in psutil.pids()
    assert wait_for(lambda: not psutil.Process(server.pid).children(), 5)
    server.close()


def linger(config: object, fds: list[int]) -> None:
    time.sleep(60)


def test_one_server_serves_equal_needs_and_another_other_ones(monkeypatch):
    one = fork_server(("json",))
    assert fork_server(("json",)) is one
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")  # read when a library loads
    other = fork_server(("json",))
    assert other is not one
    for server in (one, other):
        server.close()
    assert fork_server(("json",)) is not other  # a closed one is replaced
    fork_server(("json",)).close()


DRIVER = """
import sys, time, workbench as wb
cluster = wb.launch(3)
server = __import__("psutil").Process().children()[0].pid
print(server, *[s.pid for s in cluster.status()], cluster.folder, flush=True)
{then}
"""


def driver(then: str) -> tuple[subprocess.Popen[str], list[int], Path]:
    process = subprocess.Popen([sys.executable, "-c", DRIVER.format(then=then)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    *pids, folder = process.stdout.readline().split()
    return process, [int(pid) for pid in pids], Path(folder)


def wait_for(is_so: Callable[[], bool], limit_s: float) -> bool:
    limit = time.monotonic() + limit_s
    while not is_so() and time.monotonic() < limit:
        time.sleep(0.02)
    return is_so()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    "cell",
    ["sum(range(10**13))", "dist.barrier() if rank else time.sleep(600)", "os.fork() or time.sleep(600)", None],
    ids=["in C", "in a collective", "with a child", "idle"],
)
def test_a_killed_driver_leaves_nothing(cell):
    then = "time.sleep(600)" if cell is None else f"cluster.execute('import time, os; {cell}')"
    process, pids, folder = driver(then)
    assert len(pids) == 4 and folder.exists()
    time.sleep(0.4)
    with process:
        process.kill()
    assert wait_for(lambda: not any(map(is_alive, pids)), 3)
    assert wait_for(lambda: not folder.exists(), 3)


@pytest.mark.parametrize("then, code", [("sys.exit(3)", 3), ("1 / 0", 1)])
def test_a_driver_that_ends_leaves_nothing_and_says_nothing(then, code):
    process, pids, folder = driver(then)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code and ("ZeroDivisionError" in err if then == "1 / 0" else err == "")
    assert wait_for(lambda: not any(map(is_alive, pids)), 3) and not folder.exists()


def test_a_killed_server_takes_its_ranks_along_and_the_next_launch_has_another():
    process, pids, _ = driver(
        "import os\nos.kill(server, 9)\ntime.sleep(1)\ntry:\n    cluster.execute('1')\nexcept wb.RankFailed as error:\n"
        "    print(str(error).splitlines()[0])\ncluster.close()\nprint(wb.launch(2).run(lambda: 5))"
    )
    out, err = process.communicate(timeout=40)
    assert out.splitlines()[0].startswith("rank 0 of 3 is dead: SIGKILL") and out.splitlines()[1] == "[5, 5]", err
    assert wait_for(lambda: not any(map(is_alive, pids)), 3)


def test_a_session_is_ended_whatever_its_groups_and_what_is_another_users_is_let_be(monkeypatch):
    def refuse(process: psutil.Process) -> None:
        raise psutil.AccessDenied(process.pid)

    code = "import subprocess, time; print(subprocess.Popen(['sleep', '60'], process_group=0).pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        child = psutil.Process(int(leader.stdout.readline()))
        with monkeypatch.context() as patched:
            patched.setattr(psutil.Process, "kill", refuse)
            _end_session(leader.pid)
        assert leader.poll() is None and child.status() != psutil.STATUS_ZOMBIE
        _end_session(leader.pid)
    assert leader.returncode == -signal.SIGKILL
    gone, _ = psutil.wait_procs([child], timeout=3)
    assert gone
