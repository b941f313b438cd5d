"""The picture of a layout, read back from its artists."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from overlaps import check_texts

import workbench as wb
from workbench.view import plot_layout
from workbench.view.layout import group_letter
from workbench.view.rank_grid import rank_grid

LAYOUTS = {
    "1": wb.Layout(1),
    "2": wb.Layout(2, tp=2),
    "16": wb.Layout(16, tp=4, pp=2, dp=2),
    "64": wb.Layout(64, tp=4, pp=4, dp=2),
    "256": wb.Layout(256, tp=8, pp=4, dp=8),
    "1024": wb.Layout(1024, tp=8, pp=8, dp=16),
    "high": wb.Layout(1024, tp=2),
    "wide": wb.Layout(1024, tp=1024),
    "stages": wb.Layout(64, tp=8, pp=8),
    "megatron": wb.Layout.megatron(32, tp=2, cp=2, pp=2, ep=2),
    "supernode": wb.Layout.supernode(),
    "custom": wb.Layout.custom({"tp": [[0, 1], [2, 3, 4]], "x": [[0, 2], [1, 3, 4]]}),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def meshes(ax) -> list[QuadMesh]:
    return [artist for artist in ax.collections if isinstance(artist, QuadMesh)]


@every_layout
def test_each_rank_has_a_cell_of_its_own(layout):
    grid = rank_grid(layout)
    cells = sorted(zip(grid.x.tolist(), grid.y.tolist(), strict=True))
    assert len(cells) == layout.world_size
    for (x, y), (x2, y2) in combinations(cells[:200], 2):
        assert abs(x - x2) > 0.999 or abs(y - y2) > 0.999


def test_stages_lie_beside_each_other_with_a_gap_and_dp_below():
    grid = rank_grid(wb.Layout(8, tp=2, pp=2, dp=2))
    assert grid.x.tolist() == [0, 1, 2.5, 3.5] * 2
    assert grid.y.tolist() == [0] * 4 + [1] * 4
    assert grid.x_ticks == ((1.0, "pp 0"), (3.5, "pp 1")) and grid.y_ticks == ((0.5, "dp 0"), (1.5, "dp 1"))


def test_a_wide_or_high_world_is_folded():
    for name in ("high", "wide", "stages"):
        grid = rank_grid(LAYOUTS[name])
        assert 0.5 < grid.width / grid.height < 8, name


@pytest.mark.parametrize("color_by", ["tp", "pp", "ep"])
def test_cells_have_the_colour_and_letter_of_their_group(color_by):
    layout = LAYOUTS["16"]
    ax = plot_layout(layout, color_by=color_by)
    letters = dict(text.get_text().split("\n") for text in ax.texts)
    for index, group in enumerate(layout.groups(color_by)):
        assert {letters[str(rank)] for rank in group} == {group_letter(index)}
    shown = np.ma.asarray(meshes(ax)[0].get_array()).compressed()
    assert np.bincount(shown.astype(int)).tolist() == [len(group) for group in layout.groups(color_by)]


@every_layout
def test_a_picture_is_one_mesh_whatever_its_size(layout):
    ax = plot_layout(layout, color_by=layout.axes[0])
    assert len(meshes(ax)) == 1 and np.ma.asarray(meshes(ax)[0].get_array()).count() == layout.world_size
    assert len(ax.texts) == (layout.world_size if layout.world_size <= 64 else 0)


def test_the_title_counts_groups_and_says_what_columns_are():
    assert plot_layout(LAYOUTS["16"]).get_title(loc="left") == "16 ranks: 4 tp groups of 4; columns are pipeline stages"
    assert plot_layout(LAYOUTS["custom"], color_by="x").get_title(loc="left") == "5 ranks: 2 x groups of 2 to 3"


def test_a_large_world_frames_the_group_of_rank_0():
    ax = plot_layout(LAYOUTS["256"], color_by="dp")
    labels = [text.get_text() for text in ax.figure.legends[0].get_texts()]
    assert labels == ["group of rank 0: 0, 32, ..., 224"]


@every_layout
def test_no_two_texts_overlap_and_none_is_cut_off(layout):
    ax = plot_layout(layout, color_by=layout.axes[0])
    for scale in (1, 2):
        check_texts(ax, scale=scale, least=2)


def test_it_draws_on_the_axes_it_is_given():
    ax = Figure().subplots()
    assert plot_layout(LAYOUTS["16"], ax=ax) is ax


def test_an_unknown_axis_is_refused_with_those_that_exist():
    text = (
        "plot_layout(color_by='cp'): Layout(world_size=2, tp=2) has no axis 'cp'\n"
        "its axes are external_dp, dp, pp, pcp, tp, dcp, ep\ncolour by one of them"
    )
    with pytest.raises(wb.LayoutError, match=f"^{re.escape(text)}$"):
        plot_layout(LAYOUTS["2"], color_by="cp")


def test_letters_go_on_after_z():
    assert [group_letter(i) for i in (0, 25, 26, 51, 52)] == ["A", "Z", "AA", "AZ", "BA"]
