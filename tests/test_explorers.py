"""Explorers as the kernel sees them: what the page is given, what it may ask, and the static face."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import pytest
from run_builders import make_batch, make_run

import workbench as wb
from workbench.run import Run
from workbench.view import layout_explorer, length_explorer
from workbench.view.layout_explorer import scene_of


class ClusterOfTwo:
    """Takes layouts of two ranks only, as a cluster of two does."""

    def __init__(self) -> None:
        self.layout: wb.Layout | None = None

    def use(self, layout: wb.Layout) -> None:
        if layout.world_size != 2:
            raise ValueError(f"the layout has {layout.world_size} ranks, the cluster 2; they must be equal")
        self.layout = layout


def test_a_saved_notebook_shows_a_picture_and_words():
    data, _ = layout_explorer(wb.Layout(8, tp=2))._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in data and data["text/plain"].startswith("8 ranks: 4 tp groups of 2")


def test_the_page_gets_each_rank_its_groups_and_words():
    layout = wb.Layout(16, tp=4, pp=2, dp=2)
    scene = json.loads(json.dumps(scene_of(layout)))
    assert scene["words"][5] == "rank 5 = dp 0, pp 1, tp 1" and not scene["can_use"]
    assert all([tuple(g) for g in scene["groups"][axis]] == list(layout.groups(axis)) for axis in layout.axes)
    assert len(scene["x"]) == len(scene["y"]) == 16


def test_1024_ranks_fit_into_a_small_message():
    assert len(json.dumps(scene_of(wb.Layout(1024, tp=8, pp=8, dp=16)))) < 150_000


def test_a_layout_without_tp_begins_with_its_first_axis():
    assert layout_explorer(wb.Layout.subgroups(8, size=2)).color_by == "engine"


@pytest.mark.parametrize("name, value, text", [("rank", 8, "rank 8 is outside the world"), ("color_by", "cp", "has no axis 'cp'")])
def test_what_the_layout_lacks_is_refused(name, value, text):
    explorer = layout_explorer(wb.Layout(8, tp=2))
    with pytest.raises(wb.LayoutError, match=text):
        setattr(explorer, name, value)
    assert (explorer.rank, explorer.color_by) == (0, "tp")


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
    assert explorer.scene["can_use"]


def test_use_without_a_cluster_says_how_to_give_one():
    text = "layout_explorer(layout) knows no cluster\ngive it one: layout_explorer(layout, cluster)"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        layout_explorer(wb.Layout(2)).use()


def test_the_page_gets_each_length_with_what_it_is_looked_at_by():
    run = Run(batches={0: {0: make_batch(lengths=((3, 64),)), 1: make_batch(rank=1, lengths=((5, 7),), failed=(1,))}})
    assert length_explorer(run).rows == {
        "length_tokens": [3, 64, 5],
        "origin_rank": [0, 0, 1],
        "prompt_index": [0, 0, 0],
        "step": [0, 0, 0],
        "finish_reason": ["stop", "length", "stop"],
    }


@pytest.mark.parametrize(
    "run, text", [(make_run(num_ranks=2), "median"), (Run(batches={}), "no completions to show")], ids=["run", "empty"]
)
def test_lengths_have_a_static_picture_too(run, text):
    data, _ = length_explorer(run)._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG") and text in data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in data
