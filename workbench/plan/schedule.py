"""Collectives as steps of messages between the members of a group: who sends which part to whom; integers only.

    all_reduce      ring: reduce_scatter, then all_gather            2 (n - 1) steps
    reduce_scatter  ring: a part goes round and is added to          n - 1
    all_gather      ring: a part goes round and is kept              n - 1
    gather          one member after another sends to the root       n - 1
    scatter         the root sends to one member after another       n - 1
    broadcast       a binomial tree: who has it sends it on          log2 n, rounded up

These are textbook forms (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009, for the ring); a library may take others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["COLLECTIVES", "Move", "Schedule", "ScheduledStep", "schedule_of"]

Parts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One message.

    Attributes:
        source, target: places in the group.
        part: which part of the whole travels.
        is_reduced: the target combines it with its own, else it keeps it as it came.
    """

    source: int
    target: int
    part: int
    is_reduced: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledStep:
    """Messages that may travel at the same time."""

    title: str
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A collective.

    Attributes:
        num_parts: how many parts the whole is cut into.
        before: parts that each member holds at first, [size].
        after: parts of each member's result, [size]; what else it holds by then is scrap.
    """

    op: str
    num_parts: int
    before: Parts
    after: Parts
    steps: tuple[ScheduledStep, ...]


def schedule_of(op: str, size: int, root: int = 0) -> Schedule:
    """The messages of a collective over `size` members.

    Args:
        root: place of the member that a gather goes to, and a scatter or broadcast comes from.

    Raises:
        ValueError: no such collective.
    """
    if op not in COLLECTIVES:
        raise ValueError(f"there is no schedule for {op!r}\nknown are {', '.join(COLLECTIVES)}\nchoose one of them")
    return COLLECTIVES[op](size, root)


def _all_reduce(size: int, root: int) -> Schedule:
    scattered, gathered = _reduce_scatter(size, root), _all_gather(size, root)
    every = _all(size)
    return Schedule(op="all_reduce", num_parts=size, before=every, after=every, steps=scattered.steps + gathered.steps)


def _reduce_scatter(size: int, _root: int) -> Schedule:
    """Part p sets out from place p + 1 and arrives, after n - 1 sums, at place p."""
    title = "reduce-scatter {} of {}: each combines what comes with its own"
    steps = tuple(_ring(title.format(k + 1, size - 1), size, lag=k + 1, is_reduced=True) for k in range(size - 1))
    return Schedule(op="reduce_scatter", num_parts=size, before=_all(size), after=_own(size), steps=steps)


def _all_gather(size: int, _root: int) -> Schedule:
    """Part p sets out from place p."""
    title = "all-gather {} of {}: each keeps what comes"
    steps = tuple(_ring(title.format(k + 1, size - 1), size, lag=k, is_reduced=False) for k in range(size - 1))
    return Schedule(op="all_gather", num_parts=size, before=_own(size), after=_all(size), steps=steps)


def _ring(title: str, size: int, *, lag: int, is_reduced: bool) -> ScheduledStep:
    """Each member sends the part `lag` places behind its own place to the next member."""
    moves = (Move(source=p, target=(p + 1) % size, part=(p - lag) % size, is_reduced=is_reduced) for p in range(size))
    return ScheduledStep(title=title, moves=tuple(moves))


def _gather(size: int, root: int) -> Schedule:
    moves = [Move(source=place, target=root, part=place) for place in range(size) if place != root]
    after = tuple(tuple(range(size)) if place == root else () for place in range(size))
    return Schedule(op="gather", num_parts=size, before=_own(size), after=after, steps=_one_by_one("gather", "sends its part", moves))


def _scatter(size: int, root: int) -> Schedule:
    moves = [Move(source=root, target=place, part=place) for place in range(size) if place != root]
    before = tuple(tuple(range(size)) if place == root else () for place in range(size))
    return Schedule(op="scatter", num_parts=size, before=before, after=_own(size), steps=_one_by_one("scatter", "gets its part", moves))


def _one_by_one(name: str, what: str, moves: list[Move]) -> tuple[ScheduledStep, ...]:
    return tuple(
        ScheduledStep(title=f"{name} {k + 1} of {len(moves)}: the next member {what}", moves=(move,)) for k, move in enumerate(moves)
    )


def _broadcast(size: int, root: int) -> Schedule:
    """In step k the first 2^k members, counted from the root, send to those 2^k further on."""
    num_steps = (size - 1).bit_length()
    steps = []
    for k in range(num_steps):
        pairs = [(place, place + 2**k) for place in range(2**k) if place + 2**k < size]
        moves = tuple(Move(source=(root + a) % size, target=(root + b) % size, part=0) for a, b in pairs)
        steps.append(ScheduledStep(title=f"broadcast {k + 1} of {num_steps}: who has it sends it on", moves=moves))
    before = tuple((0,) if place == root else () for place in range(size))
    return Schedule(op="broadcast", num_parts=1, before=before, after=((0,),) * size, steps=tuple(steps))


def _all(size: int) -> Parts:
    return (tuple(range(size)),) * size


def _own(size: int) -> Parts:
    return tuple((place,) for place in range(size))


COLLECTIVES: dict[str, Callable[[int, int], Schedule]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "gather": _gather,
    "scatter": _scatter,
    "broadcast": _broadcast,
}
