"""Waiting awake: for a moment a wait asks again and again, so that neither its thread nor its core falls asleep.

A small collective is a chain of threads that wake each other, and on cores that sleep in between it takes twice as long.

Knows time and cores. Does not know what is waited for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from workbench.cores import num_usable_cores

__all__ = ["Awake"]

_LIMIT_NS = 400_000
_PATIENCE = 3  # waits in a row that outlast the limit: somebody is late, or other programs want the cores
_REST = 32  # waits that are not tried then


class Awake:
    """One kind of wait of one process.

    Args:
        num_processes: that wait for each other; where they are more than the cores, who asks would keep another one from its work.

    Attributes:
        is_wanted: whether there are cores enough.
    """

    def __init__(self, num_processes: int) -> None:
        self.is_wanted = num_processes <= num_usable_cores()
        self._in_vain = 0
        self._rest = 0

    def wait(self, is_over: Callable[[], bool]) -> None:
        """Return when it is over, or after 0.4 ms at the latest, or at once; the caller goes on waiting in its own way."""
        if not self.is_wanted or self._rest:
            self._rest = max(0, self._rest - 1)
            return
        until_ns = time.monotonic_ns() + _LIMIT_NS
        while not is_over():
            os.sched_yield()  # whoever is to end the wait may need this core
            if time.monotonic_ns() > until_ns:
                self._in_vain += 1
                if self._in_vain >= _PATIENCE:
                    self._in_vain, self._rest = 0, _REST
                return
        self._in_vain = 0
