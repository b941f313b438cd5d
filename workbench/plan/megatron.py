"""Megatron-core's layout: a grid in the order of a string, and a second grid of the same ranks for the experts.

Source: `RankGenerator` and `initialize_model_parallel` of `megatron/core/parallel_state.py`.
"""

from __future__ import annotations

from collections.abc import Set
from math import prod

import numpy as np

from workbench.errors import LayoutError
from workbench.plan.axis import Ranks
from workbench.plan.sizes import check_degrees, check_size

__all__ = ["arrange", "joined"]

_NAMES = ("tp", "cp", "ep", "dp", "pp")


def arrange(
    title: str, world_size: int, *, tp: int, cp: int, ep: int, pp: int, etp: int | None, order: str
) -> tuple[Ranks, tuple[str, ...], dict[str, Ranks]]:
    """The decoder's grid, the names of its axes, slowest first, and each axis's groups.

    Raises:
        LayoutError: sizes or an order that do not fit; each with what would.
    """
    check_size(title, "world_size", world_size)
    etp = tp if etp is None else etp
    dp = world_size // check_degrees(title, world_size, tp=tp, cp=cp, pp=pp)
    edp = world_size // check_degrees(title, world_size, etp=etp, ep=ep, pp=pp)
    fastest_first = _parsed(title, order, tp=max(tp, etp), cp=cp, ep=ep, dp=max(dp, edp), pp=pp)
    decoder, decoder_axes = _grid(fastest_first, tp=tp, cp=cp, dp=dp, pp=pp)
    experts, expert_axes = _grid(fastest_first, tp=etp, ep=ep, dp=edp, pp=pp)
    tables = {axis: joined(decoder, decoder_axes, {axis}) for axis in ("tp", "cp", "pp", "dp")}
    is_apart = pp > 1 and fastest_first[-1] != "pp" and edp != dp
    if is_apart or not np.array_equal(tables["pp"], joined(experts, expert_axes, {"pp"})):
        raise LayoutError(
            f"{title}: the experts' pipeline would not be the decoder's\n"
            f"pp is not last in order {order!r}; dp={dp}, edp={edp} (world_size / (etp {etp} * ep {ep} * pp {pp}))\n"
            "put pp last, or choose etp and ep so that edp equals dp"
        )
    tables |= {name: joined(experts, expert_axes, {axis}) for name, axis in (("ep", "ep"), ("etp", "tp"), ("edp", "dp"))}
    return decoder, decoder_axes, tables


def joined(mesh: Ranks, mesh_axes: tuple[str, ...], chosen: Set[str]) -> Ranks:
    """The groups that vary in the chosen axes only, [num_groups, size]; groups and members with the fastest axis first."""
    inside = [place for place, axis in enumerate(mesh_axes) if axis in chosen]
    outside = [place for place, axis in enumerate(mesh_axes) if axis not in chosen]
    return mesh.transpose(*outside, *inside).reshape(-1, prod(mesh.shape[place] for place in inside))


def _parsed(title: str, order: str, **degrees: int) -> list[str]:
    """The axes of an order string, fastest first; an axis of degree 1 may be left out and then comes last."""
    named = order.lower().split("-")
    unknown = [name for name in named if name not in _NAMES]
    twice = sorted({name for name in named if named.count(name) > 1})
    absent = [name for name in _NAMES if name not in named]
    missing = [f"{name}={degrees[name]}" for name in absent if degrees[name] > 1]
    for names, problem in ((unknown, "names unknown axes"), (twice, "names axes twice"), (missing, "leaves out")):
        if names:
            needed = f"name each of {', '.join(_NAMES)} once, fastest first"
            raise LayoutError(f"{title}: order {order!r} {problem}: {', '.join(names)}\n{needed}")
    return [*named, *absent]


def _grid(fastest_first: list[str], **degrees: int) -> tuple[Ranks, tuple[str, ...]]:
    """Ranks on the axes that have a degree, slowest first."""
    axes = tuple(name for name in reversed(fastest_first) if name in degrees)
    return np.arange(prod(degrees.values())).reshape([degrees[axis] for axis in axes]), axes
