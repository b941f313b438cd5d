"""`wb.current()`: this rank, its world, its groups.

In a process that is no rank of a cluster it attaches to torchrun's or SLURM's environment.

Knows this process's place. Does not know the driver.
"""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from workbench.plan.layout import Layout
    from workbench.ranks.group import Group
    from workbench.ranks.rank import Rank

__all__ = ["Current", "current", "is_first_rank", "print_first_rank"]


@dataclass(slots=True)
class Current:
    """Where this process stands.

    Attributes:
        group: all ranks of the world.
        groups: axis -> the group of this rank in it, for the layout in use.
        layout: what `cluster.use` was given (`has_layout`); before that one flat axis.
    """

    rank: int
    world_size: int
    group: Group
    layout: Layout
    groups: dict[str, Group] = field(default_factory=dict)
    generation: int = 0
    has_layout: bool = False
    process: Rank | None = None

    def mark(self, label: str) -> None:
        """Label this moment in the memory timeline."""
        if self.process is not None:
            self.process.mark(label)


_here: Current | None = None  # one process is one rank: the only ambient state, set once by the process's own main


def current() -> Current:
    """This rank.

    Raises:
        WorkbenchError: the process is no rank, and no launcher's environment (RANK, WORLD_SIZE, MASTER_ADDR; SLURM_PROCID, SLURM_NTASKS
            with a MASTER_ADDR) tells.
    """
    global _here
    if _here is None:
        _here = _attach()
    return _here


def set_current(here: Current | None) -> None:
    global _here
    _here = here


def is_first_rank() -> bool:
    """True on rank 0, and in a process that is no rank."""
    if _here is not None:
        return _here.rank == 0
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def print_first_rank(*values: Any, sep: str = " ", end: str = "\n") -> None:
    """Print on rank 0 only."""
    if is_first_rank():
        print(*values, sep=sep, end=end, file=sys.stdout, flush=True)


def _attach() -> Current:
    from workbench.plan.layout import Layout
    from workbench.ranks.group import Group

    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    world_size = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS"))
    if rank is None or world_size is None or "MASTER_ADDR" not in os.environ:
        missing = "MASTER_ADDR is" if rank is not None and world_size is not None else "they are"
        raise WorkbenchError(
            "wb.current() was called in a process that is no rank\n"
            "it looks for RANK, WORLD_SIZE and MASTER_ADDR (torchrun) or SLURM_PROCID, SLURM_NTASKS and MASTER_ADDR (srun); "
            f"{missing} not set\n"
            "call it inside cluster.run(...) or a %%ranks cell, or start the script with torchrun"
        )
    import torch.distributed as dist

    os.environ.setdefault("RANK", rank)
    os.environ.setdefault("WORLD_SIZE", world_size)
    if "SLURM_LOCALID" in os.environ:
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        atexit.register(_destroy_world)
    group = Group.from_process_group(dist.group.WORLD, name="world")
    return Current(rank=int(rank), world_size=int(world_size), group=group, layout=Layout(world_size=int(world_size)))


def _destroy_world() -> None:
    """End gloo's threads before the interpreter ends: one that lets go of a tensor later aborts the process."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
