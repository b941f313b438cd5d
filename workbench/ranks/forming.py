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
    for axis in layout.axes:
        for ranks in layout.groups(axis):
            group = Group.create(ranks, axis)
            if rank in ranks:
                mine[axis] = group
    return mine


def use_layout(layout: Layout) -> None:
    """Make a layout the one in use: `groups` of the cell's namespace and of `wb.current()` are replaced in place."""
    here = current()
    formed = form_groups(layout)
    for old in here.groups.values():
        old.destroy()
    here.groups.clear()
    here.groups.update(formed)
    here.layout = layout
