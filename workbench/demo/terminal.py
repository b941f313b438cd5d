"""The demonstration in a terminal: each section as it comes, then all of them as one HTML file."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from workbench.demo.story import story
from workbench.errors import WorkbenchError
from workbench.view.report import Section, write_report

__all__ = ["main", "show"]

_PIPED_WIDTH = 120
_LONG = 30


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration: `workbench demo [--out report.html]`."""
    parser = argparse.ArgumentParser(prog="workbench demo", description="A real rollout over 4 ranks, with tables and a report.")
    parser.add_argument("--out", type=Path, default=Path("workbench-report.html"), help="the report to write (default: %(default)s)")
    options = parser.parse_args(argv)
    _check_target(options.out)
    console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)
    started = time.monotonic()
    sections = []
    for section in story(lambda text: console.print(Text(f"  {text} ...", style="dim"))):
        show(console, section)
        sections.append(section)
    console.print(f"\nAll of it took {time.monotonic() - started:.0f} s. The same as a page, with the figures:")
    console.print(str(write_report(options.out, "Workbench: a rollout end to end", sections)), soft_wrap=True)
    return 0


def show(console: Console, section: Section) -> None:
    """Print one section; of figures only that they are in the report."""
    console.print()
    console.rule(Text(section.heading.strip(), style="bold"), align="left")
    console.print(Text(section.text))
    if section.table is not None:
        console.print(Padding(_table(section.table), (1, 0, 0, 2), expand=False))
    if section.output:
        console.print(Padding(Text(section.output, style="cyan"), (1, 0, 0, 2), expand=False))
    if section.figures:
        console.print(Text(f"\n  {len(section.figures)} figures: in the report", style="dim"))
    console.print()


def _table(frame: pd.DataFrame) -> Table:
    """Columns as wide as they need; where the terminal is too narrow, those over `_LONG` letters go on in further lines."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for name in frame:
        width = max(len(str(value)) for value in [name, *frame[name]])
        justify: Literal["left", "right"] = "right" if frame[name].dtype.kind in "if" else "left"
        table.add_column(str(name), justify=justify, no_wrap=width <= _LONG, overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    return table


def _cell(value: object) -> Text:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return Text(text, style="yellow" if ": " in text else "red" if text == "DIFFERS" else "")


def _check_target(path: Path) -> None:
    """Refuse before a minute is spent what could not be written after it."""
    folder = path.expanduser().absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "it is a folder" if path.is_dir() else "its folder is not there" if not folder.is_dir() else "its folder cannot be written"
        raise WorkbenchError(f"the report cannot be written to {path}: {why}\nname a file in a folder that exists: --out FILE.html")
