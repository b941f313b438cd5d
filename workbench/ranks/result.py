"""What a cell gave on each rank, and how it is shown: equal outputs once, with the ranks that they came from.

Knows outputs of one cell. Does not know how they were collected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from workbench.plan.folding import FoldedLine, FoldedValue, fold_lines, fold_values
from workbench.plan.selector import name_ranks
from workbench.ranks.page import IN_RESULT, LONGEST_LINE, cut_line, left_out, page_of_lines, page_of_ranks, page_of_values
from workbench.ranks.screen import settled_lines
from workbench.records import Shown

__all__ = ["CellResult", "RankOutput", "text_of_lines", "text_of_values"]

MOST_LINES = 1_000  # of all ranks together on a page
MOST_CHARACTERS = 300_000
_FEWEST_LINES = 10  # of a rank
_STREAMS = ("stdout", "stderr")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOutput:
    """What one rank gave in one cell.

    Attributes:
        stdout, stderr: Python's and native output.
        result_text: repr of the cell's last expression, "" where there is none.
        error: text of what it raised, None where it did not.
        seconds: how long it ran.
        shown: the last expression's value and open figures, where there is more to show than text.
    """

    rank: int
    stdout: str
    stderr: str
    result_text: str
    error: str | None
    seconds: float
    shown: tuple[Shown, ...] = ()

    @property
    def values(self) -> tuple[Shown, ...]:
        """All that it shows beside what it wrote."""
        has_result = any(one.text for one in self.shown)
        return self.shown if has_result or not self.result_text else (Shown(text=self.result_text), *self.shown)


class CellResult(Mapping[int, RankOutput]):
    """rank -> what it gave; equal outputs are shown once, differing numbers with how they differ."""

    def __init__(self, outputs: Mapping[int, RankOutput]) -> None:
        self._outputs = dict(sorted(outputs.items()))

    def __getitem__(self, rank: int) -> RankOutput:
        return self._outputs[rank]

    def __iter__(self) -> Iterator[int]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def folded(self) -> list[tuple[tuple[int, ...], str]]:
        """(ranks, text) of each distinct output, in order of the first rank that gave it; ranks that gave nothing are left out."""
        by_text: dict[str, list[int]] = {}
        for rank, output in self._outputs.items():
            text = "".join(
                part if part.endswith("\n") else part + "\n" for part in (output.stdout, output.stderr, output.result_text) if part
            )
            by_text.setdefault(text, []).append(rank)
        return [(tuple(ranks), text) for text, ranks in by_text.items() if text]

    def lines(self, stream: str) -> dict[int, tuple[str, ...]]:
        """Lines of "stdout" or "stderr" of each rank, progress bars as they stood in the end."""
        return {rank: settled_lines(getattr(output, stream)) for rank, output in self._outputs.items()}

    def folded_values(self) -> list[FoldedValue]:
        """Values of the last expression, then figures; equal ones once."""
        most = max((len(output.values) for output in self._outputs.values()), default=0)
        return [
            value
            for place in range(most)
            for value in fold_values({rank: output.values[place] for rank, output in self._outputs.items() if place < len(output.values)})
        ]

    @property
    def is_cut(self) -> bool:
        """Whether a page leaves something out: the older ones of many lines, the ends of long ones."""
        return any(left_out(self.lines(stream), self._most_lines(), "") for stream in _STREAMS)

    def _most_lines(self) -> int:
        """Of each rank and stream on a page, so that it stays small enough to be drawn at once."""
        written = [lines for stream in _STREAMS for lines in self.lines(stream).values()]
        most = MOST_LINES if sum(map(len, written)) <= MOST_LINES else max(_FEWEST_LINES, MOST_LINES // len(self._outputs))
        newest = [lines[-most:] for lines in written]
        size = sum(min(len(line), LONGEST_LINE) for lines in newest for line in lines)
        return most if size <= MOST_CHARACTERS else max(_FEWEST_LINES, max(map(len, newest)) * MOST_CHARACTERS // size)

    def __str__(self) -> str:
        """All of it in lines with the names of ranks."""
        written = [line for stream in _STREAMS for line in fold_lines(self.lines(stream))]
        return "\n".join([*text_of_lines(written), *text_of_values(self.folded_values())])

    def text(self, older: str = IN_RESULT) -> str:
        """What a page shows of it, in lines with the names of ranks; `older` says where the rest is."""
        most, told = self._most_lines(), []
        for by_rank in map(self.lines, _STREAMS):
            head = left_out(by_rank, most, older)
            newest = fold_lines({rank: lines[-most:] for rank, lines in by_rank.items()})
            told += [*([head] if head else []), *text_of_lines(newest, is_cut=True)]
        return "\n".join([*told, *text_of_values(self.folded_values())])

    def __repr__(self) -> str:
        return self.text() or f"<no output of {name_ranks(tuple(self._outputs))}>"

    def _repr_html_(self) -> str:
        return self.page() or f"<i>no output of {name_ranks(tuple(self._outputs))}</i>"

    def page(self, older: str = IN_RESULT) -> str:
        """All of it as HTML without scripts, "" where there is nothing; `older` says where the rest is."""
        most = self._most_lines()
        blocks = [page_of_lines(self.lines(stream), most=most, older=older, is_error=stream == "stderr") for stream in _STREAMS]
        blocks.append(page_of_values(self.folded_values()))
        shown = "".join(blocks)
        whole = {rank: _whole(output) for rank, output in self._outputs.items()}
        return shown + page_of_ranks(whole, most=most, older=older) if shown else ""


def _whole(output: RankOutput) -> tuple[str, ...]:
    return (*settled_lines(output.stdout), *settled_lines(output.stderr), *output.result_text.splitlines())


def text_of_lines(folded: list[FoldedLine], *, is_cut: bool = False) -> list[str]:
    """ "[ranks 0-1, 3] loss 0.25" and the like; with `is_cut` no more of long lines than their beginnings."""
    lines = [cut_line(one.line) if is_cut else one.line for one in folded]
    return [
        f"[{name_ranks(one.ranks)}] {line}" + (f"  <- {one.note}" if one.note else "") for one, line in zip(folded, lines, strict=True)
    ]


def text_of_values(folded: list[FoldedValue]) -> list[str]:
    """Values in lines with the ranks that showed them, summaries first; pictures only by name."""
    told = []
    for one in folded:
        text = one.shown.text or "a figure"
        lines = [one.shown.summary] if one.shown.summary and "\n" in text else []
        lines += text.splitlines()
        lines[-1] += f"  <- {one.note}" if one.note else ""
        told += [f"[{name_ranks(one.ranks)}] {line}" for line in lines]
    return told
