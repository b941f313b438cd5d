"""The driver's `prompts` and `num_samples` cut into one shard a rank, and checked.

Knows the forms that a person may write. Does not know clusters or engines.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from workbench.records import Prompt
from workbench.rollout.engine import Origin
from workbench.rollout.requests import check_prompt

__all__ = ["Shard", "check_num_samples", "check_prompts", "cut_evenly", "shard_prompts"]

Source = Callable[[], Any] | str  # a function that the rank runs, or the name of a variable there

_DICT_KEYS = ("prompt", "messages", "images", "videos")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Where one rank finds its prompts.

    Attributes:
        prompts: the prompts themselves, or what gives them on the rank.
        num_samples: one number a prompt, one number for all, what gives them on the rank, or None: as `Sampling.n` says.
    """

    rank: int
    prompts: tuple[Prompt, ...] | Source
    num_samples: tuple[int, ...] | int | Source | None

    def read(self, namespace: Mapping[str, Any]) -> tuple[list[Prompt] | None, list[int] | None]:
        """The prompts of this rank and their sample counts; run on the rank.

        Args:
            namespace: the rank's variables.

        Raises:
            ValueError: no such variable; what was found is no list of prompts, or the counts do not fit them.
        """
        found = self._find("prompts", self.prompts, namespace)
        prompts = None if found is None else check_prompts(found, self.rank)
        counts = self._find("num_samples", self.num_samples, namespace)
        return prompts, check_num_samples(counts, 0 if prompts is None else len(prompts), self.rank)

    def check_names(self, namespace: Mapping[str, Any]) -> None:
        """Look up what is named, without calling anything; run on the rank.

        Raises:
            ValueError: no such variable, or it holds no list of prompts.
        """
        if isinstance(self.prompts, str):
            check_prompts(self._find("prompts", self.prompts, namespace) or [], self.rank)
        if isinstance(self.num_samples, str):
            self._find("num_samples", self.num_samples, namespace)

    def _find(self, what: str, source: object, namespace: Mapping[str, Any]) -> Any:
        if callable(source):
            return source()
        if not isinstance(source, str):
            return source
        if source not in namespace:
            raise ValueError(
                f"rank {self.rank} has no variable {source!r}, named by {what}\n"
                f"it has {sorted(name for name in namespace if not name.startswith('_'))[:12]}\n"
                f'make it first, for example with cluster.execute("{source} = ...")'
            )
        return namespace[source]


def shard_prompts(prompts: Any, world_size: int, *, num_samples: Any = None) -> tuple[Shard, ...]:
    """One shard a rank.

    `["a", "b", "c"]` on 2 ranks gives ("a", "b") and ("c",); `[["a"], ["b", "c"]]` gives ("a",) and ("b", "c"); `[[1, 2], [3]]` is two
    prompts of token ids, and so gives ([1, 2],) and ([3],).

    Args:
        prompts: a list a rank (None is an empty one), a flat list (cut in contiguous blocks, the first ranks one longer), a function that
            each rank runs, or the name of a variable on the ranks.
        num_samples: None, one number for all, a list a rank, a flat list beside a flat list of prompts, a function or a name.

    Raises:
        ValueError: names the argument, rank, index and value that does not fit.
    """
    if _is_source(prompts, "prompts"):
        counts = _cut_counts(num_samples, [None] * world_size, is_flat=False)
        return tuple(Shard(rank=r, prompts=prompts, num_samples=counts[r]) for r in range(world_size))
    items = _as_list(prompts, "prompts")
    blocks = _cut_prompts(items, world_size)
    counts = _cut_counts(num_samples, [len(block) for block in blocks], is_flat=not _has_lists(items))
    return tuple(Shard(rank=r, prompts=blocks[r], num_samples=counts[r]) for r in range(world_size))


def cut_evenly(num_items: int, num_parts: int) -> list[slice]:
    """Contiguous blocks, the first ones one longer: 10 items in 3 parts are 0:4, 4:7, 7:10."""
    size, longer = divmod(num_items, num_parts)
    bounds = [part * size + min(part, longer) for part in range(num_parts + 1)]
    return [slice(low, high) for low, high in pairwise(bounds)]


def check_prompts(prompts: object, rank: int) -> list[Prompt]:
    """The prompts of one rank as a list.

    Raises:
        ValueError: names the rank, the index and what is no prompt.
    """
    if isinstance(prompts, str | bytes | dict) or not hasattr(prompts, "__iter__"):
        raise ValueError(
            f"the prompts of rank {rank} are {_short(prompts)} ({type(prompts).__name__})\n"
            "needed: a list of prompts\nput a single prompt in a list"
        )
    checked = list(prompts)
    for index, prompt in enumerate(checked):
        origin = Origin(rank=rank, index=index)
        check_prompt(prompt, origin)
        if isinstance(prompt, dict):
            _check_dict(prompt, origin)
    return checked


def check_num_samples(num_samples: object, num_prompts: int, rank: int) -> list[int] | None:
    """One count a prompt of one rank, [num_prompts]; None stays None.

    Raises:
        ValueError: names the rank and the number that does not fit.
    """
    if num_samples is None:
        return None
    counts = [num_samples] * num_prompts if _is_count(num_samples) else num_samples
    if isinstance(counts, str) or not hasattr(counts, "__iter__"):
        raise ValueError(f"num_samples of rank {rank} is {_short(num_samples)}\nneeded: an int of at least 0, or one a prompt")
    checked = list(counts)
    if len(checked) != num_prompts:
        raise ValueError(
            f"num_samples of rank {rank} has {len(checked)} numbers; its prompts are {num_prompts}\npass one number a prompt; 0 is allowed"
        )
    for index, count in enumerate(checked):
        if not _is_count(count):
            what = f"num_samples[{index}] of rank {rank} is {_short(count)} ({type(count).__name__})"
            raise ValueError(f"{what}\nneeded: an int of at least 0\n0 asks for no completion of that prompt")
    return [int(count) for count in checked]


def _cut_prompts(prompts: list[Any], world_size: int) -> list[tuple[Prompt, ...]]:
    if _has_lists(prompts):
        _check_lists(prompts, world_size)
        return [tuple(check_prompts(() if own is None else own, rank)) for rank, own in enumerate(prompts)]
    blocks = cut_evenly(len(prompts), world_size)
    return [tuple(_check_block(prompts[block], rank, block.start)) for rank, block in enumerate(blocks)]


def _check_block(prompts: list[Any], rank: int, start: int) -> list[Prompt]:
    try:
        return check_prompts(prompts, rank)
    except ValueError as error:
        raise ValueError(f"{error}\nthe flat list was cut in contiguous blocks: rank {rank} begins with prompts[{start}]") from None


def _check_lists(prompts: list[Any], world_size: int) -> None:
    flat = [i for i, item in enumerate(prompts) if not _is_rank_list(item)]
    if flat:
        lists = next(i for i, item in enumerate(prompts) if _is_rank_list(item))
        raise ValueError(
            "prompts mixes prompts and lists of ranks: "
            f"prompts[{flat[0]}] is {_short(prompts[flat[0]])}, prompts[{lists}] is {_short(prompts[lists])}\n"
            "a non-empty list of ints is a prompt of token ids, any other list (and None) is the list of one rank\n"
            "pass a list a rank, or one flat list of prompts"
        )
    if len(prompts) != world_size:
        raise ValueError(
            f"prompts has lists for {_ranks(len(prompts))}; the cluster has {_ranks(world_size)}\n"
            f"pass a list for each rank (an empty list for a rank without prompts), or one flat list"
        )


def _cut_counts(num_samples: Any, sizes: Sequence[int | None], *, is_flat: bool) -> list[Any]:
    """What each rank's shard says of its counts.

    Args:
        sizes: prompts of each rank, [world_size], None where only the rank knows.
        is_flat: the prompts were one flat list.
    """
    if num_samples is None or _is_count(num_samples) or _is_source(num_samples, "num_samples"):
        return [num_samples] * len(sizes)
    items = _as_list(num_samples, "num_samples")
    if is_flat and not any(item is None or isinstance(item, list | tuple) for item in items):
        items = _cut_flat_counts(items, sum(size or 0 for size in sizes), len(sizes))
    if len(items) != len(sizes) or not all(item is None or isinstance(item, list | tuple) for item in items):
        raise ValueError(
            f"num_samples is {_short(num_samples)}\nneeded: one int, or a list for each of {len(sizes)} ranks with one number a prompt\n"
            "give num_samples the same form as prompts"
        )
    own = [tuple(item or ()) for item in items]
    return [own[r] if size is None else tuple(check_num_samples(own[r], size, r) or ()) for r, size in enumerate(sizes)]


def _cut_flat_counts(counts: list[Any], num_prompts: int, world_size: int) -> list[list[Any]]:
    if len(counts) != num_prompts:
        raise ValueError(f"num_samples has {len(counts)} numbers; prompts has {num_prompts}\npass one number a prompt; 0 is allowed")
    return [counts[block] for block in cut_evenly(num_prompts, world_size)]


def _is_source(value: object, what: str) -> bool:
    """A function or the name of a variable.

    Raises:
        ValueError: a text that cannot be a name.
    """
    if isinstance(value, str) and (not value.isidentifier() or keyword.iskeyword(value)):
        hint = "put a single prompt in a list" if what == "prompts" else "pass one int, or a list a rank"
        raise ValueError(f"{what}={_short(value)} is a text\na text must be the name of a variable on the ranks\n{hint}")
    return isinstance(value, str) or callable(value)


def _as_list(value: object, what: str) -> list[Any]:
    if isinstance(value, bytes | dict) or not hasattr(value, "__iter__"):
        raise ValueError(
            f"{what} is {_short(value)} ({type(value).__name__})\n"
            "needed: a list a rank, one flat list, a function, or the name of a variable on the ranks"
        )
    return list(value)


def _has_lists(prompts: Sequence[Any]) -> bool:
    return any(_is_rank_list(item) for item in prompts)


def _is_rank_list(item: object) -> bool:
    return item is None or (isinstance(item, list | tuple) and not _is_token_ids(item))


def _is_token_ids(item: object) -> bool:
    return isinstance(item, list) and len(item) > 0 and all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in item)


def _is_count(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 0)


def _check_dict(prompt: dict[str, Any], origin: Origin) -> None:
    """The structure of a dict prompt; whether images fit the text is the engine's to say."""
    where = f"prompt {origin.index} of rank {origin.rank}"
    if unknown := [key for key in prompt if key not in _DICT_KEYS]:
        raise ValueError(f"{where} has the key {unknown[0]!r}\na dict prompt has {', '.join(_DICT_KEYS)}\nput other data in metadata")
    if "prompt" in prompt and "messages" in prompt:
        raise ValueError(f'{where} has both "prompt" and "messages"\nneeded: one of them\nput the text into a message of role "user"')
    for key in ("images", "videos"):
        if not isinstance(prompt.get(key) or [], list | tuple):
            raise ValueError(f"{where} has {key} {_short(prompt[key])} ({type(prompt[key]).__name__})\nneeded: a list, one entry an image")
    if "messages" in prompt:
        _check_messages(prompt["messages"], where)


def _check_messages(messages: Any, where: str) -> None:
    form = 'needed: a list of {"role": "user", "content": ...}, at least one'
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where} has messages {_short(messages)}\n{form}")
    for place, message in enumerate(messages):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
            raise ValueError(f"{where} has messages[{place}] {_short(message)}\n{form}")


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
