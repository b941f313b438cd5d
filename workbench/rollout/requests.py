"""Prompts expanded into requests of one sample each, with the sample's own seed and the prompt's hash.

Knows prompts, seeds and hashes. Does not know engines or tokenizers.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.records import Prompt, Sampling
from workbench.rollout.engine import Origin

__all__ = ["Request", "check_prompt", "expand", "prompt_hash", "sample_seed"]

_FORMS = 'a prompt is text, a list of token ids, {"prompt": ..., "images": [...]} or {"messages": [...]}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to generate.

    Attributes:
        prompt_index: index of the prompt in the call.
        sample_index: which sample of its prompt, from 0.
        origin: rank and index that the prompt came from.
        seed: of this sample alone, 63 bits; None draws afresh.
        prompt_hash: `prompt_hash(prompt)`.
    """

    prompt: Prompt
    prompt_index: int
    sample_index: int
    origin: Origin
    seed: int | None
    prompt_hash: int


def expand(
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    num_samples: Sequence[int] | None = None,
    origins: Sequence[Origin] | None = None,
    step: int = 0,
) -> list[Request]:
    """Give one request a sample: prompt by prompt, sample by sample.

    Two prompts with num_samples=[2, 0] give two requests, (prompt 0, sample 0) and (prompt 0, sample 1).

    Args:
        num_samples: completions per prompt, [num_prompts], 0 allowed; None takes `sampling.n`.
        origins: [num_prompts]; None numbers the prompts on rank 0.
        step: part of each seed.

    Raises:
        ValueError: a prompt is none, or num_samples or origins do not fit the prompts.
    """
    where = [Origin(rank=0, index=i) for i in range(len(prompts))] if origins is None else list(origins)
    counts = [sampling.n] * len(prompts) if num_samples is None else list(num_samples)
    _check_lengths(len(prompts), counts, where)
    requests = []
    for index, (prompt, count, origin) in enumerate(zip(prompts, counts, where, strict=True)):
        check_prompt(prompt, origin)
        digest = prompt_hash(prompt)
        for sample in range(int(count)):
            seed = sample_seed(sampling.seed, step, origin, sample)
            requests.append(Request(prompt=prompt, prompt_index=index, sample_index=sample, origin=origin, seed=seed, prompt_hash=digest))
    return requests


def _check_lengths(num_prompts: int, counts: Sequence[int], origins: Sequence[Origin]) -> None:
    if len(counts) != num_prompts:
        raise ValueError(f"num_samples has {len(counts)} numbers for {num_prompts} prompts\npass one number a prompt; 0 is allowed")
    if len(origins) != num_prompts:
        raise ValueError(f"origins has {len(origins)} entries for {num_prompts} prompts\npass one origin a prompt, or None")
    for index, count in enumerate(counts):
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
            raise ValueError(f"num_samples[{index}] is {count!r}\neach must be an int of at least 0")


def check_prompt(prompt: object, origin: Origin) -> None:
    """Refuse what is no prompt.

    Raises:
        ValueError: names rank, index and the value.
    """
    if isinstance(prompt, str):
        return
    if isinstance(prompt, list):
        _check_token_ids(prompt, origin)
        return
    if not isinstance(prompt, dict):
        raise ValueError(f"{_name(origin)} is {_short(prompt)} ({type(prompt).__name__})\n{_FORMS}")
    if not isinstance(prompt.get("prompt"), str) and not isinstance(prompt.get("messages"), list):
        raise ValueError(f'{_name(origin)} is a dict with neither "prompt" (text) nor "messages" (a list): {_short(prompt)}\n{_FORMS}')


def _check_token_ids(prompt: list[Any], origin: Origin) -> None:
    if not prompt:
        raise ValueError(f"{_name(origin)} is an empty list\na list of token ids needs at least one")
    for position, token in enumerate(prompt):
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or token < 0:
            seen = f"{_short(token)} ({type(token).__name__}) at position {position}"
            raise ValueError(f"{_name(origin)} has {seen} of its token ids\n{_FORMS}")


def _name(origin: Origin) -> str:
    return f"prompt {origin.index} of rank {origin.rank}"


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def sample_seed(seed: int | None, step: int, origin: Origin, sample_index: int) -> int | None:
    """The seed of one sample, 63 bits: a hash of (seed, step, origin rank, prompt index, sample index).

    It depends on nothing else, so every mode draws the same samples, duplicates of a prompt differ and steps differ.
    """
    if seed is None:
        return None
    key = f"{seed},{step},{origin.rank},{origin.index},{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def prompt_hash(prompt: Prompt) -> int:
    """A uint64 that tells prompts apart: text by its UTF-8, token ids by value, dicts by content (images by their pixels)."""
    digest = hashlib.blake2b(digest_size=8)
    _feed(digest, prompt)
    return int.from_bytes(digest.digest(), "little")


def _feed(digest: hashlib.blake2b, value: object) -> None:
    """Hash a value with its kind and length, so that neighbours cannot run into each other."""
    if isinstance(value, str):
        _put(digest, b"s", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes):
        _put(digest, b"b", value)
    elif isinstance(value, list | tuple):
        _feed_list(digest, value)
    elif isinstance(value, dict):
        _put(digest, b"d", struct.pack("<q", len(value)))
        for key in sorted(value, key=str):
            _feed(digest, str(key))
            _feed(digest, value[key])
    elif hasattr(value, "tobytes"):  # a PIL image or a numpy array
        shape = getattr(value, "shape", None) or getattr(value, "size", None)
        _put(digest, b"a", f"{getattr(value, 'mode', getattr(value, 'dtype', ''))}{shape}".encode())
        _put(digest, b"a", value.tobytes())
    elif hasattr(value, "detach"):  # a torch tensor
        _feed(digest, value.detach().cpu().numpy())
    else:
        _put(digest, b"r", repr(value).encode())


def _feed_list(digest: hashlib.blake2b, value: Sequence[Any]) -> None:
    if value and all(isinstance(item, int | np.integer) and not isinstance(item, bool) for item in value):
        _put(digest, b"i", np.asarray(value, dtype=np.int64).tobytes())
        return
    _put(digest, b"l", struct.pack("<q", len(value)))
    for item in value:
        _feed(digest, item)


def _put(digest: hashlib.blake2b, kind: bytes, content: bytes) -> None:
    digest.update(kind)
    digest.update(struct.pack("<q", len(content)))
    digest.update(content)
