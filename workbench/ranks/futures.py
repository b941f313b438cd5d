"""Futures of asynchronous collectives: who waits for one waits for its collectives first, and so where a stop reaches.

    work.get_future()                            ->  waits for that work
    future.then(...), torch.futures.collect_all  ->  waits for the works of the futures that it comes from
    future.wait(), torch.futures.wait_all        ->  Work.wait of each of them, then torch's own wait

C++ that waits for a future itself, as DDP's reducer does for that of a communication hook, passes none of this.

Knows works and futures of torch. Does not know groups, boards or who watches them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Futures"]

Future = torch._C.Future


class Futures:
    """Which works a future waits for, as long as anybody holds it.

    Args:
        is_watched: whether somebody wants to see the wait for this work; the futures of others are left alone.
    """

    def __init__(self, is_watched: Callable[[dist.Work], bool]) -> None:
        self._is_watched = is_watched
        self._works: weakref.WeakKeyDictionary[Any, tuple[dist.Work, ...]] = weakref.WeakKeyDictionary()

    def install(self) -> None:
        """Take over how futures of works come to be and are waited for, in this process and for good."""
        for owner, name, wrap in (
            (dist.Work, "get_future", self._of_work),
            (Future, "then", self._following),
            (Future, "wait", self._waiting),
            (torch._C, "_collect_all", self._of_all),
        ):
            setattr(owner, name, wrap(getattr(owner, name)))

    def _keep(self, future: Any, works: tuple[dist.Work, ...]) -> Any:
        if works:
            self._works[future] = works
        return future

    def _of_work(self, get: Callable[[Any], Any]) -> Callable[..., Any]:
        @functools.wraps(get)
        def get_future(work: Any) -> Any:
            return self._keep(get(work), (work,) if self._is_watched(work) else ())

        return get_future

    def _following(self, follow: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(follow)
        def then(future: Any, *args: Any, **kwargs: Any) -> Any:
            return self._keep(follow(future, *args, **kwargs), self._works.get(future, ()))

        return then

    def _of_all(self, collect: Callable[[Any], Any]) -> Callable[..., Any]:
        @functools.wraps(collect)
        def collect_all(futures: Any) -> Any:
            return self._keep(collect(futures), tuple(work for future in futures for work in self._works.get(future, ())))

        return collect_all

    def _waiting(self, wait: Callable[[Any], Any]) -> Callable[..., Any]:
        @functools.wraps(wait)
        def wrapped(future: Any) -> Any:
            for work in self._works.pop(future, ()):
                with suppress(RuntimeError):  # the backend's; the future tells it, or a callback has dealt with it
                    work.wait()
            return wait(future)

        return wrapped
