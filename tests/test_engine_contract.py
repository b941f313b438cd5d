"""One contract for every engine: the scripted one of these tests, transformers and real vLLM."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from scripted_engine import ScriptedEngine

import workbench as wb
from workbench.records import EngineStatus, FinishReason
from workbench.rollout.bisect import generate_bisected
from workbench.rollout.engine import Engine, Origin
from workbench.rollout.hf_engine import HFEngine
from workbench.rollout.requests import prompt_hash
from workbench.rollout.vllm_engine import VLLMEngine

pytestmark = [  # of vLLM's and transformers' own imports
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

KV_BYTES = 2**26
PROMPTS = ["1+1=", "12+7=", "3+4="]
GREEDY = wb.Sampling(max_tokens=10, temperature=0.0, logprobs=True)
SAMPLED = wb.Sampling(n=3, max_tokens=24, temperature=1.0, seed=5)


def make(kind: str) -> Engine:
    if kind == "scripted":
        return ScriptedEngine()
    return HFEngine("tiny") if kind == "hf" else VLLMEngine("tiny", kv_cache_bytes=KV_BYTES)


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = {kind: make(kind) for kind in ("scripted", "hf", "vllm")}
    yield made
    for engine in made.values():
        engine.close()
    torch.set_num_threads(threads)


@pytest.fixture(params=["scripted", "hf", "vllm"])
def engine(request: pytest.FixtureRequest, engines: dict[str, Engine]) -> Engine:
    found = engines[request.param]
    assert found.status is EngineStatus.AWAKE, "an earlier test left it asleep"
    return found


def status(engine: Engine) -> EngineStatus:
    """Its status now: type checkers believe that a property stays as it was."""
    return engine.status


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, copies."""
    found = engine.weights if isinstance(engine, ScriptedEngine) else wb.models.state_dict("tiny")
    return {name: tensor.clone() for name, tensor in found.items()}


def test_it_is_an_engine(engine: Engine) -> None:
    assert isinstance(engine, Engine) and not engine.is_sleeping


def test_completions_come_packed_in_the_order_of_prompts_and_samples(engine: Engine) -> None:
    origins = [Origin(rank=2, index=7), Origin(rank=0, index=1), Origin(rank=5, index=0)]
    batch = engine.generate(PROMPTS, SAMPLED, num_samples=[2, 0, 3], origins=origins, step=4)
    assert batch.prompts == tuple(PROMPTS) and len(batch) == len(batch.texts) == 5
    assert batch.prompt_index.tolist() == [0, 0, 2, 2, 2] and batch.sample_index.tolist() == [0, 1, 0, 1, 2]
    assert batch.origin_ranks.tolist() == [2, 2, 5, 5, 5] and batch.origin_indices.tolist() == [7, 7, 0, 0, 0]
    assert batch.prompt_hashes.tolist() == [prompt_hash(PROMPTS[i]) for i in (0, 0, 2, 2, 2)]
    assert batch.num_prompt_tokens.tolist() == [len(p) for p in PROMPTS]  # all three read characters
    assert batch.offsets[-1] == len(batch.tokens) and (batch.lengths >= 1).all() and (batch.lengths <= 24).all()
    assert batch.logprobs is None and batch.errors == ()


def test_finish_reasons_tell_length_from_stop(engine: Engine) -> None:
    batch = engine.generate(PROMPTS * 4, wb.Sampling(n=2, max_tokens=30, seed=1))
    for length, code in zip(batch.lengths, batch.finish_codes, strict=True):
        assert code in (FinishReason.STOP, FinishReason.LENGTH)
        assert length == 30 or code == FinishReason.STOP
    assert set(engine.generate(PROMPTS, wb.Sampling(max_tokens=1, min_tokens=1, seed=1)).lengths) == {1}


def test_min_tokens_and_ignore_eos_hold_the_end_back(engine: Engine) -> None:
    assert (engine.generate(PROMPTS, wb.Sampling(max_tokens=40, min_tokens=33, temperature=0.0)).lengths >= 33).all()
    held = engine.generate(PROMPTS, wb.Sampling(max_tokens=40, ignore_eos=True, temperature=0.0))
    assert (held.lengths == 40).all() and set(held.finish_reasons) == {"length"}


def test_a_stop_text_ends_a_completion_and_is_cut_off(engine: Engine) -> None:
    free = engine.generate(["12+7="], wb.Sampling(max_tokens=20, temperature=0.0)).texts[0]
    stop = free[2]
    batch = engine.generate(["12+7="], wb.Sampling(max_tokens=20, temperature=0.0, stop=(stop,)))
    assert batch.texts[0] == free[: free.index(stop)] and batch.finish_reasons == ("stop",)


def test_logprobs_come_only_when_asked_one_a_token(engine: Engine) -> None:
    batch = engine.generate(PROMPTS, GREEDY)
    assert batch.logprobs is not None and batch.logprobs.shape == batch.tokens.shape
    assert (batch.logprobs <= 0).all() and np.isfinite(batch.logprobs).all()


def test_nothing_to_do_is_an_empty_batch(engine: Engine) -> None:
    assert len(engine.generate([], GREEDY)) == 0
    batch = engine.generate(PROMPTS, SAMPLED, num_samples=[0, 0, 0])
    assert len(batch) == 0 and batch.prompts == tuple(PROMPTS)
    assert len(engine.generate(PROMPTS, wb.Sampling(n=0))) == 0


def test_seeds_repeat_samples_and_differ_by_sample_origin_and_step(engine: Engine) -> None:
    once, again = (engine.generate(["47+58=", "47+58="], SAMPLED) for _ in range(2))
    assert once.texts == again.texts
    assert len(set(once.texts)) > 1 and once.texts[:3] != once.texts[3:]
    assert engine.generate(["47+58=", "47+58="], SAMPLED, step=1).texts != once.texts
    alone = engine.generate(["47+58="], SAMPLED, origins=[Origin(rank=0, index=1)])
    assert alone.texts == once.texts[3:]  # a sample depends neither on its neighbours nor on its place


def test_without_a_seed_each_call_draws_afresh_and_the_process_keeps_its_random_states(engine: Engine) -> None:
    free = wb.Sampling(n=8, max_tokens=24)
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    assert engine.generate(["47+58="], free).texts != engine.generate(["47+58="], free).texts
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_token_ids_are_a_prompt_too(engine: Engine) -> None:
    batch = engine.generate([[5, 6, 7]], GREEDY)
    assert batch.num_prompt_tokens.tolist() == [3] and batch.prompt_hashes.tolist() == [prompt_hash([5, 6, 7])]


def test_a_prompt_that_is_too_long_is_told_in_tokens_and_the_next_is_fine(engine: Engine) -> None:
    with pytest.raises(wb.EngineError, match="prompt 1.* has 100000 tokens"):
        engine.generate(["1+1=", "1" * 100_000], GREEDY)
    assert len(engine.generate(PROMPTS, GREEDY)) == 3


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_gives_memory_back_and_wakes_the_same(engine: Engine, level: int) -> None:
    before = engine.generate(PROMPTS, GREEDY)
    held = engine.memory()
    slept = engine.sleep(level)
    assert status(engine) is EngineStatus.ASLEEP and engine.is_sleeping
    assert (slept.level, slept.weights_bytes, slept.kv_cache_bytes) == (level, held.weights_bytes, held.kv_cache_bytes)
    asleep = engine.memory()
    assert asleep.weights_bytes == asleep.kv_cache_bytes == 0 < held.weights_bytes
    assert asleep.host_backup_bytes == (held.weights_bytes if level == 1 else 0)
    assert engine.wake_up().weights_bytes == held.weights_bytes
    assert status(engine) is EngineStatus.AWAKE and engine.memory().host_backup_bytes == 0
    after = engine.generate(PROMPTS, GREEDY)
    np.testing.assert_array_equal(after.tokens, before.tokens)
    np.testing.assert_array_equal(after.logprobs, before.logprobs)


def test_a_pause_frees_nothing_and_ends_with_wake_up(engine: Engine) -> None:
    before = engine.generate(PROMPTS, GREEDY).texts
    slept = engine.sleep(0)
    assert slept.weights_bytes == slept.kv_cache_bytes == 0 and engine.is_sleeping and engine.memory().weights_bytes > 0
    with pytest.raises(wb.EngineError, match="sleep level 0"):
        engine.generate(PROMPTS, GREEDY)
    engine.wake_up()
    assert status(engine) is EngineStatus.AWAKE and engine.generate(PROMPTS, GREEDY).texts == before


def test_parts_wake_by_tag(engine: Engine) -> None:
    before = engine.generate(PROMPTS, GREEDY).texts
    engine.sleep(1)
    assert engine.wake_up(["weights"]).kv_cache_bytes == 0
    assert status(engine) is EngineStatus.WEIGHTS_ONLY and engine.is_sleeping
    with pytest.raises(wb.EngineError, match="wake_up"):
        engine.generate(PROMPTS, GREEDY)
    engine.wake_up(["kv_cache"])
    assert status(engine) is EngineStatus.AWAKE and engine.generate(PROMPTS, GREEDY).texts == before


def test_no_ops_say_so(engine: Engine) -> None:
    assert "already awake" in engine.wake_up().note
    engine.sleep(1)
    again = engine.sleep(2)
    assert "already asleep at level 1" in again.note and again.weights_bytes == 0
    engine.wake_up(["weights"])
    assert "awake" in engine.wake_up(["weights"]).note and status(engine) is EngineStatus.WEIGHTS_ONLY
    engine.wake_up()
    assert status(engine) is EngineStatus.AWAKE


def test_generate_on_a_sleeping_engine_names_sleep_and_wake_up(engine: Engine) -> None:
    engine.sleep(1)
    with pytest.raises(wb.EngineError, match=r"asleep(.|\n)*sleep level 1(.|\n)*wake_up\(\)"):
        engine.generate(PROMPTS, GREEDY)
    engine.wake_up()


def test_new_weights_are_used_and_named_and_survive_both_sleeps(engine: Engine) -> None:
    kept, before = weights(engine), engine.generate(PROMPTS, GREEDY)
    torch.manual_seed(0)
    engine.update_weights([(name, w + 0.3 * torch.randn_like(w)) for name, w in kept.items()], version=engine.weight_version + 1)
    changed = engine.generate(PROMPTS, GREEDY)
    assert changed.texts != before.texts and set(changed.weight_versions) == {engine.weight_version}
    for level in (1, 2):
        engine.sleep(level)
        engine.wake_up()
        assert engine.generate(PROMPTS, GREEDY).texts == changed.texts
    engine.update_weights(iter(kept.items()), version=engine.weight_version + 1)
    np.testing.assert_array_equal(engine.generate(PROMPTS, GREEDY).logprobs, before.logprobs)


def test_a_part_of_the_weights_may_be_replaced(engine: Engine) -> None:
    kept, before = weights(engine), engine.generate(PROMPTS, GREEDY)
    name = "model.embed_tokens.weight"
    engine.update_weights([(name, torch.flip(kept[name], [0]))], version=engine.weight_version + 1)
    assert engine.generate(PROMPTS, GREEDY).texts != before.texts
    engine.update_weights([(name, kept[name])], version=engine.weight_version + 1)
    assert engine.generate(PROMPTS, GREEDY).texts == before.texts


@pytest.mark.parametrize("bad, needs", [
    (("model.embed_tokens.weight", torch.zeros(3, 3)), ["model.embed_tokens.weight", "(3, 3)"]),
    (("model.embed_token.weight", torch.zeros(3, 3)), ["model.embed_token.weight", "model.embed_tokens.weight"]),
])  # fmt: skip
def test_an_update_that_does_not_fit_is_refused_whole(engine: Engine, bad: tuple[str, torch.Tensor], needs: list[str]) -> None:
    kept, before, version = weights(engine), engine.generate(PROMPTS, GREEDY), engine.weight_version
    with pytest.raises(wb.EngineError) as caught:
        engine.update_weights([*((name, w + 1) for name, w in kept.items() if name != bad[0]), bad], version=version + 1)
    assert all(need in str(caught.value) for need in needs)
    assert engine.weight_version == version
    np.testing.assert_array_equal(engine.generate(PROMPTS, GREEDY).logprobs, before.logprobs)


def test_memory_says_what_it_holds(engine: Engine) -> None:
    memory = engine.memory()
    assert memory.pid == os.getpid() and memory.weights_bytes > 0 and memory.host_backup_bytes == 0


# What only the real ones do.


@pytest.fixture(params=["hf", "vllm"])
def real(request: pytest.FixtureRequest, engines: dict[str, Engine]) -> Engine:
    return engines[request.param]


def test_greedy_tokens_and_logprobs_agree_between_the_real_engines(engines: dict[str, Engine]) -> None:
    hf, vllm = (engines[kind].generate(PROMPTS * 2, wb.Sampling(max_tokens=40, temperature=0.0, logprobs=True)) for kind in ("hf", "vllm"))
    np.testing.assert_array_equal(hf.tokens, vllm.tokens)
    assert hf.logprobs is not None and vllm.logprobs is not None
    assert hf.texts == vllm.texts and hf.finish_reasons == vllm.finish_reasons
    np.testing.assert_allclose(hf.logprobs, vllm.logprobs, atol=1e-5)


def test_logprobs_are_those_before_temperature(real: Engine) -> None:
    greedy = real.generate(["12+7="], wb.Sampling(max_tokens=1, temperature=0.0, logprobs=True))
    hot = real.generate(["12+7="], wb.Sampling(n=32, max_tokens=1, temperature=2.0, seed=0, logprobs=True))
    assert greedy.logprobs is not None and hot.logprobs is not None
    same = hot.tokens == greedy.tokens[0]
    assert 0 < same.sum() < 32
    np.testing.assert_allclose(hot.logprobs[same], greedy.logprobs[0], atol=1e-5)
    assert (hot.logprobs[~same] < greedy.logprobs[0]).all()


def test_tags_versions_levels_and_dtypes_that_are_none_are_told(real: Engine) -> None:
    with pytest.raises(wb.EngineError, match="no tag 'weight'"):
        real.wake_up(["weight"])
    with pytest.raises(wb.EngineError, match="sleep level 3 is none of 0"):
        real.sleep(3)
    with pytest.raises(wb.EngineError, match="version is an int of at least 1"):
        real.update_weights([], version=0)
    name, tensor = next(iter(weights(real).items()))
    with pytest.raises(wb.EngineError, match="its dtype is torch.int64, the checkpoint's is F32"):
        real.update_weights([(name, tensor.long())], version=9)
    with pytest.raises(wb.EngineError, match="comes twice"):
        real.update_weights([(name, tensor), (name, tensor)], version=9)
    real.sleep(1)
    with pytest.raises(wb.EngineError, match=r"asleep(.|\n)*wake_up\(\['weights'\]\)"):
        real.update_weights([(name, tensor)], version=9)
    real.wake_up()


def test_sampling_that_vllm_refuses_is_told(engines: dict[str, Engine]) -> None:
    with pytest.raises(wb.EngineError, match=r"vLLM does not take this sampling: temperature must be in \[0, 2\]"):
        engines["vllm"].generate(PROMPTS, wb.Sampling(temperature=5.0))


def test_what_is_no_prompt_is_told(real: Engine) -> None:
    with pytest.raises(wb.EngineError, match=r"prompt 1 of rank 0 is 3.5 \(float\)"):
        real.generate(["1+1=", 3.5], GREEDY)  # type: ignore[list-item]
    with pytest.raises(wb.EngineError, match="prompt 0 of rank 0 has 0 tokens"):
        real.generate([""], GREEDY)


def test_a_bad_prompt_comes_back_failed_beside_the_others(real: Engine) -> None:
    whole = real.generate(PROMPTS, SAMPLED)
    batch = generate_bisected(real, [*PROMPTS, "1" * 100_000], SAMPLED)
    assert batch.texts[:9] == whole.texts and batch.finish_reasons[9:] == ("error",) * 3
    assert "100000 tokens" in str(batch.errors[9]) and batch.errors[:9] == (None,) * 9


def test_an_interrupt_leaves_nothing_behind(engines: dict[str, Engine]) -> None:
    engine = engines["vllm"]
    before = engine.generate(PROMPTS, GREEDY).texts
    timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS * 200, wb.Sampling(n=4, max_tokens=400, ignore_eos=True, seed=0))
    timer.join()
    start = time.monotonic()
    assert engine.generate(PROMPTS, GREEDY).texts == before and status(engine) is EngineStatus.AWAKE
    assert time.monotonic() - start < 20


def test_an_interrupt_between_forward_pass_and_sampling_leaves_nothing_behind(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = engines["vllm"]
    before = engine.generate(PROMPTS, GREEDY).texts

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._llm.llm_engine.engine_core.engine_core.model_executor, "sample_tokens", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, GREEDY)
    assert engine.generate(PROMPTS, GREEDY).texts == before and status(engine) is EngineStatus.AWAKE


def test_an_interrupt_while_the_batch_changes_waits_for_the_end_of_the_step(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = engines["vllm"]
    before = engine.generate(PROMPTS, GREEDY).texts
    batch = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.input_batch
    remove = batch.remove_request

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return remove(*args)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "remove_request", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, SAMPLED)
    assert engine.generate(PROMPTS, GREEDY).texts == before and status(engine) is EngineStatus.AWAKE


def test_an_interrupt_of_all_but_a_generate_waits_for_its_end(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = engines["vllm"]
    before, version = engine.generate(PROMPTS, GREEDY).texts, engine.weight_version + 1

    def update() -> None:
        engine.update_weights(weights(engine).items(), version=version)

    for verb, call in (("_sleep", engine.sleep), ("_wake_up", engine.wake_up), ("_load", update)):
        whole = getattr(engine, verb)

        def interrupted(*args: Any, whole: Any = whole) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            return whole(*args)

        with monkeypatch.context() as patch:
            patch.setattr(engine, verb, interrupted)
            with pytest.raises(KeyboardInterrupt):
                call()
        assert engine.is_sleeping == (verb == "_sleep")
    assert engine.generate(PROMPTS, GREEDY).texts == before and engine.weight_version == version


def test_an_engine_that_was_cut_half_asleep_says_so(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = engines["vllm"]

    def cut(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_sleep", cut)
        with pytest.raises(KeyboardInterrupt):
            engine.sleep()
    assert status(engine) is EngineStatus.DEAD
    with pytest.raises(wb.EngineError, match="the engine is dead: sleep was interrupted in its middle\nstart another"):
        engine.generate(PROMPTS, GREEDY)
    engine._death = ""  # it was not asleep by half: its real sleep never began
    assert status(engine) is EngineStatus.AWAKE


def test_sleep_is_seen_from_outside(engines: dict[str, Engine]) -> None:
    engine, me = engines["vllm"], psutil.Process()
    engine.generate(PROMPTS, GREEDY)
    awake = me.memory_full_info().pss
    slept = engine.sleep(1)
    asleep = me.memory_full_info().pss
    engine.wake_up()
    again = me.memory_full_info().pss
    moved = slept.weights_bytes + slept.kv_cache_bytes
    assert awake - asleep > 0.95 * moved and again - asleep > 0.95 * moved


def test_a_second_engine_lives_beside_the_first(engines: dict[str, Engine]) -> None:
    texts = engines["vllm"].generate(PROMPTS, GREEDY).texts
    second = VLLMEngine("tiny", kv_cache_bytes=KV_BYTES)
    assert second.generate(PROMPTS, GREEDY).texts == texts
    second.close()
    second.close()
    assert second.status is EngineStatus.DEAD and "dead" in repr(second)
    with pytest.raises(wb.EngineError, match="the engine is dead: it was closed"):
        second.generate(PROMPTS, GREEDY)
    assert engines["vllm"].generate(PROMPTS, GREEDY).texts == texts


def model_runner_of(engine: Engine) -> Any:
    assert isinstance(engine, VLLMEngine)
    return engine._rpc(lambda worker: worker.model_runner)


@pytest.mark.parametrize("kept", [None, 3], ids=["all tokens", "top 3"])
def test_seeded_rows_draw_what_vllm_draws(engines: dict[str, Engine], kept: int | None) -> None:
    runner = model_runner_of(engines["vllm"])
    sampler = runner.sampler.topk_topp_sampler
    top_k = None if kept is None else torch.full((40,), kept)

    def drawn(draw: Any, seeded: range) -> tuple[list[int], list[int]]:
        torch.manual_seed(7)
        generators = {row: torch.Generator().manual_seed(row) for row in seeded}
        logits = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
        tokens = [draw(logits.clone(), generators, top_k, None)[0].tolist() for _ in range(3)]
        return sum(tokens, []), [int(generator.get_state().sum()) for generator in generators.values()]

    for seeded in (range(40), range(39)):  # the second has a row without a seed
        assert drawn(sampler.forward, seeded) == drawn(sampler.forward_cpu, seeded)
    assert len(set(drawn(sampler.forward, range(40))[0])) > 20


@pytest.mark.parametrize("rows", [1, 400])
def test_layers_of_plain_weights_multiply_as_torch_does(engines: dict[str, Engine], rows: int) -> None:
    runner = model_runner_of(engines["vllm"])
    layers = [layer for layer in runner.model.modules() if getattr(layer, "cpu_linear", None) is not None]
    assert len(layers) == 4 * 3 + 2, "four matrices a layer, the embedding and the head"
    for layer in layers:
        x = torch.randn(rows, layer.weight.shape[1])
        torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None), torch.nn.functional.linear(x, layer.weight))


def test_seeded_samples_are_whole_when_prompts_are_read_again(engines: dict[str, Engine]) -> None:
    prompts = [f"{i}+{i + 7}=" for i in range(60)]
    long = wb.Sampling(max_tokens=200, temperature=1.0, seed=3, ignore_eos=True)
    with_room = engines["vllm"].generate(prompts, long).texts
    small = VLLMEngine("tiny", kv_cache_bytes=2**24)  # holds half of it: requests are put off, and their prompts read again in pieces
    cramped = small.generate(prompts, long).texts
    small.close()
    assert cramped == with_room


@pytest.mark.parametrize("options, needs", [
    ({"engine_options": {"max_num_seq": 4}}, "nearest names: max_num_seqs"),
    ({"engine_options": {"tensor_parallel_size": 2}}, "pass tp= instead"),
    ({"engine_options": {"enable_sleep_mode": True}}, "the engine sets it itself"),
    ({"kv_cache_bytes": 2**50}, "KV cache 1073741824 MiB are needed"),
    ({"device": "cuda"}, "the installed vLLM runs on 'cpu'"),
    ({"tp": 2}, "tp=2 needs a group of 2 ranks; this one has 1"),
])  # fmt: skip
def test_what_cannot_start_is_told_before_it_starts(options: dict[str, object], needs: str) -> None:
    start = time.monotonic()
    with pytest.raises(wb.EngineError) as caught:
        VLLMEngine("tiny", **options)  # type: ignore[arg-type]
    assert needs in str(caught.value) and time.monotonic() - start < 30


@pytest.mark.parametrize("kv_bytes", [1, 100_000])
def test_a_kv_cache_too_small_says_what_to_pass(tmp_path: Path, kv_bytes: int) -> None:
    with pytest.raises(wb.EngineError, match=rf"the KV cache has {kv_bytes:,} bytes: pass a larger kv_cache_bytes=\n"):
        VLLMEngine("tiny", kv_cache_bytes=kv_bytes, log_path=tmp_path / "vllm.log")


def test_a_start_that_fails_names_the_log(tmp_path: object) -> None:
    log = f"{tmp_path}/vllm.log"
    with pytest.raises(wb.EngineError, match=r"vLLM did not start with model(.|\n)*its log is .*/vllm.log"):
        VLLMEngine("tiny", kv_cache_bytes=KV_BYTES, log_path=log, engine_options={"max_num_batched_tokens": -5})
    assert os.path.getsize(log) > 0
