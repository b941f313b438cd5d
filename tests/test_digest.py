"""The hash of a value: equal content gives equal hashes, in this process or another; what has no content says so."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from workbench.ranks.digest import digest_of


@dataclasses.dataclass
class Point:
    x: float
    tags: set[str]


class Colour(enum.Enum):
    RED = 1


def value_of(value: Any) -> str:
    found = digest_of(value)
    assert found.value and not found.reason, found
    return found.value


EQUAL = [
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({1, 2, 3}, {3, 2, 1}),
    (float("nan"), float("nan")),
    (np.arange(6).reshape(2, 3).T, np.arange(6).reshape(2, 3).T.copy()),
    (torch.arange(6.0).reshape(2, 3).T, torch.arange(6.0).reshape(2, 3).T.contiguous()),
    (torch.ones(3, requires_grad=True), torch.ones(3)),
    (list(range(2000)), list(range(2000))),
    (Point(1.0, {"b", "a"}), Point(1.0, {"a", "b"})),
    (pd.DataFrame({"a": [1, 2], "b": ["x", None]}), pd.DataFrame({"a": [1, 2], "b": ["x", None]})),
    (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
]
DIFFERENT = [
    (0.0, -0.0),
    (1, 1.0),
    (1, True),
    ("1", 1),
    ([1, 2], (1, 2)),
    ([[1], [2]], [[1, 2]]),
    (["ab", "c"], ["a", "bc"]),
    ({"a": {"b": 1}}, {"b": {"a": 1}}),
    (torch.ones(2), torch.ones(2, dtype=torch.float64)),
    (torch.ones(2, 1), torch.ones(1, 2)),
    (torch.ones(2), np.ones(2, np.float32)),
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0000002])),
    (list(range(2000)), [*range(1999), 0]),
    (Point(1.0, set()), Point(2.0, set())),
    (pd.DataFrame({"a": [1]}), pd.DataFrame({"a": [1]}, index=[5])),
    (datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)),
    (Colour.RED, 1),
    (None, "None"),
]


@pytest.mark.parametrize("first, second", EQUAL)
def test_equal_content_has_one_hash(first, second):
    assert value_of(first) == value_of(second)


@pytest.mark.parametrize("first, second", DIFFERENT)
def test_different_content_has_two(first, second):
    assert value_of(first) != value_of(second)


def test_another_process_finds_the_same():
    code = (
        "import numpy as np, torch; from workbench.ranks.digest import digest_of; "
        "print(digest_of([{'b', 'a', 'c'}, {'x': (1.5, None)}, np.arange(3), torch.arange(4), 'ä']).value)"
    )
    told = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout.strip() for _ in range(2)}
    assert told == {value_of([{"b", "a", "c"}, {"x": (1.5, None)}, np.arange(3), torch.arange(4), "ä"])}


def circle() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


@pytest.mark.parametrize(
    "value, reason",
    [
        (threading.Lock(), "a _thread.lock has no content that could be compared"),
        ([1, (2, object())], "a builtins.object has no content that could be compared"),
        (torch.zeros(5_000_000), "it is larger than 16 MiB"),
        ([str(number) for number in range(100_000)], "it is larger than 16 MiB"),
        (circle(), "it is nested more than 60 deep, or holds itself"),
        (torch.ones(2, 2).to_sparse(), "a tensor of layout torch.sparse_coo has no plain elements"),
    ],
)
def test_what_has_no_hash_says_why(value, reason):
    found = digest_of(value)
    assert found.value == "" and found.reason == reason


def test_a_value_whose_reading_fails_does_not_fail_the_cell():
    class Bad(dict[str, int]):
        def items(self) -> Any:
            raise RuntimeError("closed")

    assert digest_of(Bad()).reason == "reading it raised RuntimeError: closed"
