"""Prompts into requests: order, seeds, hashes, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from workbench.records import Prompt, Sampling
from workbench.rollout.engine import Origin
from workbench.rollout.requests import expand, prompt_hash


def origins(*pairs: tuple[int, int]) -> list[Origin]:
    return [Origin(rank=rank, index=index) for rank, index in pairs]


def test_requests_come_prompt_by_prompt_and_sample_by_sample() -> None:
    requests = expand(["a", "b", "c"], Sampling(seed=0), num_samples=[2, 0, 1], origins=origins((3, 0), (3, 1), (4, 0)))
    assert [(r.prompt, r.prompt_index, r.sample_index, r.origin.rank) for r in requests] == [("a", 0, 0, 3), ("a", 0, 1, 3), ("c", 2, 0, 4)]


def test_a_seed_depends_on_origin_sample_and_step_and_on_nothing_else() -> None:
    sampling = Sampling(n=2, seed=7)
    alone = expand(["a"], sampling, origins=origins((1, 5)))
    among = expand(["x", "a"], sampling, origins=origins((0, 0), (1, 5)))[2:]
    assert [r.seed for r in alone] == [r.seed for r in among]
    others = [
        *expand(["a", "a"], sampling, origins=origins((1, 6), (2, 5))),
        *expand(["a"], sampling, origins=origins((1, 5)), step=1),
        *expand(["a"], Sampling(n=2, seed=8), origins=origins((1, 5))),
    ]
    seeds = [r.seed for r in [*alone, *others]]
    assert len(set(seeds)) == len(seeds) and all(seed is not None and 0 <= seed < 2**63 for seed in seeds)


def test_without_a_seed_there_is_none() -> None:
    assert [r.seed for r in expand(["a"], Sampling(n=2))] == [None, None]


def test_hashes_tell_prompts_apart_and_know_equal_ones() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    with_images = [{"prompt": "12", "images": [picture]} for picture in (image, image + 1)]
    prompts: list[Prompt] = ["12", [12], [1, 2], [1, 2, 0], "", {"prompt": "12"}, *with_images]
    hashes = [prompt_hash(p) for p in prompts]
    assert len(set(hashes)) == len(prompts) and all(0 <= h < 2**64 for h in hashes)
    assert prompt_hash({"images": [image.copy()], "prompt": "12"}) == hashes[6]


@pytest.mark.parametrize(
    "bad, needs",
    [
        (3.5, "prompt 1 of rank 1 is 3.5 (float)\na prompt is text, a list of token ids"),
        (None, "prompt 1 of rank 1 is None (NoneType)"),
        ([], "prompt 1 of rank 1 is an empty list"),
        ([1, "a"], "prompt 1 of rank 1 has 'a' (str) at position 1 of its token ids"),
        ([-1], "has -1 (int) at position 0"),
        ({"text": "a"}, 'is a dict with neither "prompt" (text) nor "messages"'),
    ],
)
def test_what_is_no_prompt_is_told_with_rank_and_index(bad: Any, needs: str) -> None:
    with pytest.raises(ValueError) as caught:
        expand(["fine", bad], Sampling(), origins=origins((0, 0), (1, 1)))
    assert needs in str(caught.value)


@pytest.mark.parametrize(
    "counts, needs",
    [
        ([1], "num_samples has 1 numbers for 2 prompts"),
        ([1, -1], "num_samples[1] is -1"),
        ([1, True], "num_samples[1] is True"),
        ([0.5, 1], "num_samples[0] is 0.5"),
    ],
)
def test_counts_that_do_not_fit_are_told(counts: list[Any], needs: str) -> None:
    with pytest.raises(ValueError) as caught:
        expand(["a", "b"], Sampling(), num_samples=counts)
    assert needs in str(caught.value)


def test_origins_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="origins has 1 entries for 2 prompts"):
        expand(["a", "b"], Sampling(), origins=origins((0, 0)))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"max_tokens": "64"}, "Sampling(max_tokens='64'): max_tokens must be an int of at least 1"),
        ({"max_tokens": 0}, "Sampling(max_tokens=0): max_tokens must be an int of at least 1"),
        ({"temperature": "hot"}, "Sampling(temperature='hot'): temperature must be a number of at least 0.0 (0.0 is greedy)"),
        ({"top_p": 2}, "Sampling(top_p=2): top_p must be in (0, 1]"),
        ({"min_tokens": 65}, "Sampling(min_tokens=65): min_tokens must be between 0 and max_tokens, 64"),
    ],
)
def test_sampling_that_cannot_be_is_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as caught:
        Sampling(**options)
    assert str(caught.value) == told
