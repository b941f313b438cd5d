"""What ranks write: all of it, in order, attributed to its rank and cell, streamed while it runs."""

from __future__ import annotations

import re
import time

import pytest

import workbench as wb


@pytest.fixture(scope="module")
def cluster():
    with wb.launch(4) as made:
        yield made


def test_python_and_native_output_keep_their_order(cluster):
    cell = (
        "import os, sys, ctypes\nprint('one')\nos.system('echo two')\nos.write(1, b'three\\n')\nctypes.CDLL(None).puts(b'four')\n"
        "ctypes.CDLL(None).fflush(None)\nprint('five', end='')\nprint('error', file=sys.stderr)"
    )
    output = cluster.execute(cell, ranks=1)[1]
    assert output.stdout == "one\ntwo\nthree\nfour\nfive" and output.stderr == "error\n"


def test_a_hundred_thousand_lines_arrive_whole_and_in_order(cluster):
    result = cluster.execute("for i in range(25_000): print(f'{rank} line {i}')")
    for rank in range(4):
        lines = result[rank].stdout.splitlines()
        assert len(lines) == 25_000 and lines[0] == f"{rank} line 0"
        assert lines == [f"{rank} line {i}" for i in range(25_000)]


def test_output_streams_while_the_cell_runs(cluster):
    heard: list[tuple[float, int, str, str]] = []
    cell = "import time, sys\nprint('start')\ntime.sleep(0.6)\nprint('end', file=sys.stderr)"
    result = cluster.execute(cell, ranks="0-1", on_output=lambda rank, name, text: heard.append((time.monotonic(), rank, name, text)))
    for rank in (0, 1):
        mine = [(at_s, name, text) for at_s, r, name, text in heard if r == rank]
        assert [(name, text) for _, name, text in mine] == [("stdout", "start\n"), ("stderr", "end\n")]
        assert mine[1][0] - mine[0][0] > 0.4
        assert result[rank].stdout == "start\n" and result[rank].stderr == "end\n"


def test_streamed_text_never_cuts_a_character(cluster):
    pieces: list[str] = []
    cell = "import os, time\ndata = 'é€𝄞'.encode()\nfor byte in data:\n    os.write(1, bytes([byte])); time.sleep(0.02)"
    result = cluster.execute(cell, ranks=2, on_output=lambda rank, name, text: pieces.append(text))
    assert pieces == ["é", "€", "𝄞"] and result[2].stdout == "é€𝄞"


def test_bytes_that_are_no_text_are_shown_as_such(cluster):
    output = cluster.execute("import os; _ = os.write(1, b'a\\xff\\xfeb\\n'); _ = os.write(2, b'\\x80')", ranks=0)[0]
    assert output.stdout == "a\ufffd\ufffdb\n" and output.stderr == "\ufffd"


def test_lone_surrogates_and_carriage_returns_pass(cluster):
    output = cluster.execute("print('\\ud800')\nfor i in range(3): print(f'\\r{i} of 3', end='')\nprint()", ranks=0)[0]
    assert output.stdout == "?\n\r0 of 3\r1 of 3\r2 of 3\n"


def test_a_listener_that_raises_does_not_harm_the_cell(cluster):
    def listen(rank, name, text):
        raise ValueError("listener")

    result = cluster.execute("print(rank)", on_output=listen)
    assert [result[r].stdout for r in range(4)] == [f"{r}\n" for r in range(4)]
    assert cluster.execute("1", ranks=0)[0].result_text == "1"


def test_output_of_a_failed_cell_is_not_lost(cluster):
    heard: list[str] = []
    with pytest.raises(wb.RankFailed) as caught:
        cluster.execute("print('before')\nraise ValueError('x')", ranks=3, on_output=lambda rank, name, text: heard.append(text))
    assert heard == ["before\n"] and "ValueError: x" in str(caught.value)


def test_what_nobody_else_shows_is_printed_in_the_driver(cluster, capsys):
    def speak():
        import sys

        print("from", wb.current().rank)
        print("warning", file=sys.stderr)
        return 7

    assert cluster.run(speak, ranks="0,2") == [7, 7]
    out, err = capsys.readouterr()
    assert out == "[rank 0] from 0\n[rank 2] from 2\n" and err == "[rank 0] warning\n[rank 2] warning\n"
    with pytest.raises(wb.RankFailed):
        cluster.execute("print('before')\n1 / 0", ranks=1)
    assert capsys.readouterr().out == "[rank 1] before\n"
    cluster.execute("print('shown by the result')", ranks=1)
    assert capsys.readouterr().out == ""


def test_output_written_between_cells_comes_with_the_next(cluster):
    cluster.execute("import threading, time\nthreading.Timer(0.2, print, ('late',)).start()", ranks=1)
    time.sleep(0.5)
    result = cluster.execute("print('now')")
    assert result[1].stdout == "late\nnow\n" and result[0].stdout == "now\n"


def test_a_child_process_writes_to_its_cell(cluster):
    result = cluster.execute("import subprocess; _ = subprocess.run(['echo', f'child of {rank}'])")
    assert [result[r].stdout for r in range(4)] == [f"child of {r}\n" for r in range(4)]


def test_a_flood_does_not_hold_up_a_stop(cluster):
    handle = cluster.execute("while True: print('x' * 1000)", ranks=0, block=False)
    time.sleep(0.3)
    started = time.monotonic()
    handle.cancel()
    with pytest.raises(wb.RankInterrupted):
        handle.result(timeout_s=10)
    assert time.monotonic() - started < 3


def test_standard_input_is_empty(cluster):
    assert cluster.execute("import sys; sys.stdin.read()", ranks=0, timeout_s=5)[0].result_text == "''"


def test_progress_is_shown_on_a_terminal_after_two_seconds(cluster, monkeypatch):
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    cluster.execute("import time; time.sleep(2.8)", ranks="1,3")
    assert re.fullmatch(r"(\r\x1b\[2Kcell \d+: [234] s, ranks \[1, 3\] still run)+\r\x1b\[2K", terminal.getvalue())
