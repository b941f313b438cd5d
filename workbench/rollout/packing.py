"""Prompts and completions as one buffer of bytes each, and back: the form in which they travel between ranks.

A buffer is `[magic, number of sections, bytes of each section]` as int64, then the sections, each at a multiple of 8 bytes so that
arrays can be read where they lie. Text is UTF-8 in one section with its offsets in another. Only metadata and dict prompts are pickled,
behind the world's key.

Knows bytes. Does not know process groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from workbench.errors import EngineError, GroupError
from workbench.ranks.wire import seal, unseal
from workbench.records import Prompt, RolloutBatch
from workbench.rollout.exchange import Buffer

__all__ = ["pack_batch", "pack_prompts", "unpack_batch", "unpack_prompts"]

_MAGIC = 0x574B_4253_0001  # "WKBS", form 1
_TEXT, _TOKENS, _DICT = range(3)
_ARRAYS: tuple[tuple[str, DTypeLike], ...] = (  # of a batch, in the order in which they travel
    ("tokens", np.int32),
    ("offsets", np.int64),
    ("finish_codes", np.int8),
    ("weight_versions", np.int64),
    ("prompt_index", np.int32),
    ("sample_index", np.int32),
    ("origin_ranks", np.int32),
    ("origin_indices", np.int32),
    ("prompt_hashes", np.uint64),
    ("num_prompt_tokens", np.int32),
)


def pack_prompts(prompts: Sequence[Prompt]) -> Buffer:
    """Checked prompts as one buffer.

    Raises:
        ValueError: a dict prompt cannot be pickled.
    """
    return _join(_prompt_sections(prompts))


def unpack_prompts(buffer: Buffer) -> list[Prompt]:
    """The prompts of `pack_prompts`; token ids come as lists of ints."""
    return _read_prompts(_split(buffer))


def pack_batch(batch: RolloutBatch) -> Buffer:
    """A batch as one buffer.

    Raises:
        ValueError: its metadata cannot be pickled.
    """
    arrays = [np.asarray(getattr(batch, name), dtype) for name, dtype in _ARRAYS]
    failed = [(i, error) for i, error in enumerate(batch.errors) if error is not None]
    flags = np.array([batch.logprobs is not None, batch.metadata is not None], np.int64)
    return _join(
        [
            *_prompt_sections(batch.prompts),
            flags,
            *arrays,
            np.zeros(0, np.float32) if batch.logprobs is None else np.asarray(batch.logprobs, np.float32),
            *_text_sections(batch.texts),
            np.array([i for i, _ in failed], np.int64),
            *_text_sections([error for _, error in failed]),
            np.zeros(0, np.uint8) if batch.metadata is None else seal(batch.metadata).numpy(),
        ]
    )


def unpack_batch(buffer: Buffer) -> RolloutBatch:
    """The batch of `pack_batch`; its arrays are views of the buffer.

    Raises:
        EngineError: the number of metadata is not that of the completions.
        GroupError: the buffer is damaged.
    """
    sections = _split(buffer)
    prompts = _read_prompts(sections[:3])
    has_logprobs, has_metadata = sections[3].view(np.int64)
    arrays = {name: section.view(dtype) for (name, dtype), section in zip(_ARRAYS, sections[4:], strict=False)}
    logprobs, *rest = sections[4 + len(_ARRAYS) :]
    texts = _read_texts(rest[0], rest[1])
    metadata = tuple(unseal(torch.from_numpy(rest[5]))) if has_metadata else None
    if metadata is not None and len(metadata) != len(texts):
        raise EngineError(f"{len(metadata)} metadata came back with {len(texts)} completions\npass one a completion")
    return RolloutBatch(
        prompts=tuple(prompts),
        texts=texts,
        logprobs=logprobs.view(np.float32) if has_logprobs else None,
        errors=_read_errors(rest[2].view(np.int64), _read_texts(rest[3], rest[4]), len(texts)),
        metadata=metadata,
        **arrays,
    )


def _read_errors(places: NDArray[np.int64], texts: Sequence[str], count: int) -> tuple[str | None, ...]:
    if not len(places):
        return ()
    errors: list[str | None] = [None] * count
    for place, text in zip(places, texts, strict=True):
        errors[place] = text
    return tuple(errors)


def _prompt_sections(prompts: Sequence[Prompt]) -> list[NDArray[Any]]:
    """Kinds uint8 [num_prompts], their bytes, int64 offsets [num_prompts + 1]."""
    kinds = np.fromiter((_kind(prompt) for prompt in prompts), np.uint8, count=len(prompts))
    return [kinds, *_byte_sections([_to_bytes(prompt) for prompt in prompts])]


def _kind(prompt: Prompt) -> int:
    return _TEXT if isinstance(prompt, str) else _DICT if isinstance(prompt, dict) else _TOKENS


def _to_bytes(prompt: Prompt) -> bytes:
    if isinstance(prompt, str):
        return prompt.encode("utf-8", "surrogatepass")
    return seal(prompt).numpy().tobytes() if isinstance(prompt, dict) else np.asarray(prompt, np.int64).tobytes()


def _read_prompts(sections: Sequence[Buffer]) -> list[Prompt]:
    kinds, content, starts = sections[0], sections[1].tobytes(), sections[2].view(np.int64).tolist()
    return [_from_bytes(kind, content[low:high]) for kind, low, high in zip(kinds.tolist(), starts, starts[1:], strict=False)]


def _from_bytes(kind: int, content: bytes) -> Prompt:
    if kind == _TEXT:
        return content.decode("utf-8", "surrogatepass")
    array = np.frombuffer(content, np.uint8)
    prompt: Prompt = unseal(torch.from_numpy(array.copy())) if kind == _DICT else array.view(np.int64).tolist()
    return prompt


def _text_sections(texts: Sequence[str]) -> list[NDArray[Any]]:
    joined = "".join(texts)
    if joined.isascii():  # one encoding for all: a character is a byte
        return [np.frombuffer(joined.encode("ascii"), np.uint8), _offsets(texts)]
    return _byte_sections([text.encode("utf-8", "surrogatepass") for text in texts])


def _read_texts(content: Buffer, offsets: Buffer) -> tuple[str, ...]:
    joined, starts = content.tobytes(), offsets.view(np.int64).tolist()
    return tuple(joined[low:high].decode("utf-8", "surrogatepass") for low, high in zip(starts, starts[1:], strict=False))


def _byte_sections(parts: Sequence[bytes]) -> list[NDArray[Any]]:
    """Parts one after another, and where each begins: int64 [len(parts) + 1]."""
    return [np.frombuffer(b"".join(parts), np.uint8), _offsets(parts)]


def _offsets(parts: Sequence[str] | Sequence[bytes]) -> NDArray[np.int64]:
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, parts), np.int64, count=len(parts)), out=offsets[1:])
    return offsets


def _join(sections: Sequence[NDArray[Any]]) -> Buffer:
    sizes = [section.nbytes for section in sections]
    head = np.array([_MAGIC, len(sections), *sizes], np.int64)
    buffer = np.empty(head.nbytes + sum(map(_padded, sizes)), np.uint8)
    buffer[: head.nbytes] = head.view(np.uint8)
    start = head.nbytes
    for section, size in zip(sections, sizes, strict=True):
        buffer[start : start + size] = np.ascontiguousarray(section).view(np.uint8)
        buffer[start + size : start + _padded(size)] = 0
        start += _padded(size)
    return buffer


def _split(buffer: Buffer) -> list[Buffer]:
    numbers = buffer[: len(buffer) // 8 * 8].view(np.int64)
    count = int(numbers[1]) if len(numbers) > 1 and numbers[0] == _MAGIC and 0 <= numbers[1] <= len(numbers) - 2 else -1
    sizes = [int(size) for size in numbers[2 : 2 + count]] if count >= 0 else []
    if count < 0 or 8 * (2 + count) + sum(map(_padded, sizes)) != len(buffer):
        raise GroupError(
            f"a message of {len(buffer)} bytes between ranks is damaged or of another kind\n"
            f"its head tells {count} sections of {sum(sizes)} bytes\n"
            "something else may use this group at the same time, or a fault was injected; run the step again on a group of its own"
        )
    starts = 8 * (2 + count) + np.cumsum([0, *map(_padded, sizes)])
    return [buffer[start : start + size] for start, size in zip(starts.tolist(), sizes, strict=False)]


def _padded(size: int) -> int:
    return (size + 7) // 8 * 8
