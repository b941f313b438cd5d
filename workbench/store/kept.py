"""The last runs of this user, kept without being asked.

Each is a folder as `Run.save` writes it, named by its time; writing happens in a thread, so a rollout does not wait for it.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import RunError
from workbench.home import home
from workbench.run import Run
from workbench.store.folder import MANIFEST, save_run

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["keep_run", "kept_runs", "runs_home"]

NUM_KEPT = 20
_KEEPER = "workbench-keep-run"  # name of the threads that write


def runs_home() -> Path:
    """Where runs are kept: `$WORKBENCH_HOME/runs`, else `~/.cache/workbench/runs`."""
    return home() / "runs"


def keep_run(run: Run) -> threading.Thread:
    """Keep `run` among the last 20, in a thread beside the caller, which need not wait; the process's end does."""
    thread = threading.Thread(target=_keep, args=(run, runs_home()), name=_KEEPER)
    thread.start()
    return thread


def _keep(run: Run, folder: Path) -> None:
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S.%f")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        save_run(run, folder / f"{now}-{uuid.uuid4().hex[:6]}")
    except (OSError, RunError) as error:
        told = str(error).splitlines()[0]
        print(f"workbench: this run was not kept in {folder} ({told}); run.save(folder) still works", file=sys.stderr)
    for old in [*sorted(_kept_folders(folder))[:-NUM_KEPT], *_half_written(folder)]:
        shutil.rmtree(old, ignore_errors=True)  # another driver may be pruning the same folder


def _half_written(folder: Path) -> list[Path]:
    """What drivers that were killed while they wrote left more than an hour ago."""
    return [path for path in folder.glob(".*") if path.is_dir() and time.time() - path.stat().st_mtime > 3600]


def _kept_folders(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob(f"[0-9]*/{MANIFEST}")]


def kept_runs() -> pd.DataFrame:
    """The runs under `runs_home()`, newest first; see `runs`."""
    import pandas as pd

    for thread in threading.enumerate():  # one that is just being written counts
        if thread.name == _KEEPER:
            thread.join(timeout=10.0)
    rows = [row for folder in sorted(_kept_folders(runs_home()), reverse=True) if (row := _kept_row(folder))]
    columns = {"started_at": "str", "model": "str", "mode": "str", "num_completions": "int64", "path": "str"}
    frame = pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=dtype) for name, dtype in columns.items()})
    frame["started_at"] = pd.to_datetime(frame["started_at"], utc=True, format="ISO8601", errors="coerce")
    return frame


def _kept_row(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        how = manifest["run"]
        return {
            "started_at": how["started_at"],
            "model": str(how.get("model", "")),
            "mode": str(how.get("mode", "")),
            "num_completions": manifest["summary"]["num_completions"],
            "path": str(folder),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None  # half deleted, or not ours; load_run tells what is wrong with it
