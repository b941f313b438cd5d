"""Pages over records: the HTML face of a run in a notebook, and a report that is one file with everything in it."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes

from workbench.view.lengths import plot_lengths
from workbench.view.memory import plot_memory
from workbench.view.style import SMALL_SIZE, img_tag
from workbench.view.timeline import plot_timeline

if TYPE_CHECKING:
    import pandas as pd

    from workbench.run import Run

__all__ = ["Section", "run_html", "sleep_words", "write_report"]

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of a report: a heading, then text, table, program output and figures, each if given.

    Attributes:
        text: plain text; blank lines part paragraphs.
        output: text shown as a terminal shows it.
        figures: axes whose whole figure is embedded as a picture with alt text.
    """

    heading: str
    text: str = ""
    table: pd.DataFrame | None = None
    output: str = ""
    figures: Sequence[Axes] = ()


def write_report(path: str | os.PathLike[str], title: str, sections: Iterable[Section]) -> Path:
    """Write one HTML file with all pictures in it, for light and dark screens and for paper; returns its absolute path."""
    body = "\n".join(_section_html(section) for section in sections)
    escaped = html.escape(title)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escaped}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_CSS}</style>\n</head>\n'
        f"<body>\n<h1>{escaped}</h1>\n{body}\n</body>\n</html>\n"
    )
    target = Path(path).expanduser().absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def _section_html(section: Section) -> str:
    parts = [f"<section>\n<h2>{html.escape(section.heading)}</h2>"]
    parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text.split("\n\n") if paragraph.strip()]
    if section.table is not None:
        parts.append(f'<div class="table">{_table_html(section.table)}</div>')
    if section.output:
        parts.append(f"<pre>{html.escape(section.output)}</pre>")
    if section.figures:
        parts.append('<div class="figures">' + "".join(img_tag(ax) for ax in section.figures) + "</div>")
    return "\n".join([*parts, "</section>"])


def _table_html(table: pd.DataFrame) -> str:
    text: str = table.to_html(index=False, border=0, escape=True, na_rep="", float_format=lambda value: f"{value:.4g}")
    return text


def run_html(run: Run) -> str:
    """A run as a notebook shows it: counts, the sleeps, three small figures."""
    figures = [plot(run, size=SMALL_SIZE) for plot in (plot_lengths, plot_timeline, plot_memory)]
    sleeps = run.sleep_report
    slept = _table_html(sleep_words(sleeps.tail(5))) if len(sleeps) else "<p>The engine did not sleep.</p>"
    pictures = "".join(img_tag(ax) for ax in figures)
    return f'<div>{_facts_html(run)}{slept}<div style="display:flex;flex-wrap:wrap;gap:8px">{pictures}</div></div>'


def _facts_html(run: Run) -> str:
    s = run.summary
    facts = {
        "steps": f"{s.num_steps:,}",
        "ranks": f"{s.num_ranks:,}",
        "prompts": f"{s.num_prompts:,}",
        "completions": f"{s.num_completions:,}" + (f" ({s.num_failed:,} failed)" if s.num_failed else ""),
        "tokens": f"{s.num_tokens:,}",
        "tokens/s": "unknown" if math.isnan(s.tokens_per_s) else f"{s.tokens_per_s:,.0f}",
        "cut at the limit": "none made" if math.isnan(s.truncated_share) else f"{s.truncated_share * 100:.0f} %",
        "seconds": f"{s.duration_s:.2f}",
    }
    head = "".join(f"<th>{html.escape(name)}</th>" for name in facts)
    row = "".join(f"<td>{html.escape(value)}</td>" for value in facts.values())
    return f"<table><thead><tr>{head}</tr></thead><tbody><tr>{row}</tr></tbody></table>"


def sleep_words(shown: pd.DataFrame) -> pd.DataFrame:
    """A sleep report in MiB and with the share that was given back."""
    held = shown["weights_bytes"] + shown["kv_cache_bytes"]
    columns: dict[str, Any] = {
        "step": shown["step"],
        "engine": ["own process" if rank < 0 else f"rank {rank}" for rank in shown["rank"]],
        "level": shown["level"],
        "weights, MiB": _mib(shown["weights_bytes"]),
        "KV cache, MiB": _mib(shown["kv_cache_bytes"]),
        "freed, MiB": _mib(shown["freed_bytes"]),
        "freed": [f"{freed / total * 100:.0f} %" if total else "" for freed, total in zip(shown["freed_bytes"], held, strict=True)],
        "sleep, s": [f"{seconds:.3f}" for seconds in shown["sleep_s"]],
        "wake, s": ["asleep" if math.isnan(seconds) else f"{seconds:.3f}" for seconds in shown["wake_s"]],
    }
    return type(shown)(columns)


def _mib(values: pd.Series[int]) -> list[str]:
    return [f"{value / MIB:,.1f}" for value in values]


_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --line: #d0d7de; --soft: #f3f5f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #14181d; --line: #3a424c; --soft: #1e242b; } }
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: max-content; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { max-width: 26rem; white-space: pre-wrap; overflow-wrap: anywhere; }
thead th { background: var(--soft); }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: 0.7rem; overflow-x: auto; font-size: 0.82rem; }
.figures { display: flex; flex-wrap: wrap; gap: 0.8rem; margin-top: 0.8rem; }
img { box-sizing: border-box; max-width: 100%; height: auto; padding: 6px; background: #ffffff; border-radius: 6px; }
@media print {
  :root { --ink: #000000; --paper: #ffffff; --line: #bbbbbb; --soft: #f5f5f5; }
  body { font-size: 9pt; max-width: none; margin: 0; } h1 { font-size: 14pt; } h2 { font-size: 11pt; margin-top: 1rem; }
  section { break-inside: avoid; } img { max-width: 48%; padding: 0; } pre { white-space: pre-wrap; }
  table { width: auto; font-size: 7pt; } th, td { padding: 0.1rem 0.3rem; overflow-wrap: anywhere; }
}
"""
