"""Who waits for whom, from the board and what the driver knows of each rank; no rank is asked to wait or answer.

A wait is hopeless when somebody that it needs can never come: has finished the cell, is dead, has no part in it, or waits hopelessly
itself. So: take away every rank that still moves, then every wait that only such ranks hold up, until nothing more goes; what is left
waits for ever. (The deadlock of the AND model; a receive from any needs but one: OR. E. Knapp, "Deadlock detection in distributed
databases", ACM Computing Surveys 19 (1987), 303-328.)

Knows posted collectives and cell states. Does not act on what it finds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from workbench.ranks.board import AreaState, Board, Posted
from workbench.ranks.messages import GroupFormed, Seen
from workbench.ranks.outside import ProcessLook
from workbench.records import Absent, Diagnosis, Waiter

__all__ = ["Scene", "diagnose"]


_LAST_BYTES_S = 0.25  # a sender may still wait for gloo's word when its receiver has all it wanted
_MOST_LINKS = 6  # of a circle that are told one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What the driver knows at one moment.

    Attributes:
        members: ranks that take part in the cell.
        finished: members whose part has ended.
        dead: rank -> how it ended.
        groups: key -> group.
        seen: rank -> where its main thread was, as far as it was asked.
        looks: rank -> how the system sees its process, as far as anybody looked.
        native: rank -> its innermost frames, as far as they were read.
    """

    cell: int
    members: frozenset[int]
    finished: frozenset[int]
    dead: Mapping[int, str] = field(default_factory=dict)
    groups: Mapping[int, GroupFormed] = field(default_factory=dict)
    seen: Mapping[int, Seen] = field(default_factory=dict)
    looks: Mapping[int, ProcessLook] = field(default_factory=dict)
    native: Mapping[int, str] = field(default_factory=dict)

    @property
    def running(self) -> frozenset[int]:
        return self.members - self.finished - frozenset(self.dead)

    def can_never_come(self, rank: int) -> bool:
        return rank in self.dead or rank in self.finished or rank not in self.members


def diagnose(board: Board, scene: Scene) -> Diagnosis:
    """Read the board and name each waiting rank, each missing one and the cause."""
    posted = {rank: board.read(rank) for rank in sorted(scene.running)}
    found = {rank: _waiter(board, scene, posted, rank) for rank in posted}
    # who is where it was before we looked around has been there all the time: all these waits lasted at one and the same moment
    waiting = {rank: w for rank, w in found.items() if w is not None and not _moved(board.read(rank), posted[rank])}
    hopeless = _hopeless(scene, waiting)
    lost = {rank: waiter for rank, waiter in hopeless.items() if _lacks_for_good(scene, waiter)}
    circle = () if lost else _circle(hopeless)
    needed = {rank for waiter in waiting.values() for rank in waiter.missing} | _paused(scene)
    if not waiting and scene.looks:  # nobody waits for anybody: then where is everybody?
        needed |= scene.running
    missing = {rank: _absent(scene, rank, waiting) for rank in sorted(needed)} | _odd_ones(board, scene, posted, waiting)
    return Diagnosis(
        waiting=waiting,
        missing={r: a for r, a in missing.items() if r not in waiting or a.cause},
        sentence=_circle_text(circle, hopeless) if circle else _sentence(list((lost or waiting).values()), missing),
        is_certain_deadlock=bool(hopeless),
        circle=circle,
    )


def _waiter(board: Board, scene: Scene, posted: Mapping[int, Posted], rank: int) -> Waiter | None:
    here = posted[rank]
    group = scene.groups.get(here.key)
    if here.state is AreaState.NOWHERE or here.cell != scene.cell or group is None:
        return None
    op = here.place.text.partition("(")[0]
    if here.state is AreaState.IN_STORE:  # the group is the one that it waits for
        missing: tuple[int, ...] = group.ranks
    else:
        missing = tuple(r for r in _peers(op, group, rank) if not _has_come(board, posted, r, here))
    if op == "recv_any" and _has_message(board, scene, rank):
        missing = ()
    return Waiter(
        rank=rank,
        op=op,
        sequence=here.sequence,
        group=group.name,
        missing=missing,
        for_s=time.monotonic() - here.since_s,
        line=here.place.line,
        source=here.place.source,
        is_inside_gloo=here.state in (AreaState.IN_GLOO, AreaState.LIMITED),
        has_limit=here.state in (AreaState.LIMITED, AreaState.IN_STORE),
        ranks=() if here.state is AreaState.IN_STORE else group.ranks,
    )


def _peers(op: str, group: GroupFormed, rank: int) -> tuple[int, ...]:
    """Whom a call needs; a message has but two ends."""
    if op == "send":
        return group.ranks[1:]
    if op == "recv":
        return group.ranks[:1]
    return tuple(r for r in group.ranks if r != rank)


def _has_come(board: Board, posted: Mapping[int, Posted], rank: int, to: Posted) -> bool:
    """Whether a rank has begun a collective; one that is just posting it shows where it is before it counts."""
    there = posted.get(rank)
    is_there = there is not None and there.state is not AreaState.NOWHERE and there.key == to.key and there.sequence >= to.sequence
    return is_there or board.count(rank, to.key) >= to.sequence


def _has_message(board: Board, scene: Scene, rank: int) -> bool:
    """Whether a rank that receives from any was sent something that it has not taken yet; its sender may be gone by now."""
    channels = [g for g in scene.groups.values() if len(g.ranks) == 2 and g.name.startswith(f"{g.ranks[0]} to {rank} in ")]
    return any(board.count(g.ranks[0], g.key) > board.count(rank, g.key) for g in channels)


def _moved(now: Posted, before: Posted) -> bool:
    return (now.state, now.key, now.sequence, now.since_s) != (before.state, before.key, before.sequence, before.since_s)


# -- what can never end -----------------------------------------------------------------------------------------------------------------


def _hopeless(scene: Scene, waiting: Mapping[int, Waiter]) -> dict[int, Waiter]:
    """The waits that can never end."""
    moving = set(scene.running - set(waiting))
    moving |= {rank for rank, seen in scene.seen.items() if seen.num_threads}  # another thread of it may still come
    is_more = True
    while is_more:
        ending = {rank for rank, waiter in waiting.items() if rank not in moving and _can_end(waiter, moving)}
        moving |= ending
        is_more = bool(ending)
    return {rank: waiter for rank, waiter in waiting.items() if not _can_end(waiter, moving)}


def _can_end(waiter: Waiter, moving: Collection[int]) -> bool:
    if not waiter.missing or waiter.has_limit or (waiter.is_inside_gloo and waiter.for_s < _LAST_BYTES_S):
        return True
    coming = [rank in moving for rank in waiter.missing]
    return any(coming) if waiter.op == "recv_any" else all(coming)


def _lacks_for_good(scene: Scene, waiter: Waiter) -> bool:
    """Whether a wait is hopeless for what a rank has done already; a receive from any only when all of them have."""
    gone = [scene.can_never_come(rank) for rank in waiter.missing]
    return all(gone) if waiter.op == "recv_any" else any(gone)


def _circle(hopeless: Mapping[int, Waiter]) -> tuple[int, ...]:
    """Ranks of which each waits for the next, and the last for the first; () when there are none."""
    if not hopeless:
        return ()
    path = [min(hopeless)]
    while True:
        following = [rank for rank in hopeless[path[-1]].missing if rank in hopeless]
        closing = [rank for rank in following if rank in path]
        if closing:
            return tuple(path[max(map(path.index, closing)) :])
        path.append(min(following))


# -- in words ---------------------------------------------------------------------------------------------------------------------------


def _absent(scene: Scene, rank: int, waiting: Mapping[int, Waiter]) -> Absent:
    seen = scene.seen.get(rank)
    if rank in scene.dead:
        return Absent(rank=rank, cause=f"is dead ({scene.dead[rank]})", where="")
    if rank not in scene.members:
        return Absent(rank=rank, cause="does not take part in this cell", where="")
    if rank in scene.finished:
        return Absent(rank=rank, cause="finished the cell without it", where="", cell=scene.cell)
    look = scene.looks.get(rank)
    is_held = look is not None and (look.is_paused or rank not in waiting)  # who waits may well be swapped out meanwhile
    cause = (look.trouble if look is not None and is_held else "") or _wait_text(rank, waiting)
    if not cause and seen is None and look is not None and look.is_computing:
        cause = "is computing in native code that lets no other thread run"
    elif not cause:
        cause = "has not come" if look is None else look.doing
    native = scene.native.get(rank, "")
    where, stack = "", ""
    if seen is not None and rank not in waiting:
        where, stack = f"line {seen.line}: {seen.source}" if seen.line else seen.source and f"in {seen.source}", seen.stack
    elif seen is None and (line := re.search(r"\(<cell \d+>:(\d+)\)", native)):
        where = f"line {line.group(1)}"
    return Absent(rank=rank, cause=cause, where=where, cell=scene.cell, stack=stack, native=native)


def _wait_text(rank: int, waiting: Mapping[int, Waiter]) -> str:
    """Where a rank waits itself, and who of those that wait for it has no part in that; "" where it does not wait."""
    wait = waiting.get(rank)
    if wait is None:
        return ""
    outside = [w.rank for w in waiting.values() if rank in w.missing and wait.ranks and w.rank not in wait.ranks]
    note = f", which {_names(outside)} {'is' if len(outside) == 1 else 'are'} not in" if outside else ""
    return f"waits in {_call(wait)}{note}"


def _paused(scene: Scene) -> set[int]:
    """Ranks that hold everything up wherever they are."""
    return {rank for rank, look in scene.looks.items() if look.is_paused and rank in scene.running}


def _odd_ones(board: Board, scene: Scene, posted: Mapping[int, Posted], waiting: Mapping[int, Waiter]) -> dict[int, Absent]:
    """Ranks that met the others with another call; unless checks are off they are told so before anybody waits."""
    odd = {}
    for rank, waiter in waiting.items():
        if waiter.missing or waiter.op in ("send", "recv", "recv_any") or waiter.has_limit:
            continue
        texts = board.texts(posted[rank].key, waiter.sequence, waiter.ranks)
        by_text: dict[str, list[int]] = {}
        for other, text in texts.items():
            by_text.setdefault(text, []).append(other)
        usual = max(by_text, key=lambda text: (len(by_text[text]), -by_text[text][0]), default="")
        for other, text in texts.items():
            if text != usual:
                is_same_op = text.partition("(")[0] == usual.partition("(")[0]
                difference = "another shape, dtype, reduce op or root" if is_same_op else "another operation"
                cause = f"came to #{waiter.sequence} of group {waiter.group!r} with {difference}: {text} where others called {usual}"
                odd[other] = Absent(rank=other, cause=cause, where="", cell=scene.cell)
    return odd


def _circle_text(circle: Sequence[int], hopeless: Mapping[int, Waiter]) -> str:
    """The circle, link by link; who waits behind it is counted."""
    first = f"ranks {circle[0]} and {circle[1]} wait for each other" if len(circle) == 2 else f"{_ranks(circle, 'wait')} in a circle"
    nexts = [*circle[1:], circle[0]]
    links = [f"rank {rank} in {_call(hopeless[rank])} for rank {after}" for rank, after in zip(circle, nexts, strict=True)]
    shown = links if len(links) <= _MOST_LINKS else [*links[: _MOST_LINKS - 1], "..."]
    behind = sorted(set(hopeless) - set(circle))
    return f"{first}: {', '.join(shown)}" + (f"; {_ranks(behind, 'wait')} behind them" if behind else "")


def _call(waiter: Waiter) -> str:
    return f"{waiter.op} #{waiter.sequence} of group {waiter.group!r}" + (f" (line {waiter.line})" if waiter.line else "")


def _sentence(waiters: Sequence[Waiter], missing: Mapping[int, Absent]) -> str:
    places: dict[tuple[str, int], list[int]] = {}
    for waiter in waiters:
        places.setdefault((waiter.op, waiter.line), []).append(waiter.rank)
    parts = [f"{_ranks(ranks, 'wait')} in {op}" + (f" (line {line})" if line else "") for (op, line), ranks in places.items()]
    needed = {rank for waiter in waiters for rank in waiter.missing}
    causes: dict[str, list[int]] = {}
    for rank in sorted(set(missing) & needed) or sorted(set(missing)):
        one = missing[rank]
        causes.setdefault(one.cause + (f", {one.where}" if one.where else ""), []).append(rank)
    parts += [_causes(cause, ranks) for cause, ranks in causes.items()]
    return "; ".join(parts)


def _causes(cause: str, ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"{_names(ranks)} {cause}"
    first, _, rest = cause.partition(" ")
    plural = {"is": "are", "does": "do", "has": "have", "waits": "wait", "sleeps,": "sleep,"}.get(first, first)
    return f"{_names(ranks)} {plural} {rest.replace('or waits', 'or wait', 1)}"


def _ranks(ranks: Sequence[int], verb: str) -> str:
    return f"{_names(ranks)} {verb}s" if len(ranks) == 1 else f"{_names(ranks)} {verb}"


def _names(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
