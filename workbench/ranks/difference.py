"""Where two values differ first, in words: which item, which element, and both values.

Knows containers and tensors. Does not know tapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from workbench.ranks.digest import digest_of
from workbench.ranks.wire import seal

__all__ = ["difference", "differing_elements", "is_same", "short"]

_LONGEST_TOLD = 200  # characters of a value


def is_same(now: Any, then: Any) -> bool:
    """Whether two values are equal by content, or, where that cannot be compared, as pickles."""
    one, other = digest_of(now).value, digest_of(then).value
    if one and other:
        return one == other
    return torch.equal(seal(now, signs=False), seal(then, signs=False))


def difference(now: Any, then: Any, place: str = "the object") -> str:
    """What differs first in two values that are not the same, for a sentence: "the object['w'] is 1, on the tape 2"."""
    for name, one, other in _items(now, then, place):
        if not is_same(one, other):
            return difference(one, other, name)
    if isinstance(now, torch.Tensor) and isinstance(then, torch.Tensor) and (now.shape, now.dtype) == (then.shape, then.dtype):
        found = differing_elements(now, then)
        if found is not None:
            first, count = found
            both = f"{now.reshape(-1)[first].item()!r}, on the tape {then.reshape(-1)[first].item()!r}"
            return f"element {first} of {place} is {both}\n{count} of {now.numel()} elements differ"
    return f"{place} is {short(now)}, on the tape {short(then)}"


def differing_elements(now: torch.Tensor, then: torch.Tensor) -> tuple[int, int] | None:
    """The first element of two tensors of one shape and dtype that differs in any bit, and how many do; None where none does."""
    bits = _bits(now.detach().cpu()) != _bits(then.detach().cpu())
    if not bits.any():
        return None
    differs = bits.reshape(now.numel(), -1).any(dim=1)
    return int(differs.nonzero()[0]), int(differs.sum())


def short(value: Any) -> str:
    """A value's repr, its end cut off where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_TOLD else f"{text[:_LONGEST_TOLD]}..."


def _items(now: Any, then: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    """The items of two containers alike."""
    if isinstance(now, Mapping) and isinstance(then, Mapping) and now.keys() == then.keys():
        yield from ((f"{place}[{key!r}]", now[key], then[key]) for key in now)
    elif isinstance(now, (list, tuple)) and type(now) is type(then) and len(now) == len(then):
        yield from ((f"{place}[{number}]", *pair) for number, pair in enumerate(zip(now, then, strict=True)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that NaN equals itself and -0.0 does not equal 0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
