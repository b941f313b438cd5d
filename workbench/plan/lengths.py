"""Statistics of completion lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["LengthStats", "length_stats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthStats:
    """How long completions are, in tokens.

    Attributes:
        truncated_share: share that ended at the token limit, 0 to 1; NaN when the finish reasons were not given.
        idle_share: share of the ranks' time lost waiting for the busiest one, 0 to 1, if each token costs the same and ranks generate for
            themselves: 1 - total tokens / (ranks x tokens of the busiest rank); NaN when the ranks were not given.
    """

    num_completions: int
    min: int
    max: int
    mean: float
    median: float
    truncated_share: float
    idle_share: float
    _sorted: NDArray[np.int64] = field(repr=False, compare=False)

    def percentile(self, p: float) -> float:
        """Length that `p` percent of the completions do not exceed, interpolated linearly.

        Raises:
            ValueError: `p` is not between 0 and 100.
        """
        if not 0 <= p <= 100:
            raise ValueError(f"percentile({p!r}): p must be between 0 and 100")
        return float(np.percentile(self._sorted, p))


def length_stats(
    lengths: ArrayLike,
    finish_reasons: Sequence[str] | None = None,
    ranks: ArrayLike | None = None,
    *,
    num_ranks: int | None = None,
) -> LengthStats:
    """Statistics of completion lengths.

    Lengths 4, 4, 8, 64 on ranks 0, 0, 1, 1: the busiest makes 72 tokens, so of 2 x 72 only 80 are made: idle_share = 1 - 80 / 144 = 0.44.

    Args:
        lengths: generated tokens per completion, [num_completions].
        finish_reasons: "stop", "length", ... per completion, [num_completions].
        ranks: rank of each completion, [num_completions].
        num_ranks: ranks that wait for the busiest; None counts those in `ranks`, which misses ranks without a completion.

    Raises:
        ValueError: no completion, a negative length, arguments of different lengths, or fewer `num_ranks` than ranks seen.
    """
    array = np.asarray(lengths)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"length_stats: lengths has shape {array.shape}; it needs one number per completion, and at least one completion")
    if not np.array_equal(array, array.astype(np.int64)) or array.min() < 0:
        raise ValueError(f"length_stats: lengths run from {array.min()} to {array.max()}; they must be whole numbers of at least 0")
    array = array.astype(np.int64)
    return LengthStats(
        num_completions=array.size,
        min=int(array.min()),
        max=int(array.max()),
        mean=float(array.mean()),
        median=float(np.median(array)),
        truncated_share=_truncated_share(finish_reasons, array.size),
        idle_share=_idle_share(array, ranks, num_ranks),
        _sorted=np.sort(array),
    )


def _truncated_share(finish_reasons: Sequence[str] | None, num_completions: int) -> float:
    if finish_reasons is None:
        return math.nan
    if len(finish_reasons) != num_completions:
        raise ValueError(f"length_stats: {len(finish_reasons)} finish_reasons for {num_completions} lengths; give one for each")
    return float(np.mean([reason == "length" for reason in finish_reasons]))


def _idle_share(lengths: NDArray[np.int64], ranks: ArrayLike | None, num_ranks: int | None) -> float:
    if ranks is None:
        return math.nan
    of_rank = np.asarray(ranks)
    if of_rank.shape != lengths.shape:
        raise ValueError(f"length_stats: {of_rank.size} ranks for {lengths.size} lengths; give one for each")
    seen, index = np.unique(of_rank, return_inverse=True)
    if num_ranks is not None and num_ranks < seen.size:
        raise ValueError(f"length_stats: num_ranks={num_ranks}, but the completions lie on {seen.size} ranks")
    busiest = float(np.bincount(index, weights=lengths).max())
    return 1.0 - float(lengths.sum()) / ((num_ranks or seen.size) * busiest) if busiest else 0.0
