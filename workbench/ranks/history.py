"""What was done with a cluster since its launch, kept by the driver while it happens: the entries of a session.

Functions with their arguments and pushed names are kept as pickles, equal ones once; what is too large is named, not kept. Knows cells.
Does not know files, nor how to run anything again.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from workbench.errors import RankInterrupted
from workbench.ranks.channel import Packed, pack, unpack
from workbench.ranks.digest import Digest, digest_of
from workbench.ranks.handle import ActiveCell
from workbench.ranks.messages import Task
from workbench.ranks.session import Entry, Output

if TYPE_CHECKING:
    from workbench.ranks.cluster import Cluster

__all__ = ["History", "Made", "Told", "as_one_call", "plain"]

_MOST_OUTPUTS = 100_000  # of one rank in one cell; about 50 MB
_MOST_SHOWN_BYTES = 1 << 24
_LARGEST_VALUE = 1 << 24
_MOST_VALUE_BYTES = 1 << 27
_LARGEST_SHOWN = 1 << 12  # a result of at most so many bytes is kept as text, too
_LONGEST_TEXT = 400
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Stands for what entry `number` gave, such as an engine, in the arguments of a later call."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a session compares of what a call gave.

    Attributes:
        content: what is hashed; None takes the text.
        reason: why it is compared by its text only, "" where it is hashed.
    """

    text: str
    content: Any = None
    reason: str = ""


class History:
    """The entries so far; what is done from several threads stands in the order in which it began."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.values: dict[str, Packed] = {}
        self.num_left_out = 0
        self._num_bytes = 0
        self._num_shown_bytes = 0
        self._num_outputs = 0
        self._place: dict[int, int] = {}  # number of a cell that runs -> its place in entries
        self._shown: dict[tuple[int, int], Packed] = {}  # (place, rank) -> a small result
        self._lock = threading.Lock()  # over additions
        self._within = threading.local()  # .calls: how many this thread is in that stand for their cells
        self._made: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def add(self, number: int, task: str, text: str, ranks: Sequence[int], value: Packed | None, timeout_s: float | None = None) -> None:
        """A cell begins."""
        place = self._add(Entry(number=number, task=str(task), text=text, ranks=tuple(ranks), timeout_s=timeout_s), value)
        if place is not None:
            self._place[number] = place

    def _add(self, entry: Entry, value: Packed | None) -> int | None:
        """The entry's place; None where it does not get one."""
        if entry.task == Task.HOUSE or self._is_within_call:
            return None
        with self._lock:
            if self._num_outputs >= _MOST_OUTPUTS:
                self.num_left_out += 1
                return None
            self._num_outputs += max(1, len(entry.ranks))
            key, unkept = self._keep(value)
            self.entries.append(replace(entry, value=key, unkept=entry.unkept or unkept))
            return len(self.entries) - 1

    @property
    def _is_within_call(self) -> bool:
        return getattr(self._within, "calls", 0) > 0

    def event(self, what: str, rank: int | None = None, value: Any = None) -> None:
        """Something else was done to the cluster."""
        self.add(-1 - len(self.entries), what, "", () if rank is None else (rank,), None if value is None else pack(value))

    def ended(self, cell: ActiveCell) -> None:
        """A cell has ended on all ranks."""
        place = self._place.pop(cell.number, None)
        if place is None:
            return
        outputs = tuple(self._output(place, cell, rank) for rank in cell.members)
        seconds = time.monotonic() - cell.started_s
        self.entries[place] = replace(self.entries[place], stop=cell.stop_reason or "", seconds=round(seconds, 3), outputs=outputs)

    def told(self) -> tuple[Entry, ...]:
        """The entries, with small results as text."""
        return tuple(self._with_text(place, entry) for place, entry in enumerate(self.entries))

    @contextmanager
    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[list[Any]]:
        """A call of the driver's that runs cells itself stands for them; the caller appends what it gave."""
        with self._entry("driver", function.__qualname__, lambda: (function, self._refer(args), self._refer(kwargs))) as given:
            self._within.calls = getattr(self._within, "calls", 0) + 1
            try:
                yield given
            finally:
                self._within.calls -= 1

    @contextmanager
    def method(self, made: Any, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[list[Any]]:
        """A call on what an earlier entry made; its text ends with the method's name. The caller appends what it gave."""
        with self._entry("method", text, lambda: (self._refer_to(made), args, kwargs)) as given:
            yield given

    @contextmanager
    def _entry(self, task: str, text: str, value: Callable[[], Any]) -> Iterator[list[Any]]:
        """An entry of the driver's own, with how it ended."""
        place = self._begin(task, text, value)
        given: list[Any] = []
        started, output, stop = time.monotonic(), Output(rank=-1, outcome="ok"), ""
        try:
            yield given
        except BaseException as error:
            stop = "interrupt" if isinstance(error, (KeyboardInterrupt, RankInterrupted)) else ""
            output = Output(rank=-1, outcome="raised", text=_cut(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
            raise
        finally:
            if place is not None:
                if given:
                    output = _output_of(given[0])
                    self._remember(given[0], place)
                seconds = round(time.monotonic() - started, 3)
                self.entries[place] = replace(self.entries[place], stop=stop, seconds=seconds, outputs=(output,))

    def _begin(self, task: str, text: str, value: Callable[[], Any]) -> int | None:
        """Place of a new entry of the driver's; None where it does not get one."""
        if self._is_within_call:
            return None
        packed, unkept = None, ""
        try:
            packed = pack(value())
        except Exception as error:  # pickle raises whatever the value's own hooks raise
            unkept = str(error).partition("\n")[0]
        return self._add(Entry(number=-1 - len(self.entries), task=task, text=text, unkept=unkept), packed)

    def _remember(self, value: Any, place: int) -> None:
        try:
            self._made[value] = place
        except TypeError:  # numbers, lists and the like cannot be referred to; they travel by value
            return

    def _refer(self, value: Any) -> Any:
        """Arguments with what earlier entries made replaced by a reference."""
        if isinstance(value, tuple):
            return tuple(self._refer(item) for item in value)
        if isinstance(value, dict):
            return {key: self._refer(item) for key, item in value.items()}
        try:
            place = self._made.get(value)
        except TypeError:
            return value
        return value if place is None else Made(number=place)

    def _refer_to(self, made: Any) -> Made:
        place = self._made.get(made)
        if place is None:
            raise LookupError(f"the session does not hold how {made!r} was made")
        return Made(number=place)

    def _keep(self, value: Packed | None) -> tuple[str, str]:
        """Key of a kept pickle, or why it was not kept."""
        if value is None:
            return "", ""
        if value.num_bytes > _LARGEST_VALUE or self._num_bytes + value.num_bytes > _MOST_VALUE_BYTES:
            return "", f"{value.num_bytes >> 20} MiB are more than a session keeps"
        digest = hashlib.sha256(value.data)
        for buffer in value.buffers:
            digest.update(buffer)
        key = digest.hexdigest()[:32]
        if key not in self.values:
            self._num_bytes += value.num_bytes
            self.values[key] = Packed(bytes(value.data), tuple(bytearray(buffer) for buffer in value.buffers))
        return key, ""

    def _output(self, place: int, cell: ActiveCell, rank: int) -> Output:
        done = cell.done.get(rank)
        said = cell.stdout.get(rank, "")
        if done is None:
            return Output(rank=rank, outcome="died", text=_cut(str(cell.deaths.get(rank, "")).partition("\n")[0]))
        packed = cell.values.get(rank)
        if cell.task in (Task.CALL, Task.PULL) and packed is not None and packed.num_bytes <= _LARGEST_SHOWN:
            self._num_shown_bytes += packed.num_bytes
            if self._num_shown_bytes <= _MOST_SHOWN_BYTES:
                self._shown[place, rank] = packed
        error = done.error
        return Output(
            rank=rank,
            outcome=str(done.outcome),
            text=_cut(f"{error.kind}: {error.message}" if error else done.result_text),
            digest=done.digest.value,
            reason=done.digest.reason,
            stdout=_cut(said),
            stdout_digest=hashlib.sha256(plain(said).encode()).hexdigest()[:16] if said else "",
        )

    def _with_text(self, place: int, entry: Entry) -> Entry:
        outputs = []
        for output in entry.outputs:
            packed = self._shown.get((place, output.rank))
            outputs.append(output if packed is None else replace(output, text=_cut(_repr(packed))))
        return replace(entry, outputs=tuple(outputs))


def as_one_call(function: F) -> F:
    """Have a session hold a call of this function as one entry: it is reproduced by calling it again, not by its cells."""

    @functools.wraps(function)
    def recorded(cluster: Cluster, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(cluster, "history"):
            seen = f"{function.__name__} takes a cluster first, not {type(cluster).__name__}: {cluster!r}"
            raise TypeError(f"{seen}; cluster = wb.launch(4) is one")
        with cluster.history.call(recorded, args, kwargs) as given:
            given.append(function(cluster, *args, **kwargs))
        return given[0]

    return cast(F, recorded)


def plain(text: str) -> str:
    """Text without the addresses of objects, which differ from process to process."""
    return _ADDRESS.sub("0x", text)


def _output_of(given: Any) -> Output:
    told = given if isinstance(given, Told) else Told(text=repr(given), content=given)
    found = Digest(reason=told.reason) if told.reason else digest_of(told.text if told.content is None else told.content)
    return Output(rank=-1, outcome="ok", text=_cut(told.text), digest=found.value, reason=found.reason)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}... ({len(text):,} characters)"


def _repr(packed: Packed) -> str:
    try:
        return repr(unpack(packed))
    except Exception as error:  # the class is not here, or its repr fails
        return f"<{type(error).__name__}: {error}>"
