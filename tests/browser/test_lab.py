"""The notebook as people meet it: JupyterLab, its buttons, ranks under it."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import leaks
import psutil
import pytest
from playwright.sync_api import expect

from browser.lab import PICTURES, Lab, Notebook

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parent.parent.parent
Open = Callable[[str], Notebook]


def test_the_first_notebook_runs_in_jupyterlab(lab: Lab, open_notebook: Open) -> None:
    shutil.copy(ROOT / "notebooks" / "01_run_a_rollout.ipynb", lab.notebooks)
    notebook = open_notebook("01_run_a_rollout.ipynb")
    notebook.page.evaluate("() => window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    notebook.run_all()
    number = notebook.page.locator(".jp-Notebook .jp-Cell").count()
    told = "\n".join(notebook.text(index) for index in range(number))
    assert "equal: 13 of 13" in told and "same tokens: True - same engine process: True" in told
    assert told.count("RankDeadlock: ") == 1 and "ranks 0, 1, 3 wait in barrier (line 3); rank 2 finished the cell without it" in told
    expect(notebook.page.locator(".jp-OutputArea-output img")).to_have_count(3)
    assert "<Cluster of 4 ranks: closed>" in told


def test_a_long_cell_streams_and_the_stop_button_frees_it(lab: Lab, open_notebook: Open) -> None:
    cells = [
        "%load_ext workbench\n%launch 2",
        "%%ranks\nimport time\nfor i in range(1000):\n    kept = i\n    print('tick', i, flush=True)\n    time.sleep(0.1)",
        "%%ranks\nkept > 10, world_size",
    ]
    notebook = open_notebook(lab.write("stream.ipynb", cells))
    notebook.run(0)
    notebook.begin(1)
    expect(notebook.cell(1)).to_contain_text("tick 20", timeout=15_000)
    expect(notebook.cell(1)).to_contain_text("[*]")
    assert "tick 990" not in notebook.text(1)
    pressed = time.monotonic()
    notebook.press_stop()
    expect(notebook.cell(1)).to_contain_text("KeyboardInterrupt", timeout=10_000)
    assert time.monotonic() - pressed < 3
    notebook.wait()
    assert "names kept" in notebook.text(1)
    notebook.run(2)
    assert re.search(r"\[ranks 0-1\] \(True, 2\)", notebook.text(2))


def test_a_flood_of_lines_neither_freezes_the_page_nor_swells_the_notebook(lab: Lab, open_notebook: Open) -> None:
    flood = "for i in range(25_000): print(rank, 'line', i, 'of a flood')"
    cells = ["%load_ext workbench\n%launch 4", f"%%ranks\n{flood}", f'cluster.execute("{flood}")', "cluster.close()"]
    notebook = open_notebook(lab.write("flood.ipynb", cells))
    notebook.run(0)
    notebook.page.evaluate(WATCH_TASKS)
    for index in (1, 2):
        notebook.run(index)
        expect(notebook.cell(index)).to_contain_text("99,000 older lines of ranks 0-3: ")
        expect(notebook.cell(index)).to_contain_text("3 line 24999 of a flood")
        assert len(json.dumps(notebook.outputs(index))) < 250_000
    longest_ms = notebook.page.evaluate("() => Math.max(...window.wbTasks)")
    print(f"\n100,000 lines, twice: the page's longest task took {longest_ms:.0f} ms")
    assert longest_ms < 1000
    notebook.run(3)


WATCH_TASKS = """() => {
    window.wbTasks = [0];
    new PerformanceObserver((list) => window.wbTasks.push(...list.getEntries().map((task) => task.duration))).observe({ type: "longtask" });
}"""
COUNT_MOVES = """(panel) => {
    window.wbMoves = [];
    new MutationObserver(() => window.wbMoves.push(performance.now())).observe(panel, { attributes: true, attributeFilter: ["data-t"] });
}"""


def test_the_live_panel_moves_while_a_cell_blocks(lab: Lab, open_notebook: Open) -> None:
    cells = [
        "import workbench as wb\n%load_ext workbench\n%launch 3",
        "wb.view.live(cluster)",
        "%%ranks\nimport time\nif rank == 2:\n    time.sleep(7)\ndist.barrier()",
        "cluster.close()",
    ]
    notebook = open_notebook(lab.write("live.ipynb", cells))
    notebook.run(0)
    notebook.run(1)
    panel = notebook.cell(1).locator(".wb-live")
    expect(panel.locator("[data-rank='2']")).to_contain_text("rank 2")
    expect(panel.locator(".wb-legend li")).to_have_text([" rank 0", " rank 1", " rank 2", " driver"])  # there is no engine
    notebook.begin(2)
    expect(panel).to_contain_text("cell 1 runs")
    panel.evaluate(COUNT_MOVES)
    expect(panel.locator("[data-waits='0'][data-for='2']")).to_be_visible(timeout=6_000)
    moves = notebook.page.evaluate("() => window.wbMoves")
    seconds = (moves[-1] - moves[0]) / 1000
    print(f"\n{len(moves)} pictures in {seconds:.1f} s beside a blocking cell")
    assert len(moves) / seconds > 2.5  # 5 Hz on a quiet machine
    assert "[*]" in notebook.cell(2).inner_text()
    notebook.page.screenshot(path=PICTURES / "the_live_panel_beside_a_blocking_cell.png")
    notebook.wait()
    expect(panel.locator("[data-waits]")).to_have_count(0)
    notebook.run(3)
    expect(notebook.cell(1).locator(".jp-OutputArea-output img")).to_be_visible()  # its last picture stays


def test_a_kernel_restart_leaves_no_process(lab: Lab, open_notebook: Open) -> None:
    cells = [
        "import workbench as wb\ncluster = wb.launch(3)\nengine = wb.start_engine(cluster, kv_cache_bytes=2**26)\nprint(cluster, engine)"
    ]
    notebook = open_notebook(lab.write("restart.ipynb", cells))
    notebook.run(0)
    assert "<engine tiny (vllm, rooted): awake>" in notebook.text(0)
    (kernel,) = lab.kernels()
    ranks_and_servers = kernel.children(recursive=True)
    assert len(ranks_and_servers) > 4  # three ranks, an engine, and those that forked them
    notebook.restart_kernel()
    gone, alive = psutil.wait_procs([kernel, *ranks_and_servers], timeout=5)
    assert not alive, f"{len(gone)} ended; left: {[leaks.command_of(process)[:120] for process in alive]}"
