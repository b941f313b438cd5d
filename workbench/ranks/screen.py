"""Text as a terminal would show it: carriage returns, backspaces and cursor movements of progress bars carried out, colours dropped.

Knows one stream of text. Does not know whose it is.
"""

from __future__ import annotations

import re

__all__ = ["Screen", "settled_lines"]

_CONTROL = re.compile(r"(\n|\r|\x08|\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07)")
_PLAIN = re.compile(r"[^\r\x08\x1b]*\Z")
_MOST_OPEN_ROWS = 64  # bars below each other; a program that jumps further is no progress bar


class Screen:
    """Rows that may still change, and those above the cursor, which are done.

    "10 %\\r20 %" holds the row "20 %", and "\\n" settles it; a second bar below the first (tqdm's `position=1`) moves up to return to it.
    """

    def __init__(self) -> None:
        self._rows = [""]
        self._row = 0
        self._column = 0

    @property
    def open_rows(self) -> list[str]:
        """Rows that are not settled and not empty."""
        return [row.rstrip() for row in self._rows if row.strip()]

    def feed(self, text: str) -> list[str]:
        """Write text; the rows that it settled: all above the cursor, as it stands at the end."""
        if len(self._rows) == 1 and self._column == len(self._rows[0]) and _PLAIN.match(text):
            *lines, rest = (self._rows[0] + text).split("\n")
            self._rows, self._column = [rest], len(rest)
            return lines
        for part in _CONTROL.split(text):
            if part:
                self._put(part)
        settled, self._rows, self._row = self._rows[: self._row], self._rows[self._row :], 0
        return [row.rstrip() for row in settled]

    def _put(self, part: str) -> None:
        if part == "\n":
            self._row, self._column = self._row + 1, 0
            if self._row == len(self._rows):
                self._rows.append("")
        elif part == "\r":
            self._column = 0
        elif part == "\x08":
            self._column = max(0, self._column - 1)
        elif part[0] == "\x1b":
            self._move(part)
        else:
            row = self._rows[self._row].ljust(self._column)
            self._rows[self._row] = row[: self._column] + part + row[self._column + len(part) :]
            self._column += len(part)

    def _move(self, sequence: str) -> None:
        count = int(sequence[2:-1]) if sequence[2:-1].isdigit() else 0
        row = self._rows[self._row]
        if sequence[-1] == "A":
            self._row = max(0, self._row - max(1, count))
        elif sequence[-1] == "B":
            self._row = min(self._row + max(1, count), _MOST_OPEN_ROWS)
            self._rows += [""] * (self._row + 1 - len(self._rows))
        elif sequence[-1] == "K":
            self._rows[self._row] = {0: row[: self._column], 1: " " * self._column + row[self._column :]}.get(count, "")


def settled_lines(text: str) -> tuple[str, ...]:
    """All lines of a whole text, as they stand in the end."""
    screen = Screen()
    return (*screen.feed(text), *screen.open_rows)
