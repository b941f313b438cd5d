"""What the user called, while one of our own operations makes its calls of torch: the name that a diagnosis and the ledger show.

    group.broadcast_object(x)  ->  operation "broadcast_object"  ->  its announcement, its payload   ->  one row of the ledger

Also where the interceptor of this process, if it has one, says what it carries beside gloo. Knows names and times. Does not know groups,
boards or torch's operators.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

__all__ = ["Announcing", "Called", "Carrier", "Row", "called_now", "carrier", "named", "named_as", "set_carrier"]

P = ParamSpec("P")
T = TypeVar("T")

_local = threading.local()


class Row(NamedTuple):
    """One call as the ledger keeps it; times in monotonic nanoseconds, `where` as the board packs it."""

    key: int
    sequence: int
    num_bytes: int
    started: int
    arrived: int
    ended: int
    where: int


@dataclass(slots=True)
class Called:
    """One operation in progress.

    Attributes:
        name: what the user called: "all_reduce".
        text: that and what its members agree on: "all_reduce(sum float32 [2])".
        is_announcing: the call of torch that comes now is its announcement, which the board carries.
        num_bytes: what this rank has given so far; of an announcement, what goes along with it.
    """

    name: str
    text: str
    is_announcing: bool = False
    num_bytes: int = 0
    _row: Row | None = None
    _note: Callable[[str, Row], None] | None = field(default=None, repr=False)

    def add(self, row: Row, note: Callable[[str, Row], None]) -> None:
        """Take in one call of torch that belongs to it: all make one row, with the wait before the first."""
        if self._row is None:
            self._row, self._note = row, note
        else:
            self._row = self._row._replace(ended=row.ended)
        if not self.is_announcing:
            self.num_bytes += row.num_bytes

    @property
    def shown(self) -> str:
        """Its text beside torch's own calls: an operation without a class of its own is a group's."""
        return self.text if "." in self.name else f"Group.{self.text}"

    def end(self) -> None:
        """Put its row in the ledger."""
        if self._row is not None and self._note is not None:
            self._note(self.name, self._row._replace(num_bytes=self.num_bytes))


def called_now() -> Called | None:
    """The operation that this thread is in."""
    return getattr(_local, "called", None)


class Announcing:  # no generator: it is entered in every operation
    """The call inside is the announcement of "all_reduce sum float32 [2]"; `num_bytes` go along with it."""

    __slots__ = ("_called", "_num_bytes", "_text")

    def __init__(self, text: str, num_bytes: int) -> None:
        self._text = text
        self._num_bytes = num_bytes
        self._called = called_now()

    def __enter__(self) -> None:
        if called := self._called:
            called.text, called.is_announcing = f"{called.name}({self._text.partition(' ')[2]})", True
            called.num_bytes += self._num_bytes

    def __exit__(self, *_: object) -> None:
        if self._called is not None:
            self._called.is_announcing = False


def named(operation: Callable[P, T]) -> Callable[P, T]:
    """Show the calls of torch inside under the operation's own name; the outermost operation gives the name."""
    return named_as(operation.__name__)(operation)


def named_as(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """The same under another name, one of `operations.LEDGER_NAMES`."""

    def decorate(operation: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(operation)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            if called_now() is not None:
                return operation(*args, **kwargs)
            _local.called = called = Called(name, f"{name}()")
            try:
                return operation(*args, **kwargs)
            finally:
                _local.called = None
                called.end()

        return wrapped

    return decorate


class Carrier(Protocol):
    """What carries bytes beside a process group's own connections, through memory that the ranks share.

    Attributes:
        is_checked: whether collectives are compared before they run.
    """

    is_checked: bool

    def carries(self, process_group: Any) -> bool:
        """Whether announcements of this group go over the board."""
        ...

    def exchange(self, process_group: Any, data: bytearray) -> Sequence[memoryview]:
        """What each member of such a group announces, as the process group orders them; `data` is this rank's."""
        ...

    def shares(self, process_group: Any) -> bool:
        """Whether large bytes may go beside gloo too: nobody records or spoils what this rank's calls of torch bring."""
        ...


class _Gloo:
    """A process without a board: everything goes through gloo."""

    is_checked = True

    def carries(self, process_group: Any) -> bool:
        return False

    def exchange(self, process_group: Any, data: bytearray) -> Sequence[memoryview]:
        raise AssertionError("asked to carry what it does not")

    def shares(self, process_group: Any) -> bool:
        return False


_carrier: Carrier = _Gloo()  # one process has one interceptor, or none


def carrier() -> Carrier:
    """What carries bytes in this process."""
    return _carrier


def set_carrier(chosen: Carrier) -> None:
    global _carrier
    _carrier = chosen
