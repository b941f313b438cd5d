"""Which ranks a selector names."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.plan.selector import Selector, select_ranks


class TwoByTwo:
    """rank = 2 * pp + tp, drawn by hand."""

    axes = ("pp", "tp")

    def index_in_group(self, rank: int, axis: str) -> int:
        return {"pp": (0, 0, 1, 1), "tp": (0, 1, 0, 1)}[axis][rank]


@pytest.mark.parametrize(("selector", "ranks"), [
    (None, (0, 1, 2, 3)), ("all", (0, 1, 2, 3)), (2, (2,)), (-1, (3,)), (np.int64(1), (1,)), ([3, 0, 0], (0, 3)),
    (range(2), (0, 1)), ({1}, (1,)),
    (np.array([2, 1]), (1, 2)), (slice(1, None), (1, 2, 3)), (slice(None, None, 2), (0, 2)), ("0,2-3", (0, 2, 3)),
    (" 1 , 3 ", (1, 3)),
    ("tp=0", (0, 2)), ("pp=1,tp=0", (2,)), ("tp=0-1", (0, 1, 2, 3)),
])  # fmt: skip
def test_a_selector_names_ranks(selector: Selector, ranks: tuple[int, ...]) -> None:
    assert select_ranks(selector, 4, TwoByTwo()) == ranks


@pytest.mark.parametrize(("selector", "problem"), [
    ("4", "names rank 4"), (4, "names rank 4"), (-5, "names rank -5"), ([7], "names rank 7"), ([], "chooses no rank"),
    (slice(9, 12), "chooses no rank"),
    ("", "has ''"), ("a", "has 'a'"), ("2-", "has '2-'"), ("-1", "has '-1'"), ("3-1", "runs backwards"),
    ("0,,1", "has ''"), ("all,1", "has 'all'"),
    ("tp=9", "names tp index 9"), ("tp=", "has ''"), ("dp=0", "the layout has axes pp, tp"),
    ("tp=0,1", "mixes ranks and axes"),
    ("tp=0,tp=1", "chooses no rank"), (True, "is a bool"), ([True], "holds True"), (1.0, "is a float"),
    (["0"], "holds '0'"), (b"1", "is a bytes"),
    (slice("a"), "indices must be integers"),
])  # fmt: skip
def test_a_wrong_selector_is_named(selector: Selector, problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        select_ranks(selector, 4, TwoByTwo())
    assert repr(selector) in str(caught.value) and problem in str(caught.value) and "run from 0 to" in str(caught.value)


def test_an_axis_without_a_layout_says_so() -> None:
    with pytest.raises(ValueError, match="no layout is in use"):
        select_ranks("tp=0", 2)
