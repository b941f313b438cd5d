"""One line of the table, and what it has to reach."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Line", "Reach", "Verdict"]


class Verdict(StrEnum):
    REACHED = "reached"
    SHORT = "short"
    NOT_COMPARED = "not compared"  # the peer is not installed
    TOLD = ""  # nothing is to be reached


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """A limit on ours, or on ours / theirs.

    Attributes:
        limit: at most this, or with `is_least` at least this; a ratio, or in the line's unit where `is_ours`.
    """

    limit: float
    is_least: bool = False
    is_ours: bool = False

    def is_reached(self, value: float) -> bool:
        return value >= self.limit if self.is_least else value <= self.limit

    def text(self, unit: str) -> str:
        bound = ">=" if self.is_least else "<="
        return f"{bound} {_number(self.limit)} {unit}" if self.is_ours else f"{bound} {_number(self.limit)} x"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line.

    Attributes:
        ours, theirs: medians, in `unit`; theirs is None where there is nothing to compare with, or it is not installed.
        peer: what theirs is, or how to install it.
        reach: None where the line only informs.
    """

    what: str
    unit: str
    ours: float
    theirs: float | None = None
    peer: str = ""
    reach: Reach | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.theirs is None else self.ours / self.theirs

    @property
    def verdict(self) -> Verdict:
        if self.reach is None:
            return Verdict.TOLD
        value = self.ours if self.reach.is_ours else self.ratio
        if value is None:
            return Verdict.NOT_COMPARED
        return Verdict.REACHED if self.reach.is_reached(value) else Verdict.SHORT

    def cells(self) -> tuple[str, ...]:
        """What the table shows: what, ours, theirs, ratio, reach, verdict."""
        theirs = self.peer if self.theirs is None else f"{_number(self.theirs)} {self.unit}  {self.peer}"
        ratio = "" if self.ratio is None else f"{_number(self.ratio)} x"
        reach = "" if self.reach is None else self.reach.text(self.unit)
        return self.what, f"{_number(self.ours)} {self.unit}", theirs, ratio, reach, str(self.verdict)


def _number(value: float) -> str:
    """Three digits that count: 0.125, 1.5, 44.1, 8,120."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
