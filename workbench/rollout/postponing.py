"""Interrupts that come in the middle of an engine's step wait for its end: the engine's books are whole only between two steps.

Knows signals of this process. Does not know engines.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["LIMIT_S", "interrupts_postponed"]

LIMIT_S = 0.5  # that an interrupt waits for a step; a stop is to take no longer than a second


@contextmanager
def interrupts_postponed(limit_s: float = LIMIT_S) -> Iterator[None]:
    """SIGINT is heard at the end of the block, after `limit_s`, or when it comes a second time; outside the main thread nothing changes."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    late: list[threading.Timer] = []

    def postpone(number: int, frame: FrameType | None) -> None:
        if late:
            late.pop().cancel()
            handler(number, frame)
            return
        late.append(threading.Timer(limit_s, signal.pthread_kill, args=(threading.main_thread().ident, number)))
        late[0].daemon = True
        late[0].start()

    signal.signal(signal.SIGINT, postpone)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if late:
            late.pop().cancel()
            handler(signal.SIGINT, None)
