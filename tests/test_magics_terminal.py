"""The magics in a terminal's IPython: a pseudo-terminal, real ranks."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pexpect  # type: ignore[import-untyped]
import pytest

PROMPT = r"In \[\d+\]: "


@pytest.fixture(scope="module")
def terminal() -> Iterator[pexpect.spawn]:
    arguments = ["-m", "IPython", "--simple-prompt", "--no-banner", "--no-confirm-exit", "--colors=NoColor"]
    shell = pexpect.spawn(sys.executable, arguments, dimensions=(40, 100), timeout=20, encoding="utf-8", echo=False)
    shell.expect(PROMPT)
    say(shell, "%load_ext workbench")
    assert "cluster: 2 ranks are ready" in say(shell, "%launch 2")
    yield shell
    assert "cluster: closed, 2 ranks ended" in say(shell, "%ranks close")
    shell.sendline("exit")
    shell.expect(pexpect.EOF)
    shell.close()


def say(shell: pexpect.spawn, *lines: str) -> str:
    """Type a cell; what the terminal got until the next prompt."""
    for line in [*lines, "", ""] if len(lines) > 1 else lines:  # two empty lines end a cell
        shell.sendline(line)
    shell.expect(PROMPT)
    return re.sub(r"( *\.\.\.: )+", "", str(shell.before)).replace("\r\n", "\n").replace("\r", "")


def test_a_cell_runs_on_ranks(terminal):
    told = say(terminal, "%%ranks", "print('loss', 0.5 + rank)", "rank * 2")
    assert told.strip().splitlines() == [
        "[rank 0] loss 0.5",
        "[rank 1] loss 1.5  <- +1.0e+00 (+200 %) against rank 0",
        "[rank 0] 0",
        "[rank 1] 2",
    ]


def test_a_long_cell_streams_lines_with_bars_below_them(terminal):
    told = say(
        terminal,
        "%%ranks",
        "import time; from tqdm import tqdm",
        "for i in tqdm(range(12), ncols=60, mininterval=0.1): time.sleep(0.25); i % 4 or print('tick', i, flush=True)",
    )
    assert re.search(r"cell \d+: 2 s, waits for ranks 0-1\n", told) and "\x1b[3A\x1b[J" in told
    end = told.rpartition("\x1b[J")[2]
    assert told.count("[ranks 0-1] tick 8") == 1 and end.count("100%") <= 2 and "waits for" not in end


def test_an_error_shows_the_ranks_own_lines(terminal):
    told = say(terminal, "%%ranks", "x = 1", "x / rank")
    assert "RankFailed: rank 0 of 2 failed in cell" in told and "----> 2 x / rank" in told and "magics.py" not in told
    assert "lives on ranks 0-1: use a %%ranks cell" in say(terminal, "x")


def test_control_c_stops_the_ranks(terminal):
    for line in ("%%ranks", "print('begun', flush=True); time.sleep(60)", "", ""):
        terminal.sendline(line)
    terminal.expect("begun")
    terminal.sendintr()
    terminal.expect(PROMPT)
    assert "was stopped; ranks free after" in terminal.before and "magics.py" not in terminal.before
    assert "[ranks 0-1] 1" in say(terminal, "%%ranks", "x")


def test_verbs_print_text(terminal):
    told = say(terminal, "%ranks status")
    assert re.search(r"<Cluster of 2 ranks: idle, generation 0>\nrank 0: idle, pid \d+, \d+ MiB\nrank 1: idle, pid \d+, \d+ MiB", told)
    assert "no cell runs; every rank is idle" in say(terminal, "%ranks diagnose")
    assert "no cell runs; nothing to interrupt" in say(terminal, "%ranks interrupt")


def test_a_background_cell_leaves_the_terminal_free(terminal):
    told = say(terminal, "%%ranks --bg", "time.sleep(0.5); print('late'); rank")
    assert re.search(r"<cell \d+: running>; its handle is `cell`: .result\(\), .done\(\), .cancel\(\)", told)
    assert "[ranks 0-1] late" in say(terminal, "cell.result()")
