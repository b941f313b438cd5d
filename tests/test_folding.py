"""Outputs of several ranks as one: equal lines once, in each rank's own order, differing numbers with how they differ."""

from __future__ import annotations

import random

import numpy as np
import pytest

from workbench.plan.folding import fold_lines, fold_values
from workbench.records import Shown


def folded(*lines_of_ranks):
    return [(one.ranks, one.line) for one in fold_lines(dict(enumerate(lines_of_ranks)))]


def notes(*lines_of_ranks):
    return {one.ranks: one.note for one in fold_lines(dict(enumerate(lines_of_ranks))) if one.note}


def values(*shown):
    return [(one.ranks, one.note) for one in fold_values(dict(enumerate(shown)))]


def array(data, dtype="float32", text="tensor(...)", digest=None):
    whole = np.asarray(data, dtype=dtype)
    kept = hash(whole.tobytes()) if digest is None else digest
    return Shown(text=text, shape=whole.shape, dtype=dtype, numbers=whole.reshape(-1), digest=kept)


def test_lines_that_all_ranks_share_are_shown_once_and_the_rest_between_them():
    usual = ["begin", "loss 1.0", "end"]
    assert folded(usual, usual, ["begin", "loss 1.5", "end"]) == [
        ((0, 1, 2), "begin"),
        ((0, 1), "loss 1.0"),
        ((2,), "loss 1.5"),
        ((0, 1, 2), "end"),
    ]


def test_a_line_that_only_some_ranks_wrote_stands_in_its_place():
    assert folded(["a", "c"], ["a", "b", "c"]) == [((0, 1), "a"), ((1,), "b"), ((0, 1), "c")]
    assert folded([], ["a"], []) == [((1,), "a")]
    assert folded([], []) == []


def test_different_blocks_of_lines_stay_whole():
    assert folded(["a", "b"], ["c", "d"]) == [((0,), "a"), ((0,), "b"), ((1,), "c"), ((1,), "d")]


@pytest.mark.parametrize("seed", range(20))
def test_every_rank_finds_its_own_lines_in_its_own_order(seed):
    draw = random.Random(seed)
    written = {rank: [draw.choice("abcde") for _ in range(draw.randrange(40))] for rank in range(4)}
    told = fold_lines(written)
    for rank, lines in written.items():
        assert [one.line for one in told if rank in one.ranks] == lines


def test_ten_thousand_lines_a_rank_are_folded_in_a_moment():
    alike = [f"line {i % 7}" for i in range(10_000)]
    assert len(fold_lines({0: alike, 1: [*alike[:5_000], "odd", *alike[5_000:]]})) == 10_001


def test_numbers_of_the_odd_rank_are_compared_with_most():
    assert notes(["loss 0.25"], ["loss 0.25"], ["loss 0.5"]) == {(2,): "+2.5e-01 (+100 %) against ranks 0-1"}
    assert notes(["step 3 of 9"], ["step 3 of 9"], ["step 1 of 9"]) == {(2,): "-2 against ranks 0-1"}
    assert notes(["a 1.0 b 2.0"], ["a 1.0 b 2.0"], ["a 1.5 b 4.0"]) == {
        (2,): "2 numbers differ, most by +2.0e+00 (+100 %) against ranks 0-1"
    }
    assert notes(["loss 1.0"], ["loss 1.0"], ["loss nan"]) == {(2,): "nan for 1.0 against ranks 0-1"}


def test_numbers_that_only_name_ranks_are_no_difference():
    assert notes(["rank 0"], ["rank 1"], ["rank 2"]) == {}
    assert notes(["0"], ["0"], ["1"], ["1"]) == {}
    assert notes(["a x1 1"], ["b x1 1"], ["a x1 1"]) == {}  # other words, not other numbers


def test_floats_are_compared_on_two_ranks_too_and_marked_in_their_line():
    (_, odd) = fold_lines({0: ["loss 0.5000"], 1: ["loss 0.5001"]})
    assert odd.note == "+1.0e-04 (+0.02 %) against rank 0"
    assert [odd.line[first:behind] for first, behind in odd.marks] == ["0.5001"]


def test_tensors_are_compared_by_shape_type_first_index_and_largest_difference():
    usual = array([[1.0, 2.0], [3.0, 4.0]])
    assert values(usual, usual, array([[1.0, 2.5], [3.0, 8.0]])) == [
        ((0, 1), ""),
        ((2,), "2 of 4 values differ: first at [0, 1], 2.5 for 2; largest difference 4 at [1, 1] against ranks 0-1"),
    ]
    assert values(usual, usual, array([1.0]))[1][1] == "shape [1] for [2, 2] against ranks 0-1"
    assert values(usual, usual, array([[1, 2], [3, 4]], dtype="int64"))[1][1] == "int64 for float32 against ranks 0-1"


def test_tensors_whose_texts_are_equal_are_told_apart():
    near = array([1.0, 1.0000001])
    assert values(array([1.0, 1.0]), near)[1][1].startswith("1 of 2 values differ: first at [1], 1 for 1; largest difference 1.19e-07")


def test_nan_equals_nan_and_infinity_is_the_largest_difference():
    assert values(array([np.nan, 1.0], digest=1), array([np.nan, 2.0], digest=2))[1][1].startswith("1 of 2 values differ: first at [1]")
    assert "largest difference inf at [1]" in values(array([0.0, 0.0]), array([1.0, np.inf]))[1][1]


def test_what_lies_behind_the_numbers_that_travel_is_said():
    cut = [Shown(text="t", shape=(10,), dtype="float32", numbers=np.zeros(4, np.float32), digest=digest) for digest in (1, 2)]
    assert values(*cut)[1][1] == "differs behind the first 4 of 10 values against rank 0"


def test_single_numbers_and_texts():
    assert values(array(1.0, text="1.0"), array(1.5, text="1.5"))[1][1] == "+5.0e-01 (+50 %) against rank 0"
    ranks = [array(rank, dtype="int64", text=str(rank)) for rank in range(3)]
    assert [note for _, note in values(*ranks)] == ["", "", ""]  # a rank's number
    assert values(Shown(text="(3, 'a')"), Shown(text="(3, 'a')"), Shown(text="(5, 'a')"))[1] == ((2,), "+2 against ranks 0-1")
    assert values(Shown(text="x"), Shown(text="x")) == [((0, 1), "")]


@pytest.mark.parametrize("others", [(True,), (True, True, True)])
def test_between_true_and_false_there_is_no_difference_to_tell(others):
    yes, no = array(True, "bool", "True"), array(False, "bool", "False")
    assert values(*[yes for _ in others], no) == [(tuple(range(len(others))), ""), ((len(others),), "")]
