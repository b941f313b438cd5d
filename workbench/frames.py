"""DataFrames from records: one function a table, each with fixed columns and dtypes, also when it is empty.

Importing this loads pandas; `Run` does so when a table is first asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from workbench.records import FinishReason, MemorySample, Prompt, RolloutBatch, SleepReport, Span

__all__ = ["completions_frame", "lengths_frame", "memory_frame", "sleep_frame", "timeline_frame"]

Batches = Mapping[int, Mapping[int, RolloutBatch]]  # step -> rank -> its batch

COMPLETIONS = {
    "step": "int64",
    "origin_rank": "int64",
    "prompt_index": "int64",
    "sample_index": "int64",
    "prompt": "str",
    "text": "str",
    "length_tokens": "int64",
    "finish_reason": "str",
    "sum_logprob": "float64",
    "weight_version": "int64",
    "num_images": "int64",
    "num_prompt_tokens": "int64",
    "error": "str",
}
LENGTHS = ("step", "origin_rank", "prompt_index", "sample_index", "length_tokens", "num_prompt_tokens", "finish_reason")
TIMELINE = {
    "step": "int64",
    "rank": "int64",
    "span": "str",
    "start_s": "float64",
    "end_s": "float64",
    "num_bytes": "int64",
    "label": "str",
}
MEMORY = {
    "time_s": "float64",
    "rank": "int64",
    "pid": "int64",
    "process": "str",
    "rss_bytes": "int64",
    "pss_bytes": "int64",
    "device_used_bytes": "int64",
    "phase": "str",
}
SLEEP = {
    "step": "int64",
    "rank": "int64",
    "level": "int64",
    "weights_bytes": "int64",
    "kv_cache_bytes": "int64",
    "freed_bytes": "int64",
    "sleep_s": "float64",
    "wake_s": "float64",
    "regained_bytes": "int64",
}


def completions_frame(batches: Batches) -> pd.DataFrame:
    """A row a completion, failed ones included, ordered by step, origin_rank, prompt_index, sample_index."""
    parts = [_completion_columns(step, batch) for step, of_rank in batches.items() for batch in of_rank.values()]
    columns = {name: [value for part in parts for value in part[name]] for name in COMPLETIONS}
    frame = _frame(columns, COMPLETIONS)
    return frame.sort_values(["step", "origin_rank", "prompt_index", "sample_index"], kind="stable", ignore_index=True)


def _completion_columns(step: int, batch: RolloutBatch) -> dict[str, Iterable[Any]]:
    of_prompt = batch.prompt_index.tolist()
    prompts = [prompt_text(prompt) for prompt in batch.prompts]
    num_images = [_num_images(prompt) for prompt in batch.prompts]
    return {
        "step": [step] * len(batch),
        "origin_rank": batch.origin_ranks.tolist(),
        "prompt_index": batch.origin_indices.tolist(),
        "sample_index": batch.sample_index.tolist(),
        "prompt": [prompts[i] for i in of_prompt],
        "text": batch.texts,
        "length_tokens": batch.lengths.tolist(),
        "finish_reason": batch.finish_reasons,
        "sum_logprob": _sum_logprobs(batch).tolist(),
        "weight_version": batch.weight_versions.tolist(),
        "num_images": [num_images[i] for i in of_prompt],
        "num_prompt_tokens": batch.num_prompt_tokens[batch.prompt_index].tolist(),
        "error": batch.errors or [None] * len(batch),
    }


def _sum_logprobs(batch: RolloutBatch) -> NDArray[np.float64]:
    """Log-probability of each whole completion, [num_completions]; NaN where one of its tokens has none, and where it failed."""
    if batch.logprobs is None:
        return np.full(len(batch), np.nan)
    owner = np.repeat(np.arange(len(batch)), batch.lengths)
    sums = np.bincount(owner, weights=batch.logprobs, minlength=len(batch)).astype(np.float64)
    sums[batch.finish_codes == FinishReason.ERROR] = np.nan
    return sums


def prompt_text(prompt: Prompt) -> str:
    """A prompt of any kind as text: token ids and chat messages as JSON."""
    if isinstance(prompt, dict):
        prompt = prompt["prompt"] if "prompt" in prompt else prompt.get("messages", [])
    return prompt if isinstance(prompt, str) else json.dumps(prompt, default=str, ensure_ascii=False)


def _num_images(prompt: Prompt) -> int:
    if not isinstance(prompt, dict):
        return 0
    parts = [part for message in prompt.get("messages", ()) for part in _content_parts(message)]
    return len(prompt.get("images") or ()) + sum(str(part.get("type", "")).startswith("image") for part in parts)


def _content_parts(message: Any) -> list[dict[str, Any]]:
    content = message.get("content") if isinstance(message, dict) else None
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def lengths_frame(completions: pd.DataFrame) -> pd.DataFrame:
    """The columns of `completions_frame` that lengths are studied by, without failed completions."""
    return completions.loc[completions["finish_reason"] != "error", list(LENGTHS)].reset_index(drop=True)


def timeline_frame(spans: Iterable[Span], *, start_s: float) -> pd.DataFrame:
    """A row a span, ordered by its start; times from `start_s`."""
    frame = _frame(_columns(spans, TIMELINE), TIMELINE)
    frame[["start_s", "end_s"]] -= start_s
    return frame.sort_values(["start_s", "rank"], kind="stable", ignore_index=True)


def memory_frame(samples: Iterable[MemorySample], spans: Iterable[Span] = (), *, start_s: float) -> pd.DataFrame:
    """A row a process and time; times from `start_s`.

    A sample whose phase nobody told gets it from the spans of its rank: the one that ran then, or "asleep" after a sleep.
    """
    frame = _frame(_columns(samples, MEMORY), MEMORY)
    frame["phase"] = _phases(frame, list(spans))
    frame["time_s"] -= start_s
    return frame.sort_values(["time_s"], kind="stable", ignore_index=True)


def _phases(frame: pd.DataFrame, spans: list[Span]) -> pd.Series[str]:
    phases = frame["phase"].to_numpy(dtype=object, copy=True)
    untold = (frame["phase"] == "").to_numpy() & (frame["process"] != "driver").to_numpy()
    for rank in {span.rank for span in spans}:
        own = sorted((s for s in spans if s.rank == rank and s.span != "mark"), key=lambda s: s.start_s)
        rows = np.flatnonzero(untold & (frame["rank"] == rank).to_numpy())
        times = frame["time_s"].to_numpy()[rows]
        latest = np.searchsorted([s.start_s for s in own], times, side="right") - 1  # the span begun last before each sample
        for row, time_s, i in zip(rows, times, latest, strict=True):
            if i >= 0:
                phases[row] = own[i].span if time_s <= own[i].end_s else "asleep" if own[i].span == "sleep" else ""
    return pd.Series(phases, index=frame.index, dtype="str")


def sleep_frame(sleeps: Iterable[SleepReport]) -> pd.DataFrame:
    """A row a sleep and the wake after it; a wake still to come is NaN."""
    return _frame(_columns(sleeps, SLEEP), SLEEP)


def _columns(records: Iterable[Any], schema: Mapping[str, str]) -> dict[str, list[Any]]:
    records = list(records)
    return {name: [getattr(record, name) for record in records] for name in schema}


def _frame(columns: Mapping[str, list[Any]], schema: Mapping[str, str]) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(columns[name], dtype=dtype) for name, dtype in schema.items()})
