"""The sampler, on real processes seen from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from workbench.ranks.memory import MemorySampler, read_held_bytes, read_pss_bytes

MIB = 2**20
# Says "ready", then holds 64 MiB more after the first line it reads, and ends after the second.
CHILD = "import sys; print('ready', flush=True); input(); held = b'x' * (64 * 2**20); print('held', flush=True); input()"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "did not come true within 10 s"
        time.sleep(0.01)


def test_the_curve_rises_when_the_process_takes_memory(child):
    with MemorySampler(interval_s=0.02) as sampler:
        sampler.watch(child.pid, "engine")
        wait_for(lambda: len(sampler.samples) >= 3)
        sampler.phase = "generate"
        tell(child)
        num = len(sampler.samples)
        wait_for(lambda: len(sampler.samples) >= num + 3)
    first, last = sampler.samples[0], sampler.samples[-1]
    assert (first.process, first.pid, first.rank, first.phase, last.phase) == ("engine", child.pid, -1, "", "generate")
    assert 60 * MIB < last.pss_bytes - first.pss_bytes < 80 * MIB
    assert 60 * MIB < last.rss_bytes - first.rss_bytes < 80 * MIB
    assert 0 < last.pss_bytes <= last.rss_bytes


def test_it_keeps_moving_while_the_process_is_stopped(child):
    psutil.Process(child.pid).suspend()
    with MemorySampler(interval_s=0.02) as sampler:
        sampler.watch(child.pid, "rank", rank=2)
        wait_for(lambda: len(sampler.samples) >= 5)
    assert {s.rank for s in sampler.samples} == {2} and all(s.pss_bytes > 0 for s in sampler.samples)


def test_it_samples_at_its_interval():
    with MemorySampler(interval_s=0.05) as sampler:
        sampler.watch(os.getpid(), "driver")
        began_s = time.monotonic()
        wait_for(lambda: len(sampler.samples) >= 11)
        took_s = time.monotonic() - began_s
    assert took_s >= 0.4  # eleven samples are ten intervals; the first may come before the watch


def test_readings_that_cost_much_are_rare_and_the_curve_still_moves_at_once(child, monkeypatch):
    num_readings = 0

    def costly(pid: int) -> int:
        nonlocal num_readings
        num_readings += 1
        time.sleep(0.05)
        return read_pss_bytes(pid)

    monkeypatch.setattr(sys.modules[MemorySampler.__module__], "read_pss_bytes", costly)
    sampler = MemorySampler(max_load=0.1)
    sampler.watch(child.pid, "engine")
    sampler.sample()
    tell(child)
    for _ in range(5):
        sampler.sample()
    assert num_readings == 1  # the next one is due 0.5 s after the first
    first, *later = [s.pss_bytes for s in sampler.samples]
    assert all(60 * MIB < pss - first < 80 * MIB for pss in later)
    other = MemorySampler(max_load=0.1)
    other.watch(child.pid, "engine")
    other.sample()
    assert num_readings == 1 and other.samples[0].pss_bytes == pytest.approx(later[-1], abs=8 * MIB)  # samplers share readings
    time.sleep(0.6)
    sampler.sample()
    assert num_readings == 2 and sampler.samples[-1].pss_bytes == pytest.approx(later[-1], abs=8 * MIB)


def test_processes_of_one_tick_carry_one_time(child):
    sampler = MemorySampler()
    sampler.watch(os.getpid(), "driver")
    sampler.watch(child.pid, "rank", rank=0)
    sampler.sample()
    one, two = sampler.samples
    assert one.time_s == two.time_s and {one.process, two.process} == {"driver", "rank"}
    sampler.unwatch(child.pid)
    sampler.sample()
    assert [s.process for s in sampler.samples] == ["driver", "rank", "driver"]


def test_a_process_that_ended_leaves_the_curve_and_the_others_stay(child):
    sampler = MemorySampler()
    sampler.watch(os.getpid(), "driver")
    sampler.watch(child.pid, "engine")
    sampler.sample()
    child.kill()
    wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    sampler.sample()  # a zombie still has its pid
    child.wait()
    sampler.sample()
    sampler.watch(child.pid, "engine")  # gone: passed over
    sampler.sample()
    assert [s.process for s in sampler.samples] == ["driver", "engine", "driver", "driver", "driver"]


def test_it_is_bounded_and_still_covers_the_whole_time():
    sampler = MemorySampler(interval_s=0.1, max_samples=20)
    sampler.watch(os.getpid(), "driver")
    for _ in range(50):
        sampler.sample()
    times = [s.time_s for s in sampler.samples]
    assert len(times) <= 20 and times == sorted(times) and sampler.interval_s > 0.1
    assert len(times) + sampler.num_dropped == 50
    sampler.sample()
    assert times[0] == sampler.samples[0].time_s


def test_start_and_stop_may_be_called_twice():
    sampler = MemorySampler(interval_s=0.01)
    sampler.watch(os.getpid(), "driver")
    sampler.start()
    sampler.start()
    sampler.stop()
    num = len(sampler.samples)
    sampler.stop()
    assert num >= 2 and len(sampler.samples) == num  # one at the start, one at the end
    sampler.start()
    sampler.stop()
    assert len(sampler.samples) > num


class ScriptedDevice:
    """A GPU driver that tells what it is told, then fails."""

    def __init__(self, *answers: dict[int, int]) -> None:
        self.answers = list(answers)

    def used_bytes_by_pid(self) -> dict[int, int]:
        return self.answers.pop(0)


def test_device_memory_stands_beside_and_a_lost_device_ends_nothing(child):
    sampler = MemorySampler(device=ScriptedDevice({child.pid: 5 * MIB, 1: 7}))
    sampler.watch(child.pid, "engine")
    sampler.sample()
    sampler.sample()  # the device has no second answer
    assert [s.device_used_bytes for s in sampler.samples] == [5 * MIB, 0]


def test_pss_agrees_with_psutil_and_is_0_for_no_process(child):
    assert read_pss_bytes(child.pid) == pytest.approx(psutil.Process(child.pid).memory_full_info().pss, rel=0.05)
    child.kill()
    child.wait()
    assert read_pss_bytes(child.pid) == 0


def test_a_process_on_the_gpu_is_read_there_and_others_by_their_pss():
    assert read_held_bytes([os.getpid(), 1], ScriptedDevice({os.getpid(): 5 * MIB}))[0] == 5 * MIB
    for device in (None, ScriptedDevice({-1: 5 * MIB})):
        assert read_held_bytes([os.getpid()], device)[0] == pytest.approx(read_pss_bytes(os.getpid()), rel=0.2)
