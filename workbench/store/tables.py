"""Records as Arrow tables and back: tokens and logprobs stay packed and exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from workbench.records import RolloutBatch
from workbench.store.values import from_json, to_json

__all__ = ["batch_tables", "read_batches", "record_table"]

# field of RolloutBatch -> dtype, one number a completion
_NUMBERS = {
    "finish_codes": np.int8,
    "weight_versions": np.int64,
    "prompt_index": np.int32,
    "sample_index": np.int32,
    "origin_ranks": np.int32,
    "origin_indices": np.int32,
    "prompt_hashes": np.uint64,
}


def record_table(records: Sequence[Any]) -> pa.Table:
    """A row a record, a column a field."""
    names = [field.name for field in dataclasses.fields(records[0])] if records else []
    return pa.table({name: pa.array([getattr(record, name) for record in records]) for name in names})


def batch_tables(batches: Mapping[int, Mapping[int, RolloutBatch]]) -> dict[str, pa.Table]:
    """All batches in three tables: "batches" says how many rows of "prompts" and "completions" belong to each."""
    keys = [(step, rank) for step, of_rank in batches.items() for rank in of_rank]
    held = [batches[step][rank] for step, rank in keys]
    return {
        "batches": _counts_table(keys, held),
        "prompts": _rows(keys, [len(b.prompts) for b in held], {
            "prompt": pa.array([to_json(prompt) for b in held for prompt in b.prompts], pa.string()),
            "num_prompt_tokens": _joined([b.num_prompt_tokens for b in held], np.int32),
        }),
        "completions": _rows(keys, [len(b) for b in held], {
            "text": pa.array([text for b in held for text in b.texts], pa.string()),
            "tokens": _lists(held, [b.tokens for b in held], np.int32),
            "logprobs": _lists(held, [_logprobs_or_nan(b) for b in held], np.float32),
            **{name: _joined([getattr(b, name) for b in held], dtype) for name, dtype in _NUMBERS.items()},
            "error": pa.array(chain.from_iterable(b.errors or [None] * len(b) for b in held), pa.string()),
            "metadata": pa.array(chain.from_iterable(_metadata_json(b) for b in held), pa.string()),
        }),
    }  # fmt: skip


def _counts_table(keys: Sequence[tuple[int, int]], held: Sequence[RolloutBatch]) -> pa.Table:
    return pa.table(
        {
            "step": pa.array([step for step, _ in keys], pa.int64()),
            "rank": pa.array([rank for _, rank in keys], pa.int64()),
            "num_prompts": pa.array([len(b.prompts) for b in held], pa.int64()),
            "num_completions": pa.array([len(b) for b in held], pa.int64()),
            "has_logprobs": pa.array([b.logprobs is not None for b in held], pa.bool_()),
            "has_errors": pa.array([bool(b.errors) for b in held], pa.bool_()),
            "has_metadata": pa.array([b.metadata is not None for b in held], pa.bool_()),
        }
    )


def _rows(keys: Sequence[tuple[int, int]], num_rows: Sequence[int], columns: Mapping[str, Any]) -> pa.Table:
    steps, ranks = (np.repeat(np.array([key[i] for key in keys], dtype=np.int64), num_rows) for i in (0, 1))
    return pa.table({"step": steps, "rank": ranks, **columns})


def _joined(arrays: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *(np.asarray(a, dtype) for a in arrays)])


def _lists(held: Sequence[RolloutBatch], values: Sequence[NDArray[Any]], dtype: type) -> pa.Array:
    """One list of numbers a completion."""
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(_joined([b.lengths for b in held], np.int64))])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(_joined(values, dtype)))


def _logprobs_or_nan(batch: RolloutBatch) -> NDArray[np.float32]:
    return np.full(batch.tokens.size, np.nan, np.float32) if batch.logprobs is None else batch.logprobs


def _metadata_json(batch: RolloutBatch) -> Iterable[str | None]:
    return [None] * len(batch) if batch.metadata is None else [to_json(value) for value in batch.metadata]


def read_batches(counts: pa.Table, prompts: pa.Table, completions: pa.Table) -> dict[int, dict[int, RolloutBatch]]:
    """What `batch_tables` was given."""
    batches: dict[int, dict[int, RolloutBatch]] = {}
    asked, made = _Columns(prompts), _Columns(completions)
    first_prompt = first = 0
    for row in counts.to_pylist():
        of_prompts = slice(first_prompt, first_prompt + row["num_prompts"])
        of_completions = slice(first, first + row["num_completions"])
        batches.setdefault(row["step"], {})[row["rank"]] = _batch(row, asked, of_prompts, made, of_completions)
        first_prompt, first = of_prompts.stop, of_completions.stop
    return batches


class _Columns:
    """Columns of a table, each converted once and cut many times."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()
        self._ready: dict[str, Any] = {}

    def numbers(self, name: str, rows: slice) -> NDArray[Any]:
        if name not in self._ready:
            self._ready[name] = self._table[name].to_numpy()
        cut: NDArray[Any] = self._ready[name][rows].copy()
        return cut

    def objects(self, name: str, rows: slice) -> list[Any]:
        if name not in self._ready:
            self._ready[name] = self._table[name].to_pylist()
        found: list[Any] = self._ready[name][rows]
        return found

    def lists(self, name: str, rows: slice) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The rows' lists packed, and their offsets, [num_rows + 1]."""
        if name not in self._ready:
            column = _one_chunk(self._table[name])
            self._ready[name] = (column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy().astype(np.int64))
        values, offsets = self._ready[name]
        own = offsets[rows.start : rows.stop + 1]
        return values[own[0] : own[-1]].copy(), own - own[0]


def _one_chunk(column: Any) -> Any:
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks) if chunks else pa.array([], column.type)


def _batch(row: Mapping[str, Any], asked: _Columns, of_prompts: slice, made: _Columns, of_completions: slice) -> RolloutBatch:
    tokens, offsets = made.lists("tokens", of_completions)
    logprobs, _ = made.lists("logprobs", of_completions)
    return RolloutBatch(
        prompts=tuple(_values(asked.objects("prompt", of_prompts))),
        texts=tuple(made.objects("text", of_completions)),
        tokens=tokens,
        offsets=offsets,
        logprobs=logprobs if row["has_logprobs"] else None,
        num_prompt_tokens=asked.numbers("num_prompt_tokens", of_prompts),
        errors=tuple(made.objects("error", of_completions)) if row["has_errors"] else (),
        metadata=tuple(_values(made.objects("metadata", of_completions))) if row["has_metadata"] else None,
        **{name: made.numbers(name, of_completions) for name in _NUMBERS},
    )


def _values(texts: Sequence[str]) -> Iterator[Any]:
    return (from_json(text) for text in texts)
