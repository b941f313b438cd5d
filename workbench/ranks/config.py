"""What a rank is told at its start; torch is not needed to say it."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.plan.layout import Layout

__all__ = ["RankConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConfig:
    """What a rank is told at its start.

    Attributes:
        generation: the world's generation that it joins.
        num_threads: threads of one torch operation.
        layout: what its peers use, if `cluster.use` was called; it forms the groups with them.
        tape_folder: where it keeps the tape that `record="failures"` asks for, "" where none is.
    """

    rank: int
    world_size: int
    seed: int
    store_port: int
    store_prefix: str
    generation: int
    timeout_s: float
    is_checked: bool
    num_threads: int
    layout: Layout | None = None
    tape_folder: str = ""
