"""Asynchronous collectives that are waited for through their futures: seen, told and freed like any other wait."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

import workbench as wb
from workbench.ranks.cluster import Cluster

SETUP = """
import time
def future(size=1): return dist.all_reduce(torch.ones(size), async_op=True).get_future()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(3) as made:
        made.execute(SETUP)
        yield made


@pytest.fixture(autouse=True)
def world_works(cluster: Cluster) -> Iterator[None]:
    yield
    result = cluster.execute("future()\ntotal = future().wait()[0]; total.item()", timeout_s=20)  # the first is waited for by nobody
    assert {output.result_text for output in result.values()} == {"3.0"}


def interrupted_in_s(cluster: Cluster, handle: wb.Handle) -> float:
    started = time.monotonic()
    cluster.interrupt()
    with pytest.raises(wb.RankInterrupted):
        handle.result(timeout_s=10)
    return time.monotonic() - started


WAITS = {
    "wait": "dist.all_reduce(x, async_op=True).get_future().wait()",
    "then": "dist.all_reduce(x, async_op=True).get_future().then(lambda done: 1).then(lambda done: 2).wait()",
    "wait_all": "torch.futures.wait_all([torch.futures.Future(), dist.all_reduce(x, async_op=True).get_future()])",
    "collect_all": "torch.futures.collect_all([dist.barrier(async_op=True).get_future()]).then(lambda done: 1).wait()",
}


@pytest.mark.parametrize("call", WAITS.values(), ids=WAITS)
def test_a_peer_that_never_comes_to_a_future_is_told_with_call_and_line(cluster, call):
    with pytest.raises(wb.RankDeadlock) as told:
        cluster.execute(f"x = torch.ones(1)\nif rank != 1:\n    {call}\nelse: time.sleep(0.2)  # both others wait by then", timeout_s=20)
    op = "barrier" if "barrier" in call else "all_reduce"
    assert f"could never end: ranks 0, 2 wait in {op} (line 3); rank 1 finished the cell without it" in str(told.value)


def test_a_rank_that_waits_on_a_future_is_diagnosed_and_freed_and_keeps_its_names(cluster):
    cluster.execute("kept = rank + 10")
    cell = "x = torch.ones(2)\nif rank == 1: time.sleep(60)\ndist.all_reduce(x, async_op=True).get_future().wait()"
    handle = cluster.execute(cell, block=False)
    time.sleep(0.5)
    diagnosis = cluster.diagnose()
    assert sorted(diagnosis.waiting) == [0, 2] and diagnosis.missing[1].where == "line 2: if rank == 1: time.sleep(60)"
    waiter = diagnosis.waiting[0]
    assert (waiter.op, waiter.line, waiter.missing) == ("all_reduce", 3, (1,)) and "get_future().wait()" in waiter.source
    assert not waiter.is_inside_gloo and waiter.for_s > 0.1
    assert interrupted_in_s(cluster, handle) < 1
    assert cluster.pull("kept") == [10, 11, 12]


def test_futures_give_what_torch_gives(cluster):
    result = cluster.execute(
        "first, second, own = future(2), future(3), torch.futures.Future()\nown.set_result('own')\n"
        "tripled = second.then(lambda done: 3 * done.value()[0])\nboth = torch.futures.collect_all([first, second])\n"
        "failed = first.then(lambda done: 1 / 0)\n"
        "waited = [first.wait()[0].tolist(), tripled.wait().tolist(), [f.value()[0].tolist() for f in both.wait()]]\n"
        "text = ''\ntry: failed.wait()\nexcept RuntimeError as error: text = str(error)\n"
        "(waited, torch.futures.wait_all([own, first]), first.value()[0].tolist(), 'ZeroDivisionError' in text)"
    )
    assert {output.result_text for output in result.values()} == {
        "([[3.0, 3.0], [9.0, 9.0, 9.0], [[3.0, 3.0], [3.0, 3.0, 3.0]]], ['own', [tensor([3., 3.])]], [3.0, 3.0], True)"
    }


def test_the_ledger_counts_the_wait_for_a_future(cluster):
    cluster.execute("if rank == 1: time.sleep(0.5)\ndone = future()\ndone = done.wait()", timeout_s=20)
    frame = cluster.ledger()
    rows = frame[frame.cell == frame.cell.max()].set_index("rank")
    assert (rows.op == "all_reduce").all() and rows.line.tolist() == [3] * 3
    assert rows.wait_s[0] > 0.3 and rows.wait_s[2] > 0.3 and rows.wait_s[1] < 0.2


HOOKS = """
import copy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
torch.manual_seed(0)
plain = torch.nn.Linear(4, 2)
def gradient(register):
    model = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    register(model)
    for _ in range(3): model(torch.ones(1, 4) * (rank + 1)).sum().backward()
    return model.module.weight.grad
python = gradient(lambda model: model.register_comm_hook(None, default_hooks.allreduce_hook))
cpp = gradient(lambda model: model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE))
[torch.allclose(grad, torch.full((2, 4), 6.0)) for grad in (python, cpp, gradient(lambda model: None))]
"""


def test_communication_hooks_of_a_model_work_as_they_did(cluster):
    result = cluster.execute(HOOKS, timeout_s=30)
    assert {output.result_text for output in result.values()} == {"[True, True, True]"}


def test_a_future_of_a_world_that_was_rebuilt_tells_its_error_and_holds_nobody(cluster):
    handle = cluster.execute("if rank == 1: time.sleep(60)\nlost = future()\nlost.wait()", block=False)
    time.sleep(0.5)
    assert interrupted_in_s(cluster, handle) < 1
    started = time.monotonic()
    with pytest.raises(wb.RankFailed, match="rank 0 of 3 failed.*RuntimeError"):
        cluster.execute("lost.wait()", ranks=0, timeout_s=20)
    assert time.monotonic() - started < 2
