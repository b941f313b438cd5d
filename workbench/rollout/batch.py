"""Completions packed into a `RolloutBatch`, cut by prompts, and joined again.

Knows the packed layout. Does not know engines, ranks or tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from workbench.records import FinishReason, Prompt, RolloutBatch
from workbench.rollout.requests import Request

__all__ = ["Completion", "concat", "empty_batch", "failed_batch", "pack_completions", "select"]


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine gives for one request.

    Attributes:
        tokens: generated token ids, [length].
        logprobs: of each token before temperature, [length], None where one is missing; None when not asked.
        prompt_hash: hash of the prompt that the engine really read.
        error: why it failed, else None.
    """

    tokens: Sequence[int]
    text: str
    finish: FinishReason
    prompt_hash: int
    logprobs: Sequence[float | None] | None = None
    error: str | None = None


def pack_completions(
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    completions: Sequence[Completion],
    *,
    num_prompt_tokens: Sequence[int] | NDArray[np.int32],
    weight_version: int,
    with_logprobs: bool,
) -> RolloutBatch:
    """Pack one completion a request.

    Args:
        requests: from `expand(prompts, ...)`, [num_completions].
        completions: in the order of the requests.
        num_prompt_tokens: [num_prompts].
        weight_version: of the weights that wrote all of them.
        with_logprobs: fill `logprobs`, NaN where one is missing; otherwise it is None.
    """
    if len(requests) != len(completions):
        raise ValueError(f"{len(completions)} completions for {len(requests)} requests\nan engine must give exactly one a request")
    count = len(requests)
    lengths = np.fromiter((len(c.tokens) for c in completions), dtype=np.int64, count=count)
    offsets = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    tokens = np.fromiter(chain.from_iterable(c.tokens for c in completions), dtype=np.int32, count=int(offsets[-1]))
    return RolloutBatch(
        prompts=tuple(prompts),
        texts=tuple(c.text for c in completions),
        tokens=tokens,
        offsets=offsets,
        logprobs=_pack_logprobs(completions, offsets) if with_logprobs else None,
        finish_codes=np.fromiter((c.finish for c in completions), dtype=np.int8, count=count),
        weight_versions=np.full(count, weight_version, dtype=np.int64),
        prompt_index=np.fromiter((r.prompt_index for r in requests), dtype=np.int32, count=count),
        sample_index=np.fromiter((r.sample_index for r in requests), dtype=np.int32, count=count),
        origin_ranks=np.fromiter((r.origin.rank for r in requests), dtype=np.int32, count=count),
        origin_indices=np.fromiter((r.origin.index for r in requests), dtype=np.int32, count=count),
        prompt_hashes=np.fromiter((c.prompt_hash for c in completions), dtype=np.uint64, count=count),
        num_prompt_tokens=np.asarray(num_prompt_tokens, dtype=np.int32).reshape(len(prompts)),
        errors=_tell_errors(tuple(c.error for c in completions)),
    )


def _pack_logprobs(completions: Sequence[Completion], offsets: NDArray[np.int64]) -> NDArray[np.float32]:
    packed = np.full(int(offsets[-1]), np.nan, dtype=np.float32)
    for completion, start in zip(completions, offsets[:-1], strict=True):
        if completion.logprobs is not None:  # None items become NaN
            packed[start : start + len(completion.logprobs)] = np.array(completion.logprobs, dtype=np.float32)
    return packed


def _tell_errors(errors: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return errors if any(error is not None for error in errors) else ()


def empty_batch(prompts: Sequence[Prompt] = (), *, with_logprobs: bool = False) -> RolloutBatch:
    """Prompts without a completion."""
    return pack_completions(
        prompts, [], [], num_prompt_tokens=np.zeros(len(prompts), np.int32), weight_version=0, with_logprobs=with_logprobs
    )


def failed_batch(
    prompts: Sequence[Prompt], requests: Sequence[Request], error: str, *, weight_version: int, with_logprobs: bool
) -> RolloutBatch:
    """Every request as a failed completion: no tokens, `FinishReason.ERROR`, the error's text."""
    completions = [Completion((), "", FinishReason.ERROR, request.prompt_hash, error=error) for request in requests]
    return pack_completions(
        prompts,
        requests,
        completions,
        num_prompt_tokens=np.zeros(len(prompts), np.int32),
        weight_version=weight_version,
        with_logprobs=with_logprobs,
    )


def select(batch: RolloutBatch, start: int, stop: int) -> RolloutBatch:
    """The prompts from `start` up to `stop` with their completions; arrays are views where they can be.

    With prompt_index = [0, 0, 1, 3], select(batch, 1, 4) holds the last two completions, with prompt_index = [0, 2].
    """
    first, last = (int(i) for i in np.searchsorted(batch.prompt_index, [start, stop]))
    low, high = int(batch.offsets[first]), int(batch.offsets[last])
    return RolloutBatch(
        prompts=batch.prompts[start:stop],
        texts=batch.texts[first:last],
        tokens=batch.tokens[low:high],
        offsets=batch.offsets[first : last + 1] - low,
        logprobs=None if batch.logprobs is None else batch.logprobs[low:high],
        finish_codes=batch.finish_codes[first:last],
        weight_versions=batch.weight_versions[first:last],
        prompt_index=batch.prompt_index[first:last] - np.int32(start),
        sample_index=batch.sample_index[first:last],
        origin_ranks=batch.origin_ranks[first:last],
        origin_indices=batch.origin_indices[first:last],
        prompt_hashes=batch.prompt_hashes[first:last],
        num_prompt_tokens=batch.num_prompt_tokens[start:stop],
        errors=_tell_errors(batch.errors[first:last]),
        metadata=None if batch.metadata is None else batch.metadata[first:last],
    )


_JOINED = "tokens finish_codes weight_versions sample_index origin_ranks origin_indices prompt_hashes num_prompt_tokens".split()


def concat(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """Batches one after another, prompts renumbered: the reverse of `select`.

    Logprobs stay where every batch that has completions has them; metadata and errors missing in one batch are None there.
    """
    if not batches:
        return empty_batch()
    if len(batches) == 1:
        return batches[0]
    firsts = np.cumsum([0, *(len(b.prompts) for b in batches)])
    starts = np.cumsum([0, *(len(b.tokens) for b in batches)])
    arrays = {name: np.concatenate([getattr(b, name) for b in batches]) for name in _JOINED}
    return replace(
        batches[0],
        prompts=tuple(chain.from_iterable(b.prompts for b in batches)),
        texts=tuple(chain.from_iterable(b.texts for b in batches)),
        offsets=np.concatenate([[0], *(b.offsets[1:] + start for b, start in zip(batches, starts, strict=False))]).astype(np.int64),
        logprobs=_join_logprobs(batches),
        prompt_index=np.concatenate([b.prompt_index + np.int32(first) for b, first in zip(batches, firsts, strict=False)]),
        errors=_tell_errors(tuple(chain.from_iterable(b.errors or (None,) * len(b) for b in batches))),
        metadata=_join_metadata(batches),
        **arrays,
    )


def _join_logprobs(batches: Sequence[RolloutBatch]) -> NDArray[np.float32] | None:
    parts = [b.logprobs if b.logprobs is not None else np.zeros(0, np.float32) for b in batches if b.logprobs is not None or len(b) == 0]
    is_asked = any(b.logprobs is not None for b in batches)
    return np.concatenate(parts) if is_asked and len(parts) == len(batches) else None


def _join_metadata(batches: Sequence[RolloutBatch]) -> tuple[object, ...] | None:
    if all(b.metadata is None for b in batches):
        return None
    return tuple(chain.from_iterable(b.metadata if b.metadata is not None else (None,) * len(b) for b in batches))
