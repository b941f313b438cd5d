"""From a cluster's history to a session's file. Knows what a cluster was launched with. Does not know how a file is laid out."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from workbench.environment import describe_environment
from workbench.plan.layout import Layout
from workbench.ranks.history import History
from workbench.ranks.processes import LaunchOptions
from workbench.ranks.session import Session, write_session

__all__ = ["save_session"]


def save_session(options: LaunchOptions, layout: Layout, history: History, path: str | os.PathLike[str]) -> Path:
    """Write the history so far.

    Raises:
        SessionError: the file holds something else, or cannot be written.
    """
    entries = history.told()
    notes = [f"cell {number}, {entry.text or entry.task}: {entry.unkept}" for number, entry in enumerate(entries, start=1) if entry.unkept]
    if history.num_left_out:
        notes.append(f"{history.num_left_out} cells after the first {len(entries)} are not in this session")
    session = Session(
        launch={
            "world_size": options.world_size,
            "seed": options.seed,
            "collective_timeout_s": options.collective_timeout_s,
            "check_collectives": options.check_collectives,
            "start_method": options.start_method,
            "record": "failures" if options.records_failures else None,
        },
        environment=describe_environment(),
        layout=repr(layout),
        saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
        entries=entries,
        values={entry.value: history.values[entry.value] for entry in entries if entry.value},
        notes=tuple(notes),
    )
    return write_session(session, path)
