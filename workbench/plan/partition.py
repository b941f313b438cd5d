"""How layers, tensors and tokens are cut among ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from workbench.errors import LayoutError

__all__ = ["PARTITION_VARIABLE", "cut_layers", "divide", "partition_layers", "sequence_parallel_tokens", "split_tensor"]

PARTITION_VARIABLE = "VLLM_PP_LAYER_PARTITION"
_log = logging.getLogger("workbench.plan")


def partition_layers(
    num_layers: int, pp_size: int, partition: str | Sequence[int] | None = None, *, allow_empty: bool = False
) -> list[tuple[int, int]]:
    """The layers [start, end) of each pipeline stage, by vLLM's rule; an uneven cut is logged.

    Layers that are left over go one each to the stages before the last, which holds the final norm; the first, which holds the
    embedding, gets one only when all others have: 30 layers on 4 stages are 7, 8, 8, 7, that is (0, 7) (7, 15) (15, 23) (23, 30).

    Args:
        partition: layers of each stage, "5,6,5,6" or [5, 6, 5, 6]; None reads the variable VLLM_PP_LAYER_PARTITION, where it is set.
        allow_empty: a stage may hold no layer.

    Raises:
        LayoutError: sizes below 1, more stages than layers, or a partition that is no list of numbers or does not fit; a ValueError.

    Source: `get_pp_indices` of `vllm/distributed/utils.py`.
    """
    cut = cut_layers(num_layers, pp_size, partition, allow_empty=allow_empty)
    counts = [end - start for start, end in cut]
    if partition is None and PARTITION_VARIABLE not in os.environ and len(set(counts)) > 1:
        shown = ",".join(map(str, counts))
        _log.warning("%d layers on %d stages are uneven: %s; pass partition=%r to choose another cut", num_layers, pp_size, shown, shown)
    return cut


def cut_layers(num_layers: int, pp_size: int, partition: str | Sequence[int] | None, *, allow_empty: bool) -> list[tuple[int, int]]:
    """`partition_layers` without the notice."""
    _check_count("num_layers", num_layers, 0)
    _check_count("pp_size", pp_size, 1)
    if partition is None:
        partition = os.environ.get(PARTITION_VARIABLE)
    counts = _even(num_layers, pp_size) if partition is None else _given(num_layers, pp_size, partition)
    if 0 in counts and not allow_empty:
        raise LayoutError(
            f"stage {counts.index(0)} of {pp_size} would hold no layer\ngot {num_layers} layers cut as {counts}\n"
            "use fewer stages, or pass allow_empty=True"
        )
    return list(pairwise(accumulate(counts, initial=0)))


def divide(numerator: int, denominator: int) -> int:
    """numerator / denominator, which must come out whole.

    Raises:
        LayoutError: it does not, or the denominator is below 1; a ValueError.
    """
    _check_count("denominator", denominator, 1)
    _check_count("numerator", numerator, 0)
    if numerator % denominator:
        raise LayoutError(
            f"{numerator} is not divisible by {denominator}\n"
            f"{numerator // denominator} * {denominator} leaves {numerator % denominator}\nchoose a size that divides it"
        )
    return numerator // denominator


def split_tensor(tensor: Any, num_parts: int, *, contiguous: bool = False) -> tuple[Any, ...]:
    """Equal parts of a tensor or array along its last dim: [..., n] -> num_parts times [..., n / num_parts].

    Parts share memory with the whole unless `contiguous`, which copies them where needed.

    Raises:
        LayoutError: the last dim does not divide, or there is none; a ValueError.
    """
    if not len(tensor.shape):
        raise LayoutError("a 0-dim tensor has no last dim to split\npass a tensor of at least one dim")
    width = divide(int(tensor.shape[-1]), num_parts)
    parts = tuple(tensor[..., start : start + width] for start in range(0, width * num_parts, max(width, 1)))
    parts = parts if width else (tensor,) * num_parts
    if not contiguous:
        return parts
    return tuple(part.contiguous() if hasattr(part, "contiguous") else part.copy() for part in parts)


def sequence_parallel_tokens(num_tokens: Sequence[int], sp: int) -> list[int]:
    """Tokens that each rank works on when the tokens of each data-parallel rank are spread over `sp` ranks: [dp * sp].

    [5, 8] with sp 2 is [3, 3, 4, 4]: the share is rounded up, the last rank's is padded.

    Source: `DPMetadata` of `vllm/forward_context.py`.
    """
    _check_count("sp", sp, 1)
    for count in num_tokens:
        _check_count("num_tokens", count, 0)
    return [-(-count // sp) for count in num_tokens for _ in range(sp)]


def _even(num_layers: int, pp_size: int) -> list[int]:
    """One layer more for the `rest` stages that end before the last."""
    share, rest = divmod(num_layers, pp_size)
    return [share + (pp_size - 1 - rest <= stage < pp_size - 1) for stage in range(pp_size)]


def _given(num_layers: int, pp_size: int, partition: str | Sequence[int]) -> list[int]:
    """The counts of a partition that fits."""
    shown = f"partition {partition!r}"
    counts = _parsed(partition, shown) if isinstance(partition, str) else [*partition]
    for count in counts:
        _check_count(f"{shown}: each entry", count, 0)
    if len(counts) != pp_size:
        raise LayoutError(f"{shown} has {len(counts)} entries\n{pp_size} stages need {pp_size}\ngive one number of layers for each stage")
    if sum(counts) != num_layers:
        raise LayoutError(f"{shown} adds up to {sum(counts)} layers\nthe model has {num_layers}\nmake the numbers add up to {num_layers}")
    return counts


def _parsed(text: str, shown: str) -> list[int]:
    counts = []
    for entry in text.split(","):
        try:
            counts.append(int(entry))
        except ValueError:
            problem = f"{entry!r} is not a whole number" if entry.strip() else "an entry is empty"
            raise LayoutError(f"{shown} cannot be read: {problem}\nwrite whole numbers between commas, such as 7,8,8,7") from None
    return counts


def _check_count(what: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise LayoutError(f"{what} must be a whole number of at least {least}\ngot {value!r}")
