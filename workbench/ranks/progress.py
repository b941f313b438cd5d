"""One line that says what is waited for: overwritten on a terminal, shown and taken away in a notebook, silent elsewhere.

Knows where this process prints. Does not know what is waited for.
"""

from __future__ import annotations

import html
import sys
from types import TracebackType
from typing import Any

__all__ = ["Progress", "is_notebook"]


class Progress:
    """Use as a context; `show` replaces the line."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._is_shown = False

    def __enter__(self) -> Progress:
        return self

    def show(self, text: str) -> None:
        if is_notebook():
            from IPython.display import HTML, display

            page = HTML(f"<i>{html.escape(text)}</i>")
            if self._handle is None:
                self._handle = display(page, display_id=True)
            else:
                self._handle.update(page)
        elif sys.stderr.isatty():
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
            self._is_shown = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._handle is not None:
            from IPython.display import HTML

            self._handle.update(HTML(""))
        elif self._is_shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def is_notebook() -> bool:
    """Whether this process is a kernel, whose output goes to a page."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None and hasattr(module, "get_ipython") else None
    return shell is not None and getattr(shell, "kernel", None) is not None
