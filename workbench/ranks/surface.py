"""Where the output of a running cell is shown: a panel of the notebook, a terminal, or plain text.

    Panel      one output of the notebook's cell, replaced as a whole; at the end a static page (JupyterLab, Notebook, VS Code, nbclient)
    Terminal   lines as they come, rows that change (progress bars) redrawn below them
    Plain      lines as they come

Knows IPython's display and terminals. Does not know ranks but by their names.
"""

from __future__ import annotations

import shutil
import sys
from typing import Any, Protocol

from workbench.plan.selector import name_ranks
from workbench.ranks.page import IN_RESULT, page_of_stream, page_of_text
from workbench.ranks.progress import is_notebook
from workbench.ranks.result import CellResult, text_of_lines, text_of_values
from workbench.ranks.stream import MOST_HELD, Stream

__all__ = ["TICK_S", "Panel", "Plain", "Surface", "Terminal", "surface_here"]

TICK_S = 0.2  # between two looks at what came; lines that come within it are folded


class Surface(Protocol):
    """What shows one cell's output.

    Attributes:
        patience_s: a cell that is shorter is shown once, at its end.
    """

    patience_s: float

    def update(self, stream: Stream, status: str) -> None:
        """Show what has come; `status` is a line that says what is waited for."""
        ...

    def finish(self, stream: Stream, result: CellResult) -> None:
        """Show the rest, and the values of the last expression."""
        ...


class Plain:
    """Prints: once at the end, or line by line when the cell takes longer."""

    patience_s = 1.0

    def __init__(self) -> None:
        self._has_begun = False

    def update(self, stream: Stream, status: str) -> None:
        self._print(text_of_lines(stream.advance()))

    def finish(self, stream: Stream, result: CellResult) -> None:
        lines = stream.finish()
        if self._has_begun:
            self._print([*text_of_lines(lines), *text_of_values(result.folded_values())])
        else:
            self._print(str(result).splitlines())

    def _print(self, lines: list[str]) -> None:
        if lines:
            self._has_begun = True
            print(*lines, sep="\n", flush=True)


class Terminal(Plain):
    """As `Plain`, with rows below that are redrawn: progress bars of each rank, and what is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._num_rows = 0

    def update(self, stream: Stream, status: str) -> None:
        lines = text_of_lines(stream.advance())
        width, height = shutil.get_terminal_size()
        bars = [f"[{name_ranks((rank,))}] {row}" for rank, rows in stream.open_rows().items() for row in rows]
        rows = [row[: width - 1] for row in [*bars, status]][-max(1, height - 2) :]
        self._wipe()
        self._print(lines)
        print(*rows, sep="\n", flush=True)
        self._num_rows = len(rows)

    def finish(self, stream: Stream, result: CellResult) -> None:
        self._wipe()
        super().finish(stream, result)

    def _wipe(self) -> None:
        if self._num_rows:
            print(f"\x1b[{self._num_rows}A\x1b[J", end="")
        self._num_rows = 0


class Panel:
    """One output of the notebook's cell that is replaced while the cell runs, from any thread, and stays as a static page.

    Attributes:
        foot: a text to stand below the page in the end.
    """

    patience_s = 0.5

    def __init__(self) -> None:
        self.foot = ""
        self._handle: Any = None
        self._seen: Any = None
        self._shown = ("", "")  # HTML, text

    def update(self, stream: Stream, status: str) -> None:
        folded = stream.advance(most=MOST_HELD)
        bars = stream.open_rows()
        seen = (stream.num_lines, bars, status)
        if not folded and seen == self._seen:
            return
        self._seen = seen
        num_dropped = stream.num_lines - sum(len(one.ranks) for one in stream.recent)
        page = page_of_stream(stream.recent, bars, num_dropped=num_dropped, older=str(stream.file or ""), status=status)
        self._show(page, "\n".join([*text_of_lines([*stream.recent], is_cut=True), status]))

    def finish(self, stream: Stream, result: CellResult) -> None:
        stream.finish(most=1)
        older = str(stream.keep()) if result.is_cut else IN_RESULT
        stream.close()
        page, text = result.page(older), result.text(older)
        if self.foot:
            page += page_of_text(self.foot)
            text = f"{text}\n{self.foot}"
        if page or self._handle is not None:
            self._show(page, text)

    def repeat(self) -> None:
        """Show the same once more."""
        if self._handle is not None:
            self._show(*self._shown)

    def _show(self, page: str, text: str) -> None:
        from IPython.display import display

        self._shown = (page, text)
        bundle = {"text/html": page, "text/plain": text}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def surface_here() -> Surface:
    """The one that fits where this process prints."""
    if is_notebook():
        return Panel()
    return Terminal() if sys.stdout.isatty() else Plain()
