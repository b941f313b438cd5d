"""Which tape a rank writes: the one that was asked for, or, with `record="failures"`, one that goes on from launch.

    from launch     cell | cell | cell | ...             begun anew, with the names as they are then, when it has grown long, when the group
                                                         was formed anew, or after a cell that was stopped inside its own code
    within a block  cluster.record(dir): a tape in dir   the other one rests, and is begun anew afterwards

Knows this rank. Does not know the driver, which copies the tape of a cell that failed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from workbench.ranks.current import current
from workbench.ranks.snapshot import snapshot_names
from workbench.ranks.steady import steady_pickles
from workbench.ranks.tape import TapeWriter, current_writer, set_writer, tape_name

__all__ = ["FailureTape", "MOST_TAPE_BYTES", "start_tape", "stop_tape", "writer_for"]

MOST_TAPE_BYTES = 1 << 28  # of one rank; a cell that brings more is kept up to there
_BEGIN_ANEW_BYTES = 1 << 26
_MOST_NAME_BYTES = 1 << 27
_OURS = {"rank", "world_size", "group", "groups", "torch", "dist", "wb"}


class FailureTape:
    """The tape that goes on from launch; its cells are what a replay runs again, so that models and groups are made as they were."""

    def __init__(self, folder: str, rank: int) -> None:
        self._path = Path(folder) / tape_name(rank)
        self._writer: TapeWriter | None = None
        self._generation = -1
        self.rests = False

    def writer(self, generation: int) -> TapeWriter:
        """The tape for the next cell, begun anew where it must be."""
        last = self._writer
        if last is None or not last.can_go_on or last.num_bytes > _BEGIN_ANEW_BYTES or generation != self._generation:
            self.close()
            self._path.unlink(missing_ok=True)
            self._generation = generation
            self._writer = _begin(self._path, most_bytes=MOST_TAPE_BYTES)
        assert self._writer is not None
        return self._writer

    def close(self) -> None:
        """End it; the next cell begins another."""
        if self._writer is not None:
            if self._writer is current_writer():
                _unhook()
            self._writer.close()
            self._writer = None


def writer_for(failures: FailureTape | None, generation: int) -> TapeWriter | None:
    """The tape on which a cell goes, None where nothing is recorded."""
    if failures is None or failures.rests:
        return current_writer()
    return failures.writer(generation)


def start_tape(folder: str) -> None:
    """Runs in a rank: begin its tape, with the names that earlier cells left."""
    me = current()
    assert me.process is not None
    if me.process.failures is not None:
        me.process.failures.close()
        me.process.failures.rests = True
    _begin(Path(folder) / tape_name(me.rank))


def stop_tape() -> None:
    """Runs in a rank: close its tape."""
    me = current()
    assert me.process is not None
    if me.process.failures is not None:
        me.process.failures.rests = False
    made = current_writer()
    if made is not None:
        _unhook()
        made.close()


def _begin(path: Path, most_bytes: int | None = None) -> TapeWriter:
    me = current()
    assert me.process is not None
    held = vars(sys.modules["__main__"])
    names: dict[str, Any] = {name: value for name, value in held.items() if not name.startswith("__") and name not in _OURS}
    data, unkept = snapshot_names(names, held, None if most_bytes is None else _MOST_NAME_BYTES) if names else (b"", {})
    made = TapeWriter(path, most_bytes)
    made.start(rank=me.rank, world_size=me.world_size, layout=me.layout, has_layout=me.has_layout, names=data, unkept=unkept)
    me.process.interceptor.hooks.append(made)
    steady_pickles(True)
    set_writer(made)
    return made


def _unhook() -> None:
    process = current().process
    made = current_writer()
    if process is not None and made is not None:
        process.interceptor.hooks.remove(made)
    steady_pickles(False)
    set_writer(None)
