"""The magics as a notebook sees them: a real kernel, real ranks, the messages that a page would draw."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from kernels import Kernel
from nbclient import NotebookClient


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    assert made.run("%load_ext workbench").status == "ok"
    early = made.run("%%ranks\n1")
    told = "UsageError: there is no cluster: the variable `cluster` is needed, and it is not bound\n%launch 4 makes one"
    assert early.status == "error" and early.error == told
    assert made.run("%launch 8").streamed == "cluster: 8 ranks are ready\n"
    made.run("%%ranks\nimport time, sys\nfrom tqdm import tqdm")
    yield made
    made.run("%ranks close")
    made.close()


def test_a_short_cell_is_one_page_with_its_text_beside(kernel):
    ran = kernel.run("%%ranks\nprint('loss', 0.25 if rank != 2 else 0.5)")
    ((_, bundle),) = ran.shown
    assert ran.status == "ok" and ran.streamed == ""
    assert bundle["text/plain"] == "[ranks 0-1, 3-7] loss 0.25\n[rank 2] loss 0.5  <- +2.5e-01 (+100 %) against ranks 0-1, 3-7"
    assert ">0.5</mark>" in bundle["text/html"] and "<script" not in bundle["text/html"]


def test_a_long_cell_moves_while_it_runs_and_bars_keep_their_place(kernel):
    ran = kernel.run(
        "%%ranks 0-1\nfor i in tqdm(range(15), mininterval=0.1):\n    if i % 5 == 0: print('tick', i, flush=True)\n    time.sleep(0.1)"
    )
    first, *_, last = ran.shown
    kinds = [kind for _, kind, content in ran.messages if kind.endswith("display_data")]
    assert kinds[0] == "display_data" and set(kinds[1:]) == {"update_display_data"} and len(kinds) >= 4
    assert first[0] < 1.3 and "waits for ranks 0-1" in first[1]["text/plain"]
    moving = [bundle["text/html"] for _, bundle in ran.shown[:-1]]
    assert all(page.count("%|") <= 2 for page in moving) and any("%|" in page for page in moving)
    assert "waits for" not in last[1]["text/html"] and last[1]["text/plain"].count("100%|") <= 2
    assert last[1]["text/plain"].startswith("[ranks 0-1] tick 0\n[ranks 0-1] tick 5\n[ranks 0-1] tick 10\n")


def test_a_hundred_thousand_lines_of_eight_ranks_are_kept_and_do_not_flood_the_page(kernel):
    ran = kernel.run("%%ranks\nfor i in range(12_500): print(f'{rank} line {i} of a flood of lines')", timeout_s=60)
    pages = [(at, bundle["text/html"]) for at, bundle in ran.shown]
    assert ran.status == "ok" and ran.seconds < 20
    assert max(len(page) for _, page in pages) < 150_000 and len(pages) < 5 * ran.seconds + 3
    (told,) = [line for line in pages[-1][1].split("<") if "older lines of ranks 0-7: " in line]
    assert told.startswith('div style="opacity:.7">99,000 older lines of ranks 0-7: ')
    path = Path(told.rpartition("older lines of ranks 0-7: ")[2])
    lines = path.read_text().splitlines()
    assert path.parent == Path(os.environ["WORKBENCH_HOME"]) / "output" and len(lines) == 100_000
    for rank in range(8):
        mine = [line for line in lines if line.startswith(f"[rank {rank}] ")]
        assert mine == [f"[rank {rank}] {rank} line {i} of a flood of lines" for i in range(12_500)]
        assert f"{rank} line 12499 of a flood" in pages[-1][1]


def test_a_flood_that_lasts_is_drawn_a_few_times_a_second(kernel):
    ran = kernel.run("%%ranks\nfor i in range(20):\n    for j in range(200): print(rank, i, j)\n    time.sleep(0.1)", timeout_s=60)
    pages = [bundle["text/html"] for _, bundle in ran.shown]
    assert 4 < len(pages) < 5 * ran.seconds + 3 and max(map(len, pages)) < 100_000
    assert any("older lines: " + os.environ["WORKBENCH_HOME"] in page for page in pages[:-1])


def test_an_error_fails_the_cell_and_stops_run_all(kernel):
    failing, after = kernel.send("%%ranks\nx = 1\n1 / rank"), kernel.send("print('not reached')")
    ran = kernel.collect(failing)
    assert ran.status == "error" and kernel.reply(after)["status"] == "aborted"
    assert ran.error.startswith("RankFailed: rank 0 of 8 failed in cell") and ran.error.endswith("ZeroDivisionError: division by zero")
    assert "----> 2 1 / rank" in ran.error and "magics.py" not in ran.error


@pytest.mark.parametrize(
    "cell, told",
    [
        ("%%ranks 9\n1", "UsageError: ranks='9' names rank 9\nranks run from 0 to 7\nchoose with an int, a list"),
        ("%%ranks tp=7\n1", "UsageError: ranks='tp=7' names"),
        ("%%ranks --fast\n1", "UsageError: unrecognized arguments: --fast\nusage: %%ranks [--timeout"),
        ("%%ranks 'a\n1", 'UsageError: "\'a" cannot be read: No closing quotation'),
        ("%ranks dance", "UsageError: %ranks dance: the verb must be one of status, diagnose"),
        ("%launch 0", "UsageError: world_size is 0; it must be between 1 and 512"),
        ("%launch four", "UsageError: argument world_size: invalid int value: 'four'"),
        ("%launch 4 --layout tp=3", "UsageError: --layout tp=3: "),
    ],
)
def test_bad_lines_are_told_without_a_stack(kernel, cell, told):
    ran = kernel.run(cell)
    assert ran.status == "error" and ran.error.startswith(told) and "Traceback" not in ran.error
    assert kernel.run("%%ranks 0\n1").status == "ok"  # nothing was closed


def test_a_syntax_error_is_said_once(kernel):
    ran = kernel.run("%%ranks\nx = 1\nx = = 2")
    assert ran.status == "error" and ran.error.count("x = = 2") == 1 and "magics.py" not in ran.error and "<cell>:2" in ran.error
    assert ran.shown == [] and "SyntaxError" in ran.error


def test_the_stop_button_frees_the_ranks_and_the_next_cell_works(kernel):
    ran = kernel.run("%%ranks\nprint('begun', flush=True)\nif rank: dist.barrier()\ntime.sleep(60)", interrupt_after_s=1.5)
    assert ran.seconds < 6 and ran.status == "error"
    assert ran.error.startswith("KeyboardInterrupt: cell") and "was stopped; ranks free after" in ran.error
    assert "rank 1 waits in barrier" in ran.error and "magics.py" not in ran.error
    assert ran.shown[-1][1]["text/plain"] == "[ranks 0-7] begun"
    assert kernel.run("%%ranks\nrank // 8").shown[-1][1]["text/plain"] == "[ranks 0-7] 0"


def test_a_background_cell_goes_on_in_its_own_panel(kernel):
    kernel.reply(kernel.client.complete("la", 2))  # the first takes seconds; the one below must end before the cell does
    begun = kernel.send(
        "%%ranks 0-1 --bg --out later\nfor i in range(8):\n    print('tick', i, flush=True)\n    time.sleep(0.25)\n1 / (1 - rank)"
    )
    ran = kernel.collect(begun)
    assert ran.status == "ok" and ran.seconds < 1.0
    assert "its handle is `later`" in ran.shown[0][1]["text/plain"]
    kernel.client.complete("la", 2)  # what is asked for while one types the next cell
    waited = kernel.run("while not later.done(): __import__('time').sleep(0.1)\n__import__('time').sleep(0.5)")
    requests = {request for request, kind, _ in waited.others if kind == "update_display_data"}
    assert requests == {begun}  # VS Code takes no page that belongs to anything but a cell
    pages = [content["data"]["text/plain"] for _, kind, content in waited.others if kind == "update_display_data"]
    assert any("tick 3" in page and "tick 7" not in page for page in pages)
    (last,) = [bundle["text/html"] for _, bundle in waited.shown]  # nbclient takes what belongs to the cell that runs now
    assert "RankFailed: rank 1 of 8 failed" in last and "tick 7" in last
    assert kernel.run("later.result()").error.startswith("RankFailed: rank 1 of 8")


def test_the_front_end_completes_and_inspects(kernel):
    kernel.run("%%ranks\nsamples = torch.zeros(2)")
    code = "%%ranks\nsamples.num"
    kernel.client.complete(code, len(code))
    found = kernel.client.get_shell_msg(timeout=20)["content"]
    assert set(found["matches"]) == {"numel", "numpy"} and code[found["cursor_start"] :] == "num"
    kernel.client.inspect("samples", 7)
    assert "[ranks 0-7] samples: Tensor [2] float32" in kernel.client.get_shell_msg(timeout=20)["content"]["data"]["text/plain"]


def test_a_name_of_the_ranks_is_pointed_to(kernel):
    kernel.run("%%ranks 3-4\nonly_there = 1")
    ran = kernel.run("only_there + 1")
    assert ran.status == "error" and "NameError" in ran.error
    assert ran.streamed == "only_there lives on ranks 3-4: use a %%ranks cell, or cluster.pull('only_there')\n"


def test_a_notebook_that_was_run_holds_its_last_pages(tmp_path):
    cells = [
        "%load_ext workbench\n%launch 2",
        "%%ranks\nimport time\nfor i in range(4): print(i, flush=True); time.sleep(0.3)\nrank",
        "%ranks close",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=60, kernel_name="python3", extra_arguments=["--IPKernelApp.log_level=ERROR"]).execute()
    (page,) = notebook.cells[1].outputs
    assert page.output_type == "display_data" and page.data["text/plain"].splitlines()[-2:] == ["[rank 0] 0", "[rank 1] 1"]
    assert page.data["text/plain"].startswith("[ranks 0-1] 0\n[ranks 0-1] 1\n") and "waits for" not in page.data["text/html"]
    assert notebook.cells[2].outputs[0].text == "cluster: closed, 2 ranks ended\n"


def test_ranks_of_a_kernel_that_dies_in_the_middle_of_a_stream_are_gone():
    kernel = Kernel()
    try:
        kernel.run("%load_ext workbench\n%launch 2")
        pids = [int(pid) for pid in kernel.run("print(*[cluster.pid(r) for r in range(2)])").streamed.split()]
        sent = kernel.send("%%ranks\nwhile True: print('x' * 100)")
        while kernel.client.get_iopub_msg(timeout=20)["msg_type"] != "display_data":
            pass
        assert sent and all(map(lives, pids))
        os.kill(kernel.pid, signal.SIGKILL)
        killed = time.monotonic()
        while any(map(lives, pids)) and time.monotonic() - killed < 10:
            time.sleep(0.05)
        assert not any(map(lives, pids)) and time.monotonic() - killed < 3
    finally:
        kernel.close()


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
