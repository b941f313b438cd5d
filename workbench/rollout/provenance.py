"""Every completion says which prompt it was written for; here that is checked, and a mix-up is told with both prompts.

Knows batches and hashes. Does not know how they travelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from workbench.errors import EngineError
from workbench.records import Prompt, RolloutBatch
from workbench.rollout.engine import Origin
from workbench.rollout.requests import prompt_hash

__all__ = ["Origins", "check_counts", "check_order", "check_provenance", "number_origins", "origins_of", "shorten"]


class Origins(Sequence[Origin]):
    """Origins held as arrays: most are only compared, thousands at once.

    Attributes:
        ranks, indices: int32 [num_prompts].
    """

    def __init__(self, ranks: NDArray[np.int32], indices: NDArray[np.int32]) -> None:
        self.ranks, self.indices = ranks, indices

    def __len__(self) -> int:
        return len(self.ranks)

    @overload
    def __getitem__(self, at: int) -> Origin: ...
    @overload
    def __getitem__(self, at: slice) -> Origins: ...
    def __getitem__(self, at: int | slice) -> Origin | Origins:
        if isinstance(at, slice):
            return Origins(self.ranks[at], self.indices[at])
        return Origin(rank=int(self.ranks[at]), index=int(self.indices[at]))


def origins_of(offsets: NDArray[np.int64], ranks: Sequence[int]) -> Origins:
    """Where each gathered prompt comes from: offsets [0, 2, 3] of ranks (4, 5) give (4, 0), (4, 1), (5, 0).

    Args:
        offsets: [num_ranks + 1].
        ranks: world rank of each rank of the group, [num_ranks].
    """
    counts = np.diff(offsets)
    indices = np.arange(offsets[-1], dtype=np.int32) - np.repeat(offsets[:-1], counts).astype(np.int32)
    return Origins(np.repeat(np.asarray(ranks, np.int32), counts), indices)


def number_origins(batch: RolloutBatch, origins: Sequence[Origin]) -> RolloutBatch:
    """The batch with `origins` where the engine was told none and numbered all prompts on rank 0 itself; else the batch as it is."""
    if batch.origin_ranks.any() or not np.array_equal(batch.origin_indices, batch.prompt_index):
        return batch
    ranks, indices = _as_arrays(origins)
    return replace(batch, origin_ranks=ranks[batch.prompt_index], origin_indices=indices[batch.prompt_index])


def check_order(batch: RolloutBatch, num_prompts: int) -> None:
    """A batch that can be cut: the prompts that were gathered, completions prompt by prompt, every array of its length.

    Raises:
        EngineError: tells both numbers.
    """
    if len(batch.prompts) != num_prompts:
        raise EngineError(
            f"the batch has {len(batch.prompts)} prompts; {num_prompts} were gathered\n"
            "complete all gathered prompts in their order, also those with 0 samples"
        )
    index, count = batch.prompt_index, len(batch.texts)
    lengths = {len(index), len(batch.offsets) - 1, len(batch.finish_codes), len(batch.prompt_hashes), len(batch.origin_ranks), count}
    if len(lengths) > 1 or int(batch.offsets[-1]) != len(batch.tokens):
        raise EngineError(
            f"the batch is not whole: {count} texts, {len(index)} prompt indices, {len(batch.offsets) - 1} lengths\n"
            "pack it with one entry a completion"
        )
    if count and (int(index.min()) < 0 or int(index.max()) >= num_prompts or (np.diff(index) < 0).any()):
        raise EngineError(
            f"the batch's completions are not prompt by prompt: prompt_index is {index[:8].tolist()}... of {num_prompts} prompts\n"
            "an engine returns completions in the order of the prompts"
        )


def check_counts(batch: RolloutBatch, counts: Sequence[int], origins: Sequence[Origin]) -> None:
    """As many completions for each prompt as were asked.

    Raises:
        EngineError: names the first prompt with another number.
    """
    seen = np.bincount(batch.prompt_index, minlength=len(counts))
    wrong = np.flatnonzero(seen != np.asarray(counts, np.int64).reshape(len(counts)))
    if not len(wrong):
        return
    first = int(wrong[0])
    origin = origins[first]
    raise EngineError(
        f"the engine gave a wrong number of completions for prompt {origin.index} of rank {origin.rank}: {shorten(batch.prompts[first])}\n"
        f"got {seen[first]}, asked for {counts[first]}\n"
        "an engine returns one completion a sample; a prompt that fails is one with FinishReason.ERROR"
    )


def check_provenance(batch: RolloutBatch, asked: Sequence[Prompt], origins: Sequence[Origin]) -> None:
    """Every completion belongs to the prompt that it is filed under: origin rank, index and the hash of what the engine read.

    Args:
        asked: the prompts as sent, [num_prompts].
        origins: where each comes from, [num_prompts].

    Raises:
        EngineError: shows the prompt sent and the one that the completion was written for.
    """
    hashes = np.fromiter((prompt_hash(prompt) for prompt in asked), np.uint64, count=len(asked))
    ranks, indices = _as_arrays(origins)
    at = batch.prompt_index
    wrong = (batch.origin_ranks != ranks[at]) | (batch.origin_indices != indices[at]) | (batch.prompt_hashes != hashes[at])
    if wrong.any():
        raise EngineError(_mix_up(batch, int(np.flatnonzero(wrong)[0]), asked, hashes, origins))


def _mix_up(batch: RolloutBatch, completion: int, asked: Sequence[Prompt], hashes: NDArray[np.uint64], origins: Sequence[Origin]) -> str:
    at = int(batch.prompt_index[completion])
    sent, told = origins[at], (int(batch.origin_ranks[completion]), int(batch.origin_indices[completion]))
    read = int(batch.prompt_hashes[completion])
    shown = next((shorten(p) for p in (*asked, *batch.prompts) if prompt_hash(p) == read), "a prompt that is not among these")
    return (
        f"a completion came back for another prompt: sample {batch.sample_index[completion]} of prompt {sent.index} of rank {sent.rank}\n"
        f"sent: {shorten(asked[at])} (prompt {sent.index} of rank {sent.rank}, hash {int(hashes[at]):016x})\n"
        f"came back: {shown} (marked as prompt {told[1]} of rank {told[0]}, hash {read:016x})\n"
        "the prompts or their completions were reordered on the way; pass completions back in the order of the gathered prompts"
    )


def shorten(prompt: Prompt, limit: int = 80) -> str:
    """A prompt in at most `limit` characters and its length."""
    text = repr(prompt)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(prompt)} {'characters' if isinstance(prompt, str) else 'entries'})"


def _as_arrays(origins: Sequence[Origin]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    if isinstance(origins, Origins):
        return origins.ranks, origins.indices
    ranks = np.fromiter((o.rank for o in origins), np.int32, count=len(origins))
    return ranks, np.fromiter((o.index for o in origins), np.int32, count=len(origins))
