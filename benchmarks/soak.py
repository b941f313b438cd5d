"""The reliability run: random faults on random worlds, for a while; what may never be seen is counted.

    python -m benchmarks.soak --minutes 30 --seed 0     the run; its table is kept in results/
    python -m benchmarks.soak --only 30                 fault 30 alone, in a world made like the one that it broke
    python -m benchmarks.soak --only 30-37              that world's faults one after another

    seed -> world w (15 faults) -> fault n: draw, strike, recover, check -> Outcome -> table, JSON, exit code

Fault n and its world are drawn from the seed and n alone. After a fault that broke one of the zeros its world is closed and made anew.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.run import RESULTS, heading
from benchmarks.soaking import faults
from benchmarks.soaking.driver import kill_driver
from benchmarks.soaking.faults import Hit
from benchmarks.soaking.world import ENGINES, Broken, Plan, World, Zero, leftover_files, lost_memory, orphans

__all__ = ["Outcome", "Soak", "main", "table"]

FAULTS_A_WORLD = 15
_DRIVER = "driver killed"
_DRIVER_SHARE = 0.04
_FAULT_LIMIT_S = 600.0  # the watch over a fault whose own limits do not hold
_CLOSE_LIMIT_S = 30.0
_MOST_IN_A_ROW = 10
_KINDS = (*faults.FAULTS, _DRIVER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One fault and what came of it.

    Attributes:
        recovery_s: from the fault to a verified collective of all ranks; None where it did not come to that.
        broken: which zero it broke, "" where none.
    """

    number: int
    kind: str
    what: str
    world: str
    recovery_s: float | None
    broken: str = ""
    text: str = ""


@dataclass(slots=True)
class Soak:
    """One run.

    Attributes:
        folder: where the temporary files of this process and its children go and nobody else's; None: what is left there is not looked at.
    """

    seed: int
    folder: Path | None = None
    engines: Sequence[str] = ENGINES
    kinds: Sequence[str] = _KINDS
    say: Callable[[str], None] = print
    outcomes: list[Outcome] = field(default_factory=list)
    greedy: list[int] = field(default_factory=list)
    world: World | None = None

    def run(self, numbers: Iterable[int], *, until_s: float = float("inf"), least: int = 0) -> None:
        """Do the faults of these numbers, until a monotonic time; `least` of them in any case."""
        for number in numbers:
            if time.monotonic() > until_s and len(self.outcomes) >= least:
                break
            outcome = _within(_FAULT_LIMIT_S, lambda: self._do(number), number)  # noqa: B023  it ends before the next
            self.outcomes.append(outcome)
            self.say(_line(outcome))
            if outcome.broken:
                self.say(f"  {outcome.world}\n  {outcome.broken}: {outcome.text}\n  again alone: --seed {self.seed} --only {number}")
                self.close()
            if all(one.broken for one in self.outcomes[-_MOST_IN_A_ROW:]) and len(self.outcomes) >= _MOST_IN_A_ROW:
                self.say(f"the last {_MOST_IN_A_ROW} faults all broke something: the run ends here")
                break
        self.close()

    def _do(self, number: int) -> Outcome:
        draw = random.Random(f"{self.seed}:fault {number}")
        plan = Plan.draw(self.seed, number // FAULTS_A_WORLD, engines=self.engines)
        is_driver = _DRIVER in self.kinds and (draw.random() < _DRIVER_SHARE or set(self.kinds) == {_DRIVER})
        kind = _DRIVER if is_driver else faults.choose(draw, [k for k in self.kinds if k != _DRIVER])
        hit: Hit | None = None
        recovery_s: float | None = None
        broken: Exception | None = None
        try:
            if is_driver:
                hit = kill_driver(plan, draw)
                recovery_s = time.monotonic() - hit.at_s
            else:
                world = self._in_world(plan)
                hit = faults.FAULTS[kind][0](world, draw)
                world.recover()
                recovery_s = time.monotonic() - hit.at_s
                world.check(hit.gone)
        except Exception as error:
            broken = error
        zero = broken.zero if isinstance(broken, Broken) else Zero.ERROR if broken else ""
        return Outcome(
            number=number,
            kind=kind,
            what=hit.what if hit else "",
            world=str(plan),
            recovery_s=recovery_s,
            broken=str(zero),
            text="" if broken is None else f"{type(broken).__name__}: {broken}",
        )

    def _in_world(self, plan: Plan) -> World:
        if self.world is None or self.world.plan != plan:
            self.close()
            self.world = World(plan=plan, greedy=self.greedy)
            self.world.open()
        return self.world

    def close(self) -> None:
        """Close the world; one that does not close in time is ended by its pids."""
        world, self.world = self.world, None
        if world is None or world.cluster is None:
            return
        pids = [world.cluster.pid(rank) for rank in range(world.plan.world_size)]
        closing = threading.Thread(target=world.close, daemon=True)
        closing.start()
        closing.join(_CLOSE_LIMIT_S)
        if closing.is_alive():
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        left = orphans(set(), since_s=world.opened_s) + lost_memory(world.opened_s)
        left += [f"file {name}" for name in (leftover_files(self.folder) if self.folder else ())]
        if left or closing.is_alive():
            zero = Zero.HANG if closing.is_alive() else Zero.ORPHAN
            what = "the world did not close" if closing.is_alive() else "; ".join(left)
            self.outcomes.append(
                Outcome(number=-1, kind="close", what="", world=str(world.plan), recovery_s=None, broken=str(zero), text=what)
            )
            self.say(_line(self.outcomes[-1]) + f"\n  {what}")
            for path in self.folder.iterdir() if self.folder else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _within(limit_s: float, call: Callable[[], Outcome], number: int) -> Outcome:
    """Run in a thread that is watched: one that hangs is left behind, with the stacks of all threads in the text."""
    said: list[Outcome] = []
    thread = threading.Thread(target=lambda: said.append(call()), daemon=True)
    thread.start()
    thread.join(limit_s)
    if said:
        return said[0]
    with tempfile.TemporaryFile("w+") as stacks:
        faulthandler.dump_traceback(stacks, all_threads=True)
        stacks.seek(0)
        text = stacks.read()
    return Outcome(number=number, kind="?", what="", world="", recovery_s=None, broken=str(Zero.HANG), text=f"the driver hangs\n{text}")


def _line(outcome: Outcome) -> str:
    took = "" if outcome.recovery_s is None else f"{outcome.recovery_s:6.2f} s"
    return f"{outcome.number:4d}  {outcome.kind:<20} {took:>9}  {outcome.what}" + (f"  BROKEN: {outcome.broken}" if outcome.broken else "")


def table(outcomes: Sequence[Outcome]) -> str:
    """Faults by kind with their recovery times, and the zeros."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    out = io.StringIO()
    console = Console(file=out, width=120, color_system=None)
    by_kind = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("fault", "times", "recovered in, median", "worst", "broken"):
        by_kind.add_column(title, justify="left" if title == "fault" else "right")
    struck = [one for one in outcomes if one.kind in _KINDS]
    for kind in _KINDS:
        mine = [one for one in struck if one.kind == kind]
        if mine:
            by_kind.add_row(kind, *_cells(mine))
    by_kind.add_section()
    by_kind.add_row("all", *_cells(struck))
    console.print(by_kind)
    zeros = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    zeros.add_column("must be 0")
    zeros.add_column("seen", justify="right")
    for zero in Zero:
        zeros.add_row(str(zero), str(sum(one.broken == zero for one in outcomes)))
    console.print(zeros)
    return "\n".join(row.rstrip() for row in out.getvalue().splitlines())


def _cells(outcomes: Sequence[Outcome]) -> tuple[str, str, str, str]:
    seconds = [one.recovery_s for one in outcomes if one.recovery_s is not None]
    times = (f"{median(seconds):.2f} s", f"{max(seconds):.2f} s") if seconds else ("", "")
    return str(len(outcomes)), *times, str(sum(bool(one.broken) for one in outcomes))


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, keep; 0 when every zero is zero."""
    options = _parse(argv)
    loads, started_s = [os.getloadavg()[0]], time.monotonic()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored, and so would drivers started here
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come to this process, where they are seen
    with _own_temporary_folder() as folder:
        soak = Soak(seed=options.seed, folder=folder, kinds=options.kinds, engines=options.engines)
        numbers = options.only or range(options.first, 10**9)
        try:
            soak.run(numbers, until_s=float("inf") if options.only else started_s + 60 * options.minutes, least=options.faults)
        except KeyboardInterrupt:
            soak.close()
    loads.append(os.getloadavg()[0])
    minutes = (time.monotonic() - started_s) / 60
    text = f"{heading(loads)}\nseed {options.seed}, {len(soak.outcomes)} faults in {minutes:.1f} minutes\n{table(soak.outcomes)}"
    print(text)
    if options.out:
        _write(options.out, text, {"seed": options.seed, "minutes": minutes, "outcomes": [asdict(one) for one in soak.outcomes]})
    return int(any(one.broken for one in soak.outcomes))


@contextmanager
def _own_temporary_folder() -> Iterator[Path]:
    """Temporary files of this process and its children go there, and nobody else's."""
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before
            os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)


def _write(path: Path, text: str, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"kept in {path} and {path.with_suffix('.json')}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Random faults on random worlds.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--faults", type=int, default=300, help="at least so many, however long they take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first fault")
    parser.add_argument("--only", type=_numbers, help="these faults alone: 30, or 30-37")
    parser.add_argument("--kind", dest="kinds", action="append", choices=_KINDS, help="only faults of this kind (more than once: of these)")
    parser.add_argument("--engine", dest="engines", action="append", choices=sorted(set(ENGINES)), help="only worlds with this engine")
    parser.add_argument("--out", type=Path, help="text file to write; its .json lies beside it")
    options = parser.parse_args(argv)
    options.kinds = options.kinds or list(_KINDS)
    options.engines = options.engines or list(ENGINES)
    if not options.only and not options.out:
        options.out = RESULTS / f"soak-{time.strftime('%Y-%m-%d-%H%M', time.gmtime())}.txt"
    return options


def _numbers(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


if __name__ == "__main__":
    sys.exit(main())
