"""`%load_ext workbench`: the magics in a real IPython shell, with real ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

import workbench as wb


@pytest.fixture(scope="module")
def shell() -> Iterator[InteractiveShell]:
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "workbench")
    shell.run_line_magic("launch", "4 --layout tp=2,dp=2")
    yield shell
    shell.run_line_magic("ranks", "close")
    shell.user_ns.pop("cluster", None)
    shell.user_ns.pop("cell", None)
    InteractiveShell.clear_instance()


def ranks(shell: InteractiveShell, line: str, cell: str) -> None:
    shell.run_cell_magic("ranks", line, cell)


def test_equal_outputs_are_shown_once(shell, capsys):
    ranks(shell, "", "print('loss', 0.25 if rank != 2 else 0.5)")
    assert capsys.readouterr().out == "[ranks 0-1, 3] loss 0.25\n[rank 2] loss 0.5  <- +2.5e-01 (+100 %) against ranks 0-1, 3\n"


def test_a_cell_may_choose_ranks_by_axis(shell, capsys):
    ranks(shell, "tp=1", "rank")
    assert capsys.readouterr().out == "[rank 1] 1\n[rank 3] 3\n"


def test_a_selector_may_have_spaces(shell, capsys):
    ranks(shell, "0, 2", "rank")
    ranks(shell, "dp=1, tp=1", "rank")
    assert capsys.readouterr().out == "[rank 0] 0\n[rank 2] 2\n[rank 3] 3\n"
    with pytest.raises(UsageError, match="'0 2', which is no rank and no range"):
        ranks(shell, "0 2", "rank")


def test_a_long_cell_is_streamed_while_it_runs(shell, capsys):
    ranks(shell, "", "import time\nfor i in range(8):\n    print('tick', i, flush=True)\n    time.sleep(0.25)\nrank // 2")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "tick 7" in line] == ["[ranks 0-3] tick 7"]
    assert lines[-2:] == ["[ranks 0-1] 0", "[ranks 2-3] 1"]


def test_a_background_cell_gives_a_handle(shell, capsys):
    ranks(shell, "--bg --out later", "import time; time.sleep(0.5); rank")
    handle = shell.user_ns["later"]
    assert not handle.done() and "later" in capsys.readouterr().out
    assert [handle.result(timeout_s=10)[r].result_text for r in range(4)] == ["0", "1", "2", "3"]


def test_a_second_cell_asks_who_waits_while_the_first_runs(shell, capsys):
    ranks(shell, "--bg --out hung", "import time\nif rank == 2: time.sleep(60)\ndist.barrier()")
    time.sleep(0.5)
    capsys.readouterr()
    shell.run_line_magic("ranks", "diagnose")
    told = capsys.readouterr().out
    assert told.startswith("ranks 0, 1, 3 wait in barrier (line 3); rank 2 sleeps, or waits for something that is no collective, line 2: ")
    shell.run_line_magic("ranks", "interrupt")
    with pytest.raises(wb.RankInterrupted):
        shell.user_ns["hung"].result(timeout_s=10)


def test_a_quiet_cell_shows_nothing_and_keeps_its_result(shell, capsys):
    ranks(shell, "--quiet --out kept", "print('unseen')\nrank")
    assert capsys.readouterr().out == "" and shell.user_ns["kept"][3].result_text == "3"


def test_a_failing_cell_fails_and_shows_the_ranks_own_lines(shell):
    with pytest.raises(wb.RankFailed) as caught:
        ranks(shell, "", "x = 1\n1 / rank")
    assert caught.value.rank == 0 and "1 / rank" in str(caught.value) and "line 2" in str(caught.value)


def test_a_timeout_says_who_is_missing(shell):
    started = time.monotonic()
    with pytest.raises(wb.RankTimeout, match="rank 0"):
        ranks(shell, "--timeout 1", "if rank: dist.barrier()\nelse:\n    import time; time.sleep(60)")
    assert time.monotonic() - started < 5


def test_a_name_that_lives_on_ranks_is_pointed_to(shell, capsys):
    ranks(shell, "1-2", "only_there = 1")
    shell.run_cell("only_there + 1")
    assert "only_there lives on ranks 1-2: use a %%ranks cell, or cluster.pull('only_there')" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, told",
    [
        ("dance", "the verb must be one of status, diagnose"),
        ("respawn two", "%ranks respawn needs the number of a dead rank"),
    ],
)
def test_a_wrong_verb_is_told(shell, line, told):
    with pytest.raises(UsageError, match=told):
        shell.run_line_magic("ranks", line)


def test_wrong_arguments_are_told(shell):
    with pytest.raises(UsageError, match="'tp' is no degree; write axis=number"):
        shell.run_line_magic("launch", "4 --layout tp")
    with pytest.raises(UsageError, match="--layout tensor=2: 'tensor' is no axis; axes are dp, pp, pcp, tp, dcp"):
        shell.run_line_magic("launch", "4 --layout tensor=2")
    with pytest.raises(UsageError, match="unrecognized arguments: --fast"):
        ranks(shell, "0 --fast", "1")


def test_verbs_ask_and_steer(shell, capsys):
    shell.run_line_magic("ranks", "diagnose")
    assert "every rank is idle" in capsys.readouterr().out
    assert {"rank", "op", "wait_s"} <= set(shell.run_line_magic("ranks", "ledger").columns)


def test_launching_again_replaces_the_cluster_and_restart_keeps_its_layout(shell, capsys):
    shell.run_line_magic("launch", "2 --layout tp=2")
    assert "replaced cluster: its 4 ranks were ended" in capsys.readouterr().out
    ranks(shell, "", "gone = 1")
    shell.run_line_magic("ranks", "restart")
    ranks(shell, "tp=1", "'gone' in globals()")
    assert capsys.readouterr().out == "cluster: 2 ranks are ready, fresh; what they held is gone\n[rank 1] False\n"
    shell.run_line_magic("ranks", "close")
    assert capsys.readouterr().out == "cluster: closed, 2 ranks ended\n"
