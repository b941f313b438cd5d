"""A run on disk: Parquet tables beside a manifest that carries their hashes; written whole or not at all, read back exactly.

    manifest.json        format, version, how the run was made, sha256 of every file and of itself
    batches.parquet      a row a step and rank: how many rows of the next two are its own
    prompts.parquet      a row a prompt        completions.parquet   a row a completion, its tokens and logprobs as lists
    spans.parquet   memory.parquet   sleeps.parquet   records as they are, times from the run's start

Nothing is pickled, so a folder from elsewhere can be opened safely: prompts and metadata are JSON (`values`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import workbench
from workbench.errors import RunError
from workbench.records import MemorySample, SleepReport, Span
from workbench.run import Run

__all__ = ["read_run", "save_run"]

FORMAT = "workbench-run"
FORMAT_VERSION = 1
_TABLES = ("batches", "prompts", "completions", "spans", "memory", "sleeps")
MANIFEST = "manifest.json"

Record = TypeVar("Record", Span, MemorySample, SleepReport)


def save_run(run: Run, folder: str | os.PathLike[str]) -> None:
    """Write `run` into `folder`; see `Run.save`."""
    target = Path(folder).expanduser().absolute()
    _refuse_other_things(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            _write_files(run, half)
            _put_in_place(half, target)
        finally:
            shutil.rmtree(half, ignore_errors=True)
    except OSError as error:
        told = f"the run was not saved in {target}: {error}\nnothing was left there\nfree space, or choose another folder"
        raise RunError(told) from error


def _refuse_other_things(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise RunError(f"the run was not saved: {target} is a file\na run needs a folder of its own; choose a new name")
    seen = sorted(path.name for path in target.iterdir())
    if seen and not (MANIFEST in seen and all(name == MANIFEST or name.endswith(".parquet") for name in seen)):
        raise RunError(
            f"the run was not saved: the folder {target} holds something else\n"
            f"seen: {_shortened(seen)}; needed: a new or empty folder, or an earlier saved run to replace\n"
            "choose another name, or empty the folder yourself"
        )


def _write_files(run: Run, folder: Path) -> None:
    import pyarrow.parquet as parquet

    from workbench.store.tables import batch_tables, record_table

    shifted: dict[str, list[Any]] = {
        "spans": [replace(s, start_s=s.start_s - run.start_s, end_s=s.end_s - run.start_s) for s in run.spans],
        "memory": [replace(s, time_s=s.time_s - run.start_s) for s in run.samples],
        "sleeps": list(run.sleeps),
    }
    tables = {**batch_tables(run.batches), **{name: record_table(records) for name, records in shifted.items()}}
    for name, table in tables.items():
        parquet.write_table(table, folder / f"{name}.parquet", compression="zstd")
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "workbench": workbench.__version__,
        "run": run.manifest,
        "summary": {k: v if v == v else None for k, v in dataclasses.asdict(run.summary).items()},  # NaN is no JSON
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": _self_hash(manifest)}, indent=1), encoding="utf-8")


def _put_in_place(half: Path, target: Path) -> None:
    """Rename a finished folder to its name; an earlier run there steps aside first, and comes back if that fails."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(half, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        os.rename(target, aside)
        try:
            os.rename(half, target)
        except OSError:
            os.rename(aside, target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read a run back; see `load_run`."""
    source = Path(folder).expanduser().absolute()
    manifest = _read_manifest(source)
    _check_files(source, manifest["files"])
    import pyarrow.parquet as parquet

    from workbench.store.tables import read_batches

    tables = {name: parquet.read_table(source / f"{name}.parquet") for name in _TABLES}
    return Run(
        batches=read_batches(tables["batches"], tables["prompts"], tables["completions"]),
        spans=_records(Span, tables["spans"]),
        memory=_records(MemorySample, tables["memory"]),
        sleeps=_records(SleepReport, tables["sleeps"]),
        manifest=manifest["run"],
    )


def _records(kind: type[Record], table: Any) -> list[Record]:
    columns = table.to_pydict()
    return [kind(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _read_manifest(source: Path) -> dict[str, Any]:
    if not source.is_dir():
        raise RunError(f"no run in {source}: there is no such folder\n{_WHERE_RUNS_ARE}")
    path = source / MANIFEST
    if not path.is_file():
        seen = _shortened(sorted(p.name for p in source.iterdir())) or "nothing"
        raise RunError(f"no run in {source}: it has no {MANIFEST}\nseen: {seen}\n{_WHERE_RUNS_ARE}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"the run in {source} is damaged: {MANIFEST} is no JSON ({error})\n{_ANOTHER_COPY}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        compared = f"seen: format {found!r}; needed: {FORMAT!r}"
        raise RunError(f"no run in {source}: its {MANIFEST} is another program's\n{compared}\n{_WHERE_RUNS_ARE}")
    version = manifest.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        made_by = manifest.get("workbench", "unknown")
        raise RunError(
            f"the run in {source} is of a newer format\nseen: format {version}, written by workbench {made_by}; "
            f"this workbench ({workbench.__version__}) reads up to {FORMAT_VERSION}\nupgrade the workbench to open it"
        )
    if manifest.pop("sha256", None) != _self_hash(manifest):
        raise RunError(f"the run in {source} is damaged: {MANIFEST} was changed after it was written\n{_ANOTHER_COPY}")
    return manifest


_WHERE_RUNS_ARE = "give the folder that run.save(folder) wrote; wb.runs() lists the runs that were kept"
_ANOTHER_COPY = "take another copy of the folder, or run it again: manifest.json holds every option"


def _check_files(source: Path, files: Mapping[str, str]) -> None:
    missing = [name for name in files if not (source / name).is_file()]
    if missing:
        raise RunError(f"the run in {source} is damaged: {_shortened(missing)} missing\nneeded: {_shortened(list(files))}\n{_ANOTHER_COPY}")
    for name, needed in files.items():
        seen = _sha256(source / name)
        if seen != needed:
            raise RunError(
                f"the run in {source} is damaged: {name} was changed after it was written\n"
                f"seen: sha256 {seen[:12]}...; needed: {needed[:12]}...\n{_ANOTHER_COPY}"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _self_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
