"""Which ranks a selector names ("all", "0,2-3", "tp=0", "dp=1,pp=0", an int, a list, a slice), and how ranks are named in a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NoReturn, Protocol

import numpy as np

__all__ = ["HasCoords", "Selector", "name_ranks", "select_ranks"]

Selector = int | str | slice | Sequence[int] | None


class HasCoords(Protocol):
    """What a selector by axis needs of a layout."""

    @property
    def axes(self) -> tuple[str, ...]: ...

    def index_in_group(self, rank: int, axis: str) -> int: ...


def select_ranks(selector: Selector, world_size: int, layout: HasCoords | None = None) -> tuple[int, ...]:
    """The ranks that a selector names, sorted, each once.

    Numbers and ranges stand side by side ("0,2-3" is ranks 0, 2 and 3); conditions on axes narrow each other ("dp=1,pp=0" is where both
    hold; "tp=0-1" allows a range). None is all ranks; a negative int counts from the end, as in a list.

    Raises:
        ValueError: the selector is malformed, names a rank or axis that is not there, or chooses nobody.
    """
    chosen = _chosen(selector, world_size, layout)
    if not chosen:
        _refuse(selector, world_size, "chooses no rank")
    return tuple(sorted(chosen))


def _chosen(selector: Any, world_size: int, layout: HasCoords | None) -> set[int]:
    if selector is None:
        return set(range(world_size))
    if isinstance(selector, str):
        return _named(selector, world_size, layout)
    if isinstance(selector, slice):
        try:
            return set(range(world_size)[selector])
        except (TypeError, ValueError) as error:
            _refuse(selector, world_size, str(error))
    if isinstance(selector, bool):
        _refuse(selector, world_size, "is a bool, not a rank")
    if isinstance(selector, Integral):
        return {_rank(int(selector), selector, world_size)}
    if isinstance(selector, Sequence | set | frozenset | np.ndarray) and not isinstance(selector, bytes):
        return _listed(selector, world_size)
    _refuse(selector, world_size, f"is a {type(selector).__name__}")


def _listed(selector: Any, world_size: int) -> set[int]:
    wrong = [item for item in selector if isinstance(item, bool) or not isinstance(item, Integral)]
    if wrong:
        _refuse(selector, world_size, f"holds {wrong[0]!r}, which is no rank")
    return {_rank(int(item), selector, world_size) for item in selector}


def _named(text: str, world_size: int, layout: HasCoords | None) -> set[int]:
    if text.strip() == "all":
        return set(range(world_size))
    terms = [term.strip() for term in text.split(",")]
    if any("=" in term for term in terms):
        return set.intersection(*[_where(term, text, world_size, layout) for term in terms])
    return set().union(*[_range(term, text, world_size, what="rank") for term in terms])


def _where(term: str, text: str, world_size: int, layout: HasCoords | None) -> set[int]:
    """The ranks where one condition "tp=0" holds."""
    axis, sign, value = (part.strip() for part in term.partition("="))
    if not sign:
        _refuse(text, world_size, f"mixes ranks and axes: {term!r} has no '='")
    if layout is None or axis not in layout.axes:
        there = "no layout is in use" if layout is None else f"the layout has axes {', '.join(layout.axes)}"
        _refuse(text, world_size, f"names axis {axis!r}, but {there}")
    places = {rank: layout.index_in_group(rank, axis) for rank in range(world_size)}
    allowed = _range(value, text, max(places.values()) + 1, what=f"{axis} index")
    return {rank for rank, place in places.items() if place in allowed}


def _range(term: str, text: str, limit: int, *, what: str) -> set[int]:
    """Numbers of "3" or "2-3", all below `limit`."""
    match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", term)
    if match is None:
        _refuse(text, limit, f"has {term!r}, which is no {what} and no range of them", what)
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        _refuse(text, limit, f"has the range {term!r}, which runs backwards", what)
    if last >= limit:
        _refuse(text, limit, f"names {what} {last}", what)
    return set(range(first, last + 1))


def _rank(number: int, selector: Any, world_size: int) -> int:
    if not -world_size <= number < world_size:
        _refuse(selector, world_size, f"names rank {number}")
    return number % world_size


def _refuse(selector: Any, limit: int, problem: str, what: str = "rank") -> NoReturn:
    raise ValueError(
        f"ranks={selector!r} {problem}\n{what}s run from 0 to {limit - 1}\n"
        'choose with an int, a list, a slice, "all", "0,2-3", or by axes of the layout in use: "tp=0", "dp=1,pp=0"'
    )


def name_ranks(ranks: Sequence[int]) -> str:
    """ "rank 2", "ranks 0-3", "ranks 0, 2-3"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(texts)
