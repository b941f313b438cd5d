"""Layouts against real vLLM, torch's DeviceMesh, Megatron's formula and tables drawn by hand."""

from __future__ import annotations

import itertools
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from workbench.errors import LayoutError
from workbench.plan.layout import Layout
from workbench.plan.partition import partition_layers

AXES = ("external_dp", "dp", "pp", "pcp", "tp", "dcp", "ep")


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """vLLM's layouts of up to 256 ranks."""
    tp, pp, dp, pcp = (draw(st.sampled_from((1, 2, 3, 4))) for _ in range(4))
    dcp = draw(st.sampled_from([1, pcp, tp * pcp] if pcp > 1 else [size for size in range(1, tp + 1) if tp % size == 0]))
    return Layout(tp * pp * dp * pcp * draw(st.integers(1, 3)), tp=tp, pp=pp, dp=dp, pcp=pcp, dcp=dcp)


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_each_rank_is_in_exactly_one_group_of_each_axis(layout: Layout) -> None:
    for axis in AXES:
        assert sorted(itertools.chain(*layout.groups(axis))) == list(range(layout.world_size))
        assert all(layout.group_of(rank, axis)[layout.index_in_group(rank, axis)] == rank for rank in range(layout.world_size))


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_two_axes_meet_in_one_rank(layout: Layout) -> None:
    for one, other in itertools.combinations(layout.mesh_axes, 2):
        assert all(len(set(a) & set(b)) <= 1 for a in layout.groups(one) for b in layout.groups(other))
        assert all(set(layout.group_of(rank, one)) & set(layout.group_of(rank, other)) == {rank} for rank in range(layout.world_size))


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_coordinates_lead_back_to_their_rank(layout: Layout) -> None:
    for rank in range(layout.world_size):
        coords = layout.coords(rank)
        d, p, c, t = (coords[axis] for axis in ("dp", "pp", "pcp", "tp"))
        sizes = [layout.degree(axis) for axis in ("dp", "pp", "pcp", "tp")]
        assert rank == (((coords["external_dp"] * sizes[0] + d) * sizes[1] + p) * sizes[2] + c) * sizes[3] + t
        assert layout.rank_at(**coords) == rank


def test_groups_are_those_of_real_vllm(vllm: dict[str, Any]) -> None:
    for sizes, theirs in zip(vllm["questions"]["layouts"], vllm["groups"], strict=True):
        layout = Layout(**sizes)
        for axis, groups in theirs.items():
            assert layout.groups(axis) == tuple(map(tuple, groups)), (layout, axis)
        assert set(theirs) == {"tp", "dcp", "pcp", "pp", "dp", "ep"}


def test_layer_cuts_are_those_of_real_vllm(vllm: dict[str, Any]) -> None:
    for (num_layers, pp_size), theirs in zip(vllm["questions"]["cuts"], vllm["layers"], strict=True):
        assert partition_layers(num_layers, pp_size, allow_empty=True) == [tuple(cut) for cut in theirs]


@pytest.fixture(scope="module")
def vllm() -> dict[str, Any]:
    """What real vLLM answers, asked in a process of its own."""
    degrees = (1, 2, 3)
    sizes = [dict(tp=tp, pp=pp, dp=dp, pcp=pcp) for tp, pp, dp, pcp in itertools.product((*degrees, 4), degrees, degrees, (1, 2))]
    questions = {
        "layouts": [
            dict(world_size=s["tp"] * s["pp"] * s["dp"] * s["pcp"] * external, **s, dcp=dcp)
            for s, external in itertools.product(sizes, (1, 2))
            for dcp in sorted({1, s["pcp"], s["tp"] * s["pcp"]})
        ],
        "cuts": [(layers, stages) for layers in range(1, 40, 3) for stages in range(1, 9)],
    }
    script = Path(__file__).with_name("vllm_reference.py")
    done = subprocess.run([sys.executable, script], input=json.dumps(questions), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return {"questions": questions, **json.loads(done.stdout.splitlines()[-1])}


@pytest.fixture
def fake_world() -> Iterator[Any]:
    """Starts a world of any size in this process alone, where nothing is sent."""
    yield lambda size: dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    dist.destroy_process_group()


def test_the_device_mesh_has_the_same_groups(fake_world: Any) -> None:
    layout = Layout(16, tp=2, pp=2, dp=2)
    fake_world(16)
    mesh = layout.to_device_mesh()
    assert mesh.mesh_dim_names == ("external_dp", "dp", "pp", "pcp", "tp") and mesh.mesh.shape == (2, 2, 2, 1, 2)
    for axis in mesh.mesh_dim_names:
        assert tuple(dist.get_process_group_ranks(mesh.get_group(axis))) == layout.group_of(0, axis)


@pytest.mark.parametrize("layout", [Layout.supernode(), Layout.megatron(16, tp=2, pp=2, cp=2)])
def test_a_device_mesh_of_the_same_matrix_has_the_same_groups(fake_world: Any, layout: Layout) -> None:
    """Every slice of torch's mesh along a dim is a group of ours, for all ranks (the process itself is only rank 0)."""
    fake_world(layout.world_size)
    mesh: DeviceMesh = layout.to_device_mesh()
    for dim, axis in enumerate(layout.mesh_axes):
        rows = mesh.mesh.swapaxes(dim, -1).reshape(-1, mesh.mesh.shape[dim]).tolist()
        assert sorted(map(tuple, rows)) == sorted(layout.groups(axis))


def test_vllm_and_megatron_swap_pipeline_and_data() -> None:
    ours, theirs = Layout(8, tp=2, pp=2, dp=2), Layout.megatron(8, tp=2, pp=2)
    assert ours.groups("pp") == ((0, 2), (1, 3), (4, 6), (5, 7)) and theirs.groups("pp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert sorted(ours.groups("dp")) == [(0, 4), (1, 5), (2, 6), (3, 7)] and theirs.groups("dp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert theirs.coords(6) == {"pp": 1, "dp": 1, "cp": 0, "tp": 0}
    assert Layout.megatron(8, tp=2, pp=2, order="tp-cp-ep-pp-dp").groups("pp") == ours.groups("pp")


@pytest.mark.parametrize("order", ["-".join(names) for names in itertools.permutations(("tp", "dp", "pp"))])
def test_megatron_orders_follow_their_formula(order: str) -> None:
    """rank = sum of index * stride, the strides growing in the order of the string."""
    degrees = {"tp": 2, "dp": 3, "pp": 4}
    layout = Layout.megatron(24, tp=2, pp=4, order=order)
    for rank in range(24):
        rest, coords = rank, {"cp": 0}
        for name in order.split("-"):
            rest, coords[name] = divmod(rest, degrees[name])
        assert layout.coords(rank) == coords
        assert layout.rank_at(**coords) == rank


def test_megatron_experts_have_a_grid_of_their_own() -> None:
    layout = Layout.megatron(8, tp=2, ep=2)
    assert layout.groups("ep") == ((0, 2), (1, 3), (4, 6), (5, 7)) and layout.groups("edp") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert layout.groups("dp") == ((0, 2, 4, 6), (1, 3, 5, 7)) and layout.groups("etp") == layout.groups("tp")
    free = Layout.megatron(8, tp=4, ep=4, etp=1)
    assert free.groups("ep") == ((0, 1, 2, 3), (4, 5, 6, 7)) and free.groups("etp") == tuple((rank,) for rank in range(8))
    assert free.groups("tp-dp") == ((0, 1, 2, 3, 4, 5, 6, 7),)


def test_the_supernode_keeps_stages_inside_nodes() -> None:
    layout = Layout.supernode()
    assert layout.groups("tp") == ((0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)) == layout.groups("ep")
    assert all(a // 8 == b // 8 for a, b in layout.groups("pp"))
    for rank in range(16):
        node, local = divmod(rank, 8)
        assert (layout.stage_of(rank), layout.index_in_group(rank, "tp")) == (local // 4, node * 4 + local % 4)
    assert layout.where(pp=1, tp=0) == (4,)  # the last stage's first rank: not world_size - tp, which is 8
    assert Layout.supernode(dcp=8).groups("dcp") == layout.groups("tp")
    assert layout.layers_of(8, 30) == (0, 15) and layout.layers_of(4, 30) == (15, 30)


def test_rows_of_engines_and_of_sequences() -> None:
    layout = Layout.subgroups(6, size=2)
    assert layout.groups("engine") == ((0, 1), (2, 3), (4, 5)) and layout.groups("replica") == ((0, 2, 4), (1, 3, 5))
    assert layout.coords(5) == {"replica": 2, "engine": 1} and layout.rank_at(replica=2, engine=1) == 5
    mesh = Layout.sequence_parallel(8, sp=4)
    assert mesh.groups("sp") == ((0, 1, 2, 3), (4, 5, 6, 7)) and mesh.group_of(6, "dp") == (2, 6)


def test_groups_of_your_own_keep_their_order_and_sizes() -> None:
    layout = Layout.custom({"engine": [[2, 0], [1], [5, 3, 4]], "tp": [[0, 1], [2, 3], [4, 5]]})
    assert layout.world_size == 6 and layout.group_of(4, "engine") == (5, 3, 4) and layout.index_in_group(0, "engine") == 1
    assert layout.coords(3) == {"engine": 1, "tp": 1} and layout.neighbours(5, "engine") == (4, 3)
    assert layout.where(tp=0) == (0, 2, 4) and layout.degree("engine") == 3


def test_a_layout_is_a_value() -> None:
    one, same, other = Layout(8, tp=2), Layout(8, tp=2), Layout(8, tp=4)
    assert one == same == pickle.loads(pickle.dumps(one)) and hash(one) == hash(same) and one != other and one != "layout"
    assert repr(one) == "Layout(world_size=8, tp=2)" and "<td>7</td>" in one._repr_html_() and "external_dp" in one._repr_html_()
    assert Layout.custom({"tp": [[0, 1]]}) != Layout.custom({"tp": [[1, 0]]})
    with pytest.raises(AttributeError, match="cannot be changed"):
        one.world_size = 9


def test_a_very_large_world_answers_at_once() -> None:
    build_s = min(_timed(lambda: Layout(131_072, tp=8, pp=16, dp=4)) for _ in range(5))
    layout = Layout(131_072, tp=8, pp=16, dp=4)
    ask_s = min(_timed(lambda: layout.group_of(131_071, "tp")) for _ in range(100))
    assert build_s < 0.05 and ask_s < 50e-6, (build_s, ask_s)


def _timed(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@pytest.mark.parametrize(("sizes", "texts"), [
    (dict(world_size=8, tp=3), ["Layout(world_size=8, tp=3): the world does not divide\ngot world_size=8, which is no multiple of tp=3\n",
                                "with this world, tp must be one of 1, 2, 4, 8"]),
    (dict(world_size=12, tp=2, pp=4), ["world_size=12, which is no multiple of pp=4 * tp=2 = 8", "pp * tp must be one of 1, 2, 3"]),
    (dict(world_size=0), ["world_size must be at least 1", "world_size=0"]), (dict(world_size=8, tp=0), ["tp must be at least 1"]),
    (dict(world_size=8, pcp=-1), ["pcp must be at least 1"]), (dict(world_size=8, tp=2.0), ["tp must be an int", "2.0"]),
    (dict(world_size=8, dp=True), ["dp must be an int", "True"]), (dict(world_size=True), ["world_size must be an int"]),
    (dict(world_size=8, tp=4, dcp=3), ["dcp=3 does not fit tp=4, pcp=1", "choose dcp from [1, 2, 4]"]),
    (dict(world_size=6, tp=3, pp=2, dcp=2), ["dcp=2 does not fit tp=3", "[1, 3]"]),
    (dict(world_size=8, tp=2, pcp=4, dcp=2), ["dcp=2 does not fit tp=2, pcp=4", "[1, 4, 8]"]),
    (dict(world_size=4, dcp=0), ["dcp must be at least 1"]),
])  # fmt: skip
def test_sizes_that_do_not_fit_say_what_would(sizes: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(LayoutError) as caught:
        Layout(**sizes)
    assert all(text in str(caught.value) for text in texts), str(caught.value)


@pytest.mark.parametrize(("make", "texts"), [
    (lambda: Layout.megatron(8, tp=3), ["Layout.megatron(world_size=8, tp=3", "does not divide"]),
    (lambda: Layout.megatron(8, tp=2, ep=3), ["ep=3", "does not divide"]),
    (lambda: Layout.megatron(8, tp=2, order="tp-xp-dp-pp"), ["names unknown axes: xp"]),
    (lambda: Layout.megatron(8, tp=2, order="tp-tp-dp-pp"), ["names axes twice: tp"]),
    (lambda: Layout.megatron(8, tp=2, pp=2, order="tp-dp"), ["leaves out: pp=2", "fastest first"]),
    (lambda: Layout.megatron(8, tp=4, etp=1, order="tp-pp"), ["leaves out: dp=8"]),
    (lambda: Layout.megatron(8, tp=2, pp=2, etp=1, order="tp-pp-dp"), ["the experts' pipeline", "dp=2, edp=4", "put pp last"]),
    (lambda: Layout.subgroups(6, size=4), ["Layout.subgroups(world_size=6, size=4)", "no multiple of size=4", "one of 1, 2, 3, 6"]),
    (lambda: Layout.subgroups(6, size=0), ["size must be at least 1"]),
    (lambda: Layout.sequence_parallel(8, sp=3), ["no multiple of sp=3"]),
    (lambda: Layout.supernode(tp=4), ["no supernode of this size is known", "tp=8, pp=2", "Layout.custom"]),
    (lambda: Layout.supernode(32), ["world_size=32"]), (lambda: Layout.supernode(dcp=3), ["dcp=3 does not fit"]),
    (lambda: Layout.custom({}), ["needs groups"]), (lambda: Layout.custom({"tp": [[0, 1], [1, 2]]}), ["names ranks [1] twice"]),
    (lambda: Layout.custom({"tp": [[0, 1]], "pp": [[0, 2], [1]]}), ["axis 'tp' leaves out ranks [2] of 3"]),
    (lambda: Layout.custom({"tp": [[0], []]}), ["empty group"]), (lambda: Layout.custom({"tp": [[-1, 0]]}), ["ranks 0..world_size-1"]),
    (lambda: Layout(4, tp=2).groups("cp"), ["Layout(world_size=4, tp=2) has no axis 'cp'", "tp"]),
    (lambda: Layout(4, tp=2).group_of(4, "tp"), ["rank 4 is outside the world"]), (lambda: Layout(4).coords(-1), ["rank -1 is outside"]),
    (lambda: Layout(4, tp=2).rank_at(tp=1), ["ranks [1, 3] stand at", "external_dp, dp, pp, pcp, tp"]),
    (lambda: Layout(4, tp=2).where(tp=2), ["tp=2 is outside axis 'tp'", "0..1"]),
    (lambda: Layout.custom({"tp": [[0]]}).to_device_mesh(), ["have no grid"]),
])  # fmt: skip
def test_each_refusal_names_its_cause(make: Any, texts: list[str]) -> None:
    with pytest.raises(LayoutError) as caught:
        make()
    assert all(text in str(caught.value) for text in texts), str(caught.value)
