"""The groups of a layout, formed in every rank in the same order."""

from __future__ import annotations

from workbench.plan.layout import Layout
from workbench.ranks.current import current
from workbench.ranks.group import Group

__all__ = ["form_groups", "use_layout"]


def form_groups(layout: Layout) -> dict[str, Group]:
    """This rank's group on each axis; every rank of the world makes this call."""
    rank = current().rank
    mine: dict[str, Group] = {}
    alone: dict[int, Group] = {}  # groups of one never send: one process group serves all axes
    for axis in layout.axes:
        for ranks in layout.groups(axis):
            group = _alone(ranks[0], axis, alone) if len(ranks) == 1 else Group.create(ranks, axis)
            if rank in ranks:
                mine[axis] = group
    if "ep" in mine and "dp" in mine and "pcp" in mine:
        mine["ep"].token_group = _token_group(mine)
    return mine


def _alone(rank: int, axis: str, formed: dict[int, Group]) -> Group:
    """This axis's group of one rank, over the process group that the first such axis made."""
    if rank not in formed:
        formed[rank] = Group.create([rank], axis)
    made = formed[rank]
    return made if made.name == axis or not made.is_member else Group.from_process_group(made.process_group, name=axis)


def _token_group(groups: dict[str, Group]) -> Group | None:
    """Which ranks hold different tokens when the experts' exchange begins: those of tensor parallel hold the same.

    Source: `AgRsAll2AllManager._get_comm_group` of `vllm/distributed/device_communicators/all2all.py`.
    """
    if groups["dp"].world_size == 1:
        return groups["pcp"]
    return groups["dp"] if groups["pcp"].world_size == 1 else None


def use_layout(layout: Layout) -> None:
    """Make a layout the one in use: `groups` of the cell's namespace and of `wb.current()` are replaced in place."""
    here = current()
    formed = form_groups(layout)
    for old in here.groups.values():
        old.destroy()
    here.groups.clear()
    here.groups.update(formed)
    here.layout, here.has_layout = layout, True
