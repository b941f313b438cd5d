"""Engines in processes of their own, real vLLM on the bundled model: started, asked, slept, interrupted, killed; the ranks live on."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import leaks
import psutil
import pytest

import workbench as wb
from workbench.ranks.cluster import Cluster
from workbench.rollout.client import Address, EngineClient
from workbench.rollout.handle import EngineHandle

GREEDY = wb.Sampling(max_tokens=16, temperature=0.0)
LONG = wb.Sampling(n=64, max_tokens=250, temperature=1.0, ignore_eos=True)
KV_CACHE_BYTES = 64 * 2**20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(2) as made:
        yield made


@pytest.fixture(scope="module")
def engine(cluster) -> EngineHandle:
    return wb.start_engine(cluster, model="tiny", kv_cache_bytes=KV_CACHE_BYTES)


def test_it_is_one_process_of_the_clusters_own(cluster, engine):
    (pid,) = engine.pids
    assert pid not in [s.pid for s in cluster.status()] and psutil.Process(pid).is_running()
    assert engine.status == "awake" and repr(engine) == "<engine tiny (vllm, rooted): awake>"
    batch = engine.generate(["12+30=", [5, 6, 7]], GREEDY)
    assert len(batch) == 2 and batch.lengths.max() <= 16 and engine.generate(["12+30="], GREEDY).texts[0] == batch.texts[0]


def test_it_sleeps_and_wakes_with_what_it_frees(engine):
    before = engine.generate(["7+8="], GREEDY).texts
    awake = engine.memory().iloc[0]
    assert awake.kv_cache_bytes >= KV_CACHE_BYTES * 0.9 and awake.weights_bytes > 1e6 and awake.pid == engine.pids[0]
    for level in (1, 2):
        times = engine.sleep(level)
        assert (engine.status, engine.is_sleeping, times.level) == ("asleep", True, level)
        asleep = engine.memory().iloc[0]
        assert asleep.kv_cache_bytes == 0 == asleep.weights_bytes
        assert asleep.host_backup_bytes == (awake.weights_bytes if level == 1 else 0)
        with pytest.raises(wb.EngineError, match=r"the engine is asleep at sleep level \d.*\ncall wake_up\(\) first"):
            engine.generate(["7+8="], GREEDY)
        assert engine.sleep(level).note.startswith(f"already asleep at level {level}")
        engine.wake_up(["weights"])
        assert engine.status == "weights_only"
        engine.wake_up()
        assert engine.status == "awake" and engine.wake_up().note == "already awake"
        assert engine.generate(["7+8="], GREEDY).texts == before


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda e: e.sleep(3), "sleep level is 3; it must be 0 (pause), 1 (weights to a file) or 2 (weights discarded)"),
        (lambda e: e.generate("7+8=", GREEDY), "prompts is one text, '7+8='; generate takes a list of prompts: ['7+8=']"),
        (lambda e: e.wake_up(["caches"]), "wake_up has no tag 'caches'\ntags are 'weights' and 'kv_cache'; None wakes both"),
        (lambda e: e.update_weights([], 0), "update_weights(version=0): a version is an int of at least 1; 0 is the checkpoint"),
    ],
)
def test_what_cannot_be_is_told_and_harms_nothing(engine, call, told):
    with pytest.raises((ValueError, wb.EngineError)) as caught:
        call(engine)
    assert str(caught.value) == told and engine.status == "awake"


def test_new_weights_stand_on_completions_and_outlive_a_sleep(engine):
    state = wb.models.state_dict("tiny")
    engine.update_weights(state.items(), 3)
    assert engine.weight_version == 3 and set(engine.generate(["7+8="], GREEDY).weight_versions) == {3}
    engine.sleep(2)
    engine.wake_up()
    assert set(engine.generate(["7+8="], GREEDY).weight_versions) == {3}


CONTROL_C = """
import os, signal, threading, time, workbench as wb
with wb.launch(1) as cluster:
    engine = wb.start_engine(cluster, kv_cache_bytes=64 * 2**20)
    short = wb.Sampling(max_tokens=8, temperature=0.0)
    expected = engine.generate(["7+8="], short).texts
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    try:
        engine.generate(["1+1="] * 64, wb.Sampling(n=64, max_tokens=250, ignore_eos=True))
    except KeyboardInterrupt:
        print("interrupted", time.monotonic() - started < 3, engine.generate(["7+8="], short).texts == expected, flush=True)
"""


def test_control_c_during_generate_leaves_no_request_behind():
    done = subprocess.run([sys.executable, "-c", CONTROL_C], capture_output=True, text=True, timeout=120)
    assert done.stdout == "interrupted True True\n", done.stderr


ASLEEP_OR_AWAKE = """
import os, signal, threading, time, workbench as wb
with wb.launch(1) as cluster:
    engine = wb.start_engine(cluster, kv_cache_bytes=64 * 2**20)
    short = wb.Sampling(max_tokens=8, temperature=0.0)
    expected = engine.generate(["7+8="], short).texts
    for i in range(8):
        for call in (engine.sleep, engine.wake_up):
            pressing = threading.Timer(0.02 * i, os.kill, (os.getpid(), signal.SIGINT))
            try:
                pressing.start()
                call()
                pressing.join()
                time.sleep(0.1)
            except KeyboardInterrupt:
                pass
            engine.memory()  # behind it: what was interrupted has ended
            print(end="." if engine.status in ("asleep", "awake") else engine.status, flush=True)
        if engine.is_sleeping:
            engine.wake_up()
        print(engine.generate(["7+8="], short).texts == expected, flush=True)
"""


def test_control_c_never_leaves_it_half_asleep():
    done = subprocess.run([sys.executable, "-c", ASLEEP_OR_AWAKE], capture_output=True, text=True, timeout=120)
    assert done.stdout == "..True\n" * 8, done.stderr


INTERRUPTED_START = """
import os, signal, threading, time, psutil, workbench as wb
short = wb.Sampling(max_tokens=4, temperature=0.0)
def interrupt_after(seconds):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    return time.monotonic() + seconds
with wb.launch(2) as cluster:
    for after_s in (0.3, 0.7):  # while its server imports
        due = interrupt_after(after_s)
        try:
            wb.start_engine(cluster, backend="hf")
        except KeyboardInterrupt:
            print("free", time.monotonic() - due < 1, flush=True)
    engine = wb.start_engine(cluster, backend="hf", mode="independent")
    print("right", all(psutil.pid_exists(pid) for pid in engine.pids), len(engine.generate(["7+8="], short)), flush=True)
    due = interrupt_after(0.5)
    try:
        engine._each(lambda host: host.client.generate(["1+1="] * 64, wb.Sampling(n=16, max_tokens=250, ignore_eos=True)))
    except KeyboardInterrupt:
        print("aborted", time.monotonic() - due < 4, engine.status, len(engine._each(lambda host: host.client.memory())), flush=True)
    due = interrupt_after(0.05)
    try:
        wb.start_engine(cluster, backend="hf", mode="independent")
        time.sleep(1)
    except KeyboardInterrupt:
        print("free", time.monotonic() - due < 1, flush=True)
    time.sleep(1.5)
    alive = [p.pid for p in psutil.Process().children(recursive=True)]
    print("left", sorted(set(engine.pids) - set(alive)), len(alive) - len(engine.pids) - 2, flush=True)
"""


def test_control_c_while_an_engine_starts_or_several_work_frees_at_once_and_leaves_nothing():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_START], capture_output=True, text=True, timeout=180)
    # what stays beside two ranks and two engines: the two servers that forked them
    assert done.stdout == "free True\nfree True\nright True 1\naborted True awake 2\nfree True\nleft [] 2\n", done.stderr


def test_a_rank_that_asks_it_can_be_stopped_and_it_answers_the_next(cluster, engine):
    order = wb.Sampling(n=64, max_tokens=250, ignore_eos=True)
    stopper = threading.Timer(0.7, cluster.interrupt)
    stopper.start()
    started = time.monotonic()
    with pytest.raises(wb.RankInterrupted):
        wb.rollout(cluster, [["1+1="] * 64, []], engine=engine, sampling=order, sleep_level=None, keep=False)
    assert time.monotonic() - started < 5
    run = wb.rollout(cluster, [["7+8="], ["1+2="]], engine=engine, sampling=GREEDY, sleep_level=None, keep=False)
    assert len(run.completions) == 2 and engine.pids[0] in psutil.pids()


def test_it_is_not_hit_by_a_stop_of_the_ranks(cluster, engine):
    pid = engine.pids[0]
    with pytest.raises(wb.RankTimeout):
        cluster.execute("import time; time.sleep(60)", timeout_s=0.2)
    assert engine.pids == [pid] and engine.status == "awake" and len(engine.generate(["1+1="], GREEDY)) == 1


def test_a_caller_without_the_token_is_turned_away(engine):
    address = engine.addresses()[-1]
    assert os.stat(os.path.dirname(address.path)).st_mode & 0o777 == 0o700
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(address.path)
        stranger.sendall(bytes(32) + b"\x80\x04N.")
        stranger.settimeout(5)
        with contextlib.suppress(ConnectionResetError):  # closed before all that it sent was read
            assert stranger.recv(1) == b""
    wrong = Address(path=address.path, token=bytes(32), pid=address.pid, log_path=address.log_path)
    client = EngineClient.connect(wrong)
    with pytest.raises(wb.EngineError, match="is dead"):
        client.memory()
    client.disconnect()
    assert len(engine.generate(["1+1="], GREEDY)) == 1


def test_its_death_is_an_error_with_its_last_words_and_the_ranks_live_on(cluster, engine):
    cluster.execute("kept = rank")
    (pid,) = engine.pids
    with open(engine.addresses()[-1].log_path, "a") as log:
        log.write("the last line of its log\n")
    os.kill(pid, signal.SIGKILL)
    limit = time.monotonic() + 3
    while engine.status != "dead" and time.monotonic() < limit:
        time.sleep(0.01)
    assert engine.status == "dead"
    for call in (lambda: engine.generate(["1+1="], GREEDY), lambda: wb.rollout(cluster, [["1+1="], []], engine=engine, keep=False)):
        with pytest.raises(wb.EngineError) as caught:
            call()
        text = str(caught.value)
        assert f"the engine's process (pid {pid}) is dead" in text and "the last line of its log" in text
        assert "the ranks live on; start another engine: wb.start_engine(cluster, ...)" in text
    assert cluster.pull("kept") == [0, 1] and cluster.execute("group.barrier(); 1")[1].result_text == "1"
    engine.close()
    engine.close()


@pytest.mark.parametrize(
    "options, kind, told",
    [
        ({"mode": "rootd"}, ValueError, "mode is 'rootd'; it must be one of 'rooted', 'grouped', 'independent'"),
        ({"backend": "sglan"}, ValueError, "backend is 'sglan'; it must be one of 'vllm', 'hf'"),
        ({"tp": 2}, ValueError, "tp=2 goes with mode='grouped'; mode 'rooted' has one process an engine"),
        ({"mode": "grouped", "tp": 3}, ValueError, "tp=3 does not divide the 2 ranks into groups; choose a tp that divides 2"),
        ({"mode": "grouped", "tp": 0}, ValueError, "tp is 0; it must be an int of at least 1"),
        ({"model": "/nowhere"}, wb.ModelError, "/nowhere"),
        ({"engine_options": {"max_num_sequences": 4}}, wb.EngineError, "max_num_seq"),
        ({"kv_cache_bytes": 2**50}, wb.EngineError, "KV cache 1073741824 MiB are needed"),
    ],
)
def test_an_engine_that_cannot_be_is_refused_and_leaves_nothing(cluster, options, kind, told):
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with pytest.raises(kind) as caught:
        wb.start_engine(cluster, **options)
    assert told in str(caught.value)
    limit = time.monotonic() + 5
    while time.monotonic() < limit and leaks.new_processes(before):
        time.sleep(0.05)
    assert not leaks.new_processes(before)


def test_a_closed_cluster_starts_no_engine():
    cluster = wb.launch(1)
    cluster.close()
    with pytest.raises(wb.ClusterClosed, match="the cluster is closed; its ranks have ended"):
        wb.start_engine(cluster)


def test_transformers_behind_the_same_handle(cluster):
    with wb.start_engine(cluster, backend="hf") as engine:
        batch = engine.generate(["7+8="], GREEDY)
        assert len(batch) == 1 and engine.status == "awake" and repr(engine) == "<engine tiny (hf, rooted): awake>"
    assert engine.status == "dead"
    with pytest.raises(wb.EngineError, match=r"the engine is closed\nstart another: wb.start_engine\(cluster, ...\)"):
        engine.generate(["7+8="], GREEDY)
