"""Cells that can never end, that disagree, that are stopped: told in words, ranks freed, names kept, the group standing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

import workbench as wb
from workbench.ranks import conductor
from workbench.ranks.cluster import Cluster


@pytest.fixture(scope="module")
def cluster():
    with wb.launch(4) as made:
        yield made


@pytest.fixture(autouse=True)
def all_is_well_afterwards(request):
    """After each test on the shared cluster: every name is there and the world works."""
    yield
    if "cluster" in request.fixturenames:
        assert_well(request.getfixturevalue("cluster"))


def assert_well(cluster: Cluster) -> None:
    cluster.execute("kept = rank", ranks=0)
    result = cluster.execute("t = torch.ones(2) * rank; dist.all_reduce(t); t.tolist()", timeout_s=20)
    whole = float(sum(range(cluster.world_size)))
    assert {result[r].result_text for r in result} == {f"[{whole}, {whole}]"}


def stopped(cluster: Cluster, source: str, kind: type[wb.RankError], *, within_s: float = 3.0, **options: Any) -> str:
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        cluster.execute(source, **{"timeout_s": 30, **options})
    assert type(caught.value) is kind, caught.value
    assert time.monotonic() - started < within_s
    return str(caught.value)


ASYNC = "if rank != 2:\n    w = dist.all_reduce(torch.ones(1), async_op=True)\n    w.wait()"


@pytest.mark.parametrize(
    "source, waiting, absent",
    [
        ("x = torch.ones(1)\nif rank != 2:\n    dist.barrier()", "ranks 0, 1, 3 wait in barrier (line 3)", "rank 2"),
        (ASYNC, "ranks 0, 1, 3 wait in all_reduce (line 2)", "rank 2"),
        ("if rank == 1:\n    dist.recv(torch.ones(1), 3)", "rank 1 waits in recv (line 2)", "rank 3"),
        ("if rank == 1:\n    dist.irecv(torch.ones(1), 3).wait()", "rank 1 waits in recv (line 2)", "rank 3"),
        ("if rank == 1:\n    dist.recv(torch.ones(1))", "rank 1 waits in recv_any (line 2)", "ranks 0, 2, 3"),
        ("if rank == 1:\n    dist.send(torch.ones(9), 3)", "rank 1 waits in send (line 2)", "rank 3"),
        ("if rank == 1:\n    dist.isend(torch.ones(9), 3).wait()", "rank 1 waits in send (line 2)", "rank 3"),
        ("if rank != 2:\n    dist.new_group([0, 1])", "ranks 0, 1, 3 wait in new_group (line 2)", "rank 2"),
        ("if rank != 2:\n    group.barrier()", "ranks 0, 1, 3 wait in barrier (line 2)", "rank 2"),
        ("if rank < 1:\n    o = [None] * 4\n    dist.all_gather_object(o, 1)", "rank 0 waits in all_gather (line 3)", "ranks 1, 2, 3"),
    ],
)
def test_a_wait_that_can_never_end_is_told_in_one_sentence(cluster, source, waiting, absent):
    text = stopped(cluster, source, wb.RankDeadlock)
    assert f"could never end: {waiting}; {absent} finished the cell without it" in text
    assert "every rank of a group must reach each of its collectives; all ranks were freed" in text


@pytest.mark.parametrize("is_checked", [True, False])
def test_a_rank_that_begins_an_asynchronous_call_does_not_wait_yet(is_checked):
    source = (
        "from workbench.ranks.called import carrier\nours, seen = carrier(), []\nremember = ours.remember\n"
        "ours.remember = lambda call: (seen.append(ours.board.read(rank).state.name), remember(call))\n"
        "for _ in range(3): dist.all_reduce(torch.ones(1), async_op=True).wait()\ndel ours.remember\nseen"
    )
    with wb.launch(2, check_collectives=is_checked) as two:
        assert {done.result_text for done in two.execute(source).values()} == {"['NOWHERE', 'NOWHERE', 'NOWHERE']"}


def test_a_member_outside_the_cell_is_told(cluster):
    text = stopped(cluster, "dist.barrier()", wb.RankDeadlock, ranks="0-2")
    assert "ranks 0, 1, 2 wait in barrier (line 1); rank 3 does not take part in this cell" in text


def test_a_dead_member_is_told():
    with wb.launch(3) as cluster:
        cluster.kill(2)
        assert "rank 2 is dead (SIGKILL)" in stopped(cluster, "dist.barrier()", wb.RankDeadlock, ranks=[0, 1])


def test_groups_without_all_ranks_are_no_deadlock(cluster):
    result = cluster.execute(
        "g = dist.new_group([0, 2])\nx = torch.ones(1)\nif rank in (0, 2):\n    for _ in range(50): dist.all_reduce(x, group=g)\n"
        "    dist.barrier(group=g)\nx.item()"
    )
    assert [result[r].result_text == "1.0" for r in range(4)] == [False, True, False, True]


def test_a_subgroup_that_loses_a_member_is_told_by_its_name(cluster):
    cluster.execute("pair = dist.new_group([1, 3], group_desc='pair')")
    text = stopped(cluster, "import time\nif rank == 1: dist.barrier(group=pair)\nif rank == 0: time.sleep(30)", wb.RankDeadlock)
    assert "rank 1 waits in barrier (line 2); rank 3 finished the cell without it" in text and "of group 'pair'" in text


MISMATCHES = {
    "dist.all_reduce(torch.ones(3 + (rank == 2)))": "all_reduce(float32[4], op=sum)",
    "dist.all_reduce(torch.ones(3, dtype=torch.float64 if rank == 2 else torch.float32))": "all_reduce(float64[3], op=sum)",
    "dist.all_reduce(torch.ones(3), op=dist.ReduceOp.MAX if rank == 2 else dist.ReduceOp.SUM)": "all_reduce(float32[3], op=max)",
    "dist.all_reduce(torch.ones(3), op=dist.ReduceOp((dist.ReduceOp.SUM, dist.ReduceOp.MAX)[rank == 2]))": "all_reduce(float32[3], op=max)",
    "dist.reduce(torch.ones(3), dst=int(rank == 2))": "reduce(float32[3], op=sum, root=1)",
    "dist.new_group([0, 1 + (rank == 2)])": "new_group(ranks=[0, 2])",
}


@pytest.mark.parametrize("source, odd", MISMATCHES.items())
def test_a_mismatch_shows_the_odd_rank_first(cluster, source, odd):
    text = stopped(cluster, f"\n{source}", wb.CollectiveMismatch)
    table = [line for line in text.splitlines() if line.startswith("  rank")]
    assert table[0] == f"  {'rank 2':<20} {odd}" and table[1].startswith("  ranks ")
    assert "with different operations: rank 2 called" in text and "every rank of a group must make the same calls in the same order" in text


def test_a_mismatch_of_an_asynchronous_call_is_told(cluster):
    source = "dist.all_reduce(torch.ones(3), async_op=True).wait() if rank == 2 else dist.barrier()"
    text = stopped(cluster, source, wb.CollectiveMismatch)
    assert "  rank 2               all_reduce(float32[3], op=sum)" in text and "barrier()" in text


def test_asynchronous_and_point_to_point_calls_work(cluster):
    result = cluster.execute(
        "x, y = torch.ones(4) * rank, torch.empty(4)\nworks = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(20)]\n"
        "ops = [dist.P2POp(dist.isend, x, (rank + 1) % 4), dist.P2POp(dist.irecv, y, (rank - 1) % 4)]\n"
        "for w in dist.batch_isend_irecv(ops): w.wait()\nfor w in works: w.wait()\n"
        "source = dist.recv(torch.empty(1)) if rank == 0 else (dist.send(torch.ones(1), 0) if rank == 3 else None)\n"
        "z = torch.empty(4); r = dist.irecv(z, (rank - 1) % 4); s = dist.isend(x, (rank + 1) % 4); r.wait(); s.wait()\n"
        "(y[0].item(), z[0].item(), source)"
    )
    assert [result[r].result_text for r in range(4)] == ["(3.0, 3.0, 3)", "(0.0, 0.0, None)", "(1.0, 1.0, None)", "(2.0, 2.0, None)"]


def test_ranks_far_apart_are_no_deadlock(cluster):
    cluster.execute(
        "import time\nif rank == 0:\n    time.sleep(1)\n    dist.send(torch.ones(200_000), 1)\n"
        "if rank == 1:\n    dist.recv(torch.empty(200_000))\n"
        "if rank == 2:\n    w = dist.isend(torch.ones(500_000), 3); w.wait()\n"
        "if rank == 3:\n    time.sleep(1)\n    dist.recv(torch.empty(500_000), 2)"
    )


HANG = (
    "import time\nif rank == 0: dist.barrier()\nelif rank == 1: time.sleep(600)\n"
    "elif rank == 2:\n    while True: pass\nelse: dist.irecv(torch.ones(1), 1).wait()"
)


def test_a_timeout_ends_what_ranks_do_and_keeps_names(cluster):
    cluster.execute("kept = rank + 10")
    text = stopped(cluster, HANG, wb.RankTimeout, timeout_s=1, within_s=4)
    assert "was stopped after 1 s (timeout_s)" in text and "rank 0 waits in barrier (line 2)" in text
    assert "rank 1 sleeps, or waits for something that is no collective, line 3: elif rank == 1: time.sleep(600)" in text
    assert "give a larger timeout_s if it only needs longer" in text
    assert cluster.pull("kept") == [10, 11, 12, 13]


def test_interrupting_frees_every_rank_and_tells_who_waited(cluster):
    cluster.execute("kept = rank + 20")
    handle = cluster.execute(HANG, block=False)
    time.sleep(0.5)
    started = time.monotonic()
    cluster.interrupt()
    with pytest.raises(wb.RankInterrupted, match="was interrupted: rank"):
        handle.result(timeout_s=10)
    assert time.monotonic() - started < 2
    assert cluster.last_diagnosis is not None and sorted(cluster.last_diagnosis.waiting) == [0, 3]
    assert cluster.pull("kept") == [20, 21, 22, 23]


def test_a_diagnosis_of_a_cell_that_runs(cluster):
    handle = cluster.execute(HANG, block=False)
    time.sleep(0.7)
    diagnosis = cluster.diagnose()
    assert sorted(diagnosis.waiting) == [0, 3] and diagnosis.waiting[0].op == "barrier" and diagnosis.waiting[0].for_s > 0.1
    assert diagnosis.missing[2].where == "line 5: while True: pass" and not diagnosis.is_certain_deadlock
    assert "waits in" in cluster._repr_html_() and cluster.status()[0].waits_in.startswith("barrier #")
    handle.cancel()
    with pytest.raises(wb.RankInterrupted):
        handle.result(timeout_s=10)


SWALLOW = (
    "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end:\n"
    "    try:\n        time.sleep(0.1)\n    except KeyboardInterrupt:\n        pass"
)


def test_a_rank_that_swallows_the_stop_is_killed_started_afresh_and_told():
    with wb.launch(3) as cluster:
        cluster.use(wb.Layout(world_size=3, tp=3))
        cluster.execute("kept = rank")
        pids = [cluster.pid(r) for r in range(3)]
        source = "\n".join(["if rank == 1:", *("    " + line for line in SWALLOW.splitlines()), "dist.barrier()"])
        text = stopped(cluster, source, wb.RankTimeout, timeout_s=0.5, within_s=9)
        assert "the other ranks were freed and keep their names" in text
        assert "rank 1 did not heed the stop for 5 s" in text and "it was killed and started afresh, empty" in text
        assert [cluster.pid(r) == pids[r] for r in range(3)] == [True, False, True]
        assert cluster.generation == 1 and cluster.pull("kept", ranks="0,2") == [0, 2]
        result = cluster.execute("x = torch.ones(1); (groups['tp'].all_reduce(x).item(), 'kept' in globals())")
        assert [result[r].result_text for r in range(3)] == ["(3.0, True)", "(3.0, False)", "(3.0, True)"]
        assert_well(cluster)


def test_a_second_interrupt_kills_what_did_not_heed_the_first():
    with wb.launch(2) as cluster:
        cluster.execute("kept = 1")
        handle = cluster.execute(SWALLOW, ranks=0, block=False)
        time.sleep(0.3)
        started = time.monotonic()
        cluster.interrupt()
        time.sleep(0.7)
        assert not handle.done()
        cluster.interrupt()
        with pytest.raises(wb.RankInterrupted, match="rank 0 did not heed the stop for 5 s or was stopped twice"):
            handle.result(timeout_s=10)
        assert time.monotonic() - started < 4
        assert cluster.pull("kept", ranks=1) == [1]
        assert_well(cluster)


@pytest.mark.parametrize("asks", ["cluster.interrupt()", "the stop button"])
def test_a_stop_that_is_asked_for_twice_at_once_costs_no_names_of_ranks_that_heed_it(asks, capsys):
    cell = "if rank == 1: sum(range(10**13))  # heeds nothing\nif rank == 2:\n    while True: pass\ndist.barrier()"
    with wb.launch(4) as cluster:
        cluster.execute("kept = rank")
        if asks == "the stop button":
            pressing = [threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT)) for after_s in (0.5, 0.6)]
            for press in pressing:
                press.start()
            with pytest.raises(KeyboardInterrupt):
                cluster.execute(cell)
            assert "s, names kept but on [1]" in capsys.readouterr().err
        else:
            handle = cluster.execute(cell, block=False)
            time.sleep(0.4)
            cluster.interrupt()
            cluster.interrupt()
            with pytest.raises(wb.RankInterrupted, match="rank 1 did not heed the stop for 5 s or was stopped twice"):
                handle.result(timeout_s=4)
        assert cluster.pull("kept", ranks=[0, 2, 3]) == [0, 2, 3]
        assert_well(cluster)


def test_a_c_call_that_never_returns_is_killed_and_the_others_keep_their_names():
    with wb.launch(2) as cluster:
        cluster.execute("kept = rank")
        cell = "if rank: sum(range(10**13))  # keeps the interpreter's lock and looks at no signal\ndist.barrier()"
        text = stopped(cluster, cell, wb.RankTimeout, timeout_s=0.3, within_s=9)
        assert "rank 1 did not heed the stop" in text and cluster.pull("kept", ranks=0) == [0]
        assert_well(cluster)


CONTROL_C = """
import workbench as wb
with wb.launch(2) as cluster:
    cluster.execute("kept = rank")
    try:
        print("go", flush=True)
        cluster.execute("import time\\nif rank: time.sleep(600)\\ndist.barrier()")
    except KeyboardInterrupt:
        result = cluster.execute("group.all_gather(torch.ones(1)).sum().item()")
        print("stopped", cluster.pull("kept"), result[0].result_text)
"""


def test_control_c_in_the_driver_stops_the_cell_on_the_ranks():
    driver = subprocess.Popen([sys.executable, "-c", CONTROL_C], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert driver.stdout is not None and driver.stdout.readline() == "go\n"
    time.sleep(0.7)
    os.kill(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=30)
    assert out == "stopped [0, 1] 2.0\n", err
    assert "cell 2 interrupted; ranks free after 0." in err and "rank 0 waits in barrier" in err and "line 2" in err


OWN = (
    "old = dist.new_group([0, 1], group_desc='old')\nmodel = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))\n"
    "model(torch.ones(1, 2)).sum().backward()"
)


def test_where_ranks_are_is_told_though_none_waits_for_another(cluster):
    text = stopped(cluster, "import time\nif rank: time.sleep(60)\nwhile True: pass", wb.RankTimeout, timeout_s=0.5)
    assert "rank 0 is computing, line 3: while True: pass; ranks 1, 2, 3 sleep, or wait for something that is no collective, line 2" in text


def test_what_was_made_before_a_harmless_stop_stays_valid():
    with wb.launch(2) as cluster:
        cluster.execute(OWN)
        stopped(cluster, "if rank == 0: dist.barrier()", wb.RankDeadlock)
        stopped(cluster, "if rank == 0: dist.new_group([0, 1])", wb.RankDeadlock)
        stopped(cluster, "import time; time.sleep(60)", wb.RankTimeout, timeout_s=0.2)
        cluster.execute("dist.all_reduce(torch.ones(1), group=old)\nmodel(torch.ones(1, 2)).sum().backward()\ndist.new_group([0, 1])")
        assert cluster.generation == 0


def test_what_was_made_before_a_stop_inside_gloo_says_that_it_is_stale():
    with wb.launch(2, check_collectives=False) as cluster:
        cluster.use(wb.Layout(world_size=2, tp=2))
        cluster.execute(OWN + "\nmine = wb.Group.create([0, 1], 'mine')\nkept = rank")
        text = stopped(cluster, "import time\nif rank == 0: dist.barrier()\nelse: time.sleep(60)", wb.RankTimeout, timeout_s=0.5)
        assert "the stop closed gloo connections: the ranks now form generation 1" in text
        for cell, rebuild in {
            "dist.all_reduce(torch.ones(1), group=old)": "dist.new_group(...) for a group of your own",
            "model(torch.ones(1, 2)).sum().backward()": "DistributedDataParallel(model.module)",
            "mine.barrier()": "form it again with Group.create",
        }.items():
            with pytest.raises(wb.RankFailed) as caught:
                cluster.execute(cell, timeout_s=10)
            assert "StaleGroupError" in str(caught.value) and rebuild in str(caught.value), caught.value
        for call in ("dist.all_reduce(torch.ones(1), group=old)", "dist.broadcast(torch.ones(1), src=0, group=old)", "dist.get_rank(old)"):
            caught_there = cluster.execute(f"try:\n    {call}\nexcept wb.StaleGroupError: said = 'stale'\nsaid", timeout_s=10)
            assert [caught_there[r].result_text for r in range(2)] == ["'stale'"] * 2  # torch does not put an error of its own in its place
        assert cluster.pull("kept") == [0, 1]
        result = cluster.execute("groups['tp'].barrier(); group.barrier(); groups['tp'].world_size")
        assert result[0].result_text == "2" and cluster.generation == 1
        cluster.execute("model = torch.nn.parallel.DistributedDataParallel(model.module)\nmodel(torch.ones(1, 2)).sum().backward()")
        assert_well(cluster)


@pytest.mark.parametrize("rank_1", ["time.sleep(60)", "raise ValueError('before its backward pass')"])
def test_a_model_that_was_left_in_the_middle_of_a_backward_pass_says_that_it_is_stale(rank_1):
    with wb.launch(2) as cluster:
        cluster.execute("import time\n" + OWN)
        with pytest.raises((wb.RankTimeout, wb.RankFailed)):
            cluster.execute(f"loss = model(torch.ones(1, 2)).sum()\nif rank == 0: loss.backward()\nelse: {rank_1}", timeout_s=0.5)
        with pytest.raises(wb.RankFailed, match="StaleGroupError(.|\n)*DistributedDataParallel\\(model.module\\)"):
            cluster.execute("model(torch.ones(1, 2)).sum().backward()", timeout_s=10)
        cluster.execute("model = torch.nn.parallel.DistributedDataParallel(model.module)\nmodel(torch.ones(1, 2)).sum().backward()")
        assert_well(cluster)


SLOW = """
import time
class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, grad): time.sleep(60); return grad
class Between(torch.nn.Module):
    def forward(self, x): return Slow.apply(x)
layers = torch.nn.Linear(2, 2), Between(), torch.nn.Linear(2, 1)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers))
"""


def test_a_stop_in_the_users_own_code_of_a_backward_pass_leaves_a_model_that_says_so():
    with wb.launch(2) as cluster:
        cluster.execute(SLOW)
        stopped(cluster, "model(torch.ones(1, 2)).sum().backward()", wb.RankTimeout, timeout_s=0.5)
        with pytest.raises(wb.RankFailed, match="StaleGroupError"):
            cluster.execute("model(torch.ones(1, 2))", timeout_s=10)
        assert_well(cluster)


def test_a_failure_beside_ranks_inside_gloo_is_the_failure():
    with wb.launch(3, check_collectives=False) as cluster:
        text = stopped(cluster, "if rank == 1: raise ValueError('bad prompt')\ndist.all_reduce(torch.ones(1))", wb.RankFailed, within_s=5)
        assert text.startswith("rank 1 of 3 failed in cell 1: ValueError: bad prompt") and "ranks 0, 2 were freed" in text
        assert_well(cluster)


def test_an_interrupt_beside_ranks_inside_gloo_is_an_interrupt():
    with wb.launch(4, check_collectives=False) as cluster:
        for _ in range(3):
            handle = cluster.execute("import time\nif rank == 1: time.sleep(60)\ndist.all_reduce(torch.ones(1))", block=False)
            time.sleep(0.3)
            cluster.interrupt()
            with pytest.raises(wb.RankInterrupted):
                handle.result(timeout_s=10)
            assert_well(cluster)


def test_a_rank_that_waits_in_an_engines_own_group_is_freed_and_keeps_its_names():
    with wb.launch(2) as cluster:
        cluster.execute(
            "import functools, time\nengine = functools.partial(wb.current().process.interceptor.engine_groups, set())\nkept = rank\n"
            "with engine(): own = dist.new_group([0, 1])\ndist.barrier(group=own)"
        )
        pids = [cluster.pid(r) for r in range(2)]
        cell = "with engine(): time.sleep(60) if rank else dist.barrier(group=own)"  # not watched: it waits inside gloo
        stopped(cluster, cell, wb.RankTimeout, timeout_s=0.3)
        assert [cluster.pid(r) for r in range(2)] == pids and cluster.pull("kept") == [0, 1]
        assert_well(cluster)


def test_what_an_engine_says_of_a_stop_is_no_failure(cluster):
    cell = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: raise wb.EngineError('vLLM failed in generate')"
    stopped(cluster, cell, wb.RankTimeout, timeout_s=0.3)


def test_many_groups_and_many_stops_hold_no_descriptors():
    def num_descriptors():
        import gc
        import os
        import threading

        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), threading.active_count()

    with wb.launch(3, check_collectives=False) as cluster:
        hang = "if rank == 0: dist.barrier()\nelse:\n    import time; time.sleep(60)"
        stopped(cluster, hang, wb.RankTimeout, timeout_s=0.2)
        before = cluster.run(num_descriptors)
        for _ in range(3):
            stopped(cluster, hang, wb.RankTimeout, timeout_s=0.2)
        cluster.execute(
            "for _ in range(20):\n    g = dist.new_group([0, 1, 2]); dist.barrier(group=g); dist.destroy_process_group(g)\ndel g"
        )
        after = cluster.run(num_descriptors)
        assert all(a[0] <= b[0] + 2 and a[1] <= b[1] + 2 for a, b in zip(after, before, strict=True)), (before, after)


def test_interrupts_at_random_moments_lose_nothing():
    import random

    draw = random.Random(0)
    cell = (
        "for i in range(100000):\n    dist.all_reduce(torch.ones(10))\n"
        "    w = dist.all_reduce(torch.ones(10), async_op=True); w.wait()\n    kept = i"
    )
    with wb.launch(3) as cluster:
        for _ in range(12):
            handle = cluster.execute(cell, block=False)
            time.sleep(0.02 + draw.random() * 0.1)
            started = time.monotonic()
            threading.Thread(target=cluster.interrupt).start()
            with pytest.raises(wb.RankInterrupted):
                handle.result(timeout_s=10)
            assert time.monotonic() - started < 3
            assert_well(cluster)


def test_a_stop_that_meets_a_finalizer_comes_right_after_it(cluster):
    cluster.execute("import time, weakref\nmine = rank\nclass Held: pass")
    stopped(cluster, "held = Held()\nweakref.finalize(held, time.sleep, 1.0)\ndel held\nwhile True: pass", wb.RankTimeout, timeout_s=0.4)
    assert cluster.pull("mine") == [0, 1, 2, 3]


STEP = "model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))\nmodel(torch.ones(1, 2)).sum().backward()"


@contextmanager
def paused_again(pid: int, *, after_s: float, for_s: float = 1.0) -> Iterator[None]:
    """Let a process not go on for a while, although a stop wants it to."""

    def keep() -> None:
        time.sleep(after_s)
        limit = time.monotonic() + for_s
        with suppress(ProcessLookupError):
            while time.monotonic() < limit:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.001)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize(
    ("check", "sends", "receives"),
    [
        (True, "dist.broadcast(big, 0)", "dist.broadcast(big, 0, async_op=True)"),
        (False, "dist.broadcast(big, 0, async_op=True).wait()", "dist.broadcast(big, 0, async_op=True)"),
        (True, "funcol.wait_tensor(funcol.broadcast(big, 0, dist.group.WORLD))", "dist.broadcast(big, 0, async_op=True)"),
        (False, "dist.send(big, 1)", "dist.irecv(big, 0)"),
        (True, "dist.isend(big, 1).wait()", "dist.irecv(big, 0)"),
    ],
)
def test_a_stop_in_the_middle_of_a_large_message_loses_no_names(check, sends, receives):
    """gloo forgets who sends it when its connection closes; a peer that reads nothing keeps it in its middle."""
    with wb.launch(2, check_collectives=check) as cluster:
        cluster.execute("import os, time, torch.distributed._functional_collectives as funcol\nkept, big = rank, torch.ones(20_000_000)")
        pid = cluster.pid(1)
        takes = f"work = {receives}\n    time.sleep(0.1)\n    os.kill(os.getpid(), {int(signal.SIGSTOP)})\n    work.wait()"
        with paused_again(pid, after_s=0.6):
            told = stopped(cluster, f"if rank == 1:\n    {takes}\nelse:\n    time.sleep(0.3)\n    {sends}", wb.RankTimeout, timeout_s=0.8)
        assert "rank 1 is paused" in told
        assert_well(cluster)
        assert cluster.pull("kept") == [0, 1]
        assert cluster.execute("len(wb.current().process.interceptor._left)", ranks=0)[0].result_text == "1"


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    "source",
    [
        "model = torch.nn.parallel.DistributedDataParallel(net)\nwhile True: model(x).sum().backward()",  # stopped in a reduction
        "while True: torch.distributed.utils._sync_params_and_buffers(dist.group.WORLD, [net.weight.data], 1 << 28, 0)",  # as DDP does
    ],
)
def test_a_stop_in_the_middle_of_a_large_message_of_a_model_loses_no_names(check, source):
    with wb.launch(2, check_collectives=check) as cluster:
        cluster.execute("kept = rank\nnet, x = torch.nn.Linear(4000, 4000), torch.ones(1, 4000)")
        cluster.execute("torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))")  # what that imports may take longer than a stop
        for _ in range(2):
            with paused_again(cluster.pid(1), after_s=0.5):
                stopped(cluster, source, wb.RankTimeout, timeout_s=0.8)
            assert_well(cluster)
        assert cluster.pull("kept") == [0, 1]


def test_a_stop_lets_an_import_end(cluster, tmp_path):
    (tmp_path / "slow_to_import.py").write_text("import time\nfor _ in range(35): time.sleep(0.01)\nwhole = True\n")
    (tmp_path / "never_imported.py").write_text("while True: pass\n")
    cluster.execute(f"import sys; sys.path.insert(0, {str(tmp_path)!r})")
    stopped(cluster, "import slow_to_import\nwhile True: pass", wb.RankTimeout, timeout_s=0.2)
    assert cluster.execute("slow_to_import.whole")[0].result_text == "True"  # its name was bound: it was not left in its middle
    stopped(cluster, "import never_imported", wb.RankTimeout, timeout_s=0.2)


def test_a_stop_lets_a_large_library_come_in_whole():
    with wb.launch(2) as cluster:
        stopped(cluster, "import torch._dynamo\nwhile True: pass", wb.RankTimeout, timeout_s=0.3, within_s=7.0)
        assert cluster.execute("import torch._dynamo; hasattr(torch._dynamo, 'utils')")[1].result_text == "True"


CUT = """
DDP = torch.nn.parallel.DistributedDataParallel
def cut(gradient):
    if rank == 1 and is_armed: raise KeyboardInterrupt
    return gradient
net, is_armed = torch.nn.Linear(4, 2), True
net.weight.register_hook(cut)
model = DDP(net)
"""


@pytest.mark.parametrize("check", [True, False])
def test_a_model_made_anew_is_not_disturbed_by_the_one_that_was_cut(check):
    """Its hooks stay on the parameters as long as anything holds it, the collector's queue included."""
    with wb.launch(2, check_collectives=check) as cluster:
        cluster.execute(CUT)
        stopped(cluster, "model(torch.ones(1, 4)).sum().backward()", wb.RankDeadlock)
        cluster.execute("old, is_armed = model, False\nmodel = DDP(net)")
        for _ in range(2):
            cluster.execute("model.zero_grad()\nmodel(torch.ones(1, 4) * (rank + 1)).sum().backward()")
            assert cluster.execute("set(net.weight.grad.flatten().tolist())")[1].result_text == "{1.5}"
        with pytest.raises(wb.RankFailed, match=r"StaleGroupError(.|\n)*DistributedDataParallel\(model.module\)"):
            cluster.execute("old(torch.ones(1, 4))")


def test_a_signal_while_torch_names_a_group_waits_until_it_is_made():
    with wb.launch(3) as cluster:
        cluster.execute(
            "import os, signal, torch.distributed.distributed_c10d as c10d\nname = c10d._process_group_name\n"
            "def named(*args, **kwargs):\n    made = name(*args, **kwargs)\n    if rank == 1: os.kill(os.getpid(), signal.SIGINT)\n"
            "    return made\nc10d._process_group_name = named"
        )
        stopped(cluster, "dist.new_group([0, 1, 2])\ndist.barrier()", wb.RankDeadlock)
        cluster.execute("c10d._process_group_name = name")
        assert len({output.result_text for output in cluster.execute("c10d._world.group_count").values()}) == 1
        cluster.execute("one = torch.ones(1)\ndist.all_reduce(one, group=dist.new_group([0, 1, 2]))", timeout_s=10)


def test_a_stop_whose_signal_was_lost_is_heard_all_the_same(cluster):
    """As when it comes between Python's last look for signals and a system call."""
    pids = [cluster.pid(rank) for rank in range(4)]
    cluster.execute("import signal, time\ndef lose(number, frame): signal.signal(number, kept)\nkept = signal.signal(signal.SIGINT, lose)")
    stopped(cluster, "time.sleep(60)", wb.RankTimeout, timeout_s=0.2)
    assert pids == [cluster.pid(rank) for rank in range(4)]


def test_what_a_cell_does_on_its_way_out_of_a_stop_is_not_interrupted_again(cluster):
    cluster.execute("import time\ntidied = 0")
    tidies = "except KeyboardInterrupt:\n    time.sleep(0.8); tidied = 1; raise\nfinally:\n    time.sleep(0.8); tidied += 1"
    stopped(cluster, f"try: time.sleep(60)\n{tidies}", wb.RankTimeout, timeout_s=0.2, within_s=3.0)
    assert cluster.pull("tidied") == [2] * 4


def test_a_message_that_a_stop_came_between_leaves_the_connection_as_it_was():
    with wb.launch(2) as cluster:
        cluster.execute(
            "import os, signal, time\nkept, interceptor = rank, wb.current().process.interceptor\nnote = interceptor._note\n"
            "def interrupted(name, *rest):\n    if name == 'recv_': os.kill(os.getpid(), signal.SIGINT)\n    return note(name, *rest)"
        )
        receives = "interceptor._note = interrupted\n    dist.recv(torch.ones(9), 0)"  # the signal comes when gloo has begun it
        sends = "time.sleep(0.3); dist.send(torch.ones(9), 1); dist.barrier()"
        stopped(cluster, f"if rank:\n    {receives}\nelse:\n    {sends}", wb.RankDeadlock)
        cluster.execute("interceptor._note = note")
        assert_well(cluster)
        assert cluster.generation == 0 and cluster.pull("kept") == [0, 1]


def test_an_interrupt_that_is_tried_again_stops_no_later_cell(cluster):
    cluster.execute("import signal, time\nprocess = wb.current().process\nearlier = process.board.cell(rank)")
    cluster.execute("process._interrupt_again(earlier, signal.SIGINT)\ntime.sleep(0.05)")
    own = "process._interrupt_again(process.board.cell(rank), signal.SIGINT)"
    stopped(cluster, f"if rank == 1: {own}; time.sleep(60)\ndist.barrier()", wb.RankDeadlock)


def test_a_call_that_never_came_gives_its_reduce_op_to_no_later_one():
    with wb.launch(3) as cluster:
        stopped(cluster, "old = dist.group.WORLD\nif rank: dist.all_reduce(torch.ones(1), async_op=True).wait()", wb.RankDeadlock)
        refused = "try: dist.all_reduce(torch.ones(1), group=old)\nexcept wb.StaleGroupError: pass\nelse: raise AssertionError"
        cluster.execute(f"if rank == 1:\n    {refused.replace(chr(10), chr(10) + '    ')}\n{STEP}", timeout_s=20)


def test_without_the_check_making_groups_is_watched_too():
    with wb.launch(3, check_collectives=False) as cluster:
        told = stopped(cluster, "if rank != 1:\n    dist.new_group([0, 1, 2])", wb.RankDeadlock)
        assert "ranks 0, 2 wait in new_group (line 2); rank 1 finished the cell without it" in told
        assert_well(cluster)


def test_without_the_check_the_reductions_of_a_model_are_watched_too():
    with wb.launch(3, check_collectives=False) as cluster:
        cluster.execute("model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))")
        told = stopped(cluster, "if rank != 1:\n    model(torch.ones(1, 2)).sum().backward()", wb.RankDeadlock)
        assert "ranks 0, 2 wait in all_reduce (line 2); rank 1 finished the cell without it" in told


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("rounds", "operation"),
    [
        ("if rank != 1:\n    torch.nn.parallel.DistributedDataParallel(net)", "all_gather"),  # it compares the parameters
        ("for _ in range(1 if rank == 1 else 2):\n    model(x).sum().backward()", "broadcast"),  # the second makes the buckets anew
    ],
)
def test_what_a_model_does_beside_its_reductions_is_watched_too(check, rounds, operation):
    with wb.launch(3, check_collectives=check) as cluster:
        cluster.execute(
            "net, x = torch.nn.Sequential(*[torch.nn.Linear(600, 600) for _ in range(4)]), torch.ones(1, 600)\n"
            "model = torch.nn.parallel.DistributedDataParallel(net, bucket_cap_mb=1)"
        )
        told = stopped(cluster, rounds, wb.RankDeadlock)
        assert f"ranks 0, 2 wait in {operation} (line 2); rank 1 finished the cell without it" in told
        assert_well(cluster)


HOOK = """
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
kept, begin = rank, {begin}
model.register_comm_hook(None, lambda state, bucket: begin(bucket.buffer()).get_future().then(lambda done: bucket.buffer()))
for _ in range(2): model(torch.ones(1, 2)).sum().backward()  # the second makes the buckets anew
"""
BEGINS = {
    "all_reduce": "lambda data: dist.all_reduce(data, async_op=True)",
    "all_gather": "lambda data: dist.all_gather([torch.empty_like(data) for _ in range(world_size)], data, async_op=True)",
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("operation", BEGINS)
def test_what_a_communication_hook_of_a_model_begins_is_watched_too(check, operation):
    with wb.launch(3, check_collectives=check) as cluster:
        cluster.execute(HOOK.format(begin=BEGINS[operation]))
        told = stopped(cluster, "if rank != 1:\n    model(torch.ones(1, 2)).sum().backward()", wb.RankDeadlock)
        assert f"ranks 0, 2 wait in {operation} (line 3); rank 1 finished the cell without it" in told
        assert_well(cluster)
        assert cluster.pull("kept") == [0, 1, 2]


@pytest.mark.parametrize("asks_again", [True, False])
def test_a_rank_that_does_not_leave_its_old_groups_is_ended_and_told(monkeypatch, asks_again):
    monkeypatch.setattr(conductor, "_PART_LIMIT_S", 60.0 if asks_again else 1.0)
    with wb.launch(3, check_collectives=False) as cluster:
        cluster.execute("import time; kept = rank\nif rank == 1: dist.destroy_process_group = lambda: time.sleep(60)")
        handle = cluster.execute("if rank: dist.barrier()", block=False)
        time.sleep(0.4)
        cluster.interrupt()
        if asks_again:
            time.sleep(1.0)
            cluster.interrupt()
        with pytest.raises(wb.RankError) as caught:
            handle.result(timeout_s=15)
        assert "rank 1 of 3 died while the ranks formed generation 1: it was ended, because it had not left its old" in str(caught.value)
        cluster.respawn(1)
        assert_well(cluster)
        assert cluster.pull("kept", ranks=[0, 2]) == [0, 2]


def test_a_fresh_rank_whose_generation_was_abandoned_says_so(monkeypatch):
    monkeypatch.setattr(conductor, "_PART_LIMIT_S", 1.0)
    with wb.launch(3) as cluster:
        cluster.execute("import time; kept = rank\nif rank == 2: dist.destroy_process_group = lambda: time.sleep(60)")
        cluster.kill(1)
        with pytest.raises(wb.RankFailed, match="rank 2 of 3 died while the ranks formed generation 1"):
            cluster.respawn(1)
        cluster._until(lambda: cluster._processes.links[1].is_dead, "rank 1 to end")
        with pytest.raises(wb.RankFailed, match="rank 1 of 3 is dead: it could not join the world: .*Freed: .*\nnothing was sent"):
            cluster.execute("1", ranks=1)
        cluster.respawn(1)
        assert_well(cluster)
        assert cluster.pull("kept", ranks=0) == [0]


ENGINE_WORLD = """
import os, signal, threading, time
from workbench.rollout.own_world import OwnWorld
kept = rank
own = OwnWorld(dist.group.WORLD)
x = torch.ones(50_000_000)
"""


def test_a_stop_in_a_collective_of_an_engine_loses_no_names():
    """Such collectives are not watched; one of them in the middle of a large message to a paused peer is not ended by gloo."""
    pause = "if rank: threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGSTOP)).start()\n"
    with wb.launch(2) as cluster:
        for _ in range(5):
            cluster.execute(ENGINE_WORLD)
            handle = cluster.execute(f"{pause}with own.entered():\n    while True: dist.all_reduce(x)", block=False)
            time.sleep(0.5)
            cluster.interrupt()
            with pytest.raises(wb.RankInterrupted):
                handle.result(timeout_s=4)
            assert cluster.pull("kept") == [0, 1]


def test_the_world_of_an_engine_that_was_stopped_in_its_middle_can_be_let_go_of():
    begin = "with own.entered():\n    work = dist.broadcast(x, src=1 - rank, async_op=True)\n    time.sleep(60)"  # each waits for the other
    with wb.launch(2) as cluster:
        cluster.execute(ENGINE_WORLD)
        handle = cluster.execute(begin, block=False)
        time.sleep(0.5)
        cluster.interrupt()
        with pytest.raises(wb.RankInterrupted):
            handle.result(timeout_s=4)
        cluster.execute("import gc\nown = work = None\ngc.collect()", timeout_s=5)
        assert_well(cluster)
        assert cluster.pull("kept") == [0, 1]
