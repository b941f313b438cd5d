"""Follow a rollout while it runs: what engine processes tell of finished completions, and memory, into a `LiveRun`.

Knows engine handles and the memory sampler. Does not know how a `LiveRun` is shown.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from workbench.live import LiveRun
from workbench.ranks.memory import MemorySampler
from workbench.ranks.progress import is_notebook
from workbench.rollout.finished import FinishedReader
from workbench.rollout.handle import EngineHandle

__all__ = ["Live", "followed"]

Live = bool | Callable[[LiveRun], object]
_EVERY_S = 0.2


@contextmanager
def followed(live: Live, engine: EngineHandle, sampler: MemorySampler, *, num_steps: int, start_s: float) -> Iterator[LiveRun]:
    """Within the block, fill a `LiveRun` and show it; with live=False it stays empty and costs nothing.

    Args:
        live: True shows it; a function is given it instead, once.
    """
    live_run = LiveRun(num_steps=num_steps, start_s=start_s)
    if not live:
        yield live_run
        return
    live_run.read_memory_from(sampler.samples_since)
    readers = engine.finished_readers()
    for reader in readers:
        reader.open()
    thread = threading.Thread(target=_fill, args=(live_run, readers, sampler), name="workbench-live", daemon=True)
    thread.start()
    try:
        if callable(live):
            live(live_run)
        with live_run.shown(is_notebook=is_notebook()) if live is True else nullcontext():
            try:
                yield live_run
            except BaseException as error:
                live_run.error = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise
            finally:
                live_run.phase = sampler.phase
                _take(live_run, readers)
    finally:
        live_run.finish()
        thread.join()
        for reader in readers:
            reader.close()


def _fill(live_run: LiveRun, readers: list[FinishedReader], sampler: MemorySampler) -> None:
    while not live_run.wait(_EVERY_S):
        live_run.phase = sampler.phase
        _take(live_run, readers)


def _take(live_run: LiveRun, readers: list[FinishedReader]) -> None:
    for reader in readers:
        live_run.add(reader.read())
