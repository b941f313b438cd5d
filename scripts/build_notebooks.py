"""Build `notebooks/NN_title.ipynb` from `NN_title.py` (jupytext percent), executed from the top in a fresh kernel.

    scripts/build_notebooks.py               build all                    (what `make notebooks` calls)
    scripts/build_notebooks.py 01 03         build those whose name begins so
    scripts/build_notebooks.py --check       tell which notebooks have other cells than their source, exit code 1 if any has

The `.py` is what people write and review; the `.ipynb` is what readers see. What changes without reason is dropped from it: times, memory
addresses, widget state, random cell ids, progress lines. Pictures and tables stay, so two builds differ only where the work does.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
CELL_LIMIT_S = 300
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}  # in every environment with ipykernel
KEPT_TYPES = ("image/png", "image/svg+xml", "text/html", "text/markdown", "text/plain")
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
COLORS = re.compile(r"\x1b\[[0-9;]*m")
LIBRARY_FRAME = re.compile(r'^  File "/[^\n]*\n(?:    [^\n]*\n)*', re.MULTILINE)  # those of the cell are called "<cell 3>"

Cell = tuple[str, str, tuple[str, ...]]


def sources(folder: Path = FOLDER) -> list[Path]:
    return sorted(folder.glob("[0-9][0-9]_*.py"))


def target_of(source: Path) -> Path:
    return source.with_suffix(".ipynb")


def cells_of(notebook: Any) -> list[Cell]:
    """(kind, source, tags) of each cell: what the pair must agree on."""
    return [(cell.cell_type, cell.source, tuple(cell.metadata.get("tags", ()))) for cell in notebook.cells]


def is_in_step(source: Path) -> bool:
    """Whether the built notebook is there and has the cells of its source."""
    target = target_of(source)
    return target.exists() and cells_of(nbformat.read(target, as_version=4)) == cells_of(jupytext.read(source))


def execute(notebook: Any, folder: Path) -> None:
    """Run all cells from the top in a fresh kernel; only cells tagged "raises-exception" may raise.

    Raises:
        CellExecutionError: another cell raised.
    """
    notebook.metadata.kernelspec = KERNEL
    client = NotebookClient(
        notebook,
        timeout=CELL_LIMIT_S,
        coalesce_streams=True,  # how prints fall into messages differs from build to build
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # ipykernel warns that it talks over loopback in the clear
        record_timing=False,
        store_widget_state=False,
    )
    client.execute()


def clean(notebook: Any) -> None:
    """Drop what differs between two runs of the same work."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    seen: Counter[str] = Counter()
    number = 0
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        cell.id = f"{digest}-{seen[digest]}" if seen[digest] else digest
        seen[digest] += 1
        if cell.cell_type == "code":
            number += 1
            cell.execution_count = number
            cell.outputs = [output for output in map(_clean_output, cell.outputs) if output is not None]
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = number


def _clean_output(output: Any) -> Any:
    """An output without noise; None for one that shows nothing."""
    if output.output_type == "stream":
        output.text = ADDRESS.sub("", output.text)
        return output if output.text.strip() else None
    if output.output_type == "error":
        frames = [part for part in output.traceback if not COLORS.sub("", part).startswith("File ")]  # the driver's, then the ranks'
        output.traceback = [LIBRARY_FRAME.sub("", part) for part in frames]
        output.evalue = LIBRARY_FRAME.sub("", output.evalue)
        return output
    data = {kind: output.data[kind] for kind in KEPT_TYPES if kind in output.data}
    if "image/png" in data and data.get("text/html", "").startswith("<img "):  # the same once more, which some code hosts do not show
        del data["text/html"]
    if not data.get("text/html", "shown").strip() and set(data) <= {"text/html", "text/plain"}:  # a progress line, taken away again
        return None
    output.data = nbformat.from_dict({kind: ADDRESS.sub("", value) if kind == "text/plain" else value for kind, value in data.items()})
    output.metadata = nbformat.from_dict({kind: value for kind, value in output.metadata.items() if kind in data})
    return output


def build(source: Path) -> Path:
    """Execute a source and write the notebook beside it, whole or not at all."""
    notebook = jupytext.read(source)
    execute(notebook, source.parent)
    clean(notebook)
    target = target_of(source)
    nbformat.validate(notebook)
    draft = target.with_suffix(".ipynb.new")
    nbformat.write(notebook, draft)
    draft.replace(target)
    return target


def check(chosen: Sequence[Path]) -> int:
    late = [source for source in chosen if not is_in_step(source)]
    for source in late:
        print(f"{target_of(source).name} does not have the cells of {source.name}; build it: make notebooks", file=sys.stderr)
    return 1 if late else 0


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="build_notebooks", description="Build the notebooks from their sources and run them.")
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 01; default: all")
    parser.add_argument("--check", action="store_true", help="build nothing, only compare the cells")
    options = parser.parse_args(arguments)
    chosen = [source for source in sources() if not options.names or source.name.startswith(tuple(options.names))]
    if not chosen:
        print(f"no notebook begins with {' or '.join(options.names)}; there are {[s.stem for s in sources()]}", file=sys.stderr)
        return 1
    if options.check:
        return check(chosen)
    for source in chosen:
        try:
            target = build(source)
        except CellExecutionError as error:
            print(f"{source.name} did not run to its end; {target_of(source).name} stays as it is\n{error}", file=sys.stderr)
            return 1
        print(f"{target.relative_to(FOLDER.parent)}: {target.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
