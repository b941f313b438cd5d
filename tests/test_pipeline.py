"""gather -> generate -> scatter in real gloo worlds of 1, 2 and 4 ranks, around the scripted engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scripted_engine import ScriptedEngine
from worlds import run_world

import workbench as wb
from workbench.rollout.engine import Origin
from workbench.rollout.provenance import origins_of

SAMPLING = wb.Sampling(n=2, max_tokens=9, temperature=1.0, seed=5, logprobs=True)
RAGGED: list[list[Any]] = [["1+1=", [7, 8, 9]], [], [{"prompt": "<image> what", "images": [b"png"]}], ["4+4=", "1+1=", "6+6="]]
COUNTS = [[1, 3], [], [0], [2, 0, 1]]


def direct(rank, prompts, counts=None, *, step=0):
    """What an engine gives for one rank's prompts with no pipeline around it."""
    origins = [Origin(rank=rank, index=i) for i in range(len(prompts))]
    return ScriptedEngine().generate(prompts, SAMPLING, num_samples=counts, origins=origins, step=step)


def difference(batch, expected):
    """Names of the fields that differ."""
    names = []
    for name in expected.__dataclass_fields__:
        left, right = getattr(batch, name), getattr(expected, name)
        is_equal = np.array_equal(left, right) and left.dtype == right.dtype if isinstance(right, np.ndarray) else left == right
        if not is_equal and name != "metadata":
            names.append(name)
    return names


def told(call):
    """The kind and text of the error that a call raises."""
    try:
        call()
    except (ValueError, wb.WorkbenchError) as error:
        return type(error).__name__, str(error)
    return "no error", ""


def rooted(group, rank, *, root=0, engine=None, **options):
    return wb.RootedRollout(group, (engine or ScriptedEngine()) if rank == root else None, root=root, **options)


def every_mode(rank):
    """Differences from the direct engine for each kind of group and way, and what the spans say."""
    import torch.distributed as dist
    from accelerate import Accelerator

    world = dist.group.WORLD
    groups = {"torch": world, "group": wb.Group.from_process_group(world), "accelerate": Accelerator(cpu=True)}
    found: dict[Any, list[str]] = {}
    for name, group in groups.items():
        for way in ("scatter", "broadcast"):
            rollout = rooted(group, rank, root=dist.get_world_size() - 1, scatter=way, step=3)
            batch = rollout.generate(RAGGED[rank], SAMPLING)
            counted = rollout.generate(RAGGED[rank], SAMPLING, COUNTS[rank])
            found[name, way] = difference(batch, direct(rank, RAGGED[rank], step=3)) + difference(
                counted, direct(rank, RAGGED[rank], COUNTS[rank], step=3)
            )
    spans = [(span.span, span.step, span.rank, span.num_bytes) for span in rollout.spans]
    grouped = wb.GroupedRollout(world, ScriptedEngine())
    found["grouped"] = difference(grouped.generate(RAGGED[rank], SAMPLING), direct(rank, RAGGED[rank]))
    alone = wb.GroupedRollout(None, ScriptedEngine())
    found["independent"] = difference(alone.generate(RAGGED[rank], SAMPLING), direct(rank, RAGGED[rank]))
    is_in_order = all(a.end_s <= b.start_s and a.start_s <= a.end_s for a, b in zip(rollout.spans, rollout.spans[1:], strict=False))
    return found, spans, is_in_order, sum(span.num_bytes for span in alone.spans)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_rank_gets_the_completions_of_its_own_prompts(world_size):
    for rank, (found, spans, is_in_order, bytes_alone) in enumerate(run_world(world_size, every_mode)):
        assert {how: names for how, names in found.items() if names} == {}
        assert [span[:3] for span in spans] == [(name, 3, rank) for name in ("gather", "generate", "scatter")] * 2
        assert all((num_bytes > 0) == (world_size > 1) for name, _, _, num_bytes in spans if name != "generate")
        assert is_in_order and bytes_alone == 0


def test_a_rank_alone_needs_no_process_group():
    rollout = wb.RootedRollout(None, ScriptedEngine())
    assert difference(rollout.generate(["a", "b"], SAMPLING, [1, 2]), direct(0, ["a", "b"], [1, 2])) == []
    assert difference(wb.GroupedRollout(None, ScriptedEngine()).generate(["a"], SAMPLING), direct(0, ["a"])) == []


def groups_of_two(rank):
    """Two engine groups beside each other, one whose ranks are not in rising order, one rooted at its second member."""
    first, second = wb.Group.create([0, 2], "even"), wb.Group.create([3, 1], "odd")
    mine = second if rank in second.ranks else first
    gathered = wb.GroupedRollout(mine, ScriptedEngine()).gather_prompts(RAGGED[rank], 1)
    grouped = wb.GroupedRollout(mine, ScriptedEngine()).generate(RAGGED[rank], SAMPLING)
    by_root = rooted(mine, mine.rank_in_group, root=1).generate(RAGGED[rank], SAMPLING)
    texts = [p for p in gathered.prompts if isinstance(p, str)]
    return (
        texts,
        gathered.offsets.tolist(),
        difference(grouped, direct(rank, RAGGED[rank])),
        difference(by_root, direct(rank, RAGGED[rank])),
    )


def test_groups_of_ranks_roll_out_beside_each_other():
    results = run_world(4, groups_of_two)
    assert [texts for texts, *_ in results] == [["1+1="], ["4+4=", "1+1=", "6+6="]] * 2
    assert [offsets for _, offsets, *_ in results] == [[0, 2, 3], [0, 3, 3]] * 2
    assert [result[2:] for result in results] == [([], [])] * 4


def by_hand(rank):
    """The steps one by one, with metadata beside the completions; the engine numbers the prompts itself."""
    import torch.distributed as dist

    engine = ScriptedEngine()
    rollout = rooted(dist.group.WORLD, rank, engine=engine)
    gathered = rollout.gather_prompts(RAGGED[rank], COUNTS[rank])
    batch = metadata = None
    if rank == 0:
        batch = engine.generate(gathered.prompts, SAMPLING, num_samples=gathered.num_samples)
        metadata = [{"reward": i} if i else None for i in range(len(batch))]
    mine = rollout.scatter_completions(batch, gathered.offsets, metadata)
    from_a_list = rollout.scatter_completions(batch, gathered.offsets.tolist())
    seeded = engine.generate(gathered.prompts, SAMPLING, origins=rollout.origins(gathered.offsets)) if rank == 0 else None
    same = rollout.scatter_completions(seeded, gathered.offsets)
    is_alike = difference(same, direct(rank, RAGGED[rank])) == [] and difference(from_a_list, mine) == []
    origins = {(int(r), int(i)) for r, i in zip(mine.origin_ranks, mine.origin_indices, strict=True)}
    return (
        gathered.offsets.tolist(),
        gathered.num_samples.tolist(),
        len(gathered.prompts),
        mine.prompts == tuple(RAGGED[rank]),
        mine.metadata,
        origins,
        is_alike,
    )


def test_the_steps_are_usable_by_hand():
    results = run_world(4, by_hand)
    for rank, (offsets, counts, num_prompts, has_prompts, _, origins, is_alike) in enumerate(results):
        assert offsets == [0, 2, 2, 3, 6] and counts == [1, 3, 0, 2, 0, 1]
        assert num_prompts == (6 if rank == 0 else 0)
        assert has_prompts and is_alike
        assert origins == {(rank, i) for i, count in enumerate(COUNTS[rank]) if count}
    rewards = [list(metadata) for *_, metadata, _, _ in results]
    assert rewards == [[None, {"reward": 1}, {"reward": 2}, {"reward": 3}], [], [], [{"reward": 4}, {"reward": 5}, {"reward": 6}]]


def grouped_by_hand(rank):
    import torch.distributed as dist

    rollout = wb.GroupedRollout(dist.group.WORLD, None)
    gathered = rollout.gather_prompts(RAGGED[rank])
    batch = ScriptedEngine().generate(gathered.prompts, SAMPLING, origins=rollout.origins(gathered.offsets))
    mine = rollout.scatter_completions(batch, gathered.offsets, list(range(len(batch))))
    return len(gathered.prompts), difference(mine, direct(rank, RAGGED[rank])), mine.metadata


def test_grouped_steps_are_usable_by_hand():
    assert run_world(4, grouped_by_hand) == [(6, [], (0, 1, 2, 3)), (6, [], ()), (6, [], (4, 5)), (6, [], (6, 7, 8, 9, 10, 11))]


class MixedUp(ScriptedEngine):
    """Swaps the completions of its first two prompts."""

    def generate(self, prompts, sampling, **options):
        batch = super().generate(prompts, sampling, **options)
        swapped = batch.prompt_hashes.copy()
        swapped[:4] = batch.prompt_hashes[[2, 3, 0, 1]]
        return replace(batch, prompt_hashes=swapped)


class Short(ScriptedEngine):
    """Leaves the last prompt out."""

    def generate(self, prompts, sampling, **options):
        options = {**options, "num_samples": [2] * (len(prompts) - 1) + [1]}
        return super().generate(prompts, sampling, **options)


class Careless(ScriptedEngine):
    """Forgets where prompts come from."""

    def generate(self, prompts, sampling, *, origins=None, **options):
        return super().generate(prompts, sampling, **options)


def failures(rank):
    """Each case: the error on this rank; after each a whole rollout must work."""
    import torch.distributed as dist

    world = dist.group.WORLD
    text = [f"{rank}+{i}=" for i in range(2)]

    def generate(engine=None, prompts=text, sampling=SAMPLING, counts=None, **options):
        rollout = rooted(world, rank, engine=engine, **options)
        return told(lambda: rollout.generate(prompts, sampling, counts))

    def scatter(change):
        rollout = rooted(world, rank)
        gathered = rollout.gather_prompts(text)
        batch = ScriptedEngine().generate(gathered.prompts, SAMPLING) if rank == 0 else None
        return told(lambda: rollout.scatter_completions(**change(batch, gathered.offsets)))

    closed = ScriptedEngine()
    closed.close()
    cases = {
        "bad prompt": lambda: generate(prompts=[*text, 3.5] if rank == 2 else text),
        "no list": lambda: generate(prompts="text" if rank == 1 else text),
        "none": lambda: generate(prompts=None if rank == 1 else text),
        "all none": lambda: generate(prompts=None),
        "counts none": lambda: generate(counts=None if rank in (1, 2) else [1, 1]),
        "counts short": lambda: generate(counts=[1] if rank == 3 else [1, 1]),
        "engine": lambda: generate(engine=ScriptedEngine(fails_on="2+1")),
        "refusal": lambda: generate(engine=ScriptedEngine(max_model_len=4)),
        "closed": lambda: generate(engine=closed, on_error="keep"),
        "no engine": lambda: told(lambda: wb.RootedRollout(world, None).generate(text, SAMPLING)),
        "sampling": lambda: generate(sampling=SAMPLING if rank < 3 else replace(SAMPLING, n=1)),
        "call": lambda: generate() if rank else told(lambda: rooted(world, rank).gather_prompts(text)),
        "root": lambda: told(lambda: wb.RootedRollout(world, ScriptedEngine(), root=int(rank == 1)).generate(text, SAMPLING)),
        "mode": lambda: told(lambda: (wb.RootedRollout if rank else wb.GroupedRollout)(world, ScriptedEngine()).gather_prompts(text)),
        "mixed up": lambda: generate(engine=MixedUp()),
        "short": lambda: generate(engine=Short()),
        "careless": lambda: generate(engine=Careless()),
        "no batch": lambda: scatter(lambda batch, offsets: dict(batch=None, offsets=offsets)),
        "two batches": lambda: scatter(lambda batch, offsets: dict(batch=batch or direct(0, ["a"]), offsets=offsets)),
        "offsets": lambda: scatter(lambda batch, offsets: dict(batch=batch, offsets=offsets[:-1] if rank == 1 else offsets)),
        "prompts": lambda: scatter(lambda batch, offsets: dict(batch=batch, offsets=offsets + np.arange(5))),
        "metadata": lambda: scatter(lambda batch, offsets: dict(batch=batch, offsets=offsets, metadata=[1] if rank == 0 else None)),
        "pickle": lambda: scatter(
            lambda batch, offsets: dict(batch=batch, offsets=offsets, metadata=[iter(i for i in [1])] * 16 if rank == 0 else None)
        ),
        "reversed": lambda: scatter(
            lambda batch, offsets: dict(batch=batch and ScriptedEngine().generate(batch.prompts[::-1], SAMPLING), offsets=offsets)
        ),
        "peers differ": lambda: told(
            lambda: wb.GroupedRollout(world, ScriptedEngine(mean_length=3 if rank == 2 else 12)).generate(text, SAMPLING)
        ),
        "one peer fails": lambda: told(
            lambda: wb.GroupedRollout(world, ScriptedEngine(fails_on="0+0" if rank == 2 else None)).generate(text, SAMPLING)
        ),
    }
    texts = {}
    for name, case in cases.items():
        texts[name] = case()
        assert difference(rooted(world, rank).generate(text, SAMPLING), direct(rank, text)) == [], name
    return texts


EXPECTED = {
    "bad prompt": ("ValueError", ["prompt 2 of rank 2 is 3.5 (float)", "a prompt is text"]),
    "no list": ("ValueError", ["the prompts of rank 1 are 'text' (str)", "put a single prompt in a list"]),
    "none": ("ValueError", ["prompts is None on rank 1 and a list on ranks 0, 2, 3", "needed: a list on every rank", "empty list"]),
    "all none": ("ValueError", ["prompts is None on ranks 0, 1, 2, 3\n", "needed: a list on every rank"]),
    "counts none": ("ValueError", ["num_samples is None on ranks 1, 2 and a list on ranks 0, 3"]),
    "counts short": ("ValueError", ["num_samples of rank 3 has 1 numbers; its prompts are 2"]),
    "engine": (
        "EngineError",
        ["the engine on rank 0 failed in generate at step 0: RuntimeError: the engine chokes", "8 prompts", 'on_error="keep"'],
    ),
    "refusal": ("EngineError", ["prompt 0 has 4 tokens; the model reads 4"]),
    "closed": ("EngineError", ["the engine is closed"]),
    "no engine": ("EngineError", ["rank 0 generates and has no engine", "RootedRollout(group, engine)"]),
    "sampling": ("ValueError", ["ranks 0 and 3 do not make the same call", "with another sampling or step"]),
    "call": ("ValueError", ["seen: rank 0 is in gather_prompts, rank 1 in generate"]),
    "root": ("ValueError", ["ranks 0 and 1 run different rollouts", "rooted at 0, rooted at 1"]),
    "mode": ("ValueError", ["ranks 0 and 1 run different rollouts", "grouped, rooted at 0"]),
    "mixed up": (
        "EngineError",
        [
            "sample 0 of prompt 0 of rank 0",
            "sent: '0+0=' (prompt 0 of rank 0",
            "came back: '0+1=' (marked as prompt 0 of rank 0",
            "order of",
        ],
    ),
    "short": ("EngineError", ["wrong number of completions for prompt 1 of rank 3: '3+1='", "got 1, asked for 2"]),
    "careless": ("EngineError", ["sent: '1+0=' (prompt 0 of rank 1", "came back: '1+0=' (marked as prompt 2 of rank 0"]),
    "no batch": ("ValueError", ["scatter_completions got no batch on rank 0", "batch and metadata on rank 0, the root, None elsewhere"]),
    "two batches": ("ValueError", ["scatter_completions got a batch on rank 1", "also rank 2: scatter_completions got a batch on rank 2"]),
    "offsets": ("ValueError", ["offsets on rank 1 are [0, 2, 4, 6]", "5 numbers from 0 upwards, for 4 ranks", "GatheredPrompts.offsets"]),
    "prompts": ("EngineError", ["the batch has 8 prompts; 12 were gathered"]),
    "metadata": ("ValueError", ["metadata has 1 entries for 16 completions", "None is allowed"]),
    "pickle": ("ValueError", ["cannot be sent to other ranks"]),
    "reversed": ("EngineError", ["sent: '0+0=' (prompt 0 of rank 0", "came back: '3+1='"]),
    "peers differ": (
        "EngineError",
        ["ranks 0 and 2 share one engine and generated different tokens", "1 of 4 members differ", "engine seed"],
    ),
    "one peer fails": ("EngineError", ["the engine on rank 2 failed in generate at step 0: RuntimeError"]),
}


@pytest.fixture(scope="module")
def failed():
    return run_world(4, failures, timeout_s=120.0)


@pytest.mark.parametrize("case", EXPECTED)
def test_a_failure_is_one_error_on_every_rank_and_the_next_rollout_works(failed, case):
    kind, needs = EXPECTED[case]
    assert {texts[case] for texts in failed} == {failed[0][case]}
    assert failed[0][case][0] == kind and [need for need in needs if need not in failed[0][case][1]] == [], failed[0][case]


def test_every_case_of_failure_is_looked_at(failed):
    assert set(failed[0]) == set(EXPECTED)


def keeping(rank):
    import torch.distributed as dist

    rollout = rooted(dist.group.WORLD, rank, engine=ScriptedEngine(fails_on="2+1"), on_error="keep")
    text = [f"{rank}+{i}=" for i in range(3)]
    batch = rollout.generate(text, SAMPLING)
    good = difference(batch, direct(rank, text))
    return batch.finish_reasons, batch.errors, batch.texts, good


def test_a_prompt_that_fails_comes_back_failed_and_the_others_whole():
    results = run_world(4, keeping)
    assert [good for *_, good in results if not good] == [[]] * 3  # every rank but rank 2
    reasons, errors, texts, _ = results[2]
    whole = direct(2, ["2+0=", "2+1=", "2+2="])
    assert reasons[2:4] == ("error", "error") and list(texts[2:4]) == ["", ""]
    assert [error is None for error in errors] == [True, True, False, False, True, True] and "2+1" in errors[2]
    assert (*texts[:2], *texts[4:]) == (*whole.texts[:2], *whole.texts[4:])


def tampered(rank):
    """What arrives on rank 1 was packed for another rank."""
    import torch.distributed as dist

    from workbench.rollout.packing import pack_batch, unpack_batch

    rollout = rooted(dist.group.WORLD, rank)
    receive = rollout._exchange.scatter_buffers
    if rank == 1:
        rollout._exchange.scatter_buffers = lambda *args: pack_batch(
            replace(unpack_batch(receive(*args)), origin_ranks=np.zeros(4, np.int32))
        )
    return told(lambda: rollout.generate([f"{rank}+0=", "5+5="], SAMPLING))


def test_what_changed_on_the_way_is_told_where_it_arrives():
    (kind, text), (first, _) = reversed(run_world(2, tampered))
    assert first == "no error" and kind == "EngineError"
    assert "sent: '1+0=' (prompt 0 of rank 1" in text and "came back: '1+0=' (marked as prompt 0 of rank 0" in text


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        (dict(scatter="mail"), "scatter='mail'\nneeded: 'scatter' or 'broadcast'"),
        (dict(on_error="hide"), "on_error='hide'\nneeded: 'raise' or 'keep'"),
        (dict(root=1), "root=1\nneeded: 0"),
    ],
)
def test_arguments_that_do_not_fit_are_told(options, needs):
    with pytest.raises(ValueError) as caught:
        wb.RootedRollout(None, ScriptedEngine(), **options)
    assert needs in str(caught.value)


def test_the_environment_chooses_the_way_where_the_caller_does_not(monkeypatch):
    monkeypatch.setenv("WORKBENCH_SCATTER", "broadcast")
    assert (wb.RootedRollout(None, None)._way, wb.RootedRollout(None, None, scatter="scatter")._way) == ("broadcast", "scatter")
    monkeypatch.setenv("WORKBENCH_SCATTER", "mail")
    with pytest.raises(ValueError, match="WORKBENCH_SCATTER='mail'"):
        wb.RootedRollout(None, None)


def test_origins_of_offsets_are_told_one_by_one_and_in_slices():
    origins = origins_of(np.array([0, 2, 2, 3]), (4, 5, 7))
    expected = [Origin(rank=4, index=0), Origin(rank=4, index=1), Origin(rank=7, index=0)]
    assert list(origins) == expected and list(origins[1:]) == expected[1:] and len(origins) == 3
    assert len(origins_of(np.array([0, 0]), (0,))) == 0
