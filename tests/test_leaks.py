from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import leaks


def test_a_process_that_is_left_is_named():
    before = leaks.Belongings.now()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (line,) = leaks.left_since(before, wait_s=0)
        assert f"process {child.pid}" in line and "time.sleep(60)" in line
    finally:
        child.kill()
        child.wait()
    assert leaks.left_since(before) == []


def test_an_orphan_is_seen():
    before = leaks.Belongings.now()
    code = "import subprocess; print(subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL).pid)"
    pid = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)
    assert f"process {pid}" in leaks.left_since(before, wait_s=0)[0]
    os.kill(pid, 9)
    assert leaks.left_since(before) == []


def test_files_in_shared_memory_and_in_the_temporary_folder_are_named():
    before = leaks.Belongings.now()
    shared = leaks.SHARED_MEMORY / f"wbt-{os.getpid()}"
    shared.write_bytes(b"x")
    temporary = Path(tempfile.mkdtemp())
    try:
        assert leaks.left_since(before, wait_s=0) == [f"shared memory {shared}", f"temporary file {temporary}"]
    finally:
        shared.unlink()
        temporary.rmdir()


def test_what_another_program_maps_is_not_ours():
    shared = leaks.SHARED_MEMORY / f"wbt-{os.getpid()}"
    shared.write_bytes(b"x" * 4096)
    code = "import leaks; print(leaks._new_shared_memory(leaks.Belongings(pids=frozenset(), shared=frozenset(), temporary=frozenset())))"

    def seen_from_a_child() -> str:
        return subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True).stdout

    try:
        assert shared.name in seen_from_a_child()
        with open(shared, "r+b") as file, mmap.mmap(file.fileno(), 0):  # to the child, this process is another program
            assert shared.name not in seen_from_a_child()
    finally:
        shared.unlink()


def test_figures_are_closed():
    import matplotlib.pyplot as plt

    plt.figure()
    leaks.close_figures()
    assert plt.get_fignums() == []
