"""Interrupts that come in the middle of what must be done whole wait for its end: a step of an engine, the start of a rank, a message.

Knows signals of this process. Does not know engines or ranks.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["LIMIT_S", "interrupts_postponed"]

LIMIT_S = 0.5  # that an interrupt waits for a step; a stop is to take no longer than a second


@contextmanager
def interrupts_postponed(limit_s: float = LIMIT_S) -> Iterator[None]:
    """SIGINT is heard at the end of the block, or `limit_s` after it came; outside the main thread nothing changes."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    heard_s: float | None = None
    late: threading.Timer | None = None
    is_over = False

    def postpone(number: int, frame: FrameType | None) -> None:
        nonlocal heard_s, late
        if heard_s is None:
            heard_s = time.monotonic()
            late = threading.Timer(limit_s, signal.pthread_kill, args=(threading.main_thread().ident, number))
            late.daemon = True
            late.start()
        elif not is_over and time.monotonic() - heard_s >= limit_s:
            heard_s = None
            handler(number, frame)

    signal.signal(signal.SIGINT, postpone)
    try:
        yield
    finally:
        is_over = True  # from here on nothing is raised until the handler is back
        if late is not None:
            late.cancel()
        signal.signal(signal.SIGINT, handler)
        if heard_s is not None:
            handler(signal.SIGINT, None)
