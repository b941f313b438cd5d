"""Explorers as the kernel sees them: what the page is given, what it may ask, and the static face."""

from __future__ import annotations

import base64

import pytest
from run_builders import make_batch, make_run

from workbench.run import Run
from workbench.view import length_explorer


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
