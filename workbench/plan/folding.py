"""Outputs of several ranks as one: equal lines once, with the ranks that wrote them, and how differing numbers differ.

    lines per rank -> which lines all ranks share -> between those, equal stretches as one -> numbers compared with what most wrote

Knows text and arrays. Does not know ranks' processes, nor how a page or a terminal shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from workbench.plan.selector import name_ranks
from workbench.records import Shown

__all__ = ["FoldedLine", "FoldedValue", "fold_lines", "fold_values"]

Lines = tuple[str, ...]
Ranks = tuple[int, ...]

_MOST_ALIGNED = 500  # lines a rank: aligning takes up to the square of it
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|nan|inf)(?![\w])")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedLine:
    """A line that some ranks wrote.

    Attributes:
        note: how its numbers differ from what most ranks wrote, "" where they do not.
        marks: where those numbers stand in the line: (first, behind) characters.
    """

    ranks: Ranks
    line: str
    note: str = ""
    marks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedValue:
    """A value that some ranks showed; `note` says how it differs from what most showed."""

    ranks: Ranks
    shown: Shown
    note: str = ""


def fold_lines(by_rank: Mapping[int, Sequence[str]]) -> list[FoldedLine]:
    """Lines of all ranks in an order that is right for each of them; a rank that wrote nothing does not appear.

    Ranks 0 and 1 wrote "a", "loss 1.0", rank 2 "a", "loss 1.5": [0, 1, 2] "a"; [0, 1] "loss 1.0"; [2] "loss 1.5", noted +5.0e-01 (+50 %).
    """
    distinct = _group({rank: tuple(lines) for rank, lines in by_rank.items() if lines})
    if not distinct:
        return []
    folded: list[FoldedLine] = []
    everybody = tuple(sorted(rank for ranks, _ in distinct for rank in ranks))
    begins = [0] * len(distinct)
    for ends in [*_shared([lines for _, lines in distinct]), tuple(len(lines) for _, lines in distinct)]:
        stretch: dict[int, Lines] = {}
        for (ranks, lines), begin, end in zip(distinct, begins, ends, strict=True):
            stretch.update(dict.fromkeys(ranks, lines[begin:end]))
        folded += _fold_stretch(stretch)
        if ends[0] < len(distinct[0][1]):
            folded.append(FoldedLine(ranks=everybody, line=distinct[0][1][ends[0]]))
        begins = [end + 1 for end in ends]
    return folded


def _group(by_rank: Mapping[int, Any]) -> list[tuple[Ranks, Any]]:
    """(ranks, what they have in common) of each distinct value, by first rank."""
    groups: dict[Any, list[int]] = {}
    for rank, value in sorted(by_rank.items()):
        groups.setdefault(value, []).append(rank)
    return [(tuple(ranks), value) for value, ranks in groups.items()]


def _shared(texts: Sequence[Lines]) -> Iterator[tuple[int, ...]]:
    """Where lines stand that all texts have in the same order: an index into each text."""
    first, others = texts[0], texts[1:]
    if not others:
        return ((index,) for index in range(len(first)))
    matches = [_matches(first, other) for other in others]
    return ((index, *(match[index] for match in matches)) for index in range(len(first)) if all(index in match for match in matches))


def _matches(left: Lines, right: Lines) -> dict[int, int]:
    """Index of a line on the left -> index of the equal line on the right."""
    shortest = min(len(left), len(right))
    head = next((i for i in range(shortest) if left[i] != right[i]), shortest)
    tail = next((i for i in range(shortest - head) if left[-1 - i] != right[-1 - i]), shortest - head)
    found = {i: i for i in range(head)}
    if max(len(left), len(right)) - head - tail <= _MOST_ALIGNED:
        middle = SequenceMatcher(None, left[head : len(left) - tail], right[head : len(right) - tail], autojunk=False)
        for block in middle.get_matching_blocks():
            found.update({head + block.a + i: head + block.b + i for i in range(block.size)})
    found.update({len(left) - 1 - i: len(right) - 1 - i for i in range(tail)})
    return found


def _fold_stretch(stretch: Mapping[int, Lines]) -> list[FoldedLine]:
    """Lines between two that all ranks share: equal stretches as one, numbers against the stretch that most ranks have."""
    groups = _group({rank: lines for rank, lines in stretch.items() if lines})
    if not groups:
        return []
    usual_ranks, usual = _usual(groups)
    is_majority = 2 * len(usual_ranks) > len(stretch)
    folded = []
    for ranks, lines in groups:
        for index, line in enumerate(lines):
            has_peer = lines is not usual and len(lines) == len(usual)
            note, marks = _compare_lines(line, usual[index], is_majority) if has_peer else ("", ())
            against = f"{note} against {name_ranks(usual_ranks)}" if note else ""
            folded.append(FoldedLine(ranks=ranks, line=line, note=against, marks=marks))
    return folded


def _usual(groups: Sequence[tuple[Ranks, Any]]) -> tuple[Ranks, Any]:
    """What most ranks have; among equals the one of the lowest rank."""
    return max(groups, key=lambda group: (len(group[0]), -group[0][0]))


def _compare_lines(line: str, usual: str, is_majority: bool) -> tuple[str, tuple[tuple[int, int], ...]]:
    """How the numbers of a line differ from the usual line, if only numbers do.

    Whole numbers that differ on every rank (ranks, pids, sizes) tell nothing and are left alone.
    """
    if _NUMBER.sub("#", line) != _NUMBER.sub("#", usual):
        return "", ()
    pairs = [
        (mine, theirs[0])
        for mine, theirs in zip(_NUMBER.finditer(line), _NUMBER.finditer(usual), strict=True)
        if mine[0] != theirs[0] and (is_majority or not _is_whole(mine[0], theirs[0]))
    ]
    notes = [_difference(mine[0], theirs) for mine, theirs in pairs]
    if not notes:
        return "", ()
    sizes = [abs(float(mine[0]) - float(theirs)) for mine, theirs in pairs]
    largest = notes[int(np.argmax(np.nan_to_num(sizes, nan=np.inf)))]
    note = largest if len(notes) == 1 else f"{len(notes)} numbers differ, most by {largest}"
    return note, tuple(mine.span() for mine, _ in pairs)


def _is_whole(*texts: str) -> bool:
    return all(text.lstrip("+-").isdigit() for text in texts)


def _difference(text: str, usual: str) -> str:
    """ "+2", "+2.5e-01 (+100 %)", or both where there is no difference to tell (nan, inf)."""
    value, other = float(text), float(usual)
    if not np.isfinite(value) or not np.isfinite(other):
        return f"{text} for {usual}"
    if _is_whole(text, usual):
        return f"{int(text) - int(usual):+d}"
    share = f" ({100 * (value - other) / abs(other):+.3g} %)" if other else ""
    return f"{value - other:+.1e}{share}"


def fold_values(by_rank: Mapping[int, Shown]) -> list[FoldedValue]:
    """Values of ranks, equal ones as one; others with how they differ from what most ranks show.

    Tensors and arrays are compared by their numbers, also where their texts are equal.
    """
    by_identity: dict[Any, list[int]] = {}
    for rank, shown in sorted(by_rank.items()):
        by_identity.setdefault(shown.identity, []).append(rank)
    groups = [(tuple(ranks), by_rank[ranks[0]]) for ranks in by_identity.values()]
    if not groups:
        return []
    usual_ranks, usual = _usual(groups)
    is_majority = 2 * len(usual_ranks) > len(by_rank)
    folded = []
    for ranks, shown in groups:
        note = "" if shown is usual else _compare_values(shown, usual, is_majority)
        folded.append(FoldedValue(ranks=ranks, shown=shown, note=f"{note} against {name_ranks(usual_ranks)}" if note else ""))
    return folded


def _compare_values(shown: Shown, usual: Shown, is_majority: bool) -> str:
    if shown.numbers is None or usual.numbers is None:
        single = "\n" not in shown.text + usual.text
        return _compare_lines(shown.text, usual.text, is_majority)[0] if single else ""
    if shown.dtype != usual.dtype:
        return f"{shown.dtype} for {usual.dtype}"
    if shown.shape != usual.shape:
        return f"shape {list(shown.shape)} for {list(usual.shape)}"
    if not shown.shape:
        kind = shown.numbers.dtype.kind
        is_label = kind == "b" or (not is_majority and kind in "iu")
        return "" if is_label else _difference(_exact(shown.numbers[0]), _exact(usual.numbers[0]))
    return _compare_arrays(shown, usual)


def _exact(value: Any) -> str:
    return str(int(value)) if isinstance(value, (np.integer, np.bool_)) else repr(float(value))


def _compare_arrays(shown: Shown, usual: Shown) -> str:
    """First differing index, how many differ, and the largest difference with its index."""
    assert shown.numbers is not None and usual.numbers is not None
    mine, theirs = shown.numbers.astype(np.float64), usual.numbers.astype(np.float64)
    differ = (mine != theirs) & ~(np.isnan(mine) & np.isnan(theirs))
    size = int(np.prod(shown.shape))
    if not differ.any():
        return f"differs behind the first {mine.size:,} of {size:,} values"
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.where(differ, np.nan_to_num(np.abs(mine - theirs), nan=np.inf, posinf=np.inf), 0.0)
    first, largest = int(np.argmax(differ)), int(np.argmax(gaps))
    seen = f"{int(differ.sum()):,} of {mine.size:,} values differ" + (f" (of the first {mine.size:,})" if mine.size < size else "")
    return (
        f"{seen}: first at {_index(first, shown.shape)}, {mine[first]:g} for {theirs[first]:g}; "
        f"largest difference {gaps[largest]:.3g} at {_index(largest, shown.shape)}"
    )


def _index(flat: int, shape: tuple[int, ...]) -> list[int]:
    return [int(i) for i in np.unravel_index(flat, shape)]
