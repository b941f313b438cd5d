"""Who waits for whom, from the board and what the driver knows of each rank; no rank is asked to wait or answer.

Knows posted collectives and cell states. Does not act on what it finds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from workbench.ranks.board import AreaState, Board, Posted
from workbench.ranks.messages import GroupFormed, Seen
from workbench.records import Absent, Diagnosis, Waiter

__all__ = ["Scene", "diagnose"]


_LAST_BYTES_S = 0.25  # a sender may still wait for gloo's word when its receiver has all it wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What the driver knows at one moment.

    Attributes:
        members: ranks that take part in the cell.
        finished: members whose part has ended.
        dead: rank -> how it ended.
        groups: key -> group.
        seen: rank -> where its main thread was, as far as it was asked.
    """

    cell: int
    members: frozenset[int]
    finished: frozenset[int]
    dead: Mapping[int, str] = field(default_factory=dict)
    groups: Mapping[int, GroupFormed] = field(default_factory=dict)
    seen: Mapping[int, Seen] = field(default_factory=dict)


def diagnose(board: Board, scene: Scene) -> Diagnosis:
    """Read the board and name each waiting rank, each missing one and the cause."""
    waiting = {}
    for rank in sorted(scene.members - scene.finished - set(scene.dead)):
        waiter = _waiter(board, scene, rank)
        if waiter is not None:
            waiting[rank] = waiter
    absent = sorted({rank for waiter in waiting.values() for rank in waiter.missing})
    missing = {rank: _absent(scene, rank, waiting) for rank in absent}
    certain = [w for w in waiting.values() if _is_for_ever(scene, w)]
    return Diagnosis(
        waiting=waiting,
        missing={r: a for r, a in missing.items() if r not in waiting or a.cause},
        sentence=_sentence(certain or list(waiting.values()), missing),
        is_certain_deadlock=bool(certain),
    )


def _waiter(board: Board, scene: Scene, rank: int) -> Waiter | None:
    posted = board.read(rank)
    group = scene.groups.get(posted.key)
    if posted.state is AreaState.NOWHERE or posted.cell != scene.cell or group is None:
        return None
    op = posted.place.text.partition("(")[0]
    if op == "send":
        peers: tuple[int, ...] = group.ranks[1:]
    elif op == "recv":
        peers = group.ranks[:1]
    else:
        peers = tuple(r for r in group.ranks if r != rank)
    missing = tuple(r for r in peers if board.count(r, posted.key) < posted.sequence)
    if op == "recv_any" and _has_message(board, scene, rank):
        missing = ()
    if _moved(board.read(rank), posted):
        return None
    return Waiter(
        rank=rank,
        op=op,
        sequence=posted.sequence,
        group=group.name,
        missing=missing,
        for_s=time.monotonic() - posted.since_s,
        line=posted.place.line,
        source=posted.place.source,
        is_inside_gloo=posted.state is AreaState.IN_GLOO,
    )


def _has_message(board: Board, scene: Scene, rank: int) -> bool:
    """Whether a rank that receives from any was sent something that it has not taken yet; its sender may be gone by now."""
    channels = [g for g in scene.groups.values() if len(g.ranks) == 2 and g.name.startswith(f"{g.ranks[0]} to {rank} in ")]
    return any(board.count(g.ranks[0], g.key) > board.count(rank, g.key) for g in channels)


def _moved(now: Posted, before: Posted) -> bool:
    return (now.state, now.key, now.sequence, now.since_s) != (before.state, before.key, before.sequence, before.since_s)


def _is_for_ever(scene: Scene, waiter: Waiter) -> bool:
    """A rank that will never come leaves a collective without hope; a receive from any only when all of them are such."""
    if waiter.is_inside_gloo and waiter.for_s < _LAST_BYTES_S:
        return False
    gone = [_can_never_come(scene, rank) for rank in waiter.missing]
    return bool(gone) and (all(gone) if waiter.op == "recv_any" else any(gone))


def _can_never_come(scene: Scene, rank: int) -> bool:
    return rank in scene.dead or rank in scene.finished or rank not in scene.members


def _absent(scene: Scene, rank: int, waiting: Mapping[int, Waiter]) -> Absent:
    seen = scene.seen.get(rank)
    where = f"line {seen.line}: {seen.source}" if seen is not None and seen.line else ""
    if rank in scene.dead:
        cause = f"is dead ({scene.dead[rank]})"
    elif rank not in scene.members:
        cause = "does not take part in this cell"
    elif rank in scene.finished:
        cause = "finished the cell without it"
    elif rank in waiting:
        other = waiting[rank]
        cause, where = f"waits in {other.op} #{other.sequence} of group {other.group!r} (line {other.line})", ""
    else:
        cause = "is still computing" if not where else "has not come"
    return Absent(rank=rank, cause=cause, where=where)


def _sentence(waiters: Sequence[Waiter], missing: Mapping[int, Absent]) -> str:
    if not waiters:
        return ""
    places: dict[tuple[str, int], list[int]] = {}
    for waiter in waiters:
        places.setdefault((waiter.op, waiter.line), []).append(waiter.rank)
    parts = [f"{_ranks(ranks, 'wait')} in {op}" + (f" (line {line})" if line else "") for (op, line), ranks in places.items()]
    absent = {rank for waiter in waiters for rank in waiter.missing}
    causes: dict[str, list[int]] = {}
    for rank in sorted(absent):
        one = missing[rank]
        causes.setdefault(one.cause + (f", {one.where}" if one.where else ""), []).append(rank)
    parts += [_causes(cause, ranks) for cause, ranks in causes.items()]
    return "; ".join(parts)


def _causes(cause: str, ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} {cause}"
    first, _, rest = cause.partition(" ")
    plural = {"is": "are", "does": "do", "has": "have", "waits": "wait"}.get(first, first)
    return f"ranks {', '.join(map(str, ranks))} {plural} {rest}"


def _ranks(ranks: Sequence[int], verb: str) -> str:
    return f"rank {ranks[0]} {verb}s" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} {verb}"
