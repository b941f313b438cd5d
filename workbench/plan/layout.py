"""How the ranks of a world are laid out on axes: which work together, and in which order; integers only.

Every question is answered from the groups, never from arithmetic such as rank // tp, which holds for some layouts only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import LayoutError
from workbench.plan import megatron
from workbench.plan.axis import Axis, Ranks
from workbench.plan.partition import cut_layers
from workbench.plan.sizes import check_degrees, check_divides, check_size

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Layout"]

_VLLM_AXES = ("external_dp", "dp", "pp", "pcp", "tp")
_MAX_ROWS = 64
_ALWAYS_SHOWN = ("world_size", "size", "sp", "etp")  # also at 1: the call needs them, or means something else without them


class Layout:
    """A world of ranks on axes. `Layout(world_size=16, tp=8, pp=2)` is vLLM's order:

        rank = (((external_dp * DP + dp) * PP + pp) * PCP + pcp) * TP + tp

    where what is left over of the world is external_dp. Two more axes derive from these: dcp (decode context parallel: runs of dcp ranks
    in TP x PCP, PCP first) and ep (experts: all of DP x PCP x TP at one stage). Megatron orders, engine subgroups, sequence-parallel
    meshes, the supernode and groups of your own have constructors below. A layout never changes; it can be pickled and compared.

    Source: `initialize_model_parallel` of `vllm/distributed/parallel_state.py` (0.32.0).

    Attributes:
        world_size: number of ranks.
        axes: names of all axes.
        mesh_axes: the axes that `coords` gives; one rank stands at each point of them. () where groups overlap otherwise.
    """

    __slots__ = ("_axes", "_mesh", "_title", "mesh_axes", "world_size")

    world_size: int
    mesh_axes: tuple[str, ...]
    _mesh: Ranks | None
    _axes: dict[str, Axis]
    _title: str

    def __init__(self, world_size: int, *, tp: int = 1, pp: int = 1, dp: int = 1, pcp: int = 1, dcp: int = 1) -> None:
        title = _titled("Layout", world_size=world_size, tp=tp, pp=pp, dp=dp, pcp=pcp, dcp=dcp)
        check_size(title, "world_size", world_size)
        check_degrees(title, world_size, dp=dp, pp=pp, pcp=pcp, tp=tp)
        _check_dcp(title, tp=tp, pcp=pcp, dcp=dcp)
        mesh = np.arange(world_size).reshape(-1, dp, pp, pcp, tp)
        self._fill(mesh, _VLLM_AXES, _vllm_tables(mesh, dcp), title)

    @classmethod
    def megatron(
        cls, world_size: int, *, tp: int = 1, cp: int = 1, ep: int = 1, pp: int = 1, etp: int | None = None, order: str = "tp-cp-ep-dp-pp"
    ) -> Layout:
        """Megatron-core's layout; `order` names the fastest-varying axis first.

        dp is what is left over: world_size / (tp * cp * pp). The experts have a grid of their own over the same ranks: ep, etp (by default
        tp) and edp = world_size / (etp * ep * pp); their axes are "ep", "etp" and "edp".

        Raises:
            LayoutError: degrees that do not divide the world, an order that lacks an axis or knows another, or expert groups whose
                pipeline differs from the decoder's.
        """
        title = _titled("Layout.megatron", world_size=world_size, tp=tp, cp=cp, ep=ep, pp=pp, etp=etp, order=order)
        mesh, axes, tables = megatron.arrange(title, world_size, tp=tp, cp=cp, ep=ep, pp=pp, etp=etp, order=order)
        return cls._made(mesh, axes, tables, title)

    @classmethod
    def subgroups(cls, world_size: int, *, size: int) -> Layout:
        """Engines of `size` consecutive ranks (axis "engine") and, across them, the ranks at the same place (axis "replica").

        world_size 6, size 2: engine (0, 1) (2, 3) (4, 5); replica (0, 2, 4) (1, 3, 5).
        """
        return cls._rows("Layout.subgroups", world_size, "size", size, ("replica", "engine"))

    @classmethod
    def sequence_parallel(cls, world_size: int, *, sp: int) -> Layout:
        """Sequence-parallel groups of `sp` consecutive ranks (axis "sp"), and data parallel across them (axis "dp")."""
        return cls._rows("Layout.sequence_parallel", world_size, "sp", sp, ("dp", "sp"))

    @classmethod
    def supernode(
        cls, world_size: int = 16, *, tp: int = 8, pp: int = 2, dp: int = 1, pcp: int = 1, dcp: int = 1, ranks_per_node: int = 8
    ) -> Layout:
        """Two nodes of 8 ranks joined into one supernode: tp 8 runs across both nodes, the two stages of pp stay inside each.

        With node, local = divmod(rank, 8): pp = local // 4 and tp = 4 * node + local % 4, so tp is (0, 1, 2, 3, 8, 9, 10, 11) and
        (4, 5, 6, 7, 12, 13, 14, 15). Decode context parallel lies inside these.

        Raises:
            LayoutError: other sizes; nobody has said how they lie on the nodes.
        """
        title = _titled("Layout.supernode", world_size=world_size, tp=tp, pp=pp, dp=dp, pcp=pcp, dcp=dcp, ranks_per_node=ranks_per_node)
        if (world_size, ranks_per_node, tp, pp, dp, pcp) != (16, 8, 8, 2, 1, 1):
            raise LayoutError(
                f"{title}: no supernode of this size is known\n"
                "known is world_size=16 on two nodes of ranks_per_node=8, with tp=8, pp=2, dp=1, pcp=1\n"
                "use these sizes, or give the groups yourself with Layout.custom"
            )
        _check_dcp(title, tp=tp, pcp=pcp, dcp=dcp)
        node_stage_local = np.arange(16).reshape(2, 2, 4)
        mesh = node_stage_local.swapaxes(0, 1).reshape(1, 1, 2, 1, 8)
        return cls._made(mesh, _VLLM_AXES, _vllm_tables(mesh, dcp), title)

    @classmethod
    def custom(cls, groups: Mapping[str, Sequence[Sequence[int]]]) -> Layout:
        """Groups of your own, in the order given: `Layout.custom({"tp": [[0, 1], [2, 3]]})`.

        Raises:
            LayoutError: no groups, a rank twice in an axis, or a rank that an axis leaves out.
        """
        listed = {axis: [list(map(int, group)) for group in given] for axis, given in groups.items()}
        ranks = {rank for given in listed.values() for group in given for rank in group}
        if not ranks or min(ranks) < 0:
            raise LayoutError(f"Layout.custom({listed}): needs groups of ranks 0..world_size-1\npass e.g. {{'tp': [[0, 1], [2, 3]]}}")
        world_size = max(ranks) + 1
        title = f"Layout.custom({', '.join(f'{axis}: {len(given)} groups' for axis, given in listed.items())})"
        return _restore(world_size, {axis: Axis.from_groups(axis, given, world_size) for axis, given in listed.items()}, None, (), title)

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self._axes)

    def degree(self, axis: str) -> int:
        """Size of an axis: of its largest group."""
        return self._axis(axis).degree

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """All groups of an axis. Axes of the mesh may be joined: "tp-pp" is a group per choice of all others."""
        return self._axis(axis).groups()

    def group_of(self, rank: int, axis: str) -> tuple[int, ...]:
        """The group of an axis that a rank is in."""
        return self._axis(axis).group_of(self._checked(rank))

    def index_in_group(self, rank: int, axis: str) -> int:
        """A rank's place in its group of an axis."""
        return self._axis(axis).place_of(self._checked(rank))

    def neighbours(self, rank: int, axis: str) -> tuple[int, int]:
        """The rank before and the rank after in the group; it closes to a ring."""
        group, place = self.group_of(rank, axis), self.index_in_group(rank, axis)
        return group[place - 1], group[(place + 1) % len(group)]

    def coords(self, rank: int) -> dict[str, int]:
        """A rank's index on each axis of the mesh (on every axis where there is none): {"external_dp": 0, "dp": 0, ..., "tp": 5}."""
        return {axis: self.index_in_group(rank, axis) for axis in self.mesh_axes or self.axes}

    def where(self, **coords: int) -> tuple[int, ...]:
        """The ranks that stand at these indices, sorted: `where(pp=1, tp=0)`."""
        here = np.ones(self.world_size, dtype=bool)
        for axis, index in coords.items():
            if not 0 <= index < self.degree(axis):
                raise LayoutError(f"{self}: {axis}={index} is outside axis {axis!r}\nits indices are 0..{self.degree(axis) - 1}")
            here &= self._axis(axis).places == index
        return tuple(np.flatnonzero(here).tolist())

    def rank_at(self, **coords: int) -> int:
        """The one rank with these coordinates, the inverse of `coords`; axes of degree 1 may be left out.

        Raises:
            LayoutError: no rank stands there, or several do.
        """
        ranks = self.where(**coords)
        if len(ranks) != 1:
            found = f"ranks {list(ranks[:8])} stand" if ranks else "no rank stands"
            raise LayoutError(f"{self}: {found} at {coords}\na rank is found by all of {', '.join(self.mesh_axes or self.axes)}")
        return ranks[0]

    def stage_of(self, rank: int) -> int:
        """A rank's pipeline stage."""
        return self.index_in_group(rank, "pp")

    def layers_of(self, rank: int, num_layers: int, partition: str | Sequence[int] | None = None) -> tuple[int, int]:
        """The layers [start, end) of a rank's stage; `partition` as in `partition_layers`."""
        return cut_layers(num_layers, self.degree("pp"), partition, allow_empty=False)[self.stage_of(rank)]

    def to_device_mesh(self, device_type: str = "cpu") -> DeviceMesh:
        """The same grid as a torch DeviceMesh; torch makes its groups, so every rank of the world calls this."""
        from torch.distributed.device_mesh import DeviceMesh

        if self._mesh is None:
            raise LayoutError(f"{self}: groups of your own have no grid\nuse a layout with axes, or cluster.use(layout)")
        return DeviceMesh(device_type, self._mesh.tolist(), mesh_dim_names=self.mesh_axes)

    @classmethod
    def _made(cls, mesh: Ranks, mesh_axes: tuple[str, ...], tables: dict[str, Ranks], title: str) -> Layout:
        layout = cls.__new__(cls)
        layout._fill(mesh, mesh_axes, tables, title)
        return layout

    @classmethod
    def _rows(cls, name: str, world_size: int, word: str, size: int, axes: tuple[str, str]) -> Layout:
        """Rows of consecutive ranks; `axes` names the column's axis, then the row's."""
        title = _titled(name, world_size=world_size, **{word: size})
        check_size(title, "world_size", world_size)
        check_size(title, word, size)
        check_divides(title, world_size, **{word: size})
        mesh = np.arange(world_size).reshape(-1, size)
        return cls._made(mesh, axes, {axes[1]: mesh, axes[0]: mesh.T}, title)

    def _fill(self, mesh: Ranks, mesh_axes: tuple[str, ...], tables: dict[str, Ranks], title: str) -> None:
        self._assign(mesh.size, {axis: Axis.from_table(axis, table) for axis, table in tables.items()}, mesh, mesh_axes, title)

    def _assign(self, world_size: int, axes: dict[str, Axis], mesh: Ranks | None, mesh_axes: tuple[str, ...], title: str) -> None:
        values = {"world_size": int(world_size), "_axes": axes, "_mesh": mesh, "mesh_axes": mesh_axes, "_title": title}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{self} cannot be changed: make another layout instead of setting {name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.world_size, self._axes, self._mesh, self.mesh_axes, self._title)

    def _axis(self, name: str) -> Axis:
        if name in self._axes:
            return self._axes[name]
        parts = set(name.split("-"))
        if self._mesh is None or not parts <= set(self.mesh_axes):
            raise LayoutError(f"{self} has no axis {name!r}\nits axes are {', '.join(self.axes)}\nchoose one of them")
        return Axis.from_table(name, megatron.joined(self._mesh, self.mesh_axes, parts))

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"{self}: rank {rank} is outside the world\nranks are 0..{self.world_size - 1}")
        return rank

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        return self.axes == other.axes and self.mesh_axes == other.mesh_axes and all(
            np.array_equal(mine.ranks, other._axes[axis].ranks) and np.array_equal(mine.starts, other._axes[axis].starts)
            for axis, mine in self._axes.items()
        )

    def __hash__(self) -> int:
        return hash((self.world_size, self.axes, tuple(axis.degree for axis in self._axes.values())))

    def __repr__(self) -> str:
        return self._title

    def _repr_html_(self) -> str:
        """A table in a notebook: each rank's coordinates."""
        names = self.mesh_axes or self.axes
        head = "".join(f"<th>{escape(name)}</th>" for name in ("rank", *names))
        rows = [(rank, *self.coords(rank).values()) for rank in range(min(self.world_size, _MAX_ROWS))]
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
        more = f"<p>and {self.world_size - _MAX_ROWS} more ranks</p>" if self.world_size > _MAX_ROWS else ""
        return f"<p>{escape(self._title)}</p><table><tr>{head}</tr>{body}</table>{more}"


def _restore(world_size: int, axes: dict[str, Axis], mesh: Ranks | None, mesh_axes: tuple[str, ...], title: str) -> Layout:
    layout = Layout.__new__(Layout)
    layout._assign(world_size, axes, mesh, mesh_axes, title)
    return layout


def _titled(name: str, **sizes: Any) -> str:
    """The call as written, without degrees of 1: "Layout(world_size=8, tp=2)"."""
    shown = [f"{key}={value!r}" for key, value in sizes.items() if value is not None and (value != 1 or key in _ALWAYS_SHOWN)]
    return f"{name}({', '.join(shown)})"


def _check_dcp(title: str, *, tp: int, pcp: int, dcp: int) -> None:
    """Source: `ParallelConfig` of vLLM, which checks this; its `initialize_model_parallel` alone would build groups across stages."""
    check_size(title, "dcp", dcp)
    fitting = sorted({1, pcp, tp * pcp}) if pcp > 1 else [size for size in range(1, tp + 1) if tp % size == 0]
    if dcp not in fitting:
        rule = "with pcp > 1, dcp is 1, pcp or tp * pcp" if pcp > 1 else "dcp divides tp"
        raise LayoutError(f"{title}: dcp={dcp} does not fit tp={tp}, pcp={pcp}\n{rule}\nchoose dcp from {fitting}")


def _vllm_tables(mesh: Ranks, dcp: int) -> dict[str, Ranks]:
    """Each axis's groups, [num_groups, size], from ranks [external_dp, dp, pp, pcp, tp]; the lists are in vLLM's order too."""
    context = mesh.swapaxes(-1, -2) if dcp > 1 else mesh
    tables = {axis: mesh.swapaxes(place, -1).reshape(-1, mesh.shape[place]) for place, axis in enumerate(_VLLM_AXES)}
    experts = mesh.swapaxes(1, 2).reshape(-1, mesh.shape[1] * mesh.shape[3] * mesh.shape[4])
    return {**tables, "dcp": context.reshape(-1, dcp), "ep": experts}
