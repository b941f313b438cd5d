"""What was asked of an engine's handle as a part of a session: asked again in its order and compared, or said why not."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import workbench as wb
from workbench.ranks import history
from workbench.ranks.digest import digest_of
from workbench.ranks.history import History, Told
from workbench.ranks.reproduce import compare
from workbench.ranks.session import Entry, Output, read_session, write_session
from workbench.rollout.batch import empty_batch
from workbench.rollout.engine import PhaseTimes
from workbench.rollout.outcome import told_batch, told_phase, told_weights

SEEDED = wb.Sampling(n=2, max_tokens=8, temperature=1.0, seed=5, logprobs=True)
FRESH = wb.Sampling(max_tokens=8, temperature=1.0)
ENDLESS = wb.Sampling(n=64, max_tokens=250, ignore_eos=True)
PROMPTS = ["12+30=", [5, 6, 7]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that can be asked of a handle; the last weights are too large to be kept."""
    shifted = [(name, weight + 0.3) for name, weight in wb.models.state_dict("tiny").items()]
    with wb.launch(1) as cluster:
        with wb.start_engine(cluster, kv_cache_bytes=64 * 2**20) as engine:
            engine.generate(PROMPTS, SEEDED)
            cluster.execute("between = 1; between")
            engine.sleep(2)
            with pytest.raises(wb.EngineError):
                engine.generate(PROMPTS, SEEDED)
            engine.wake_up(["weights"])
            engine.update_weights(iter(shifted), 3)
            engine.wake_up()
            wb.rollout(cluster, ["1+1="], engine=engine, sampling=SEEDED, sleep_level=None, keep=False)
            engine.generate(PROMPTS, FRESH)
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                engine.generate(["1+1="] * 64, ENDLESS)
            engine.generate(PROMPTS, SEEDED, num_samples=[1, 0])
            with pytest.MonkeyPatch.context() as limits:
                limits.setattr(history, "_LARGEST_VALUE", 1 << 20)
                engine.update_weights(shifted, 4)
            engine.generate(PROMPTS, SEEDED)
        with pytest.raises(wb.EngineError):
            engine.generate(PROMPTS, SEEDED)
        return cluster.save_session(tmp_path_factory.mktemp("session") / "session.json")


def test_what_was_asked_stands_in_its_order(saved):
    entries = read_session(saved).entries
    assert [entry.text.removeprefix("engine.") for entry in entries] == [
        *("start_engine", "generate", "between = 1; between", "sleep", "generate", "wake_up", "update_weights", "wake_up"),
        *("rollout", "generate", "generate", "generate", "update_weights", "generate", "close", "generate"),
    ]
    assert [(entry.outputs[0].outcome, entry.outputs[0].text) for entry in entries[3:8]] == [
        ("ok", "asleep, level 2"),
        ("raised", "EngineError: generate: the engine is asleep at sleep level 2: weights and kv_cache"),
        ("ok", "weights_only, level 2"),
        ("ok", "30 tensors, 2,072,064 bytes, version 3"),
        ("ok", "awake, level 2"),
    ]
    assert entries[10].stop == "interrupt" and entries[-1].outputs[0].text == "EngineError: the engine is closed"


def test_it_is_asked_again_and_the_first_that_differs_is_told(saved):
    with wb.reproduce(saved) as cluster:
        report = cluster.report
        assert report is not None and (report.num_cells, report.num_outputs, report.num_hashed) == (14, 14, 10), str(report)
        now = cluster.history.told()
    (first,) = report.differences  # only of what came after weights that were not kept: they stand on completions as version 4
    assert (first.cell, first.source, first.rank, first.what) == (14, "engine.generate", -1, "result")
    assert first.then.startswith("['") and "(hash " in first.then and first.then.split(" (hash ")[1] != first.now.split(" (hash ")[1]
    assert report.notes == (
        "cell 13, engine.update_weights: 1 MiB are more than a session keeps",
        "cell 11 could not be run: WorkbenchError: engine.generate was interrupted then",
        "cell 13 could not be run: WorkbenchError: engine.update_weights was not kept: 1 MiB are more than a session keeps",
        "cell 10: a result was compared by its text only: it was drawn without a seed; "
        "Sampling(seed=...) makes completions that can be compared",
    )
    assert [entry.text for entry in now] == [e.text for i, e in enumerate(read_session(saved).entries, start=1) if i not in (11, 13)]


def test_an_engine_that_could_not_be_started_is_named_by_what_needs_it(saved, tmp_path):
    session = read_session(saved)
    start, asked, *_, rolled = session.entries[:9]
    entries = (replace(start, value="gone"), asked, rolled)
    with wb.reproduce(write_session(replace(session, entries=entries, notes=()), tmp_path / "session.json")) as cluster:
        assert cluster.report is not None and cluster.report.num_cells == 0
        assert cluster.report.notes == (
            "cell 1 could not be run: KeyError: 'gone'",
            "cell 2 could not be run: WorkbenchError: engine.generate needs what cell 1 (start_engine) gives, and that could not be run",
            "cell 3 could not be run: WorkbenchError: rollout needs what cell 1 (start_engine) gives, and that could not be run",
        )


class Machine:
    """Something that a call makes."""

    def __repr__(self) -> str:
        return "<machine>"


def test_a_history_refers_to_what_its_entries_made_and_says_what_it_does_not_know():
    kept, machine = History(), Machine()
    with kept.call(Machine, (), {}) as given:
        given.append(machine)
        with kept.method(machine, "machine.within", (), {}):  # the call stands for it
            beside = threading.Thread(target=lambda: kept.event("kill", 0))  # but not for what another thread does meanwhile
            beside.start()
            beside.join()
    with kept.method(machine, "machine.run", (1,), {}) as given:
        given.append(Told(text="ran"))
    with kept.method(Machine(), "machine.run", (), {}):
        pass
    made, killed, ran, unknown = kept.told()
    assert (made.text, killed.task, ran.task, ran.text, ran.unkept) == ("Machine", "kill", "method", "machine.run", "")
    assert ran.outputs[0].digest == digest_of("ran").value
    assert unknown.unkept == "the session does not hold how <machine> was made" and unknown.value == ""


@pytest.mark.parametrize(
    "error, stop", [(KeyboardInterrupt(), "interrupt"), (wb.RankInterrupted("interrupted"), "interrupt"), (ValueError("no"), "")]
)
def test_a_call_that_was_interrupted_is_told_from_one_that_failed(error, stop):
    kept = History()
    with pytest.raises(type(error)), kept.call(Machine, (), {}):
        raise error
    (entry,) = kept.told()
    assert (entry.stop, entry.outputs[0].outcome) == (stop, "raised")


def test_what_is_compared_of_a_call():
    times = PhaseTimes(level=1, weights_s=1.0, kv_cache_s=2.0, tidy_s=3.0, weights_bytes=4, kv_cache_bytes=5, note="already awake")
    assert told_phase("awake", times) == Told(text="awake, level 1 (already awake)")
    assert told_phase("asleep", replace(times, note="", weights_s=9.0, kv_cache_bytes=9)) == Told(text="asleep, level 1")
    one, other = (told_weights([("w", torch.full((2, 3), value))], 7) for value in (1.0, 2.0))
    assert one.text == other.text == "1 tensor, 24 bytes, version 7" and digest_of(one.content) != digest_of(other.content)
    batch = empty_batch(["1+1="])
    assert told_batch(batch, FRESH).text == "0 completions of 1 prompt"
    assert told_batch(batch, FRESH).reason.startswith("it was drawn without a seed") and told_batch(batch, FRESH).content is None
    for sampling in (SEEDED, wb.Sampling(temperature=0.0)):
        assert digest_of(told_batch(batch, sampling).content).value and not told_batch(batch, sampling).reason


def test_cells_are_numbered_as_in_the_session_where_some_could_not_be_run():
    then, now = (
        Entry(number=1, task="method", text="engine.sleep", outputs=(Output(rank=-1, outcome="ok", text=text, reason="why"),))
        for text in ("asleep, level 1", "asleep, level 2")
    )
    (found,), *_, unhashed = compare([(then, now)], [7])
    assert str(found) == "cell 7 (engine.sleep), the driver: result differs\n  then asleep, level 1\n  now  asleep, level 2"
    assert unhashed == ["cell 7: a result was compared by its text only: why"]
