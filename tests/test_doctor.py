"""The doctor finds only our own leftovers, ends them, and says what the machine lacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import workbench as wb
from workbench.cli import main
from workbench.ranks import doctor

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


def test_what_is_lacking_has_a_remedy(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1))
    checks = {check.what: check for check in doctor.check_machine()}
    assert "set TMPDIR to a larger disk" in checks["disk"].remedy and checks["loopback"].remedy == ""


@pytest.mark.parametrize("option", ["--help"])
def test_it_explains_itself(option, capsys):
    with pytest.raises(SystemExit):
        main(["doctor", option])
    assert "--clean" in capsys.readouterr().out
