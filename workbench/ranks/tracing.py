"""A collective carried out message by message on real ranks, each message and what every rank holds after it kept.

    driver                           every rank
    trace_collective  -- order -->   its schedule (`plan.schedule`), then for each step: isend, recv, combine, note
                      <-- noted --   and once torch's own collective on the same input, to compare with
    joined: a `CollectiveTrace`

The messages are sends and receives of torch.distributed: they stand in the ledger and on tapes, and faults can be injected into them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.errors import LayoutError
from workbench.plan.schedule import COLLECTIVES, Move, Schedule, schedule_of
from workbench.ranks.current import current
from workbench.records import CollectiveStep, CollectiveTrace, Held, Transfer

if TYPE_CHECKING:
    from workbench.ranks.cluster import Cluster
    from workbench.ranks.group import Group

__all__ = ["TraceOrder", "trace_collective"]

_MOST_MEMBERS = 16  # a picture of more could not be read
_MOST_VALUES = 16  # of one part; larger ones are told by their size
Combine = Callable[[Tensor, Tensor], Tensor]
_COMBINE: dict[str, Combine] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}
_FROM_ROOT = ("scatter", "broadcast")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOrder:
    """What every rank is told; `inputs` is a tensor a rank of the world, a name that the ranks know, or None for numbers easy to follow."""

    op: str
    inputs: tuple[Tensor | None, ...] | str | None
    root: int
    reduce_op: str
    axis: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Noted:
    """One member's side; times on the monotonic clock by (step, number of the message in it).

    Attributes:
        held: parts after each step, the input first, [num_steps + 1, num_parts].
        came: when a message was here, what it carried, and its bytes.
        max_difference: from torch's own result, 0.0 where this member gets none.
    """

    ranks: tuple[int, ...]
    dtype: str
    held: list[tuple[Held, ...]]
    sent_s: dict[tuple[int, int], float]
    came: dict[tuple[int, int], tuple[float, Held, int]]
    max_difference: float


def trace_collective(
    cluster: Cluster, op: str, inputs: Any = None, *, root: int = 0, reduce_op: str = "sum", axis: str | None = None, rank: int = 0
) -> CollectiveTrace:
    """See `Cluster.trace_collective`."""
    _check(cluster, op, root, reduce_op, axis, rank)
    order = TraceOrder(op=op, inputs=_as_inputs(inputs, cluster.world_size), root=root, reduce_op=reduce_op, axis=axis)
    noted: list[_Noted] = cluster.run(_trace_here, order)
    members = noted[rank].ranks
    return _joined(order, [noted[member] for member in members])


def _check(cluster: Cluster, op: str, root: int, reduce_op: str, axis: str | None, rank: int) -> None:
    if op not in COLLECTIVES:
        raise ValueError(f"trace_collective({op!r}): there is no such collective\nknown are {', '.join(COLLECTIVES)}\nchoose one of them")
    if reduce_op not in _COMBINE:
        raise ValueError(f"trace_collective(reduce_op={reduce_op!r}): no such operation\nknown are {', '.join(_COMBINE)}")
    if not 0 <= rank < cluster.world_size:
        raise ValueError(f"trace_collective(rank={rank}) is outside the world\nranks are 0..{cluster.world_size - 1}")
    if axis is not None and axis not in cluster.layout.axes:
        raise LayoutError(
            f"trace_collective(axis={axis!r}): {cluster.layout} has no such axis\nits axes are {', '.join(cluster.layout.axes)}\n"
            "name one of them, or cluster.use(layout) first"
        )
    sizes = [cluster.world_size] if axis is None else [len(group) for group in cluster.layout.groups(axis)]
    if min(sizes) < 2 or max(sizes) > _MOST_MEMBERS:
        seen = f"{sizes[0]}" if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
        raise ValueError(
            f"trace_collective: a group of {seen} cannot be traced\nneeded: 2 to {_MOST_MEMBERS} members, as a picture shows them\n"
            "launch another number of ranks, or pass axis= to trace the groups of one axis of the layout"
        )
    if not 0 <= root < min(sizes):
        raise ValueError(f"trace_collective(root={root}) is outside the group\nroot is a place in the group, 0..{min(sizes) - 1}")


def _as_inputs(inputs: Any, world_size: int) -> tuple[Tensor | None, ...] | str | None:
    """Given values as tensors that can travel, one a rank of the world."""
    if inputs is None or isinstance(inputs, str):
        return inputs
    given = list(inputs)
    if len(given) != world_size:
        raise ValueError(
            f"trace_collective: {len(given)} inputs for {world_size} ranks\nneeded: one a rank, None where a rank gives nothing\n"
            "pass a list of lists or tensors, or the name of a tensor on the ranks"
        )
    return tuple(None if value is None else torch.as_tensor(value) for value in given)


# On every rank


def _trace_here(order: TraceOrder) -> _Noted:
    here = current()
    group = here.group if order.axis is None else here.groups[order.axis]
    place, schedule = group.rank_in_group, schedule_of(order.op, group.world_size, order.root)
    given = _input(order, group)
    count, dtype = _agreed(order, given, group)
    whole = given.to(dtype) if isinstance(given, Tensor) else torch.empty(0, dtype=dtype)
    sizes = _part_sizes(order.op, count, group.world_size)
    parts = _cut(schedule, whole, sizes, place)
    expected = _by_torch(order, group, whole, sizes)
    held, sent_s, came = _perform(schedule, group, parts, sizes, dtype, _COMBINE[order.reduce_op])
    got = [part for at in schedule.after[place] if (part := parts[at]) is not None]
    difference = _difference(torch.cat(got), expected) if got else 0.0
    shown = str(dtype).removeprefix("torch.")
    return _Noted(ranks=group.ranks, dtype=shown, held=held, sent_s=sent_s, came=came, max_difference=difference)


def _input(order: TraceOrder, group: Group) -> Any:
    """This member's own values, flat; what is no tensor comes back as it is, None where none count."""
    if order.op in _FROM_ROOT and group.rank_in_group != order.root:
        return None
    if isinstance(order.inputs, str):
        value = vars(sys.modules["__main__"]).get(order.inputs)
    else:
        value = _easy_to_follow(order.op, group) if order.inputs is None else order.inputs[group.rank]
    return value.detach().cpu().reshape(-1).clone() if isinstance(value, Tensor) else value


def _easy_to_follow(op: str, group: Group) -> Tensor:
    """Member 1 of 4 has 20, 21, 22, 23: the tens tell whose a number is, the ones which part."""
    count = {"all_gather": 2, "gather": 2, "broadcast": 3}.get(op, group.world_size)
    return 10 * (group.rank_in_group + 1) + torch.arange(count)


def _agreed(order: TraceOrder, given: Any, group: Group) -> tuple[int, torch.dtype]:
    """How many values each member gives, and their dtype; the same on all, or the same error on all."""
    mine = (given.numel(), given.dtype) if isinstance(given, Tensor) else type(given).__name__
    told: list[tuple[int, torch.dtype] | str] = group.all_gather_object(mine)
    counting = [order.root] if order.op in _FROM_ROOT else list(range(group.world_size))
    first = told[counting[0]]
    for place in counting:
        _check_input(order, group, place, told[place], first)
    assert not isinstance(first, str)
    _check_count(order.op, first[0], group.world_size)
    return first


def _check_input(order: TraceOrder, group: Group, place: int, told: tuple[int, torch.dtype] | str, first: Any) -> None:
    rank, what = group.ranks[place], f"trace_collective({order.op!r})"
    if isinstance(told, str):
        name = f"{order.inputs!r} on rank {rank}" if isinstance(order.inputs, str) else f"the input of rank {rank}"
        raise ValueError(
            f"{what}: {name} is no tensor\ngot {told}\n"
            "push a tensor to the ranks under a name and pass the name, or pass a list with one tensor or list of numbers a rank"
        )
    if told != first:
        seen = f"{first[0]} values of {first[1]} and {told[0]} of {told[1]}"
        raise ValueError(
            f"{what}: ranks {group.ranks[0]} and {rank} give different tensors\ngot {seen}\ngive equally many of one dtype on every rank"
        )


def _check_count(op: str, count: int, size: int) -> None:
    needed = "at least 1"
    fits = count >= 1
    if op == "all_reduce":
        fits, needed = count >= size, f"at least {size}, one a rank"
    elif op in ("reduce_scatter", "scatter"):
        fits, needed = count >= size and count % size == 0, f"a multiple of {size}"
    if not fits:
        raise ValueError(f"trace_collective({op!r}): {count} values do not fit {size} ranks\nneeded: {needed}\ngive more or fewer")


def _part_sizes(op: str, count: int, size: int) -> list[int]:
    """Values in each part of the whole, [num_parts]: all_reduce of 6 values on 4 ranks has 2, 2, 1, 1."""
    if op == "broadcast":
        return [count]
    if op in ("all_gather", "gather"):
        return [count] * size
    return [count // size + (part < count % size) for part in range(size)]


def _cut(schedule: Schedule, whole: Tensor, sizes: list[int], place: int) -> list[Tensor | None]:
    """The parts that this member holds at first, None for those that it does not hold, [num_parts]."""
    mine = schedule.before[place]
    parts = iter(whole.split([sizes[part] for part in mine])) if mine else iter(())
    return [next(parts).clone() if part in mine else None for part in range(schedule.num_parts)]


def _perform(
    schedule: Schedule, group: Group, parts: list[Tensor | None], sizes: list[int], dtype: torch.dtype, combine: Combine
) -> tuple[list[tuple[Held, ...]], dict[tuple[int, int], float], dict[tuple[int, int], tuple[float, Held, int]]]:
    """Carry out the messages of this member, and change `parts` as they come: what it held, and when each was sent and came."""
    place, ranks, process_group = group.rank_in_group, group.ranks, group.process_group
    held = [tuple(map(_shown, parts))]
    sent_s: dict[tuple[int, int], float] = {}
    came: dict[tuple[int, int], tuple[float, Held, int]] = {}
    for number, step in enumerate(schedule.steps):
        on_their_way: list[dist.Work | None] = []
        for k, move in enumerate(step.moves):
            if move.source == place:
                data = parts[move.part]
                assert data is not None
                sent_s[number, k] = time.monotonic()
                on_their_way.append(dist.isend(data.clone(), dst=ranks[move.target], group=process_group))
        for k, move in enumerate(step.moves):
            if move.target == place:
                data = torch.empty(sizes[move.part], dtype=dtype)
                dist.recv(data, src=ranks[move.source], group=process_group)
                came[number, k] = (time.monotonic(), _shown(data), data.nbytes)
                own = parts[move.part]
                parts[move.part] = combine(own, data) if move.is_reduced and own is not None else data
        for work in on_their_way:
            assert work is not None  # None is for ranks that are no members
            work.wait()
        held.append(tuple(map(_shown, parts)))
    return held, sent_s, came


def _shown(part: Tensor | None) -> Held:
    """What the record keeps of a part: its values when they are few, else their number."""
    if part is None:
        return None
    return tuple(part.tolist()) if part.numel() <= _MOST_VALUES else f"{part.numel():,} values"


def _difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors, NaN where only one of them is."""
    same = (got == expected) | (got.isnan() & expected.isnan())
    return float(torch.where(same, 0.0, (got.double() - expected.double()).abs()).max())


def _by_torch(order: TraceOrder, group: Group, whole: Tensor, sizes: list[int]) -> Tensor:
    """This member's result of the group's own collective, flat, which is torch's over gloo; empty where it gets none."""
    place = group.rank_in_group
    match order.op:
        case "all_reduce":
            return group.all_reduce(whole, order.reduce_op)
        case "reduce_scatter":
            mine: Tensor = group.all_reduce(whole, order.reduce_op).split(sizes)[place]
            return mine
        case "all_gather":
            return group.all_gather(whole, dim=0)
        case "gather":
            gathered = group.gather(whole, dst=order.root, dim=0)
            return whole[:0] if gathered is None else gathered
        case "broadcast":
            return group.broadcast(whole if place == order.root else torch.empty(sizes[0], dtype=whole.dtype), src=order.root)
    got = torch.empty(sizes[place], dtype=whole.dtype)
    held = dist.get_process_group_ranks(group.process_group)  # torch's order
    parts = whole.split(sizes) if place == order.root else ()
    in_torchs_order = [parts[group.ranks.index(rank)] for rank in held] if parts else None
    dist.scatter(got, in_torchs_order, src=group.ranks[order.root], group=group.process_group)
    return got


# In the driver again


def _joined(order: TraceOrder, noted: Sequence[_Noted]) -> CollectiveTrace:
    """The members' notes, in group order, as one record."""
    schedule = schedule_of(order.op, len(noted), order.root)
    first_s = min((at_s for one in noted for at_s in one.sent_s.values()), default=0.0)
    titles = ["before: what each rank gives", *(step.title for step in schedule.steps), "after: what each rank has"]
    transfers = [(), *(_transfers(number, step.moves, noted, first_s) for number, step in enumerate(schedule.steps)), ()]
    held = [*zip(*(one.held for one in noted), strict=True), tuple(one.held[-1] for one in noted)]
    return CollectiveTrace(
        op=f"{order.op} ({order.reduce_op})" if order.op in ("all_reduce", "reduce_scatter") else order.op,
        members=tuple(f"rank {rank}" for rank in noted[0].ranks),
        parts=tuple(f"part {part}" for part in range(schedule.num_parts)),
        steps=tuple(
            CollectiveStep(title=title, transfers=moved, held=now) for title, moved, now in zip(titles, transfers, held, strict=True)
        ),
        results=schedule.after,
        dtype=noted[0].dtype,
        max_difference=max(one.max_difference for one in noted),
    )


def _transfers(step: int, moves: Sequence[Move], noted: Sequence[_Noted], first_s: float) -> tuple[Transfer, ...]:
    """The messages of one step: when the sender sent, and when and what the receiver got."""
    made = []
    for number, move in enumerate(moves):
        end_s, carried, num_bytes = noted[move.target].came[step, number]
        sent_s = noted[move.source].sent_s[step, number]
        made.append(
            Transfer(
                source=move.source, target=move.target, part=move.part, carried=carried, num_bytes=num_bytes,
                start_s=sent_s - first_s, end_s=end_s - first_s, is_reduced=move.is_reduced,
            )
        )  # fmt: skip
    return tuple(made)
