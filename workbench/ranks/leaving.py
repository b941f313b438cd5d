"""Waits inside gloo that can be left.

When a connection is closed, gloo tells those who wait for it, but for the message that is on its way: one in the middle of being sent or
received, or sent to a peer that has gone, before gloo saw that. Who waits for it waits until the group's own limit. A stop that shuts
connections therefore leaves such a wait behind, in a thread.

Knows torch's works. Does not know groups or the board.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]  # missing in torch's stubs

__all__ = ["SLICE", "Freed", "Helper", "Left", "StandIn", "aside", "outlast", "work_of"]

T = TypeVar("T")

_LOOK_S = 0.05
SLICE = timedelta(seconds=0.1)


class Freed(KeyboardInterrupt):
    """This rank was freed from a collective because its cell was stopped."""


class Left(Exception):
    """A wait was left.

    Attributes:
        made: what comes of it, some day.
    """

    def __init__(self, made: Future[Any]) -> None:
        super().__init__("a wait inside gloo was left")
        self.made = made


def aside(call: Callable[[], T], *, name: str, should_leave: Callable[[], bool]) -> T:
    """Make a call in a thread of its own, which can be left.

    Raises:
        Left: `should_leave`, asked again and again, said so first.
    """
    made: Future[T] = Future()
    threading.Thread(target=_make, args=(call, made), name=f"workbench-{name}", daemon=True).start()
    return _await(made, should_leave)


class Helper:
    """A thread that makes one call after another in place of the one that asks: a new one for each would cost as much as a message."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        threading.Thread(target=self._serve, name=f"workbench-{name}", daemon=True).start()

    def aside(self, call: Callable[[], T], *, should_leave: Callable[[], bool]) -> T:
        """As the function `aside`; once left, the helper is of no use any more."""
        made: Future[T] = Future()
        self._calls.put((call, made))
        return _await(made, should_leave)

    def _serve(self) -> None:
        while True:
            _make(*self._calls.get())


def _make(call: Callable[[], Any], made: Future[Any]) -> None:
    try:
        made.set_result(call())
    except BaseException as error:
        made.set_exception(error)


def _await(made: Future[T], should_leave: Callable[[], bool]) -> T:
    while not made.done():
        with suppress(TimeoutError):
            made.exception(_LOOK_S)  # waits, and raises nothing of the call's
        if not made.done() and should_leave():
            raise Left(made)
    return made.result()


def outlast(work: Any, wait: Callable[..., bool], *, should_leave: Callable[[], bool]) -> bool:
    """Wait until a collective has ended; unlike sends and receives it may be waited for more than once.

    Args:
        work: of torch.
        wait: `dist.Work.wait` as torch made it.

    Returns:
        False where `should_leave`, asked again and again, said so first.

    Raises:
        RuntimeError: the collective failed.
    """
    while True:
        try:
            wait(work, SLICE)
            return True
        except RuntimeError:
            pass  # looked into outside, so that an error has no other in its story
        if work.is_completed():  # its own error, or it ended just after the slice was over
            wait(work)
            return True
        if should_leave():
            return False


def work_of(future: torch.futures.Future[Any]) -> Any:
    """A work that ends with a future, boxed as the dispatcher takes it."""
    return _create_work_from_future(future).boxed()


class StandIn:
    """What C++ waits for in place of a collective of gloo's: it ends with that one, or when that one is given up.

    An error is told by its future alone, not by its `wait`.

    Attributes:
        boxed: for the dispatcher.
    """

    def __init__(self, work: Any) -> None:
        self._work = work
        self._end: torch.futures.Future[Any] = torch.futures.Future()
        self.boxed = work_of(self._end.then(_value_of))
        work.get_future().add_done_callback(self._take)

    def is_completed(self) -> bool:
        """Whether gloo's own has ended."""
        return bool(self._work.is_completed())

    def give_up(self, why: str) -> None:
        """Let C++ go with an error, if it waits still."""
        self._set(RuntimeError(why))

    def _take(self, ended: torch.futures.Future[Any]) -> None:
        try:
            self._set(ended.value())
        except Exception as error:
            self._set(error)

    def _set(self, value: Any) -> None:
        with suppress(RuntimeError):  # the other was first
            self._end.set_result(value)


def _value_of(end: torch.futures.Future[Any]) -> Any:
    value = end.value()
    if isinstance(value, Exception):
        raise value  # `set_exception` of torch's futures is seen by Python alone
    return value
