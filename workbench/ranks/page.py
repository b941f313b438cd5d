"""A cell's output as HTML that needs no script: folded lines, values in their rich form, each rank's own text one click away.

It stays readable where a viewer takes styles away, and uses the notebook's own colours in light and dark. Knows folded output. Does not
know cells or processes.
"""

from __future__ import annotations

import base64
import html
import zlib
from collections.abc import Mapping, Sequence

from workbench.plan.folding import FoldedLine, FoldedValue, fold_lines
from workbench.plan.selector import name_ranks
from workbench.records import Shown

__all__ = [
    "IN_RESULT",
    "LONGEST_LINE",
    "cut_line",
    "left_out",
    "page_of_lines",
    "page_of_ranks",
    "page_of_stream",
    "page_of_text",
    "page_of_values",
]

IN_RESULT = "in the stdout and stderr of this result"
LONGEST_LINE = 2_000  # characters
_MUTED = "opacity:.7"  # of the text's own colour: VS Code has JupyterLab's variables too, those of the light theme also in the dark
_FONT = "font-family:var(--jp-code-font-family,monospace);font-size:var(--jp-code-font-size,13px)"
_PRE = f"margin:0;padding:0;background:none;color:inherit;white-space:pre-wrap;overflow-wrap:anywhere;{_FONT}"
_MARK = "background:none;color:inherit;font-weight:bold;text-decoration:underline 2px #D55E00"
_ERROR = "border-left:3px solid #D55E00;padding-left:5px"
_SCROLL = "max-height:30em;overflow:auto"
_AT_END = f"display:flex;flex-direction:column-reverse;{_SCROLL}"  # a box whose end is in sight, also when it grows
_PICTURES = ("image/png", "image/jpeg")

_TABS = """<style>
.{0}{{display:flex;flex-wrap:wrap;gap:0 2px}}
.{0}>details{{display:contents}}
.{0}>details>summary{{list-style:none;cursor:pointer;padding:2px 8px;border-bottom:2px solid transparent}}
.{0}>details[open]>summary{{border-bottom-color:#0072B2;font-weight:bold}}
.{0}>details::details-content{{order:1;width:100%}}
</style>"""


def page_of_lines(by_rank: Mapping[int, Sequence[str]], *, most: int, older: str = IN_RESULT, is_error: bool = False) -> str:
    """What ranks wrote: equal lines once, numbers that differ underlined, of each rank the last `most` lines."""
    folded = fold_lines({rank: lines[-most:] for rank, lines in by_rank.items()})
    if not folded:
        return ""
    body = _lines(folded)
    is_end = any(len(lines) > most for lines in by_rank.values())
    style = f"{_AT_END if is_end else _SCROLL};{_ERROR if is_error else ''}"
    title = ' title="stderr"' if is_error else ""
    return _head(left_out(by_rank, most, older)) + f'<div style="{style}"{title}><pre style="flex:none;{_PRE}">{body}</pre></div>'


def page_of_stream(folded: Sequence[FoldedLine], bars: Mapping[int, Sequence[str]], *, num_dropped: int, older: str, status: str) -> str:
    """A cell that still runs: its newest lines, then rows that still change, such as progress bars; it scrolls with its end."""
    head = f'<div style="{_MUTED}">{num_dropped:,} older lines: {html.escape(older)}</div>' if num_dropped else ""
    still = "\n".join(_label((rank,)) + html.escape(row[:LONGEST_LINE]) for rank, rows in sorted(bars.items()) for row in rows)
    body = "\n".join(part for part in (_lines(folded), still) if part)
    foot = f'<div style="{_MUTED};font-style:italic">{html.escape(status)}</div>'
    return f'{head}<div style="{_AT_END}"><pre style="flex:none;{_PRE}">{body}</pre></div>{foot}'


def page_of_text(text: str) -> str:
    """A text below the rest, such as an error's."""
    return f'<pre style="{_PRE}">{html.escape(text)}</pre>'


def _lines(folded: Sequence[FoldedLine]) -> str:
    """Lines with the names of their ranks, a name only where it changes; names take one column."""
    width = max((len(name_ranks(one.ranks)) for one in folded), default=0)
    rows, before = [], None
    for one in folded:
        name = name_ranks(one.ranks)
        label = _label(one.ranks, width) if name != before else f"{'':{width}}  "
        note = f'  <span style="{_MUTED}">&larr; {html.escape(one.note)}</span>' if one.note else ""
        rows.append(f"{label}{_marked(one)}{note}")
        before = name
    return "\n".join(rows)


def _label(ranks: Sequence[int], width: int = 0) -> str:
    return f'<span style="{_MUTED};user-select:none">{name_ranks(ranks):<{width}}  </span>'


def _marked(one: FoldedLine) -> str:
    line, begin, parts = one.line, 0, []
    for first, behind in one.marks:
        parts += [html.escape(line[begin:first]), f'<mark style="{_MARK}">{html.escape(line[first:behind])}</mark>']
        begin = behind
    return "".join([*parts, html.escape(cut_line(line[begin:], len(line)))])


def cut_line(line: str, length: int | None = None) -> str:
    """Its beginning where it is long; `length` is that of the line whose rest it is."""
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}... ({length or len(line):,} characters)"


def left_out(by_rank: Mapping[int, Sequence[str]], most: int, older: str) -> str:
    """What is not among the newest `most` lines of each rank, each cut where it is long, and where it is; "" where all is there.

    "14,001 older lines of ranks 0-2 and the ends of 3 long lines: in the stdout and stderr of this result"
    """
    num_cut = sum(len(line) > LONGEST_LINE for lines in by_rank.values() for line in lines[-most:])
    ends = f"the ends of {num_cut:,} long lines" if num_cut > 1 else "the end of a long line" if num_cut else ""
    told = " and ".join(part for part in (_older(by_rank, most), ends) if part)
    return f"{told}: {older}" if told else ""


def _older(by_rank: Mapping[int, Sequence[str]], most: int) -> str:
    dropped = {rank: len(lines) - most for rank, lines in by_rank.items() if len(lines) > most}
    return f"{sum(dropped.values()):,} older lines of {name_ranks(tuple(dropped))}" if dropped else ""


def _head(told: str) -> str:
    return f'<div style="{_MUTED}">{html.escape(told)}</div>' if told else ""


def page_of_values(folded: Sequence[FoldedValue]) -> str:
    """Values side by side where there is room, each in its richest form."""
    blocks = []
    for one in folded:
        name = name_ranks(one.ranks)
        note = f'<div style="{_MUTED}">&larr; {html.escape(one.note)}</div>' if one.note else ""
        head = f'<div style="{_MUTED}">{name}{f": {html.escape(one.shown.summary)}" if one.shown.summary else ""}</div>'
        blocks.append(f'<div style="min-width:0">{head}{_form(one.shown, name)}{note}</div>')
    return f'<div style="display:flex;flex-wrap:wrap;gap:.5em 2em;margin-top:2px">{"".join(blocks)}</div>' if blocks else ""


def _form(shown: Shown, name: str) -> str:
    forms = shown.forms
    if isinstance(rich := forms.get("text/html"), str):
        return f'<div style="overflow:auto">{rich}</div>'
    if isinstance(drawn := forms.get("image/svg+xml"), str):
        return drawn
    for kind in _PICTURES:
        if isinstance(data := forms.get(kind), bytes):
            source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
            return f'<img style="max-width:100%" alt="picture of {name}: {html.escape(shown.text or "figure")}" src="{source}">'
    return f'<pre style="{_PRE};{_SCROLL}">{html.escape(shown.text)}</pre>'


def page_of_ranks(by_rank: Mapping[int, Sequence[str]], *, most: int, older: str = IN_RESULT) -> str:
    """Each rank's own text behind one click, a tab a rank; "" where all ranks gave the same."""
    if len(set(map(tuple, by_rank.values()))) < 2:
        return ""
    group = f"wb-{zlib.crc32(repr(by_rank).encode(errors='replace')):08x}"  # of this page alone, and the same in every build of a notebook
    tabs = "".join(_tab(rank, lines, most, group, older, is_open=rank == min(by_rank)) for rank, lines in by_rank.items())
    summary = f'<summary style="cursor:pointer;{_MUTED}">each rank by itself</summary>'
    return f'<details style="margin-top:2px">{summary}{_TABS.format(group)}<div class="{group}">{tabs}</div></details>'


def _tab(rank: int, lines: Sequence[str], most: int, group: str, older: str, *, is_open: bool) -> str:
    text = "\n".join(cut_line(line) for line in lines[-most:])
    told = _older({rank: lines}, most)
    body = f'{_head(told and f"{told}: {older}")}<pre style="{_PRE};{_SCROLL}">{html.escape(text) or "(nothing)"}</pre>'
    return f'<details name="{group}"{" open" if is_open else ""}><summary>rank {rank}</summary>{body}</details>'
