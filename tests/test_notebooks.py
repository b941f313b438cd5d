"""Each notebook has the cells of its source and runs from the top in a fresh kernel; what is kept has no noise; README's code runs."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

import workbench as wb

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "build_notebooks.py"
spec = importlib.util.spec_from_file_location("build_notebooks", SCRIPT)
assert spec is not None and spec.loader is not None
building = importlib.util.module_from_spec(spec)
spec.loader.exec_module(building)
SOURCES = building.sources()


def names(path: Path) -> str:
    return path.stem


def with_solutions(notebook: Any) -> Any:
    """The notebook with each solution, hidden in its text, as a cell to run in that place."""
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if "<summary>Solution" in cell.source:
            cells += [new_code_cell(code) for code in re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL)]
    notebook.cells = cells
    return notebook


@pytest.mark.parametrize("source", SOURCES, ids=names)
def test_a_notebook_has_the_cells_of_its_source(source):
    assert building.is_in_step(source), f"{source.stem}.ipynb does not have the cells of its source; build it: make notebooks"


@pytest.mark.parametrize("source", SOURCES, ids=names)
def test_what_is_kept_of_a_notebook_has_pictures_or_tables_and_no_noise(source):
    path = building.target_of(source)
    text = path.read_text()
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and notebook.metadata.kernelspec.name == "python3"
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert ('"image/png"' in text or '"text/html"' in text) and path.stat().st_size < 400_000
    assert not re.search(r"0x[0-9a-f]{8,}", text) and "/site-packages/" not in text
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert all(output.metadata["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {}))
    errors = [cell for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "error"]
    assert all("raises-exception" in cell.metadata.tags for cell in errors)


@pytest.mark.parametrize("source", SOURCES, ids=names)
def test_a_notebook_opens_with_what_it_is_about_and_has_an_exercise_and_a_fault(source):
    cells = nbformat.read(building.target_of(source), as_version=4).cells
    assert all(f"**{promise}**" in cells[0].source for promise in ("You will", "You will learn", "You need"))
    assert cells[0].source.startswith("# ") and re.search(r"minute", cells[0].source.rpartition("**You need**")[2])
    assert any("## Exercise" in cell.source for cell in cells)
    assert len(with_solutions(nbformat.read(building.target_of(source), as_version=4)).cells) == len(cells) + 1
    assert any("raises-exception" in cell.metadata.get("tags", ()) for cell in cells)


@pytest.mark.parametrize("source", SOURCES, ids=names)
def test_a_notebook_runs_from_the_top(source):
    """With the solutions of its exercises. That no process is left afterwards is held by the check around every test."""
    import jupytext

    notebook = with_solutions(jupytext.read(source))
    building.execute(notebook, source.parent)
    told = [cell for cell in notebook.cells if "raises-exception" in cell.metadata.get("tags", ())]
    assert all(any(output.output_type == "error" for output in cell.outputs) for cell in told), "a cell that should raise did not"


def test_the_first_notebook_shows_what_it_claims():
    notebook = nbformat.read(ROOT / "notebooks" / "01_run_a_rollout.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = json.dumps(outputs)
    for claim in (
        "equal: 13 of 13",
        "same tokens after waking: True",
        "ended within a second: True",
        "same tokens: True - same engine process: True",
    ):
        assert claim in text
    assert "ranks 0, 1, 3 wait in barrier (line 3); rank 2 finished the cell without it" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3


def test_cleaning_keeps_pictures_and_drops_noise():
    cell = new_code_cell("1", metadata={"execution": {"iopub.execute_input": "2026-01-01"}, "tags": ["keep"]}, execution_count=7)
    cell.outputs = [
        new_output("stream", name="stdout", text="<object at 0x7f0012345678>\n"),
        new_output("display_data", {"text/html": "", "text/plain": "<IPython.core.display.HTML object>"}),
        new_output(
            "execute_result",
            {
                "image/png": "abc",
                "text/html": '<img src="data:image/png;base64,abc">',
                "application/vnd.jupyter.widget-view+json": {"model_id": "1"},
                "text/plain": "<A at 0x7f0012345678>",
            },
            execution_count=7,
            metadata={"image/png": {"width": 9}, "other": 1},
        ),
    ]
    frames = ["\x1b[36mCell\x1b[39m In[3], line 1", "\x1b[36mFile \x1b[39m/home/me/workbench/ranks/cluster.py:7", "RankFailed: rank 1\n"]
    rank = '  File "<cell 3>", line 2, in <module>\n    f(x)\n  File "/home/me/lib.py", line 9, in f\n    g(x)\n    ^^^^\nValueError: x\n'
    failed = new_code_cell("2", outputs=[new_output("error", ename="RankFailed", evalue=rank, traceback=[*frames, rank])])
    notebook = new_notebook(cells=[cell, new_code_cell("1"), failed], metadata={"widgets": {"state": {}}})
    building.clean(notebook)
    stream, result = notebook.cells[0].outputs
    assert stream.text == "<object>\n"
    assert result.data == {"image/png": "abc", "text/plain": "<A>"} and result.metadata == {"image/png": {"width": 9}}
    assert notebook.cells[0].metadata == {"tags": ["keep"]} and "widgets" not in notebook.metadata
    assert [c.execution_count for c in notebook.cells] == [1, 2, 3] and result.execution_count == 1
    (error,) = notebook.cells[2].outputs
    assert error.evalue == '  File "<cell 3>", line 2, in <module>\n    f(x)\nValueError: x\n'
    assert error.traceback == [frames[0], frames[2], error.evalue]
    assert notebook.cells[1].id == f"{notebook.cells[0].id}-1"  # equal cells, different ids, both from the cells alone
    nbformat.validate(notebook)


def test_a_notebook_that_was_changed_is_told_with_the_command(tmp_path, monkeypatch, capsys):
    source = tmp_path / "09_count.py"
    source.write_text("# %%\n1 + 1\n")
    building.build(source)
    assert building.check([source]) == 0
    source.write_text("# %%\n1 + 2\n")
    assert building.check([source]) == 1
    assert capsys.readouterr().err == "09_count.ipynb does not have the cells of 09_count.py; build it: make notebooks\n"


def test_two_builds_of_the_same_work_are_equal(tmp_path):
    source = tmp_path / "09_count.py"
    source.write_text("# %% [markdown]\n# Count\n\n# %%\nprint(object())\n\n# %% tags=['raises-exception']\n1 / 0\n")
    first = building.build(source).read_bytes()
    assert building.build(source).read_bytes() == first


def test_a_source_that_fails_leaves_the_notebook_as_it_is(tmp_path, monkeypatch, capsys):
    source = tmp_path / "09_fail.py"
    source.write_text("# %%\n1 / 0\n")
    target = building.target_of(source)
    target.write_text("old")
    monkeypatch.setattr(building, "FOLDER", tmp_path)
    monkeypatch.setattr(building, "sources", lambda: [source])
    assert building.main([]) == 1
    told = capsys.readouterr().err
    assert "09_fail.py did not run to its end; 09_fail.ipynb stays as it is" in told and "ZeroDivisionError" in told
    assert target.read_text() == "old"


def test_a_name_that_no_notebook_has_is_told():
    done = subprocess.run([sys.executable, str(SCRIPT), "77"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no notebook begins with 77" in done.stderr and "01_run_a_rollout" in done.stderr


def test_the_contents_page_lists_every_notebook():
    page = (ROOT / "notebooks" / "README.md").read_text()
    assert all(f"({source.stem}.ipynb)" in page for source in SOURCES)


def test_the_code_in_the_readme_runs():
    """Statement by statement, as in cells: only the one that promises a deadlock raises, and that is what it raises."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    raised = []
    try:
        for statement in ast.parse(code).body:
            try:
                exec(compile(ast.Module([statement], []), "README.md", "exec"), names)
            except wb.RankDeadlock as error:
                raised.append((code.splitlines()[statement.lineno - 1], str(error)))
    finally:
        getattr(names.get("cluster"), "close", lambda: None)()
    ((line, told),) = raised
    assert "# RankDeadlock" in line and "ranks 0, 1, 3 wait in barrier" in told and "rank 2 finished the cell without it" in told
    run = names["run"]
    assert isinstance(run, wb.Run) and len(run.completions) == 4 * 5


def test_the_pictures_in_the_readme_are_there_and_described():
    pictures = re.findall(r'<img src="([^"]+)"[^>]* alt="([^"]+)"|!\[([^\]]+)\]\(([^)]+\.png)\)', (ROOT / "README.md").read_text())
    assert pictures
    for source, alt, other_alt, other_source in pictures:
        assert (ROOT / (source or other_source)).is_file() and len(alt or other_alt) > 30
