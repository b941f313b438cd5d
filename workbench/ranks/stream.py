"""Output of a cell's ranks while it runs: settled into lines, folded, the older ones of a flood kept in a file.

    take (conductor's thread) -> pieces -> advance (the thread that shows) -> folded lines, rows that still change, file

Knows text and one file. Does not know where it is shown.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from workbench.plan.folding import FoldedLine, fold_lines
from workbench.ranks.screen import Screen

__all__ = ["MOST_HELD", "Stream", "output_file"]

MOST_HELD = 200  # folded lines that a view which is replaced as a whole shows
_NUM_KEPT = 20  # files of older lines


class Stream:
    """What has come so far.

    Attributes:
        num_lines: lines of all ranks together.
        recent: the newest folded lines.
        file: where all lines are, None while everything is in sight.
    """

    def __init__(self, make_file: Callable[[], Path]) -> None:
        self.num_lines = 0
        self.recent: deque[FoldedLine] = deque(maxlen=MOST_HELD)
        self.file: Path | None = None
        self._make_file = make_file
        self._lock = threading.Lock()
        self._pieces: list[tuple[int, str, str]] = []
        self._screens: dict[tuple[int, str], Screen] = {}
        self._lines: list[tuple[int, str]] = []  # all of them, until there is a file
        self._writer: IO[str] | None = None

    def take(self, rank: int, name: str, text: str) -> None:
        """Keep a piece of output; called from the conductor's thread, which must not be held up."""
        with self._lock:
            self._pieces.append((rank, name, text))

    def advance(self, *, most: int | None = None) -> list[FoldedLine]:
        """Lines that were settled since the last call, equal ones of several ranks as one; of each rank the newest `most`."""
        with self._lock:
            pieces, self._pieces = self._pieces, []
        lines = [(rank, line) for rank, name, text in _joined(pieces) for line in self._screen(rank, name).feed(text)]
        return self._add(lines, most)

    def finish(self, *, most: int | None = None) -> list[FoldedLine]:
        """The last lines: also those without an end."""
        folded = self.advance(most=most)
        return folded + self._add([(rank, row) for rank, rows in self.open_rows().items() for row in rows], most)

    def open_rows(self) -> dict[int, list[str]]:
        """Rows that may still change, such as progress bars, of each rank that has any."""
        rows: dict[int, list[str]] = {}
        for (rank, _), screen in sorted(self._screens.items()):
            rows.setdefault(rank, []).extend(screen.open_rows)
        return {rank: found for rank, found in rows.items() if found}

    def _screen(self, rank: int, name: str) -> Screen:
        return self._screens.setdefault((rank, name), Screen())

    def _add(self, lines: Sequence[tuple[int, str]], most: int | None) -> list[FoldedLine]:
        self.num_lines += len(lines)
        by_rank: dict[int, list[str]] = {}
        for rank, line in lines:
            by_rank.setdefault(rank, []).append(line)
        folded = fold_lines({rank: mine[-most:] if most else mine for rank, mine in by_rank.items()})
        self.recent.extend(folded)
        if self._writer is not None:
            self._write(lines)
        else:
            self._lines += lines
            if self.num_lines > sum(len(one.ranks) for one in self.recent):  # some are out of sight
                self.keep()
        return folded

    def keep(self) -> Path:
        """Have all lines in the file, those to come too."""
        if self.file is None:
            self.file = self._make_file()
            self._writer = self.file.open("a", encoding="utf-8", errors="replace")
            self._write(self._lines)
            self._lines = []
        return self.file

    def _write(self, lines: Sequence[tuple[int, str]]) -> None:
        assert self._writer is not None
        self._writer.write("".join(f"[rank {rank}] {line}\n" for rank, line in lines))
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _joined(pieces: Sequence[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """Pieces of one rank's stream that follow each other as one; what a progress bar writes in parts is then read whole."""
    texts: dict[tuple[int, str], list[str]] = {}
    for rank, name, text in pieces:
        texts.setdefault((rank, name), []).append(text)
    return [(rank, name, "".join(parts)) for (rank, name), parts in texts.items()]


def output_file(folder: Path, name: str) -> Path:
    """A path for one cell's lines in a folder of the user's own that keeps the newest 20."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in sorted(folder.glob("*.txt"), key=_age)[: -_NUM_KEPT + 1 or None]:
        old.unlink(missing_ok=True)
    path = folder / f"{name}.txt"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    return path


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another driver prunes too
        return 0.0
