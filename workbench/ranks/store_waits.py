"""Waits for a store, as stateless groups make them, shown to the driver beside the waits in collectives.

Places of a stateless group are not ranks of the world, and some may belong to other worlds: each rank says which places are its own.
Knows the board, through this rank's interceptor; in a process that is no rank of a cluster it does nothing.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from workbench.ranks import current
from workbench.ranks.board import AreaState
from workbench.ranks.calls import KnownGroup, key_of, place_of, user_frame

__all__ = ["StoreWait", "announce_place"]

_SHOWN_AFTER_S = 0.05  # shorter waits are not worth the microseconds


def announce_place(port: int, place: int, name: str) -> None:
    """Tell the driver that this rank is `place` of the stateless group whose store is on `port`."""
    interceptor = _interceptor()
    if interceptor is not None:
        groups, key = interceptor.groups, _key(port, place)
        groups.announce(KnownGroup(key=key, name=name, ranks=(groups.rank,), generation=groups.generation, outlives_generations=True))


class StoreWait:
    """Use as a context around the polling; `tell` says whom it waits for, as often as it likes."""

    def __init__(self, op: str, port: int, number: int) -> None:
        self._op, self._port, self._number = op, port, number
        self._began_s = time.monotonic()
        self._shown = -1
        self._interceptor: Any = None

    def __enter__(self) -> StoreWait:
        return self

    def tell(self, place: int) -> None:
        """It waits for this place now."""
        if place == self._shown or time.monotonic() - self._began_s < _SHOWN_AFTER_S:
            return
        self._shown, self._interceptor = place, _interceptor()
        if self._interceptor is not None:
            line, text = place_of(user_frame(1)[0], f"{self._op}()")
            board, rank = self._interceptor.board, self._interceptor.rank
            board.show(rank, _key(self._port, place), self._number, AreaState.IN_STORE, text, line)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._interceptor is not None:
            self._interceptor.board.move(self._interceptor.rank, AreaState.NOWHERE)


def _key(port: int, place: int) -> int:
    return key_of(f"store {port} {place}")


def _interceptor() -> Any:
    here = current._here  # not current(), which would attach to a launcher's environment
    return None if here is None or here.process is None else here.process.interceptor
