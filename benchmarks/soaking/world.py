"""A world under fault as the driver sees it: how it is drawn, what lives on it, and what must hold after each fault.

    Plan.draw(seed, number) -> World.open() -> fault -> recover (respawn, a verified collective) -> check (names, old objects, orphans)

Every call has a time limit of its own; what does not come back within it is a hang. Knows clusters. Does not know faults.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

import workbench as wb
from benchmarks.soaking import ranks
from benchmarks.soaking.ranks import Names
from workbench.ranks.handle import CellHandle

__all__ = ["ENGINES", "Broken", "Plan", "World", "Zero", "leftover_files", "lost_memory", "orphans"]

ENGINES = (*[""] * 7, *["hf"] * 3, "vllm", "vllm tp")  # a start of vLLM in a rank takes as long as many faults
_ASK_LIMIT_S = 60.0  # a call that takes milliseconds; the machine may be busy
_ENGINE_LIMIT_S = 240.0
_ORPHAN_LIMIT_S = 3.0
_HELPER_LIMIT_S = 15.0  # for a py-spy that reads the stack of a rank that was stopped: it has a limit of its own


class Zero(StrEnum):
    """What may never be seen."""

    HANG = "hangs"
    ORPHAN = "orphans"
    LOST = "lost names of healthy ranks"
    STALE = "stale objects that hung or kept silent"
    WRONG = "wrong results"
    ERROR = "other errors than the fault asks for"


class Broken(Exception):
    """One of the zeros is not zero."""

    def __init__(self, zero: Zero, text: str) -> None:
        super().__init__(f"{zero}: {text}")
        self.zero = zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one world is made.

    Attributes:
        tp: degree of the layout's tp axis; the rest is data parallel.
        engine: "", "hf", "vllm" (one a member) or "vllm tp" (one over all members).
        members: ranks with an engine.
    """

    number: int
    world_size: int
    is_checked: bool
    tp: int
    engine: str
    members: tuple[int, ...]

    @classmethod
    def draw(cls, seed: int, number: int, *, engines: Sequence[str] = ENGINES) -> Plan:
        """The same for the same seed and number."""
        draw = random.Random(f"{seed}:world {number}")
        size = draw.choice([2, 2, 3, 3, 4, 4, 5, 6, 7, 8])
        engine = draw.choice(engines)
        num_members = 2 if engine == "vllm tp" else draw.randint(1, 2)
        return cls(
            number=number,
            world_size=size,
            is_checked=draw.random() < 0.7,
            tp=draw.choice([d for d in (1, 2, 4) if size % d == 0]),
            engine=engine,
            members=tuple(sorted(draw.sample(range(size), num_members))) if engine else (),
        )

    def __str__(self) -> str:
        engine = f", {self.engine} on ranks {list(self.members)}" if self.engine else ""
        return f"world {self.number}: {self.world_size} ranks, tp {self.tp}, check {'on' if self.is_checked else 'off'}{engine}"


@dataclass(slots=True)
class World:
    """A cluster, and what its ranks must still hold.

    Attributes:
        names: rank -> what it was last seen to hold.
        generation: of the objects that live on the ranks now.
        greedy: tokens that every engine of the whole run gives; shared by the worlds.
        engine_pids: of engines beside the ranks.
        last_error: what the last fault that asked for an error ended in.
        opened_s: when, in seconds since the epoch; what this process had started before is nobody's orphan.
    """

    plan: Plan
    greedy: list[int] = field(default_factory=list)
    cluster: Any = None
    names: dict[int, Names] = field(default_factory=dict)
    generation: int = 0
    num_calls: int = 0
    opened_s: float = 0.0
    engine_pids: set[int] = field(default_factory=set)
    last_error: str = ""

    def open(self) -> None:
        """Start the ranks, and what lives on them."""
        self.opened_s = time.time()
        self.cluster = wb.launch(self.plan.world_size, check_collectives=self.plan.is_checked, collective_timeout_s=600)
        self.cluster.use(wb.Layout(world_size=self.plan.world_size, tp=self.plan.tp))
        self.settle()

    def close(self) -> None:
        self.cluster.close()

    # -- calls --------------------------------------------------------------------------------------------------------------------------

    def start(self, fn: Callable[..., Any], *args: Any, on: Sequence[int] | None = None, timeout_s: float | None = None) -> CellHandle:
        """Begin a call on ranks (None: all)."""
        handle: CellHandle = self.cluster.run(fn, *args, ranks=None if on is None else list(on), timeout_s=timeout_s, block=False)
        return handle

    def end(self, handle: CellHandle, *kinds: type[wb.WorkbenchError], limit_s: float = _ASK_LIMIT_S) -> Any:
        """Wait for a call that must end in an error of one of `kinds`, or in none where there are none.

        Raises:
            Broken: it ended otherwise, or not at all.
        """
        try:
            value = handle.result(limit_s)
        except TimeoutError:
            found = self.cluster.diagnose()
            raise Broken(Zero.HANG, f"{handle!r} did not end within {limit_s:.0f} s: {found.sentence}\n{found.text}") from None
        except wb.WorkbenchError as error:
            if "WrongResult" in str(error):
                raise Broken(Zero.WRONG, str(error)) from error
            if kinds and isinstance(error, kinds):
                self.last_error = str(error)
                return error
            wanted = " or ".join(kind.__name__ for kind in kinds) or "none"
            raise Broken(Zero.ERROR, f"{type(error).__name__} where {wanted} was due: {error}") from error
        if kinds:
            raise Broken(Zero.ERROR, f"the call ended well where {' or '.join(kind.__name__ for kind in kinds)} was due")
        return value

    def ask(self, fn: Callable[..., Any], *args: Any, on: Sequence[int] | None = None, limit_s: float = _ASK_LIMIT_S) -> list[Any]:
        """A call that must end well."""
        values: list[Any] = self.end(self.start(fn, *args, on=on), limit_s=limit_s)
        return values

    # -- after a fault ------------------------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Bring dead ranks back, and see a collective of all ranks give the right result."""
        for _ in range(self.plan.world_size):
            if not (dead := self.dead()):
                break
            self.cluster.respawn(dead[0])
        self.num_calls += 1
        nonce = 1000 * self.num_calls
        size = self.plan.world_size
        wanted = size * (size - 1) // 2 + size * nonce
        if (got := self.ask(ranks.verify, nonce)) != [wanted] * size:
            raise Broken(Zero.WRONG, f"all_reduce over {size} ranks gave {got}, must be {wanted}")

    def dead(self) -> list[int]:
        return [status.rank for status in self.cluster.status() if status.state == "dead"]

    def check(self, gone: frozenset[int]) -> None:
        """Names of healthy ranks are there, old objects work or say that they are stale, no process is left; then all is made anew.

        Args:
            gone: ranks that the fault ended, whose names may be gone.
        """
        self._check_names(gone)
        healthy = [rank for rank in range(self.plan.world_size) if rank not in gone]
        self._check_objects(healthy)
        self._check_engines(healthy)
        self.settle()
        if left := self.orphans():
            raise Broken(Zero.ORPHAN, "; ".join(left))

    def _check_names(self, gone: frozenset[int]) -> None:
        for rank, (now, before) in enumerate(zip(self.ask(ranks.tell_names), self.names.values(), strict=True)):
            if rank in gone:
                if now.token:
                    raise Broken(Zero.ERROR, f"rank {rank} was to end and did not: it has its names still")
            elif now != before:
                raise Broken(Zero.LOST, f"rank {rank} was healthy: it had {before}, it has {now}\nthe fault's own error: {self.last_error}")

    def _check_objects(self, healthy: Sequence[int]) -> None:
        """With a new generation each healthy rank hears StaleGroupError; without one the objects work as before."""
        is_stale = self.cluster.generation != self.generation
        if not healthy:
            return
        for what in ranks.OBJECTS:
            handle = self.start(ranks.use, what, on=healthy, timeout_s=_ASK_LIMIT_S / 2)
            try:
                said = self.end(handle)
            except Broken as broken:
                if is_stale:
                    raise Broken(Zero.STALE, f"{what} of generation {self.generation}, now {self.cluster.generation}: {broken}") from broken
                raise
            if set(said) != {"stale" if is_stale else "right"}:
                zero = Zero.STALE if is_stale else Zero.ERROR
                raise Broken(zero, f"{what} of generation {self.generation}, now {self.cluster.generation}: the ranks said {said}")

    def _check_engines(self, healthy: Sequence[int]) -> None:
        """Engines of one process work on whatever happened to the groups; one over two ranks works, or says that it is dead."""
        members = [rank for rank in self.plan.members if rank in healthy]
        if not members:
            return
        if self.plan.engine == "vllm tp":
            handle = self.start(ranks.generate, on=members)
            try:
                self.end(handle)
            except Broken as broken:
                if "EngineError: the engine is dead" not in str(broken) and "EngineError: vLLM failed" not in str(broken):
                    raise Broken(Zero.STALE, f"engine over ranks {list(self.plan.members)}: {broken}") from broken
        else:
            self._see_tokens(self.ask(ranks.generate, on=members))

    def settle(self) -> None:
        """Names where they are missing, groups, models and engines of the present generation."""
        self.generation = self.cluster.generation
        self.names = dict(enumerate(self.ask(ranks.settle, f"{self.plan.number}.{self.num_calls}")))
        if self.plan.engine:
            self.ask(ranks.make_engine, self.plan.engine, list(self.plan.members), limit_s=_ENGINE_LIMIT_S)
            self._see_tokens(self.ask(ranks.generate, on=self.plan.members))

    def _see_tokens(self, said: list[list[int]]) -> None:
        """Any two engines give the same greedy tokens, to the first of the run."""
        if not self.greedy:
            self.greedy.extend(said[0])
        if any(tokens != self.greedy for tokens in said):
            raise Broken(Zero.WRONG, f"greedy tokens {said}, must be {self.greedy}")

    def orphans(self) -> list[str]:
        own = {self.cluster.pid(rank) for rank in range(self.plan.world_size)} | self.engine_pids
        return orphans(own, since_s=self.opened_s)


def orphans(ranks_pids: set[int], *, since_s: float = 0.0, limit_s: float = _ORPHAN_LIMIT_S) -> list[str]:
    """Descendants of this process that are no fork server, no rank and no rank's own child, still there after `limit_s`; a line each.

    Args:
        since_s: children of this process that began earlier, in seconds since the epoch, do not count.
    """
    limit = time.monotonic() + limit_s
    while True:
        children = [child for child in psutil.Process().children() if _began_s(child) >= since_s]
        left = [line for child in children for line in _astray(child, ranks_pids)]
        are_helpers = all("py-spy" in line or line.endswith(": ") for line in left)  # no command: it is just starting or ending
        if not left or time.monotonic() > limit + (_HELPER_LIMIT_S if are_helpers else 0.0):
            return left
        time.sleep(0.05)


def _began_s(process: psutil.Process) -> float:
    try:
        return float(process.create_time())
    except psutil.Error:
        return 0.0


def _astray(process: psutil.Process, ranks_pids: set[int]) -> list[str]:
    try:
        if process.pid in ranks_pids or process.status() == psutil.STATUS_ZOMBIE:
            return []
        command = " ".join(process.cmdline())
        is_server = "workbench.ranks.forkserver" in command and process.pid not in ranks_pids and _is_first(process)
        if is_server:
            return [line for child in process.children() for line in _astray(child, ranks_pids)]
        return [f"process {process.pid}: {command[:120]}"]
    except psutil.Error:
        return []


def _is_first(process: psutil.Process) -> bool:
    """A fork server is a child of this very process, and not a fork of another server."""
    return process.ppid() == psutil.Process().pid


def leftover_files(folder: Path) -> list[str]:
    """Names in a temporary folder of ours, but for the one of torch's own cache."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("torchinductor_"))


def lost_memory(since_s: float, *, limit_s: float = 3.0) -> list[str]:
    """Shared memory of Python's made since then (Unix time) that no process maps any more; what runs beside maps its own."""
    limit = time.monotonic() + limit_s
    while True:
        made = {path for path in Path("/dev/shm").glob("psm_*") if _made_s(path) >= since_s}
        mapped = "".join(map(_maps, Path("/proc").glob("[0-9]*/maps"))) if made else ""
        lost = sorted(f"shared memory {path.name}" for path in made if str(path) not in mapped)
        if not lost or time.monotonic() > limit:
            return lost
        time.sleep(0.05)


def _made_s(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_ctime
    return 0.0


def _maps(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace")
    return ""
