"""Run: the records of one rollout, as tables and figures; what a notebook holds.

Knows records. Does not know ranks, engines or where a figure is drawn: tables come from `frames`, folders from `store`, pictures from
`view`, each imported when it is first asked for.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from workbench.records import FinishReason, MemorySample, RolloutBatch, SleepReport, Span

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["Run", "RunSummary", "load_run", "runs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A run in numbers.

    Attributes:
        num_tokens: generated tokens, prompts not counted.
        tokens_per_s: generated tokens per second of generating; NaN when no generate span was recorded.
        truncated_share: share of completions cut at the token limit, failed ones not counted; NaN without completions.
        duration_s: from the first span's start to the last one's end.
    """

    num_steps: int
    num_ranks: int
    num_prompts: int
    num_completions: int
    num_failed: int
    num_tokens: int
    tokens_per_s: float
    truncated_share: float
    duration_s: float


class Run:
    """The records of one rollout.

    Args:
        batches: step -> rank -> what that rank holds afterwards.
        spans: what ran when on which rank.
        memory: memory of every process over time.
        sleeps: a report for each sleep of an engine process.
        marks: spans named "mark" with a label; they may also stand in `spans`.
        manifest: how the run was made: versions, environment, seeds, layout, model hash, every option; kept as plain JSON values.
        start_s: the run's start on the clock of the records (`time.monotonic()`), subtracted from all times that are shown.
    """

    def __init__(
        self,
        *,
        batches: Mapping[int, Mapping[int, RolloutBatch]],
        spans: Iterable[Span] = (),
        memory: Iterable[MemorySample] = (),
        sleeps: Iterable[SleepReport] = (),
        marks: Iterable[Span] = (),
        manifest: Mapping[str, Any] | None = None,
        start_s: float = 0.0,
    ) -> None:
        self.batches = {step: dict(sorted(of_rank.items())) for step, of_rank in sorted(batches.items())}
        self.spans = (*spans, *marks)
        self.samples = tuple(memory)
        self.sleeps = tuple(sleeps)
        self.start_s = start_s
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.manifest: dict[str, Any] = {"started_at": now, **plain(manifest or {})}

    def __digest__(self) -> Any:
        """What of it must be equal when it is reproduced: completions, not times."""
        return self.batches

    @cached_property
    def completions(self) -> pd.DataFrame:
        """A row a completion, failed ones included (finish_reason "error"), ordered by step, origin_rank, prompt_index, sample_index."""
        from workbench.frames import completions_frame

        return completions_frame(self.batches)

    @cached_property
    def lengths(self) -> pd.DataFrame:
        """Length of each completion that did not fail, with what it is studied by."""
        from workbench.frames import lengths_frame

        return lengths_frame(self.completions)

    @cached_property
    def timeline(self) -> pd.DataFrame:
        """A row a span: step, rank (-1: the engine's own process), span, start_s, end_s, num_bytes, label."""
        from workbench.frames import timeline_frame

        return timeline_frame(self.spans, start_s=self.start_s)

    @cached_property
    def memory(self) -> pd.DataFrame:
        """A row a process and time: time_s, rank, pid, process, rss_bytes, pss_bytes, device_used_bytes, phase."""
        from workbench.frames import memory_frame

        return memory_frame(self.samples, self.spans, start_s=self.start_s)

    @cached_property
    def sleep_report(self) -> pd.DataFrame:
        """A row a sleep: step, rank, level, weights_bytes, kv_cache_bytes, freed_bytes, sleep_s, wake_s, regained_bytes."""
        from workbench.frames import sleep_frame

        return sleep_frame(self.sleeps)

    def batch(self, rank: int, step: int = -1) -> RolloutBatch:
        """What `rank` held after `step`; a negative step counts from the last.

        Raises:
            ValueError: the run has no such step or rank.
        """
        steps = list(self.batches)
        chosen = steps[step] if -len(steps) <= step < 0 else step
        if chosen not in self.batches:
            raise ValueError(f"run.batch(rank={rank}, step={step}): the run has no such step\nit has {_listed(steps, 'step')}")
        if rank not in self.batches[chosen]:
            held = _listed(list(self.batches[chosen]), "rank")
            raise ValueError(f"run.batch(rank={rank}, step={step}): no batch of that rank\nstep {chosen} has {held}")
        return self.batches[chosen][rank]

    @property
    def marks(self) -> tuple[Span, ...]:
        """The labels that `cluster.mark` left, in order of time."""
        return tuple(sorted((s for s in self.spans if s.span == "mark"), key=lambda s: s.start_s))

    @cached_property
    def summary(self) -> RunSummary:
        """The run in numbers."""
        batches = [batch for of_rank in self.batches.values() for batch in of_rank.values()]
        codes = [code for batch in batches for code in batch.finish_codes.tolist()]
        num_failed = codes.count(FinishReason.ERROR)
        num_good = len(codes) - num_failed
        num_tokens = sum(batch.tokens.size for batch in batches)
        generate_s = _generate_s(self.spans)
        work = [span for span in self.spans if span.span != "mark"]
        return RunSummary(
            num_steps=len(self.batches),
            num_ranks=len({rank for of_rank in self.batches.values() for rank in of_rank}),
            num_prompts=sum(len(batch.prompts) for batch in batches),
            num_completions=len(codes),
            num_failed=num_failed,
            num_tokens=num_tokens,
            tokens_per_s=num_tokens / generate_s if generate_s else math.nan,
            truncated_share=codes.count(FinishReason.LENGTH) / num_good if num_good else math.nan,
            duration_s=max(span.end_s for span in work) - min(span.start_s for span in work) if work else 0.0,
        )

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of generating."""
        return self.summary.tokens_per_s

    @property
    def truncated_share(self) -> float:
        """Share of completions cut at the token limit."""
        return self.summary.truncated_share

    def plot_lengths(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Histogram of completion lengths; options as in `workbench.view.plot_lengths`."""
        from workbench.view import plot_lengths

        return plot_lengths(self, ax, **options)

    def plot_timeline(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Spans of each rank over time; options as in `workbench.view.plot_timeline`."""
        from workbench.view import plot_timeline

        return plot_timeline(self, ax, **options)

    def plot_memory(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Memory of the processes over time; options as in `workbench.view.plot_memory`."""
        from workbench.view import plot_memory

        return plot_memory(self, ax, **options)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the run into a folder of its own, whole or not at all: Parquet tables and manifest.json.

        A run that was saved there before is replaced.

        Raises:
            RunError: the folder holds something else, or cannot be written.
        """
        from workbench.store.folder import save_run

        save_run(self, folder)

    def __repr__(self) -> str:
        s = self.summary
        failed = f", {s.num_failed} failed" if s.num_failed else ""
        speed = "" if math.isnan(s.tokens_per_s) else f", {s.tokens_per_s:,.0f} tokens/s"
        cut = "" if math.isnan(s.truncated_share) else f", {s.truncated_share:.0%} cut"
        counts = f"{count(s.num_steps, 'step')}, {count(s.num_ranks, 'rank')}, {count(s.num_completions, 'completion')}{failed}"
        return f"Run({counts}, {count(s.num_tokens, 'token')}{speed}{cut})"

    def _repr_html_(self) -> str:
        from workbench.view.report import run_html

        return run_html(self)


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Read back whole what `run.save(folder)` wrote.

    Raises:
        RunError: no run there, one that is damaged, or one of a newer format.
    """
    from workbench.store.folder import read_run

    return read_run(folder)


def runs() -> pd.DataFrame:
    """The last runs of this user, kept without being asked, newest first: started_at, model, mode, num_completions, path.

    They lie in `$WORKBENCH_HOME/runs`, else in `~/.cache/workbench/runs`; `wb.load_run(path)` opens one.
    """
    from workbench.store.kept import kept_runs

    return kept_runs()


def count(number: int, noun: str) -> str:
    """A count in words: "1 rank", "1,024 ranks"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def plain(value: Any) -> Any:
    """`value` in JSON's own types, so that a saved manifest reads back equal; what JSON lacks becomes text."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return plain(value.tolist())
    return str(value)


def _generate_s(spans: Iterable[Span]) -> float:
    """Seconds spent generating: per step from the first to the last moment that the engine, or else some rank, generates."""
    found = [span for span in spans if span.span == "generate"]
    found = [span for span in found if span.rank < 0] or found
    total = 0.0
    for step in {span.step for span in found}:
        of_step = [span for span in found if span.step == step]
        total += max(span.end_s for span in of_step) - min(span.start_s for span in of_step)
    return total


def _listed(numbers: list[int], noun: str) -> str:
    return f"{noun}s {', '.join(map(str, numbers))}" if numbers else f"no {noun}s"
