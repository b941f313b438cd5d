"""What helps to find a bug in a rank: the failing frame's names, breakpoint() and input() told what to do, a diagnosis as HTML."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

import workbench as wb
from workbench.ranks.cluster import Cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(2) as cluster:
        yield cluster


def test_a_failure_shows_the_names_of_the_failing_frame(cluster):
    cell = "import math\ndef half(values, step):\n    mean = sum(values) / step\n    return mean\nhalf([1, 2, 3], 0)"
    with pytest.raises(wb.RankFailed) as caught:
        cluster.execute(cell, ranks=1)
    assert caught.value.locals == {"values": "[1, 2, 3]", "step": "0"}


def test_a_failure_inside_a_library_shows_the_users_own_frame(cluster):
    with pytest.raises(wb.RankFailed) as caught:
        cluster.execute("left, right = torch.ones(2, 3), torch.ones(2, 3)\nleft @ right", ranks=0)
    assert {"left", "right", "rank"} <= set(caught.value.locals) and "torch" not in caught.value.locals


def test_a_name_whose_repr_fails_is_told_as_such(cluster):
    cell = "class Bad:\n    def __repr__(self): raise ValueError('no repr')\ndef fail():\n    bad = Bad()\n    1 / 0\nfail()"
    with pytest.raises(wb.RankFailed) as caught:
        cluster.execute(cell, ranks=0)
    assert "its repr failed: ValueError('no repr')" in caught.value.locals["bad"]


@pytest.mark.parametrize("call", ["breakpoint()", "input('name? ')"])
def test_what_needs_a_terminal_points_to_replay(cluster, call):
    with pytest.raises(wb.RankFailed) as caught:
        cluster.execute(call, ranks=1)
    told = str(caught.value)
    assert f"{call.partition('(')[0]}() was called on rank 1, which has no terminal" in told and "wb.replay(dir, rank=1)" in told
    assert "from a terminal, while it is idle or runs: workbench attach 1" in told


def test_a_diagnosis_has_a_table_and_escapes_source(cluster):
    handle = cluster.execute("import time\nif rank == 0 < 1: dist.barrier()\nelse: time.sleep(60)", block=False)
    time.sleep(0.7)
    page = cluster.diagnose()._repr_html_()
    cluster.interrupt()
    with pytest.raises(wb.RankInterrupted):
        handle.result(timeout_s=10)
    assert "<td>waits in barrier #" in page and "rank == 0 &lt; 1" in page and "time.sleep(60)" in page
