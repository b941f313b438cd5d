"""How the driver's prompts and counts are cut, one shard a rank, and what is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.rollout.shards import check_prompts, cut_evenly, shard_prompts


def prompts_of(*args, **kwargs):
    return [shard.prompts for shard in shard_prompts(*args, **kwargs)]


def counts_of(*args, **kwargs):
    return [shard.num_samples for shard in shard_prompts(*args, **kwargs)]


def test_a_flat_list_is_cut_in_blocks_the_first_ranks_one_longer():
    assert prompts_of(list("abcdefghij"), 3) == [tuple("abcd"), tuple("efg"), tuple("hij")]
    assert prompts_of(["a"], 3) == [("a",), (), ()]
    assert prompts_of([], 2) == [(), ()]


@given(num_items=st.integers(0, 200), num_parts=st.integers(1, 40))
def test_blocks_cover_every_item_once_and_differ_by_one_at_most(num_items, num_parts):
    blocks = cut_evenly(num_items, num_parts)
    sizes = [block.stop - block.start for block in blocks]
    assert [i for block in blocks for i in range(num_items)[block]] == list(range(num_items))
    assert len(sizes) == num_parts and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_lists_are_those_of_ranks_and_none_is_an_empty_one():
    assert prompts_of([["a"], None, [], ("b", "c")], 4) == [("a",), (), (), ("b", "c")]


def test_a_list_of_ints_is_a_prompt_and_any_other_list_a_rank():
    assert prompts_of([[1, 2], [3]], 2) == [([1, 2],), ([3],)]
    assert prompts_of([[[1, 2]], [[3], "a"]], 2) == [([1, 2],), ([3], "a")]


def test_an_array_of_texts_is_a_flat_list():
    assert prompts_of(np.array(["a", "b", "c"]), 2) == [("a", "b"), ("c",)]


def test_a_function_and_a_name_are_read_on_the_rank():
    by_name, by_function = shard_prompts("mine", 3)[2], shard_prompts(lambda: ["x", [1, 2]], 3, num_samples="counts")[1]
    assert by_name.read({"mine": ("a", "b")}) == (["a", "b"], None)
    assert by_function.read({"counts": [2, 0]}) == (["x", [1, 2]], [2, 0])
    assert pickle.loads(pickle.dumps(by_name)) == by_name


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [
        (None, [None, None]),
        (3, [3, 3]),
        ([[3], [1, 0]], [(3,), (1, 0)]),
        ([[3], (1, np.int64(0))], [(3,), (1, 0)]),
    ],
)
def test_num_samples_beside_lists_of_ranks(num_samples, expected):
    assert counts_of([["a"], ["b", "c"]], 2, num_samples=num_samples) == expected


def test_num_samples_beside_a_flat_list_are_cut_alike():
    assert counts_of(["a", "b", "c"], 2, num_samples=[1, 2, 0]) == [(1, 2), (0,)]
    assert counts_of(["a", "b", "c"], 2, num_samples=[[1, 2], [0]]) == [(1, 2), (0,)]
    assert counts_of([], 2, num_samples=[]) == [(), ()]


def test_one_number_holds_for_every_prompt_of_the_rank():
    assert shard_prompts([["a", "b"], []], 2, num_samples=2)[0].read({}) == (["a", "b"], [2, 2])


@pytest.mark.parametrize(
    ("prompts", "needs"),
    [
        ([["a"]], ["lists for 1 rank;", "the cluster has 2 ranks", "empty list"]),
        ([["a"], [3.5]], ["prompt 0 of rank 1 is 3.5 (float)", "a prompt is text"]),
        (["a", 3.5, "b"], ["prompt 1 of rank 0 is 3.5 (float)", "begins with prompts[0]"]),
        (["a", "b", None], ["prompts mixes", "prompts[0] is 'a'", "prompts[2] is None"]),
        ([["a"], "b"], ["prompts mixes", "prompts[1] is 'b'"]),
        ([["a"], [1, 2]], ["prompts[1] is [1, 2]", "list of ints is a prompt"]),
        ([1, 2, 3], ["prompt 0 of rank 0 is 1 (int)"]),
        ([["a", []], []], ["prompt 1 of rank 0 is an empty list"]),
        ([["a"], [[1, -2]]], ["prompt 0 of rank 1", "-2"]),
        ([["a"], [[1, True]]], ["prompt 0 of rank 1", "True"]),
        ("1+1=", ["prompts='1+1='", "name of a variable", "in a list"]),
        ("class", ["prompts='class'", "name of a variable"]),
        (7, ["prompts is 7 (int)", "a function"]),
        ({"prompt": "a"}, ["prompts is {'prompt': 'a'} (dict)"]),
        ([[{"prompt": "a", "image": 1}], []], ["prompt 0 of rank 0 has the key 'image'", "images"]),
        ([[{"prompt": "a", "messages": []}], []], ['both "prompt" and "messages"']),
        ([[{"prompt": "a", "images": "cat.png"}], []], ["images 'cat.png' (str)", "a list"]),
        ([[{"messages": []}], []], ["messages []", "at least one"]),
        ([[{"messages": [{"role": "user"}]}], []], ["messages[0] {'role': 'user'}", "content"]),
        ([[{"text": "a"}], []], ["neither"]),
    ],
)
def test_prompts_that_do_not_fit_are_told(prompts, needs):
    with pytest.raises(ValueError) as caught:
        shard_prompts(prompts, 2)
    assert [need for need in needs if need not in str(caught.value)] == []
    assert len(str(caught.value).splitlines()) >= 2


@pytest.mark.parametrize(
    ("prompts", "num_samples", "needs"),
    [
        ([["a"], ["b"]], [[1]], ["num_samples is [[1]]", "each of 2 ranks"]),
        ([["a"], ["b"]], [1, 2], ["num_samples is [1, 2]", "same form"]),
        ([["a"], ["b"]], [[1], [1, 2]], ["num_samples of rank 1 has 2 numbers", "its prompts are 1"]),
        ([["a"], ["b"]], [[1], [-1]], ["num_samples[0] of rank 1 is -1", "at least 0"]),
        ([["a"], ["b"]], [[1], [1.5]], ["num_samples[0] of rank 1 is 1.5 (float)"]),
        ([["a"], ["b"]], -1, ["num_samples is -1"]),
        ([["a"], ["b"]], True, ["num_samples is True"]),
        ([["a"], ["b"]], "two words", ["num_samples='two words'", "one int"]),
        (["a", "b", "c"], [1, 2], ["num_samples has 2 numbers; prompts has 3"]),
        ("mine", [1, 2], ["num_samples is [1, 2]", "each of 2 ranks"]),
    ],
)
def test_counts_that_do_not_fit_are_told(prompts, num_samples, needs):
    with pytest.raises(ValueError) as caught:
        shard_prompts(prompts, 2, num_samples=num_samples)
    assert [need for need in needs if need not in str(caught.value)] == []


def test_what_the_rank_finds_is_checked_there():
    with pytest.raises(ValueError, match="rank 1 has no variable 'mine', named by prompts\nit has \\['other'\\]\nmake it first"):
        shard_prompts("mine", 2)[1].read({"other": 1, "_hidden": 2})
    with pytest.raises(
        ValueError, match="the prompts of rank 1 are 'text' \\(str\\)\nneeded: a list of prompts\nput a single prompt in a list"
    ):
        shard_prompts("mine", 2)[1].read({"mine": "text"})
    with pytest.raises(ValueError, match="num_samples of rank 0 has 1 numbers; its prompts are 2"):
        shard_prompts("mine", 2, num_samples=[[1], []])[0].read({"mine": ["a", "b"]})


def test_whole_dict_prompts_pass():
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "ho"}]}]}
    assert check_prompts([{"prompt": "<image>", "images": [b"png"]}, chat], 0) == [{"prompt": "<image>", "images": [b"png"]}, chat]


def test_names_alone_are_looked_up_beforehand():
    def explode() -> list[str]:
        raise AssertionError("called too early")

    shard_prompts(explode, 1, num_samples="counts")[0].check_names({"counts": 2})
    with pytest.raises(ValueError, match="rank 0 has no variable 'counts', named by num_samples"):
        shard_prompts(explode, 1, num_samples="counts")[0].check_names({})
    with pytest.raises(ValueError, match="the prompts of rank 0 are 'one' \\(str\\)"):
        shard_prompts("mine", 1)[0].check_names({"mine": "one"})
    shard_prompts("mine", 1)[0].check_names({"mine": None})
