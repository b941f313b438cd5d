"""Waiting awake for a moment."""

from __future__ import annotations

import itertools
import time

import pytest

from workbench.ranks import awake
from workbench.ranks.awake import Awake


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Four cores, and a clock on which each look at it takes 10 us, so that a busy machine changes nothing."""
    found, ticks = set(range(4)), itertools.count(step=10_000)
    monkeypatch.setattr(awake, "num_usable_cores", lambda: len(found))
    monkeypatch.setattr(time, "monotonic_ns", lambda: next(ticks))
    return found


class Looks:
    """Counts how often it is asked; over after so many times."""

    def __init__(self, over_after: float) -> None:
        self.over_after = over_after
        self.count = 0

    def __call__(self) -> bool:
        self.count += 1
        return self.count > self.over_after


def test_a_wait_ends_with_what_it_waits_for(cores):
    looks = Looks(over_after=5)
    Awake(4).wait(looks)
    assert looks.count == 6


def test_a_wait_that_has_ended_is_looked_at_once(cores):
    looks = Looks(over_after=0)
    Awake(4).wait(looks)
    assert looks.count == 1


def test_nobody_looks_where_cores_are_fewer_than_processes(cores):
    looks = Looks(over_after=0)
    Awake(5).wait(looks)
    assert looks.count == 0


def test_a_long_wait_is_given_back_soon(cores):
    looks = Looks(over_after=float("inf"))
    Awake(2).wait(looks)
    assert looks.count == 41, "0.4 ms of looks"


def test_long_waits_in_a_row_are_left_alone_for_a_while(cores):
    awake, never = Awake(2), Looks(over_after=float("inf"))
    for _ in range(2):
        awake.wait(never)
    awake.wait(Looks(over_after=1))  # so those were not three in a row
    for _ in range(3):
        awake.wait(never)
    soon = [Looks(over_after=0) for _ in range(40)]
    for looks in soon:
        awake.wait(looks)
    assert [looks.count for looks in soon] == [0] * 32 + [1] * 8
