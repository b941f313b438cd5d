"""Where the workbench keeps what outlives a notebook: runs, tapes of failures, the key of sessions."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["home"]


def home() -> Path:
    """`$WORKBENCH_HOME`, else `$XDG_CACHE_HOME/workbench`, else `~/.cache/workbench`; it may not exist yet."""
    chosen = os.environ.get("WORKBENCH_HOME")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "workbench"
