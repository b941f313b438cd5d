"""The layout explorer: the page's arithmetic against the package's, what the page may ask, and the static face."""

from __future__ import annotations

import base64
import itertools
import random
import re
import struct
from typing import Any

import pytest
from javascript import evaluate

import workbench as wb
from workbench.view import layout_explorer
from workbench.view.layout_spec import LayoutSpec, layout_of, spec_of
from workbench.view.rank_grid import rank_grid

LAYOUTS = [
    wb.Layout(1),
    wb.Layout(2, tp=2),
    wb.Layout(16, tp=4, pp=2, dp=2),
    wb.Layout(32, tp=2, pp=2, dp=2, pcp=2),
    wb.Layout(16, tp=4, pcp=2, dcp=8),
    wb.Layout(16, tp=8, dcp=4),
    wb.Layout(48, pp=3, tp=2),
    wb.Layout(1024, tp=8, pp=8, dp=16),
    wb.Layout(1024, tp=2),
    wb.Layout(1024, tp=1024),
    wb.Layout(64, tp=8, pp=8),
    wb.Layout(96, pp=96),
    wb.Layout(96, dp=48, tp=2),
    wb.Layout.megatron(32, tp=2, cp=2, pp=2, ep=2),
    wb.Layout.megatron(32, tp=2, pp=2, ep=2, etp=1, order="tp-cp-ep-pp-dp"),
    wb.Layout.megatron(32, tp=2, pp=2, ep=4, etp=1),
    wb.Layout.megatron(16, tp=4, ep=2, etp=2, pp=2),
    wb.Layout.supernode(),
    wb.Layout.supernode(dcp=8),
    wb.Layout.subgroups(12, size=3),
    wb.Layout.subgroups(4, size=1),
    wb.Layout.sequence_parallel(8, sp=4),
    wb.Layout.custom({"tp": [[0, 1], [2, 3, 4]], "x": [[0, 2], [1, 3, 4]]}),
]


@pytest.fixture(scope="module")
def pages() -> list[dict[str, Any]]:
    """What the page makes of each of LAYOUTS."""
    found: list[dict[str, Any]] = evaluate(
        "layout_plan.js",
        "specs.map((s) => { const plan = m.planOf(s); return {"
        " axes: plan.axes, world: plan.world, groups: plan.groups, code: m.codeOf(s), grid: m.gridOf(plan),"
        " words: [...Array(plan.world).keys()].map((rank) => m.wordsOf(plan, rank))}; })",
        specs=[spec_of(layout) for layout in LAYOUTS],
    )
    return found


every_layout = pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=map(repr, LAYOUTS))


@every_layout
def test_the_page_forms_the_same_groups(number, pages):
    layout, page = LAYOUTS[number], pages[number]
    assert (page["world"], tuple(page["axes"])) == (layout.world_size, layout.axes)
    assert {axis: tuple(map(tuple, groups)) for axis, groups in page["groups"].items()} == {a: layout.groups(a) for a in layout.axes}


@every_layout
def test_the_page_puts_ranks_where_the_picture_has_them(number, pages):
    grid, page = rank_grid(LAYOUTS[number]), pages[number]["grid"]
    assert page["x"] == pytest.approx(grid.x.tolist()) and page["y"] == pytest.approx(grid.y.tolist())
    for ticks, wanted in ((page["xTicks"], grid.x_ticks), (page["yTicks"], grid.y_ticks)):
        assert [name for _, name in ticks] == [name for _, name in wanted]
        assert [at for at, _ in ticks] == pytest.approx([at for at, _ in wanted])


@every_layout
def test_the_code_line_makes_the_layout_again(number, pages):
    names: dict[str, Any] = {"wb": wb}
    exec(pages[number]["code"], names)  # the page's own text, as a person would paste it
    assert names["layout"] == LAYOUTS[number] and layout_of(spec_of(LAYOUTS[number])) == LAYOUTS[number]


def test_the_page_says_coordinates_in_words(pages):
    assert pages[2]["words"][5] == "rank 5 = dp 0, pp 1, tp 1" and pages[0]["words"] == ["rank 0, the only one"]
    assert pages[-1]["words"][3] == "rank 3 = tp 1, x 1"


def random_specs(count: int) -> list[LayoutSpec]:
    """Sizes that mostly do not fit."""
    rng, sizes = random.Random(0), [1, 2, 3, 4, 6, 8]
    names = {"vllm": "tp pp dp pcp dcp", "megatron": "tp cp ep pp etp", "subgroups": "size", "supernode": "dcp"}
    orders = ("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp", "pp-dp-tp-cp-ep", "tp-cp-pp", "tp-tp-cp-ep-dp-pp", "tp-xp-cp-ep-dp-pp")
    made = []
    for kind in itertools.islice(itertools.cycle(names), count):
        chosen = {name: rng.choice(sizes if rng.random() < 0.5 else [1]) for name in names[kind].split()}
        world = {} if kind == "supernode" else {"world_size": rng.choice([4, 8, 12, 16, 24, 48, 64])}
        made.append(LayoutSpec(kind=kind, sizes=world | chosen, order=rng.choice(orders), groups={}))
    return made


def fits(spec: LayoutSpec) -> bool:
    try:
        layout_of(spec)
    except wb.LayoutError:
        return False
    return True


def test_the_page_refuses_exactly_what_the_package_refuses():
    specs = random_specs(600)
    problems = evaluate("layout_plan.js", "specs.map(m.problemOf)", specs=specs)
    wrong = [(spec, problem) for spec, problem in zip(specs, problems, strict=True) if (problem == "") != fits(spec)]
    assert not wrong and 100 < sum(map(bool, problems)) < 500


@pytest.mark.parametrize(
    "spec, text",
    [
        (
            dict(kind="vllm", sizes={"world_size": 16, "tp": 3}),
            "16 ranks do not divide by tp 3 = 3; that product must be one of 1, 2, 4, 8, 16",
        ),
        (
            dict(kind="vllm", sizes={"world_size": 8, "tp": 4, "dcp": 8}),
            "dcp 8 does not fit tp 4, pcp 1: dcp divides tp; choose from 1, 2, 4",
        ),
        (dict(kind="vllm", sizes={"world_size": 0}), "world_size must be a whole number of at least 1"),
        (dict(kind="vllm", sizes={"world_size": 4096}), "4096 ranks are more than the 1024 that can be shown"),
        (dict(kind="custom", groups={"tp": [[0, 1], [3]]}), "axis tp leaves out ranks 2 of 4; give each a group, if of one"),
        (dict(kind="custom", groups={"tp": [[0, 1], [1, 2]]}), "axis tp names rank 1 twice; a rank is in one group of an axis"),
        (dict(kind="custom", groups={}), 'give groups of ranks from 0 on, such as {"tp": [[0, 1], [2, 3]]}'),
    ],
)
def test_the_page_says_why(spec, text):
    assert evaluate("layout_plan.js", "m.problemOf(spec)", spec={"sizes": {}, "order": "tp-cp-ep-dp-pp", "groups": {}} | spec) == text


def test_only_sizes_that_fit_are_offered():
    spec = spec_of(wb.Layout(16, tp=4, pp=2))
    names = ["tp", "pp", "dp", "pcp", "dcp", "world_size"]
    offered = dict(zip(names, evaluate("layout_plan.js", "names.map((n) => m.fitting(spec, n))", spec=spec, names=names), strict=True))
    assert offered["tp"] == [1, 2, 4, 8] and offered["pp"] == [1, 2, 4] and offered["dcp"] == [1, 2, 4]
    assert offered["world_size"] == list(range(8, 1025, 8)) and offered["dp"] == offered["pcp"] == [1, 2]


@pytest.mark.parametrize("num_layers, stages, partition", [(30, 4, ""), (32, 8, ""), (7, 7, ""), (21, 4, "5,6,5,5"), (10, 3, "")])
def test_stages_get_the_layers_that_vllm_gives_them(num_layers, stages, partition):
    cut = evaluate("layout_plan.js", "m.cutLayers(n, stages, partition)", n=num_layers, stages=stages, partition=partition)
    assert [tuple(stage) for stage in cut] == wb.partition_layers(num_layers, stages, partition or None)


# What the kernel does


class ClusterOfTwo:
    """Takes layouts of two ranks only, as a cluster of two does."""

    world_size = 2

    def __init__(self) -> None:
        self.layout: wb.Layout | None = None

    def use(self, layout: wb.Layout) -> None:
        if layout.world_size != 2:
            raise ValueError(f"the layout has {layout.world_size} ranks, the cluster 2; they must be equal")
        self.layout = layout


def test_a_saved_notebook_shows_a_picture_and_words():
    data, metadata = layout_explorer(wb.Layout(8, tp=2))._repr_mimebundle_()
    assert metadata["image/png"]["width"] == pytest.approx(struct.unpack(">I", base64.b64decode(data["image/png"])[16:20])[0] / 1.44, abs=1)
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in data and data["text/plain"].startswith("8 ranks: 4 tp groups of 2")


def test_what_the_page_changes_is_a_layout_here():
    explorer = layout_explorer(wb.Layout(8, tp=2))
    explorer.set_state(
        {"spec": {"kind": "megatron", "sizes": {"world_size": 8, "tp": 2, "pp": 2}, "order": "tp-cp-ep-dp-pp", "groups": {}}}
    )
    assert explorer.layout_shown == wb.Layout.megatron(8, tp=2, pp=2)
    explorer.show(wb.Layout(4, pp=2))
    assert explorer.spec == {"kind": "vllm", "sizes": {"world_size": 4, "pp": 2}, "order": "tp-cp-ep-dp-pp", "groups": {}}
    assert explorer.code == "layout = wb.Layout(world_size=4, pp=2)"


def test_a_smaller_layout_takes_the_choice_along():
    explorer = layout_explorer(wb.Layout.subgroups(8, size=2))
    assert explorer.color_by == "engine"
    explorer.rank = 7
    explorer.show(wb.Layout(4, tp=2))
    assert (explorer.rank, explorer.color_by) == (3, "tp")


@pytest.mark.parametrize("name, value, text", [("rank", 8, "rank 8 is outside the world"), ("color_by", "cp", "has no axis 'cp'")])
def test_what_the_layout_lacks_is_refused(name, value, text):
    explorer = layout_explorer(wb.Layout(8, tp=2))
    with pytest.raises(wb.LayoutError, match=text):
        setattr(explorer, name, value)
    assert (explorer.rank, explorer.color_by) == (0, "tp")


def test_sizes_that_do_not_fit_are_refused_here_too():
    explorer = layout_explorer(wb.Layout(8, tp=2))
    with pytest.raises(wb.LayoutError, match="the world does not divide"):
        explorer.spec = {"kind": "vllm", "sizes": {"world_size": 8, "tp": 3}, "order": "", "groups": {}}
    with pytest.raises(wb.LayoutError, match="layouts of kind 'ring' are not known"):
        explorer.spec = {"kind": "ring", "sizes": {"world_size": 8}, "order": "", "groups": {}}
    assert explorer.layout_shown == wb.Layout(8, tp=2)


@pytest.mark.parametrize(
    "size, told", [(2, "the cluster uses Layout(world_size=2, tp=2)"), (4, "the cluster refused: the layout has 4 ranks")]
)
def test_the_button_hands_the_layout_to_the_cluster_and_says_what_came_of_it(size, told, monkeypatch):
    messages: list[Any] = []
    cluster, layout = ClusterOfTwo(), wb.Layout(size, tp=2)
    explorer = layout_explorer(layout, cluster)
    monkeypatch.setattr(explorer, "send", messages.append)
    explorer._handle_custom_msg({"use": True}, [])
    assert messages[0]["told"].startswith(told) and cluster.layout == (layout if size == 2 else None)
    assert explorer.num_cluster_ranks == 2


def test_use_without_a_cluster_says_how_to_give_one():
    text = "layout_explorer(layout) knows no cluster\ngive it one: layout_explorer(layout, cluster)"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        layout_explorer(wb.Layout(2)).use()


def test_a_world_too_large_to_show_is_refused():
    text = "Layout(world_size=2048): 2,048 ranks are more than the explorer can show\nneeded: at most 1,024\nshow a smaller world"
    with pytest.raises(wb.LayoutError, match=re.escape(text)):
        layout_explorer(wb.Layout(2048))
