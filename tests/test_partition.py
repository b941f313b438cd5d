"""Layers, tensors and tokens cut among ranks."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from workbench.plan.partition import divide, partition_layers, sequence_parallel_tokens, split_tensor

HALF: Any = 0.5


@pytest.mark.parametrize(("num_layers", "pp_size", "counts"), [
    (30, 4, [7, 8, 8, 7]), (32, 4, [8, 8, 8, 8]), (31, 4, [8, 8, 8, 7]), (29, 4, [7, 7, 8, 7]), (5, 1, [5]), (7, 2, [4, 3]),
    (9, 9, [1] * 9),
])  # fmt: skip
def test_layers_left_over_go_before_the_last_stage(num_layers: int, pp_size: int, counts: list[int]) -> None:
    cut = partition_layers(num_layers, pp_size)
    assert [end - start for start, end in cut] == counts and cut[0][0] == 0 and cut[-1][1] == num_layers
    assert all(before[1] == after[0] for before, after in zip(cut[:-1], cut[1:], strict=True))


def test_a_partition_may_be_text_numbers_or_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [(0, 5), (5, 11), (11, 16), (16, 22)]
    assert partition_layers(22, 4, "5,6,5,6") == partition_layers(22, 4, [5, 6, 5, 6]) == partition_layers(22, 4, " 5, 06,+5,6") == expected
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "5,6,5,6")
    assert partition_layers(22, 4) == expected and partition_layers(4, 4, "1,1,1,1") == [(0, 1), (1, 2), (2, 3), (3, 4)]
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "")
    with pytest.raises(ValueError, match="an entry is empty"):
        partition_layers(22, 4)


def test_an_uneven_cut_is_logged_and_an_even_or_chosen_one_is_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "workbench.plan"):
        partition_layers(32, 4)
        partition_layers(22, 4, "5,6,5,6")
        assert not caplog.records
        partition_layers(30, 4)
    assert "30 layers on 4 stages are uneven: 7,8,8,7" in caplog.text


@pytest.mark.parametrize(("partition", "text"), [
    ("5,5,5,", "an entry is empty"), ("", "an entry is empty"), ("a,b", "'a' is not a whole number"),
    ("5.5,5,5,6", "'5.5' is not a whole number"),
    ("5;6;5;6", "'5;6;5;6' is not a whole number"), ("5,5,5", "has 3 entries\n4 stages need 4"),
    ("5,5,5,5", "adds up to 20 layers\nthe model has 22"),
    ("25,-3,0,0", "each entry must be a whole number of at least 0\ngot -3"), ("22,0,0,0", "stage 1 of 4 would hold no layer"),
    ([5.0, 6, 5, 6], "got 5.0"), ([True, 10, 5, 6], "got True"),
])  # fmt: skip
def test_each_bad_partition_is_told_apart(partition: Any, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        partition_layers(22, 4, partition)
    assert text in str(caught.value)


@pytest.mark.parametrize(("call", "text"), [
    (lambda: partition_layers(3, 4), "stage 3 of 4 would hold no layer\ngot 3 layers cut as [1, 1, 1, 0]\nuse fewer stages, or pass allow"),
    (lambda: partition_layers(3, 0), "pp_size must be a whole number of at least 1\ngot 0"),
    (lambda: partition_layers(-1, 2), "num_layers must be a whole number of at least 0\ngot -1"),
    (lambda: divide(7, 2), "7 is not divisible by 2\n3 * 2 leaves 1"),
    (lambda: divide(4, 0), "denominator must be a whole number of at least 1"),
    (lambda: divide(HALF, 2), "numerator must be a whole number"),
    (lambda: split_tensor(torch.ones(2, 3), 2), "3 is not divisible by 2"), (lambda: split_tensor(torch.tensor(1), 1), "0-dim"),
    (lambda: sequence_parallel_tokens([1], 0), "sp must be"), (lambda: sequence_parallel_tokens([-1], 2), "num_tokens must be"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(call: Any, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert text in str(caught.value)


def test_empty_stages_are_allowed_on_request() -> None:
    assert partition_layers(2, 4, allow_empty=True) == [(0, 0), (0, 1), (1, 2), (2, 2)]
    assert partition_layers(22, 4, "22,0,0,0", allow_empty=True) == [(0, 22), (22, 22), (22, 22), (22, 22)]


def test_a_tensor_is_split_along_its_last_dim() -> None:
    whole = torch.arange(12).reshape(2, 6)
    parts = split_tensor(whole, 3)
    assert [part.tolist() for part in parts] == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
    assert not parts[1].is_contiguous() and parts[0].data_ptr() == whole.data_ptr()
    assert all(part.is_contiguous() for part in split_tensor(whole, 3, contiguous=True))
    assert [part.shape for part in split_tensor(torch.empty(2, 0), 2)] == [(2, 0), (2, 0)]
    assert np.array_equal(split_tensor(whole.numpy(), 2)[1], whole[:, 3:].numpy()) and divide(12, 4) == 3


def test_sequence_parallel_tokens_are_rounded_up() -> None:
    assert sequence_parallel_tokens([5, 8, 0], 2) == [3, 3, 4, 4, 0, 0]
