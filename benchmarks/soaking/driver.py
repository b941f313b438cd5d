"""A driver to be killed: a process that launches ranks and works until somebody ends it. And the fault that does so.

    soak --start--> driver: launch, settle, "go" --(stop button: SIGINT)--> verify, "stopped" --(kill -9)--> nothing of it after 3 s

Run as `python -m benchmarks.soaking.driver WORLD_SIZE TP BODY ENGINE`.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from benchmarks.soaking.faults import Hit
from benchmarks.soaking.world import Broken, Plan, World, Zero, leftover_files

__all__ = ["kill_driver", "main"]

_START_LIMIT_S = 240.0
_STOP_LIMIT_S = 30.0
_GONE_LIMIT_S = 3.0


def main(arguments: Sequence[str]) -> None:
    """Launch, say "go", work; a SIGINT is answered by a verified collective and "stopped"; then work on, for ever."""
    import workbench as wb
    from benchmarks.soaking import ranks

    size, tp, body, engine = int(arguments[0]), int(arguments[1]), arguments[2], arguments[3]
    plan = Plan(number=0, world_size=size, is_checked=True, tp=tp, engine="", members=())
    world = World(plan=plan)
    world.open()
    if engine:
        handle = wb.start_engine(world.cluster, model="tiny", backend=engine, kv_cache_bytes=2**24)
        world.engine_pids |= set(handle.pids)
    while True:
        try:
            print("go", flush=True)
            world.cluster.run(ranks.work, body, ranks.FOREVER)
        except KeyboardInterrupt:
            world.recover()
            world.check(frozenset())
            print("stopped", flush=True)


def kill_driver(plan: Plan, draw: random.Random) -> Hit:
    """Kill a driver at a random moment, while it starts too; see that nothing of it is left; start it again.

    Raises:
        Broken: processes or files are left after 3 s, a stop did not come through, or it did not start again.
    """
    engine = draw.choice(["", "", "", "hf"])
    body = draw.choice(["all_reduce", "objects and groups", "computing", "DDP", "large all_reduce", "sleeping"])
    is_early, is_stopped = draw.random() < 0.3, draw.random() < 0.6
    with tempfile.TemporaryDirectory(prefix="driver-") as folder:
        driver = Driver(plan, body, engine, folder)
        if is_early:
            time.sleep(6 * draw.random())
        else:
            driver.read("go", _START_LIMIT_S)
            time.sleep(draw.random())
            if is_stopped:
                driver.interrupt()
                driver.read("stopped", _STOP_LIMIT_S)
        at_s = driver.kill()
        again = Driver(replace(plan, world_size=max(2, plan.world_size // 2), tp=1), body, "", folder)
        again.read("go", _START_LIMIT_S)
        hit = Hit(at_s=at_s, what=f"{plan.world_size} ranks, {'while it starts' if is_early else body}{', engine' if engine else ''}")
        recovered_s = time.monotonic()
        again.kill()
    return replace(hit, at_s=hit.at_s + time.monotonic() - recovered_s)  # the second kill is no part of the recovery


class Driver:
    """The driver's process, with what it says."""

    def __init__(self, plan: Plan, body: str, engine: str, folder: str) -> None:
        command = [sys.executable, "-m", "benchmarks.soaking.driver", str(plan.world_size), str(plan.tp), body, engine]
        self._folder = Path(folder)
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True, env={**os.environ, "TMPDIR": folder})

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def read(self, wanted: str, limit_s: float) -> None:
        """Wait for a line."""
        said = self._process.stdout
        assert said is not None
        limit = time.monotonic() + limit_s
        while time.monotonic() < limit:
            if not select.select([said], [], [], 0.1)[0]:
                continue
            line = said.readline().strip()
            if line == wanted:
                return
            if not line:
                raise Broken(Zero.ERROR, f"the driver ended with code {self._process.wait()} before it said {wanted!r}\n{self._tail()}")
        raise Broken(Zero.HANG, f"the driver did not say {wanted!r} within {limit_s:.0f} s\n{self._tail()}")

    def kill(self) -> float:
        """kill -9 it; when that was. Nothing of it may be there 3 s later.

        Raises:
            Broken: a process or a file is.
        """
        family = psutil.Process(self._process.pid).children(recursive=True)
        at_s = time.monotonic()
        self._process.kill()
        self._process.wait()
        while (left := self._left(family)) and time.monotonic() - at_s < _GONE_LIMIT_S:
            time.sleep(0.05)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
        if left:
            raise Broken(Zero.ORPHAN, "; ".join(f"{one} of a killed driver" for one in left))
        return at_s

    def _left(self, family: list[psutil.Process]) -> list[str]:
        for process in family:
            with suppress(ChildProcessError):  # orphans come to this process, which must reap them
                os.waitpid(process.pid, os.WNOHANG)
        processes = [f"process {one.pid}" for one in family if _lives(one)]
        return processes + [f"file {name}" for name in leftover_files(self._folder)]

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-4000:]


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # it ended between the two questions
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
