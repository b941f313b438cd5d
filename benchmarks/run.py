"""The command behind `workbench bench`: measure, print one table, keep it.

workbench bench [NAME ...] [--out FILE] [--quick]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks import cells, collectives, groups, launch, scatter, sleep, tokens
from benchmarks.line import Line

__all__ = ["MEASUREMENTS", "RESULTS", "heading", "main"]

RESULTS = Path(__file__).parent / "results"
_WIDTH = 160


class Result(Protocol):
    def lines(self) -> list[Line]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One measurement: how it is made, and with which arguments for a quick look."""

    measure: Callable[..., Result]
    quick: dict[str, Any]


MEASUREMENTS = {
    "launch": Measurement(measure=launch.measure, quick={"repeats": 1}),
    "cells": Measurement(measure=cells.measure, quick={"num_cells": 40}),
    "scatter": Measurement(measure=scatter.measure, quick={"repeats": 3}),
    "tokens": Measurement(measure=tokens.measure, quick={"repeats": 2, "num_samples": 4}),
    "sleep": Measurement(measure=sleep.measure, quick={"repeats": 2}),
    "collectives": Measurement(measure=collectives.measure, quick={"repeats": 1}),
    "groups": Measurement(measure=groups.measure, quick={"num_calls": 3, "sizes": (1 << 10, 1 << 20)}),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write it; 0 when every measurement ended, 1 when one failed."""
    from rich.console import Console

    options = _parse(argv)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    path = options.out or RESULTS / f"{time.strftime('%Y-%m-%d-%H%M', time.gmtime())}.txt"
    kept = Kept()
    for name in options.names or list(MEASUREMENTS):
        chosen = MEASUREMENTS[name]
        console.print(f"measuring {name} ...", highlight=False)
        try:
            kept.add(name, chosen.measure(**(chosen.quick if options.quick else {})))
        except Exception as error:
            kept.failures[name] = f"{type(error).__name__}: {error}"
            console.print(f"{name} failed: {kept.failures[name]}", markup=False, style="red")
        kept.write(path)  # each time: what was measured outlives an interrupt
    console.print(kept.text(), highlight=False, markup=False)
    console.print(f"kept in {path} and {path.with_suffix('.json')}", highlight=False, soft_wrap=True)
    return 1 if kept.failures else 0


class Kept:
    """What one run has measured so far."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.results: dict[str, Any] = {}
        self.failures: dict[str, str] = {}
        self.loads = [os.getloadavg()[0]]

    def add(self, name: str, result: Result) -> None:
        self.results[name] = asdict(result)  # type: ignore[call-overload]  # a protocol cannot say that it is a dataclass
        self.lines += result.lines()
        self.loads.append(os.getloadavg()[0])

    def text(self) -> str:
        return _text(self.lines, heading(self.loads))

    def write(self, path: Path) -> None:
        """The table as text, and every number in a JSON file beside it."""
        lines = [{**asdict(line), "ratio": line.ratio, "verdict": str(line.verdict)} for line in self.lines]
        record = {"heading": heading(self.loads), "lines": lines, "results": self.results, "failures": self.failures}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text() + "\n")
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="workbench bench", description="Speed and memory, beside what people use today.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASUREMENTS)}; none takes all")
    parser.add_argument("--out", type=Path, help="text file to write; its .json lies beside it")
    parser.add_argument("--quick", action="store_true", help="few repeats: a look, not a result")
    options = parser.parse_args(argv)
    for name in options.names:
        if name not in MEASUREMENTS:
            parser.error(f"no measurement {name!r}; there are {', '.join(MEASUREMENTS)}")
    return options


def heading(loads: Sequence[float]) -> str:
    """Date, machine and versions, a line each."""
    from workbench.environment import describe_environment

    found = describe_environment()
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    size = f"{machine['num_usable_cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB"
    return (
        f"{when}; {size}, {_processor()}, {machine['system']}\n{versions}\n"
        f"load of the machine before, between and after the measurements: {', '.join(f'{load:.1f}' for load in loads)} (1 minute)"
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


def _text(lines: Sequence[Line], heading: str) -> str:
    """The table as plain text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("what", "ours", "theirs", "ratio", "reach", ""):
        table.add_column(title, justify="right" if title in ("ours", "ratio", "reach") else "left")
    for line in lines:
        table.add_row(*line.cells())
    out = io.StringIO()
    console = Console(file=out, width=_WIDTH, color_system=None)
    console.print(heading, highlight=False, markup=False)
    console.print(table)
    return "\n".join(row.rstrip() for row in out.getvalue().splitlines())


if __name__ == "__main__":
    sys.exit(main())
