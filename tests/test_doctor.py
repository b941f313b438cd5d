"""The doctor finds only our own leftovers, ends them, and says what the machine lacks."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import leaks
import psutil
import pytest

import workbench as wb
from workbench.cli import main
from workbench.ranks import doctor
from workbench.ranks.forkserver import FOLDER_VARIABLE

ORPHAN = "import time; print('up', flush=True); time.sleep(60)"


def gone_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return process.pid


def owner(folder: Path, driver: dict[str, float], servers: list[dict[str, float]]) -> Path:
    folder.mkdir()
    (folder / "owner.json").write_text(json.dumps({"driver": driver, "servers": servers}))
    return folder


def test_a_living_cluster_is_no_leftover():
    with wb.launch(1) as cluster:
        assert (cluster.folder / "owner.json").exists()
        assert cluster.folder not in [left.folder for left in doctor.find_leftovers(cluster.folder.parent)]


def test_a_dead_drivers_processes_are_found_and_ended(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE) as orphan:
        assert orphan.stdout is not None and orphan.stdout.readline()
        identity = {"pid": orphan.pid, "started": psutil.Process(orphan.pid).create_time()}
        folder = owner(tmp_path / "workbench-left", {"pid": gone_pid(), "started": 1.0}, [identity])
        (left,) = doctor.find_leftovers(tmp_path)
        assert left.folder == folder and left.pids == (orphan.pid,)
        doctor.remove(left)
        assert not psutil.pid_exists(orphan.pid) and not folder.exists()


def test_a_process_that_carries_the_mark_of_a_cluster_that_is_gone_is_found_and_ended(tmp_path):
    folder = owner(tmp_path / "workbench-left", {"pid": gone_pid(), "started": 1.0}, [])
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, env={FOLDER_VARIABLE: str(folder)}) as orphan:
        assert orphan.stdout is not None and orphan.stdout.readline()
        (left,) = doctor.find_leftovers(tmp_path)
        assert left.pids == (orphan.pid,)
        doctor.remove(left)
        assert not psutil.pid_exists(orphan.pid) and not folder.exists()


def test_a_pid_that_another_process_has_now_is_never_touched(tmp_path):
    other = {"pid": os.getpid(), "started": psutil.Process().create_time() - 1000}  # our pid, but somebody else's start
    owner(tmp_path / "workbench-left", other, [other])
    (left,) = doctor.find_leftovers(tmp_path)
    assert left.pids == ()
    doctor.remove(left)
    assert psutil.pid_exists(os.getpid())


def test_a_folder_that_says_nothing_is_left_alone(tmp_path):
    (tmp_path / "workbench-foreign").mkdir()
    (tmp_path / "workbench-broken").mkdir()
    (tmp_path / "workbench-broken" / "owner.json").write_text("{")
    assert doctor.find_leftovers(tmp_path) == []


def test_a_killed_drivers_folder_goes_by_itself():
    code = "import workbench as wb, time\nif __name__ == '__main__':\n    c = wb.launch(2); print(c.folder, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        folder = Path(driver.stdout.readline().strip())
        driver.kill()
    limit = time.monotonic() + 4
    while folder.exists() and time.monotonic() < limit:
        time.sleep(0.05)
    assert not folder.exists()


def test_the_command_tells_the_machine(capsys):
    code = main(["doctor"])
    told = capsys.readouterr().out
    assert "2 ranks added up to 3" in told and "127.0.0.1 answers" in told and "GiB available" in told
    assert code in (0, 1) and ("well" in told)


def no_loopback(*args: object, **options: object) -> None:
    raise OSError(99, "Cannot assign requested address")


def no_ranks(world_size: int) -> None:
    raise wb.LaunchError("rank 0 of 2 could not join the world:\nand why")


def texts(**files: str) -> Callable[[Path], str]:
    return lambda path: files[path.name]


SMALL_SHM = SimpleNamespace(f_bavail=2**13, f_frsize=2**12)
FAULTS = {
    "loopback": (socket, "create_server", no_loopback, "Cannot assign requested address", "bring it up: ip link set lo up"),
    "gloo": ("workbench.ranks.launch", "launch", no_ranks, "rank 0 of 2 could not join the world:", "a firewall on lo or a memory limit"),
    "native stacks (ptrace)": (Path, "read_text", texts(ptrace_scope="2"), "yama ptrace_scope is 2", "sysctl kernel.yama.ptrace_scope=0"),
    "shared memory": (os, "statvfs", lambda path: SMALL_SHM, "0.0 GiB free in /dev/shm", "mount -o remount,size=1G /dev/shm"),
    "open files": (resource, "getrlimit", lambda what: (256, 512), "limit 256, at most 512", "ulimit -Hn 4096"),
    "memory": (
        psutil,
        "virtual_memory",
        lambda: SimpleNamespace(available=2**29),
        "0.5 GiB available",
        "close something: an engine on a CPU",
    ),
    "disk": (shutil, "disk_usage", lambda path: SimpleNamespace(free=1), "0.0 GiB free under", "set TMPDIR to a larger disk"),
}
LOOKS = dict(zip(FAULTS, (doctor._loopback, doctor._gloo, doctor._ptrace, doctor._shared_memory, doctor._open_files, doctor._memory, doctor._disk), strict=True))  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("what", FAULTS)
def test_what_is_lacking_has_a_remedy(what, monkeypatch):
    home, name, fault, seen, remedy = FAULTS[what]
    assert LOOKS[what]().what == what and LOOKS[what]().remedy == ""
    monkeypatch.setattr(os, "getuid", lambda: 1000)  # root may look into every process
    monkeypatch.setattr(import_module(home) if isinstance(home, str) else home, name, fault)
    check = LOOKS[what]()
    monkeypatch.undo()
    assert check.what == what and seen in check.seen and remedy in check.remedy


def test_ranks_let_their_driver_look_where_yama_asks_for_that(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(Path, "read_text", texts(ptrace_scope="1"))
    check = doctor._ptrace()
    monkeypatch.undo()
    assert check.seen == "yama ptrace_scope is 1: ranks and engines let their driver look" and not check.remedy


def test_all_checks_are_made_and_what_stays_open_is_told(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_gloo", lambda: doctor.Check(what="gloo", seen="not asked here"))
    main(["doctor"])
    told = capsys.readouterr().out
    assert [check.what for check in doctor.check_machine()] == list(FAULTS)
    assert "gloo and the TCPStore talk without passwords: who can log in to this machine can reach them" in told
    assert "closed to others: control channels, engines, tapes, sessions and folders (0700, a token)" in told


# -- what engines made by hand leave ----------------------------------------------------------------------------------------------------

BY_HAND = """
import os, time
from workbench.ranks.doctor import own_folder
for kind in ("engine", "world"):
    print(own_folder(kind), flush=True)
time.sleep(60)
"""


def test_folders_of_a_killed_script_are_found_and_removed_and_those_of_a_living_one_are_not(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "check_machine", list)
    with subprocess.Popen([sys.executable, "-c", BY_HAND], stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        folders = [Path(script.stdout.readline().strip()) for _ in range(2)]
        assert [folder.name.rpartition("-")[0] for folder in folders] == ["workbench-engine", "workbench-world"]
        (folders[0] / "engine.log").write_text("INFO it began")
        assert not [left for left in doctor.find_leftovers() if left.folder in folders]
        script.kill()
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert f"left by process {script.pid}: {folders[0]}" in told.replace("\n", "") and "workbench doctor --clean removes them" in told
    assert main(["doctor", "--clean"]) == 0 and not any(folder.exists() for folder in folders)
    assert "removed" in capsys.readouterr().out


def test_in_a_rank_such_folders_lie_in_the_clusters():
    def folder() -> str:
        return str(doctor.own_folder("engine"))

    with wb.launch(1) as cluster:
        (made,) = cluster.run(folder)
        assert Path(made).parent == cluster.folder and Path(made).stat().st_mode & 0o777 == 0o700
    assert not Path(made).exists()


# -- clusters that are up ---------------------------------------------------------------------------------------------------------------

DRIVER = """
import workbench as wb
if __name__ == "__main__":
    with wb.launch(3) as cluster:
        print("up", flush=True)
        cluster.execute("import time\\nif rank == 1: time.sleep(60)\\nelse: dist.barrier()")
"""


@pytest.fixture
def driver() -> Iterator[subprocess.Popen[str]]:
    """Another process, whose main thread waits for a cell that hangs."""
    with subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        time.sleep(1.0)
        yield process
        process.kill()


def test_a_live_cluster_of_another_process_is_diagnosed_from_a_shell(driver, capsys):
    with wb.launch(1):  # another cluster, of this process
        assert main(["doctor", "--attach", str(driver.pid)]) == 0
        told = capsys.readouterr().out
        assert main(["doctor", "--attach"]) == 0
        both = capsys.readouterr().out
    assert told.startswith(f"cluster of process {driver.pid}, ") and str(os.getpid()) not in told.splitlines()[0]
    assert "<Cluster of 3 ranks: cell 1 runs, generation 0>" in told
    assert "): running cell 1 barrier #2 of world" in told and "  rank 1 (pid " in told
    assert "ranks 0, 2 wait in barrier (line 3); rank 1 sleeps, or waits for something that is no collective, line 2: if rank == 1:" in told
    assert f"cluster of process {driver.pid}, " in both and f"cluster of process {os.getpid()}, " in both
    assert "no cell runs; every rank is idle" in both


def test_a_driver_that_gives_no_answer_is_told(driver, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_ANSWER_LIMIT_S", 0.5)
    os.kill(driver.pid, signal.SIGSTOP)
    try:
        assert main(["doctor", "--attach", str(driver.pid)]) == 1
    finally:
        os.kill(driver.pid, signal.SIGCONT)
    told = capsys.readouterr().err
    assert f"the driver {driver.pid} gave no answer within 0.5 s\nit is paused, or runs native code" in told
    assert f"py-spy dump --pid {driver.pid} shows where it is" in told


def test_no_cluster_to_attach_to_is_told(capsys):
    assert main(["doctor", "--attach", str(gone_pid())]) == 1
    assert "workbench doctor: no cluster of yours is up in process " in capsys.readouterr().err


# -- nothing is left, whenever the driver goes ------------------------------------------------------------------------------------------

VICTIM = """
import os, sys, threading, time, workbench as wb
def act():
    print("launching", flush=True)
    cluster = wb.launch(4)
    print(cluster.folder, flush=True)
    if sys.argv[1] == "cell":
        cluster.execute("import time\\nwhile True:\\n    dist.all_reduce(torch.ones(100))")
    elif sys.argv[1] == "stop":
        handle = cluster.execute("while True: pass", block=False); cluster.interrupt(); handle.result()
    elif sys.argv[1] == "restart":
        while True: cluster.restart()
    elif sys.argv[1] == "engine":
        print(wb.start_engine(cluster, backend="hf"), flush=True)
    time.sleep(60)
if __name__ == "__main__":
    act()
"""


@pytest.mark.parametrize(
    "doing, after_s", [("launch", 0.05), ("launch", 0.6), ("cell", 1.5), ("stop", 1.5), ("restart", 1.8), ("engine", 1.2), ("engine", 3.0)]
)
def test_a_kill_of_the_driver_at_any_moment_leaves_nothing_after_three_seconds(doing, after_s):
    before = leaks.Belongings.now()
    with subprocess.Popen([sys.executable, "-c", VICTIM, doing], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == "launching\n"
        time.sleep(after_s)
        driver.kill()
    left = leaks.left_since(before, wait_s=3.0)
    assert not left, left
    assert doctor.find_leftovers() == []


@pytest.mark.parametrize("option", ["--help"])
def test_it_explains_itself(option, capsys):
    with pytest.raises(SystemExit):
        main(["doctor", option])
    told = capsys.readouterr().out
    assert "--clean" in told and "--attach" in told
