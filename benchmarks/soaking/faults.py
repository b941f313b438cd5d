"""The faults: each breaks a world at a random moment, and tells when it did and which ranks it ended.

A fault knows how its cell must end and says so to `World.end`; what must hold afterwards is the world's to check.
Everything random is drawn from the given generator, so a fault can be done again alone.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import workbench as wb
from benchmarks.soaking import ranks
from benchmarks.soaking.world import Broken, World, Zero

__all__ = ["FAULTS", "Hit", "choose"]

_BIG_BYTES = 200_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """What a fault did.

    Attributes:
        at_s: monotonic time at which it struck; recovery counts from here.
        what: details, for the table of single faults.
        gone: ranks that it ended.
    """

    at_s: float
    what: str
    gone: frozenset[int] = frozenset()


Fault = Callable[[World, random.Random], Hit]


def _moment(draw: random.Random, world: World) -> None:
    """Let the work run for a while: mostly a part of a second."""
    time.sleep(draw.random() ** 2 * (1.2 if world.plan.engine else 0.8))


def _work(world: World, draw: random.Random, names: Sequence[str] = tuple(ranks.WORK)) -> str:
    if world.plan.engine and "generate" in names and draw.random() < 0.4:
        return "generate"
    return draw.choice([name for name in names if name != "generate"])


def _rank(world: World, draw: random.Random) -> int:
    return draw.randrange(world.plan.world_size)


def _begin(world: World, body: str) -> Any:
    return world.start(ranks.work, body, ranks.FOREVER)


# -- deaths -----------------------------------------------------------------------------------------------------------------------------


def kill_idle(world: World, draw: random.Random) -> Hit:
    """A rank is killed while no cell runs; the next cell says so before anything is sent."""
    victim, at_s = _rank(world, draw), time.monotonic()
    os.kill(world.cluster.pid(victim), signal.SIGKILL)
    _until_dead(world, victim)
    try:
        world.cluster.execute("1", timeout_s=20)
    except wb.RankFailed as error:
        if error.rank != victim:
            raise Broken(Zero.ERROR, f"rank {victim} was killed, the error names {error.rank}: {error}") from error
    else:
        raise Broken(Zero.ERROR, "a cell ran on a dead rank")
    return Hit(at_s=at_s, what=f"rank {victim}", gone=frozenset({victim}))


def kill_busy(world: World, draw: random.Random) -> Hit:
    """A rank is killed in the middle of work."""
    body, victim = _work(world, draw), _rank(world, draw)
    handle = _begin(world, body)
    _moment(draw, world)
    at_s = time.monotonic()
    os.kill(world.cluster.pid(victim), signal.SIGKILL)
    _ends_by(world, handle, victim)
    return Hit(at_s=at_s, what=f"rank {victim} in {body}", gone=frozenset({victim}))


def die(world: World, draw: random.Random) -> Hit:
    """A rank ends itself: os._exit, abort, a crash in native code."""
    trouble = draw.choice(["exit", "abort", "segfault"])
    body, victim = _work(world, draw), _rank(world, draw)
    at_s = time.monotonic()
    _ends_by(world, world.start(ranks.work, body, ranks.FOREVER, victim, draw.randint(0, 20), trouble), victim)
    return Hit(at_s=at_s, what=f"rank {victim}, {trouble} in {body}", gone=frozenset({victim}))


def kill_while_mending(world: World, draw: random.Random) -> Hit:
    """A second rank is killed while the first is being brought back, or while a stop is under way."""
    body, is_stop, delay_s = _work(world, draw), draw.random() < 0.5, draw.random() ** 2
    first, second = draw.sample(range(world.plan.world_size), 2)
    handle = _begin(world, body)
    _moment(draw, world)
    timer = threading.Timer(delay_s, os.kill, (world.cluster.pid(second), signal.SIGKILL))
    at_s = time.monotonic()
    if is_stop:
        timer.start()
        world.cluster.interrupt()
        world.end(handle, wb.RankInterrupted, wb.RankFailed)
    else:
        os.kill(world.cluster.pid(first), signal.SIGKILL)
        _ends_by(world, handle, first)
        timer.start()
        try:
            world.cluster.respawn(first)
        except (wb.LaunchError, wb.RankFailed) as error:
            if "120 s" in str(error):
                raise Broken(Zero.HANG, f"respawn({first}) while rank {second} died: {error}") from error
    timer.join()
    _until_dead(world, second)
    gone = {second} if is_stop else {first, second}
    return Hit(at_s=at_s, what=f"{'stop' if is_stop else f'rank {first}'} then rank {second} in {body}", gone=frozenset(gone))


def restart(world: World, draw: random.Random) -> Hit:
    """All ranks are replaced while they work."""
    body = _work(world, draw)
    handle = _begin(world, body)
    _moment(draw, world)
    at_s = time.monotonic()
    world.cluster.restart()
    world.end(handle, wb.RankFailed)
    return Hit(at_s=at_s, what=f"in {body}", gone=frozenset(range(world.plan.world_size)))


def _ends_by(world: World, handle: Any, victim: int) -> None:
    error = world.end(handle, wb.RankFailed)
    if error.rank != victim or error.exit_code is None:
        raise Broken(Zero.ERROR, f"rank {victim} died, the error names {error.rank} with exit code {error.exit_code}: {error}")


def _until_dead(world: World, victim: int) -> None:
    """Until the driver knows; a rank that was brought back already is well too."""
    limit, pid = time.monotonic() + 10, world.names[victim].pid
    while victim not in world.dead() and world.cluster.pid(victim) == pid:
        if time.monotonic() > limit:
            raise Broken(Zero.HANG, f"the death of rank {victim} was not noticed within 10 s")
        time.sleep(0.005)


# -- stops ------------------------------------------------------------------------------------------------------------------------------


def interrupt(world: World, draw: random.Random) -> Hit:
    """The stop button at a random moment of any work."""
    body = _work(world, draw)
    handle = _begin(world, body)
    _moment(draw, world)
    at_s = time.monotonic()
    world.cluster.interrupt()
    world.end(handle, wb.RankInterrupted)
    return Hit(at_s=at_s, what=body)


def interrupt_twice(world: World, draw: random.Random) -> Hit:
    """The stop button pressed again at once: ranks that heed the first keep their names."""
    body, pause_s = _work(world, draw), 0.3 * draw.random() ** 2
    handle = _begin(world, body)
    _moment(draw, world)
    at_s = time.monotonic()
    world.cluster.interrupt()
    time.sleep(pause_s)
    world.cluster.interrupt()
    world.end(handle, wb.RankInterrupted)
    return Hit(at_s=at_s, what=f"{body}, {pause_s:.2f} s apart")


def timeout(world: World, draw: random.Random) -> Hit:
    """A cell outlives its timeout_s."""
    body, timeout_s = _work(world, draw), 0.1 + 0.5 * draw.random()
    at_s = time.monotonic() + timeout_s
    world.end(world.start(ranks.work, body, ranks.FOREVER, timeout_s=timeout_s), wb.RankTimeout)
    return Hit(at_s=at_s, what=body)


def stubborn(world: World, draw: random.Random) -> Hit:
    """A rank swallows the first stop; the second ends it, and it alone."""
    victim = _rank(world, draw)
    handle = world.start(ranks.work, "all_reduce", 1, victim, 0, "swallow", on=[victim])
    time.sleep(0.3)
    at_s = time.monotonic()
    world.cluster.interrupt()
    time.sleep(0.5)
    world.cluster.interrupt()
    world.end(handle, wb.RankInterrupted)
    return Hit(at_s=at_s, what=f"rank {victim}", gone=frozenset({victim}))


def c_loop(world: World, draw: random.Random) -> Hit:
    """Native code that never returns: that rank alone is killed after 5 s."""
    victim = _rank(world, draw)
    at_s = time.monotonic() + 1.0  # time enough for a busy machine to come to the loop
    world.end(world.start(ranks.work, _work(world, draw, ranks.MEETING), 100, victim, 0, "C loop", timeout_s=1.0), wb.RankTimeout)
    return Hit(at_s=at_s, what=f"rank {victim}", gone=frozenset({victim}))


# -- failures of the program ------------------------------------------------------------------------------------------------------------


def exception(world: World, draw: random.Random) -> Hit:
    """A rank raises; the others wait for it, or work on."""
    body, culprit = _work(world, draw), _rank(world, draw)
    at_s = time.monotonic()
    error = world.end(world.start(ranks.work, body, ranks.FOREVER, culprit, draw.randint(0, 20), "raise"), wb.RankFailed)
    if error.rank != culprit or "ValueError: on purpose" not in str(error):
        raise Broken(Zero.ERROR, f"rank {culprit} raised, the error names {error.rank}: {error}")
    return Hit(at_s=at_s, what=f"rank {culprit} in {body}")


def mismatch(world: World, draw: random.Random) -> Hit:
    """One rank calls another operation, shape, dtype or reduce op than the others."""
    culprit = _rank(world, draw)
    kind = draw.choice([*ranks.MISMATCHES, "group"]) if world.plan.is_checked else "group"
    at_s = time.monotonic()
    kinds = [wb.CollectiveMismatch, wb.RankFailed] if kind == "group" else [wb.CollectiveMismatch]  # a GroupError is the rank's own
    world.end(world.start(ranks.mismatch, kind, culprit), *kinds)
    return Hit(at_s=at_s, what=f"{kind}, rank {culprit}")


def deadlock(world: World, draw: random.Random) -> Hit:
    """A rank leaves while the others still wait for it."""
    body, culprit = _work(world, draw, ranks.MEETING), _rank(world, draw)
    at_s = time.monotonic()
    world.end(world.start(ranks.work, body, ranks.FOREVER, culprit, draw.randint(0, 20), "leave"), wb.RankDeadlock)
    return Hit(at_s=at_s, what=f"rank {culprit} leaves {body}")


# -- pauses -----------------------------------------------------------------------------------------------------------------------------


def pause(world: World, draw: random.Random) -> Hit:
    """A rank is stopped by SIGSTOP and goes on later; nothing else happens."""
    body, victim = _work(world, draw, ranks.MEETING), _rank(world, draw)
    num_rounds = 20 if body == "large all_reduce" else 60
    handle = world.start(ranks.work, body, num_rounds)
    time.sleep(0.3 * draw.random())
    at_s = time.monotonic()
    os.kill(world.cluster.pid(victim), signal.SIGSTOP)
    time.sleep(0.1 + 1.5 * draw.random())
    os.kill(world.cluster.pid(victim), signal.SIGCONT)
    if (done := world.end(handle)) != [num_rounds] * world.plan.world_size:
        raise Broken(Zero.WRONG, f"{num_rounds} rounds of {body} were to be done, the ranks did {done}")
    return Hit(at_s=at_s, what=f"rank {victim} in {body}")


def pause_and_stop(world: World, draw: random.Random) -> Hit:
    """A rank is stopped by SIGSTOP for good; the stop button frees it too."""
    body, victim = _work(world, draw), _rank(world, draw)
    handle = _begin(world, body)
    _moment(draw, world)
    os.kill(world.cluster.pid(victim), signal.SIGSTOP)
    time.sleep(0.4 * draw.random())
    at_s = time.monotonic()
    world.cluster.interrupt()
    world.end(handle, wb.RankInterrupted)
    return Hit(at_s=at_s, what=f"rank {victim} in {body}")


# -- faults made by the workbench itself ------------------------------------------------------------------------------------------------


def injected(world: World, draw: random.Random) -> Hit:
    """`cluster.inject`: a rank killed, paused, delayed or left out at its first collective."""
    victim = _rank(world, draw)
    action = draw.choice(["kill", "pause", "delay", "drop"])
    kinds = {"kill": [wb.RankFailed], "pause": [wb.RankTimeout], "delay": [], "drop": [wb.RankDeadlock]}[action]
    at_s = time.monotonic()
    op = "barrier" if action == "drop" else "all_reduce"  # who leaves out a sum would see that it is wrong
    with world.cluster.inject(wb.Fault(rank=victim, op=op, at=1, action=action, delay_s=0.3)):
        world.end(world.start(ranks.meet, op, timeout_s=0.6 if action == "pause" else None), *kinds)
    return Hit(at_s=at_s, what=f"{action}, rank {victim}", gone=frozenset({victim}) if action == "kill" else frozenset())


# -- large values -----------------------------------------------------------------------------------------------------------------------


def big_value(world: World, draw: random.Random) -> Hit:
    """200 MB pushed to a rank or two and pulled back, whole."""
    array = np.random.default_rng(draw.getrandbits(32)).integers(0, 256, _BIG_BYTES, dtype=np.uint8)
    wanted, chosen = ranks.checksum_of(array), draw.sample(range(world.plan.world_size), draw.randint(1, 2))
    at_s = time.monotonic()
    if draw.random() < 0.5:
        world.cluster.push({"big": array}, ranks=sorted(chosen))
        back = world.cluster.pull("big", ranks=sorted(chosen))
        world.cluster.execute("del big", ranks=sorted(chosen))
    else:
        back = world.ask(ranks.give_back, array, on=sorted(chosen))
    if (got := [ranks.checksum_of(one) for one in back]) != [wanted] * len(chosen):
        raise Broken(Zero.WRONG, f"200 MB came back with checksums {got}, must be {wanted}")
    return Hit(at_s=at_s, what=f"ranks {sorted(chosen)}")


def big_value_cut(world: World, draw: random.Random) -> Hit:
    """200 MB on their way when the cell is stopped, or the rank that gets them is killed."""
    array = np.zeros(_BIG_BYTES, dtype=np.uint8)
    victim, is_kill = _rank(world, draw), draw.random() < 0.5
    handle = world.start(ranks.give_back, array, on=[victim])
    time.sleep(0.5 * draw.random())
    at_s, is_done = time.monotonic(), handle.done()
    if is_kill:
        os.kill(world.cluster.pid(victim), signal.SIGKILL)
        _until_dead(world, victim)
    else:
        world.cluster.interrupt()
    kinds = () if is_done else (wb.RankFailed,) if is_kill else (wb.RankInterrupted,)
    try:
        world.end(handle, *kinds)
    except Broken as broken:
        if "ended well" not in str(broken):  # it may have been through just before
            raise
    gone = frozenset({victim}) if is_kill else frozenset[int]()
    return Hit(at_s=at_s, what=f"{'kill' if is_kill else 'stop'}, rank {victim}", gone=gone)


FAULTS: dict[str, tuple[Fault, int]] = {  # name -> fault, weight
    "kill, idle": (kill_idle, 3),
    "kill, busy": (kill_busy, 8),
    "exit or crash": (die, 5),
    "kill while mending": (kill_while_mending, 5),
    "restart": (restart, 2),
    "interrupt": (interrupt, 16),
    "interrupt twice": (interrupt_twice, 6),
    "timeout": (timeout, 6),
    "stop swallowed": (stubborn, 1),
    "C loop": (c_loop, 1),
    "exception": (exception, 8),
    "mismatch": (mismatch, 8),
    "deadlock": (deadlock, 6),
    "pause": (pause, 6),
    "pause and stop": (pause_and_stop, 6),
    "injected": (injected, 6),
    "200 MB": (big_value, 4),
    "200 MB cut": (big_value_cut, 4),
}


def choose(draw: random.Random, names: Sequence[str] = tuple(FAULTS)) -> str:
    """One of the faults, by weight."""
    return draw.choices(list(names), [FAULTS[name][1] for name in names])[0]
