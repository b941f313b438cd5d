"""Completion, `?` and hints for names that live on ranks, in a real IPython shell with real ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

import workbench as wb
from workbench.completion import split_question
from workbench.ranks.messages import Inquiry, Question
from workbench.ranks.names import answer


@pytest.fixture(scope="module")
def shell() -> Iterator[InteractiveShell]:
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "workbench")
    shell.run_line_magic("launch", "4 --layout tp=2,dp=2")
    shell.run_cell_magic(
        "ranks",
        "",
        "samples = torch.zeros(2, 3)\ndef scaled(x, by=2):\n    '''Times `by`.'''\n    return x * by\nif rank == 3: only_three = 1",
    )
    yield shell
    shell.run_line_magic("ranks", "close")
    shell.run_line_magic("unload_ext", "workbench")
    shell.user_ns.pop("cluster", None)
    InteractiveShell.clear_instance()


def completions(shell: InteractiveShell, text: str) -> list[str]:
    """What Tab offers at the end of a text, as whole words of its last line."""
    with provisionalcompleter():
        return [text[: one.start].split("\n")[-1] + one.text for one in shell.Completer.completions(text, len(text))]


def test_names_and_attributes_of_ranks_are_completed_in_their_cells(shell):
    assert "sampl" not in " ".join(completions(shell, "sampl"))
    assert "samples" in completions(shell, "%%ranks\nsampl")
    assert "samples.shape" in completions(shell, "%%ranks\nx = 1\nsamples.sh")
    assert "y = samples.numpy" in completions(shell, "%%ranks\ny = samples.nu")
    assert set(completions(shell, "%%ranks\nsamples.num")) == {"samples.numel", "samples.numpy"}  # nothing of the notebook's own
    assert completions(shell, "%%ranks\nsamples._gra") == ["samples._grad", "samples._grad_fn"]


def test_a_name_of_chosen_ranks_only(shell):
    assert "only_three" in completions(shell, "%%ranks\nonly_th") and "only_three" in completions(shell, "%%ranks tp=1\nonly_th")
    assert "only_three" not in completions(shell, "%%ranks 0-1 --timeout 5\nonly_th")
    assert completions(shell, "%%ranks 17\nsamples.num") == [] == completions(shell, "%%ranks 'unclosed\nsamples.num")


def test_options_and_selectors_are_completed_on_the_first_line(shell):
    assert completions(shell, "%%ranks ") == [
        f"%%ranks {one}" for one in "all 0 1 2 3 dp=0 dp=1 tp=0 tp=1 ep=0 ep=1 ep=2 ep=3 --timeout --bg --out --quiet".split()
    ]
    assert completions(shell, "%%ranks tp=") == ["%%ranks tp=0", "%%ranks tp=1"]
    assert completions(shell, "%%ranks 0 --q") == ["%%ranks 0 --quiet"]
    assert completions(shell, "%launch 4 --l") == ["%launch 4 --layout"]
    assert completions(shell, "%launch 4 --layout t") == ["%launch 4 --layout tp="]
    assert completions(shell, "%ranks re") == ["%ranks restart", "%ranks respawn"]


def test_dead_ranks_are_offered_to_respawn(shell, capsys):
    whole = shell.user_ns["cluster"]
    with wb.launch(2) as shell.user_ns["cluster"]:
        shell.user_ns["cluster"].push({"held": "text"})
        shell.user_ns["cluster"].kill(1)
        assert completions(shell, "%ranks respawn ") == ["%ranks respawn 1"]
        assert "held.upper" in completions(shell, "%%ranks\nheld.up")
        shell.run_line_magic("ranks", "respawn 1")
        assert "%ranks respawn 1" not in completions(shell, "%ranks respawn ")
    assert capsys.readouterr().out == "rank 1 is back, empty; the others keep their names\n"
    shell.user_ns["cluster"] = whole


def test_busy_ranks_answer_and_stuck_ones_hold_nobody_up(shell):
    shell.run_cell_magic("ranks", "--bg --out busy", "import time; time.sleep(30)")
    assert "samples.shape" in completions(shell, "%%ranks\nsamples.sh")
    shell.user_ns["busy"].cancel()
    shell.user_ns["busy"].wait(10)
    shell.run_cell_magic("ranks", "0-2 --bg --out stuck", "torch.arange(1).numpy()\nimport ctypes\nctypes.PyDLL(None).sleep(4)")
    time.sleep(0.3)
    started = time.monotonic()
    assert "samples.shape" in completions(shell, "%%ranks\nsamples.sh")  # of rank 3
    assert time.monotonic() - started < 2.5
    shell.user_ns["stuck"].result(timeout_s=15)


def test_a_name_is_described_in_any_cell(shell, capsys):
    shell.run_cell("samples?")
    assert capsys.readouterr().out.splitlines() == [
        "[ranks 0-3] samples: Tensor [2, 3] float32, 24 B: min 0, mean 0, max 0",
        "[ranks 0-3] tensor([[0., 0., 0.],",
        "[ranks 0-3]         [0., 0., 0.]])",
    ]
    shell.run_cell("scaled?")
    assert capsys.readouterr().out == "[ranks 0-3] scaled(x, by=2): function\n[ranks 0-3] Times `by`.\n"
    shell.run_cell("scaled??")
    assert "[ranks 0-3]     return x * by" in capsys.readouterr().out
    shell.run_cell("nowhere_at_all?")
    assert capsys.readouterr().out == "Object `nowhere_at_all` not found.\n"
    local = shell.object_inspect_mime("shell_is_here") if "shell_is_here" in shell.user_ns else shell.object_inspect_mime("print")
    assert "Prints the values" in local["text/plain"] and "ranks" not in local["text/plain"]


def test_shift_tab_shows_what_ranks_know(shell):
    bundle = shell.object_inspect_mime("samples.shape")
    assert bundle["text/plain"].startswith("[ranks 0-3] samples.shape: Size") and "ranks 0-3" in bundle["text/html"]
    with pytest.raises(KeyError):
        shell.object_inspect_mime("samples.nowhere")


def test_a_question_may_end_a_cell_of_the_ranks(shell, capsys):
    shell.run_cell_magic("ranks", "", "doubled = samples * 2\ndoubled?")
    assert "doubled: Tensor [2, 3]" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"nobody\? : no rank knows nobody\nan earlier %%ranks cell must bind it"):
        shell.run_cell_magic("ranks", "", "nobody?")


@pytest.mark.parametrize(
    "cell, parts",
    [
        ("x = 1\nx?", ("x = 1", "x", 0)),
        ("x.y??\n", ("", "x.y", 1)),
        ("?x", ("", "x", 0)),
        ("x = 1", ("x = 1", "", 0)),
        ("print('why?')", ("print('why?')", "", 0)),
        ("", ("", "", 0)),
    ],
)
def test_questions_are_told_from_code(cell, parts):
    assert split_question(cell) == parts


def test_magics_explain_themselves(shell):
    for name, word in (("%%ranks", "--timeout"), ("%ranks", "respawn K"), ("%launch", "--layout")):
        assert word in shell.object_inspect_mime(name)["text/plain"]


def test_loading_twice_hooks_once_and_unloading_takes_the_hooks_back(shell):
    matchers = len(shell.Completer.custom_matchers)
    assert matchers > 0
    shell.run_line_magic("reload_ext", "workbench")
    assert len(shell.Completer.custom_matchers) == matchers
    shell.run_line_magic("unload_ext", "workbench")
    assert len(shell.Completer.custom_matchers) == matchers - 1 and "RankNames" not in repr(shell.object_inspect_mime)
    shell.run_line_magic("load_ext", "workbench")
    assert "samples" in completions(shell, "%%ranks\nsampl")


class Moody:
    """Raises where it is looked at."""

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __repr__(self):
        raise RuntimeError("repr")


@pytest.mark.parametrize("inquiry", list(Inquiry))
@pytest.mark.parametrize("text", ["moody", "moody.attribute.further", "gone.attribute", "", "."])
def test_what_cannot_be_answered_is_no_error(inquiry, text):
    assert isinstance(answer(Question(ticket=1, inquiry=inquiry, text=text), {"moody": Moody()}).lines, tuple)
