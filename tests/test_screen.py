"""Text as a terminal would show it."""

from __future__ import annotations

import io

import pytest
from tqdm import tqdm  # type: ignore[import-untyped]

from workbench.ranks.screen import Screen, settled_lines


@pytest.mark.parametrize(
    "text, lines",
    [
        ("a\nb\n", ("a", "b")),
        ("a\n\nb", ("a", "", "b")),
        ("10 %\r20 %\r100 %\n", ("100 %",)),
        ("abc\rX\n", ("Xbc",)),
        ("windows\r\nline\r\n", ("windows", "line")),
        ("abc\x08\x08X\n", ("aXc",)),
        ("\x1b[31mred\x1b[0m\n", ("red",)),
        ("long text\r\x1b[Kshort\n", ("short",)),
        ("\x1b]0;title\x07text\n", ("text",)),
        ("one\n\x1b[Atwo\n", ("two",)),
        ("", ()),
    ],
)
def test_controls_are_carried_out(text, lines):
    assert settled_lines(text) == lines


def test_a_row_without_an_end_stays_open():
    screen = Screen()
    assert screen.feed("first\n 10 %") == ["first"] and screen.open_rows == [" 10 %"]
    assert screen.feed("\r 20 %") == [] and screen.open_rows == [" 20 %"]
    assert screen.feed("\ndone\nrest") == [" 20 %", "done"] and screen.open_rows == ["rest"]


def test_a_bar_keeps_its_place():
    written = io.StringIO()
    screen, settled, seen = Screen(), [], []
    for _ in tqdm(range(20), file=written, mininterval=0, ncols=60):
        settled += screen.feed(written.getvalue())
        written.seek(0), written.truncate()
        seen += screen.open_rows
    settled += screen.feed(written.getvalue())
    assert len(settled) == 1 and settled[0].startswith("100%") and any(row.startswith(" 50%") for row in seen)


def test_two_bars_below_each_other_keep_their_places():
    written = io.StringIO()
    for _ in tqdm(range(3), file=written, mininterval=0, ncols=60, desc="outer"):
        for _ in tqdm(range(4), file=written, mininterval=0, ncols=60, desc="inner", position=1, leave=False):
            pass
    lines = settled_lines(written.getvalue())
    assert len(lines) == 1 and lines[0].startswith("outer: 100%")


def test_a_hundred_thousand_lines_pass_in_a_moment():
    screen = Screen()
    text = "".join(f"line {i}\n" for i in range(100_000))
    assert sum(len(screen.feed(text[i : i + 65536])) for i in range(0, len(text), 65536)) == 100_000
