"""Statistics of completion lengths, against numbers worked out by hand and against pandas."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.plan.lengths import length_stats


def test_the_worked_example():
    stats = length_stats([4, 4, 8, 64], finish_reasons=["stop", "stop", "stop", "length"], ranks=[0, 0, 1, 1])
    assert (stats.num_completions, stats.min, stats.max, stats.mean, stats.median) == (4, 4, 64, 20.0, 6.0)
    assert stats.truncated_share == 0.25 and stats.percentile(50) == 6.0
    assert stats.idle_share == pytest.approx(1 - 80 / 144)


def test_what_was_not_given_is_nan_not_zero():
    stats = length_stats([1, 2])
    assert math.isnan(stats.truncated_share) and math.isnan(stats.idle_share)


def test_a_rank_without_completions_waits_too():
    assert length_stats([5], ranks=[1], num_ranks=2).idle_share == 0.5
    assert length_stats([5], ranks=[1]).idle_share == 0.0


def test_nothing_generated_leaves_nobody_idle():
    assert length_stats([0, 0], ranks=[0, 1]).idle_share == 0.0


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60), st.floats(0, 100))
def test_agrees_with_pandas(lengths, p):
    stats, series = length_stats(lengths), pd.Series(lengths)
    assert (stats.min, stats.max, stats.median) == (series.min(), series.max(), series.median())
    assert stats.mean == pytest.approx(series.mean()) and stats.percentile(p) == pytest.approx(series.quantile(p / 100))


@pytest.mark.parametrize(
    "arguments, told",
    [
        (dict(lengths=[]), r"shape \(0,\); it needs one number per completion, and at least one completion"),
        (dict(lengths=[[1, 2]]), r"shape \(1, 2\)"),
        (dict(lengths=[3, -1]), "lengths run from -1 to 3; they must be whole numbers of at least 0"),
        (dict(lengths=[1.5]), "whole numbers"),
        (dict(lengths=[1, 2], finish_reasons=["stop"]), "1 finish_reasons for 2 lengths; give one for each"),
        (dict(lengths=[1, 2], ranks=[0, 1, 2]), "3 ranks for 2 lengths; give one for each"),
        (dict(lengths=[1, 2], ranks=[0, 1], num_ranks=1), "num_ranks=1, but the completions lie on 2 ranks"),
    ],
)
def test_bad_input_is_told(arguments, told):
    with pytest.raises(ValueError, match=told):
        length_stats(**arguments)


def test_a_percentile_outside_0_to_100_is_told():
    with pytest.raises(ValueError, match="p must be between 0 and 100"):
        length_stats(np.array([1, 2])).percentile(150)
