"""Waits that are left: for works that end, that fail, and that never end."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from workbench.ranks.leaving import Helper, Left, StandIn, aside, outlast, work_of


def work_and_end() -> tuple[Any, torch.futures.Future[Any]]:
    end: torch.futures.Future[Any] = torch.futures.Future()
    return dist.Work.unbox(work_of(end)), end


def fail(_: Any) -> None:
    raise ValueError("connection closed")


def test_what_stands_in_for_a_work_ends_with_it():
    work, end = work_and_end()
    stand_in = StandIn(work)
    waited = dist.Work.unbox(stand_in.boxed)
    assert not stand_in.is_completed() and not waited.is_completed()
    end.set_result([torch.ones(2)])
    assert waited.wait() and stand_in.is_completed() and waited.get_future().value()[0].tolist() == [1.0, 1.0]
    stand_in.give_up("too late")
    assert waited.wait()


def test_what_stands_in_for_a_work_fails_with_it():
    end: torch.futures.Future[Any] = torch.futures.Future()
    work = dist.Work.unbox(work_of(end.then(fail)))
    waited = dist.Work.unbox(StandIn(work).boxed)
    end.set_result(None)
    with pytest.raises(RuntimeError, match="connection closed"):
        waited.get_future().wait()


def test_a_work_that_never_ends_is_given_up():
    work, end = work_and_end()
    stand_in = StandIn(work)
    told: list[BaseException] = []

    def wait() -> None:
        try:
            dist.Work.unbox(stand_in.boxed).get_future().wait()
        except RuntimeError as error:
            told.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.05)
    stand_in.give_up("the cell was stopped")
    thread.join(5)
    assert len(told) == 1 and "the cell was stopped" in str(told[0]) and not stand_in.is_completed()
    end.set_result([])  # gloo's own error, much later


@pytest.mark.parametrize("make", [partial(aside, name="test"), Helper("test").aside])
def test_a_call_aside_gives_what_it_gives_raises_what_it_raises_and_can_be_left(make: Any):
    assert make(lambda: 3, should_leave=lambda: False) == 3
    with pytest.raises(TimeoutError, match="its own"):
        make(lambda: (_ for _ in ()).throw(TimeoutError("its own")), should_leave=lambda: False)
    goes_on = threading.Event()
    with pytest.raises(Left) as left:
        make(goes_on.wait, should_leave=lambda: True)
    goes_on.set()
    assert left.value.made.result(5) is True


def test_a_collective_is_waited_for_until_it_ends_or_is_to_be_left():
    work, end = work_and_end()
    slices: list[float] = []

    def wait(work: Any, limit: Any) -> bool:
        slices.append(limit.total_seconds())
        if len(slices) == 3:
            return True
        raise RuntimeError("the slice is over")

    assert outlast(work, wait, should_leave=lambda: False) and slices == [0.1] * 3
    asked: list[bool] = []

    def should_leave() -> bool:
        asked.append(True)
        return len(asked) == 3

    def wait_in_vain(work: Any, limit: Any) -> bool:
        raise RuntimeError("the slice is over")

    assert not outlast(work, wait_in_vain, should_leave=should_leave) and len(asked) == 3
    end.set_result([])


def test_an_error_of_the_collectives_own_is_raised_and_one_that_ends_with_its_slice_is_not_lost():
    work, end = work_and_end()
    end.set_result([])

    def wait(work: Any, *limit: Any) -> bool:
        if limit:
            raise RuntimeError("the slice is over")
        return True

    assert outlast(work, wait, should_leave=lambda: True)

    def fail(work: Any, *limit: Any) -> bool:
        raise RuntimeError("connection closed by peer")

    with pytest.raises(RuntimeError, match="closed by peer"):
        outlast(work, fail, should_leave=lambda: True)
