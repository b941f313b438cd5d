"""Output while a cell runs: lines as they settle, bars in place, the older lines of a flood in a file; where it is shown."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from workbench.ranks.result import CellResult, RankOutput
from workbench.ranks.stream import Stream, output_file
from workbench.ranks.surface import Panel, Plain, Surface, Terminal, surface_here


def stream_in(folder: Path) -> Stream:
    return Stream(lambda: output_file(folder, "cell"))


@pytest.fixture
def stream(tmp_path) -> Iterator[Stream]:
    made = stream_in(tmp_path)
    yield made
    made.close()


def result_of(*stdout: str) -> CellResult:
    return CellResult({r: RankOutput(rank=r, stdout=t, stderr="", result_text="", error=None, seconds=0.0) for r, t in enumerate(stdout)})


def told(folded):
    return [(one.ranks, one.line) for one in folded]


def test_lines_that_came_together_are_folded_and_half_a_line_waits(stream):
    for rank in range(3):
        stream.take(rank, "stdout", "a\nhal")
    assert told(stream.advance()) == [((0, 1, 2), "a")]
    assert stream.open_rows() == {0: ["hal"], 1: ["hal"], 2: ["hal"]}
    stream.take(1, "stdout", "f\n")
    assert told(stream.advance()) == [((1,), "half")]
    assert told(stream.finish()) == [((0, 2), "hal")] and stream.num_lines == 6 and stream.file is None


def test_a_bar_is_one_row_until_it_ends(stream):
    for percent in (10, 20):
        stream.take(2, "stderr", f"\r{percent} %")
        assert told(stream.advance()) == [] and stream.open_rows() == {2: [f"{percent} %"]}
    stream.take(2, "stderr", "\r100 %\n")
    assert told(stream.advance()) == [((2,), "100 %")] and stream.open_rows() == {}


def test_a_flood_goes_to_a_file_whole_and_in_order(stream):
    written = [(rank, f"{rank} line {i}") for i in range(400) for rank in range(2)]
    for start in range(0, len(written), 50):
        for rank, line in written[start : start + 50]:
            stream.take(rank, "stdout", line + "\n")
        stream.advance()
    stream.take(0, "stdout", "last\n")
    stream.finish()
    assert stream.file is not None and oct(stream.file.stat().st_mode & 0o777) == "0o600"
    lines = stream.file.read_text().splitlines()
    assert len(lines) == 801 and len(stream.recent) == 200
    for rank in range(2):
        mine = [line.removeprefix(f"[rank {rank}] ") for line in lines if line.startswith(f"[rank {rank}] ")]
        assert mine == [line for r, line in written if r == rank] + (["last"] if rank == 0 else [])


def test_only_the_newest_files_are_kept(tmp_path):
    folder = tmp_path / "output"
    for number in range(25):
        path = output_file(folder, f"{number}")
        os.utime(path, (number, number))
    assert sorted(int(path.stem) for path in folder.iterdir()) == list(range(5, 25))
    assert oct(folder.stat().st_mode & 0o777) == "0o700"


def test_plain_text_is_printed_once_or_line_by_line(stream, capsys, tmp_path):
    plain = Plain()
    stream.take(0, "stdout", "a\n"), stream.take(1, "stdout", "b\n")
    plain.finish(stream, result_of("a\n", "b\n"))
    assert capsys.readouterr().out == "[rank 0] a\n[rank 1] b\n"
    plain, long = Plain(), stream_in(tmp_path)
    long.take(0, "stdout", "a\n")
    plain.update(long, "status")
    assert capsys.readouterr().out == "[rank 0] a\n"
    long.take(0, "stdout", "b")
    plain.finish(long, result_of("a\nb"))
    assert capsys.readouterr().out == "[rank 0] b\n"


def test_a_terminal_redraws_bars_below_the_lines(stream, capsys):
    terminal = Terminal()
    stream.take(0, "stdout", "line\n"), stream.take(1, "stderr", "10 %")
    terminal.update(stream, "cell 1: 2 s, waits for ranks 0-1")
    assert capsys.readouterr().out == "[rank 0] line\n[rank 1] 10 %\ncell 1: 2 s, waits for ranks 0-1\n"
    stream.take(1, "stderr", "\r20 %")
    terminal.update(stream, "cell 1: 3 s, waits for ranks 0-1")
    assert capsys.readouterr().out == "\x1b[2A\x1b[J[rank 1] 20 %\ncell 1: 3 s, waits for ranks 0-1\n"
    terminal.finish(stream, result_of("line\n", ""))
    assert capsys.readouterr().out == "\x1b[2A\x1b[J[rank 1] 20 %\n"


def test_a_panel_is_one_output_that_is_replaced(stream, monkeypatch):
    shown: list[dict[str, str]] = []

    class Handle:
        def update(self, bundle, raw):
            shown.append(bundle)

    def display(bundle, raw, display_id):
        shown.append(bundle)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    panel = Panel()
    stream.take(0, "stdout", "<line>\n"), stream.take(1, "stderr", "10 %")
    panel.update(stream, "cell 1: 2 s")
    panel.update(stream, "cell 1: 2 s")
    assert len(shown) == 1 and "&lt;line&gt;" in shown[0]["text/html"] and "10 %" in shown[0]["text/html"]
    panel.foot = "RankFailed: text"
    panel.finish(stream, result_of("<line>\n", ""))
    assert shown[-1]["text/plain"] == "[rank 0] <line>\nRankFailed: text" and "10 %" not in shown[-1]["text/html"]
    assert re.search(r"<pre style=[^>]*white-space:pre-wrap[^>]*>RankFailed: text</pre>$", shown[-1]["text/html"])


def test_the_page_of_a_flood_names_the_file_with_the_older_lines(stream, monkeypatch):
    shown: list[dict[str, str]] = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, **_: shown.append(bundle))
    text = "".join(f"line {i}\n" for i in range(5_000))
    stream.take(0, "stdout", text), stream.take(1, "stdout", text + "odd\n")
    Panel().finish(stream, result_of(text, text + "odd\n"))
    (bundle,) = shown
    assert stream.file is not None and len(stream.file.read_text().splitlines()) == 10_001
    assert f"9,001 older lines of ranks 0-1: {stream.file}" in bundle["text/html"]
    text = f"9,001 older lines of ranks 0-1: {stream.file}\n[rank 0] line 4500\n[ranks 0-1] line 4501\n"
    assert bundle["text/plain"].startswith(text) and bundle["text/plain"].endswith("\n[rank 1] odd")
    assert len(bundle["text/html"]) < 100_000 and len(bundle["text/plain"]) < 40_000


def test_a_long_line_is_cut_and_whole_in_the_file(stream, monkeypatch):
    shown: list[dict[str, str]] = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, **_: shown.append(bundle))
    stream.take(1, "stdout", "x" * 50_000)
    Panel().finish(stream, result_of("", "x" * 50_000))
    (bundle,) = shown
    assert stream.file is not None and stream.file.read_text() == f"[rank 1] {'x' * 50_000}\n"
    for text in bundle.values():
        assert f"the end of a long line: {stream.file}" in text and "xxx... (50,000 characters)" in text and len(text) < 6_000


def test_what_a_view_does_not_hold_is_in_the_file(stream):
    stream.take(0, "stdout", "".join(f"line {i}\n" for i in range(30)))
    assert told(stream.advance(most=5)) == [((0,), f"line {i}") for i in range(25, 30)]
    assert stream.file is not None and len(stream.file.read_text().splitlines()) == stream.num_lines == 30


def test_the_surface_fits_the_place(monkeypatch):
    def here() -> type[Surface]:
        return type(surface_here())

    assert here() is Plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert here() is Terminal
    monkeypatch.setattr("workbench.ranks.surface.is_notebook", lambda: True)
    assert here() is Panel
