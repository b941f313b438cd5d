"""`LiveRun`: a rollout while it runs, as records that a view or a terminal's line reads; the rollout fills it.

Knows records. Does not know ranks, engines or widgets: a notebook's picture comes from `view`, imported when it is first shown.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from workbench.records import FinishedCompletion, MemorySample

if TYPE_CHECKING:
    from workbench.run import Run

__all__ = ["LiveRun"]

_LINE_S = 0.5  # between two lines on a terminal
_PLAIN_LINE_S = 5.0  # and where nothing can be overwritten, such as a log


class LiveRun:
    """What has happened so far in a rollout; read from any thread.

    Attributes:
        start_s: the run's start on the clock of the records.
        num_steps: steps asked for.
        step, phase: where it is ("wake_up", "generate", "sleep", "asleep").
        run: the finished run, None while it goes on.
        error: why it ended, "" while it goes on or when it ended well.
    """

    def __init__(self, *, num_steps: int, start_s: float | None = None) -> None:
        self.start_s = time.monotonic() if start_s is None else start_s
        self.num_steps = num_steps
        self.step = 0
        self.phase = ""
        self.run: Run | None = None
        self.error = ""
        self._completions: list[FinishedCompletion] = []
        self._places: set[tuple[int, int, int, int]] = set()
        self._memory: Callable[[float], Sequence[MemorySample]] = lambda _: ()
        self._finished = threading.Event()
        self._lock = threading.Lock()

    @property
    def is_done(self) -> bool:
        return self._finished.is_set()

    @property
    def completions(self) -> tuple[FinishedCompletion, ...]:
        """All that have finished, in the order in which they did."""
        return tuple(self.completions_since(0))

    def completions_since(self, count: int) -> list[FinishedCompletion]:
        """Those that finished after the first `count`; a reader counts what it has got."""
        with self._lock:
            return self._completions[count:]

    def memory_since(self, time_s: float) -> list[MemorySample]:
        """Memory of every process after a time on the clock of the records; -inf gives all."""
        return list(self._memory(time_s))

    def wait(self, timeout_s: float) -> bool:
        """Until it is done, at most so long; whether it is."""
        return self._finished.wait(timeout_s)

    # -- the rollout's side -------------------------------------------------------------------------------------------------------------

    def read_memory_from(self, since: Callable[[float], Sequence[MemorySample]]) -> None:
        self._memory = since

    def add(self, completions: Sequence[FinishedCompletion]) -> None:
        """Take in what has finished; a completion that was generated again (after a prompt beside it failed) counts once."""
        with self._lock:
            for one in completions:
                place = (one.step, one.origin_rank, one.prompt_index, one.sample_index)
                if place not in self._places:
                    self._places.add(place)
                    self._completions.append(one)

    def finish(self, run: Run | None = None, error: str = "") -> None:
        """Nothing more comes; what was set before stays."""
        self.run, self.error = run or self.run, error or self.error
        self._finished.set()

    # -- showing ------------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def shown(self, *, is_notebook: bool) -> Iterator[None]:
        """Within the block: a widget in a notebook, one line that is overwritten on a terminal, a line now and then in a log."""
        if is_notebook:
            from workbench.view.live_rollout import LiveRollout

            widget = LiveRollout(self)
            widget.show(with_picture=False)
            end = widget.close
        else:
            thread = threading.Thread(target=self._print_lines, name="workbench-live-line", daemon=True)
            thread.start()
            end = thread.join
        try:
            yield
        finally:
            self._finished.set()
            end()

    def line(self) -> str:
        """Where it is in one line."""
        done = self.completions_since(0)
        tokens = sum(one.length_tokens for one in done)
        latest = self._memory(time.monotonic() - 1.0)
        held = sum({sample.pid: sample.pss_bytes for sample in latest}.values())
        step = f"step {self.step + 1} of {self.num_steps}, " if self.num_steps > 1 else ""
        memory = f", {held / 2**20:,.0f} MiB held" if held else ""
        return f"rollout: {step}{self.phase or 'starting'}, {len(done):,} completions, {tokens:,} tokens{memory}"

    def _print_lines(self) -> None:
        is_terminal = sys.stderr.isatty()
        while not self._finished.wait(_LINE_S if is_terminal else _PLAIN_LINE_S):
            if is_terminal:
                print(f"\r\x1b[2K{self.line()}", end="", file=sys.stderr, flush=True)
            else:
                print(self.line(), file=sys.stderr, flush=True)
        print(f"\r\x1b[2K{self.line()}" if is_terminal else self.line(), file=sys.stderr, flush=True)
