"""Calls that a loop makes again pass torch and the interceptor by; nothing else may change by it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

import workbench as wb
from workbench.ranks.cluster import Cluster

COUNT = """
import time
import torch.distributed.distributed_c10d as c10d
from workbench.ranks.called import carrier
watch, long_way = carrier()._watched, []
def watched(name, *args):
    long_way.append(name)
    return watch(name, *args)
carrier()._watched = watched
pair = dist.new_group([0, 1])
"""
CALLS = {  # call -> what it gives on both ranks, after `x = full(4, 1 + rank)`
    "dist.all_reduce(x)": [[3.0] * 4] * 2,
    "dist.all_reduce(x, dist.ReduceOp.MAX, pair)": [[2.0] * 4] * 2,
    "dist.all_reduce(x, group=pair, op=dist.ReduceOp.PRODUCT)": [[2.0] * 4] * 2,
    "dist.broadcast(x, 1)": [[2.0] * 4] * 2,
    "dist.broadcast(x, src=0, group=pair)": [[1.0] * 4] * 2,
    "dist.reduce(x, 1, dist.ReduceOp.MIN); x *= rank": [[0.0] * 4, [1.0] * 4],
    "y = torch.zeros(8); dist.all_gather_into_tensor(y, x); x = y": [[1.0] * 4 + [2.0] * 4] * 2,
    "y = torch.zeros(8); c10d.all_gather_into_tensor(y, x, group=pair); x = y": [[1.0] * 4 + [2.0] * 4] * 2,
    "y = torch.zeros(2); dist.reduce_scatter_tensor(y, x, dist.ReduceOp.SUM); x = y": [[3.0] * 2] * 2,
    "y = [torch.zeros(4), torch.zeros(4)]; dist.all_gather(y, x); x = torch.cat(y)": [[1.0] * 4 + [2.0] * 4] * 2,
    "y = [torch.zeros(4), torch.zeros(4)]; dist.all_gather(tensor=x, tensor_list=y, group=pair); x = torch.cat(y)": [[1.0] * 4 + [2.0] * 4]
    * 2,
    "y = [torch.zeros(4), torch.zeros(4)]; dist.gather(x, y if rank else None, dst=1); x = sum(y)": [[0.0] * 4, [3.0] * 4],
    "dist.scatter(x, [torch.ones(4), 5 * x] if rank == 0 else None)": [[1.0] * 4, [5.0] * 4],
    "dist.scatter(x, scatter_list=[7 * x, 1 * x] if rank else [], src=1) if rank else dist.scatter(x, src=1)": [[14.0] * 4, [2.0] * 4],
    "y = torch.zeros(2); dist.reduce_scatter(y, [x[:2], rank * x[2:]]); x = y": [[3.0] * 2, [2.0] * 2],
    "y = torch.zeros(4); dist.all_to_all_single(y, x); x = y": [[1.0, 1.0, 2.0, 2.0]] * 2,
    "y = torch.zeros(4); dist.all_to_all_single(y, x, [1, 3] if rank else [3, 1], [3, 1] if rank == 0 else [1, 3]); x = y": [
        [1.0, 1.0, 1.0, 2.0],
        [1.0, 2.0, 2.0, 2.0],
    ],
    "dist.all_reduce(x, async_op=True).wait()": [[3.0] * 4] * 2,
    "work = dist.broadcast(x, src=1, async_op=True); work.wait(); work.wait()": [[2.0] * 4] * 2,
    "y = [torch.zeros(4), torch.zeros(4)]; dist.all_gather(y, x, async_op=True).get_future().wait(); x = torch.cat(y)": [
        [1.0] * 4 + [2.0] * 4
    ]
    * 2,
    "y = dist.all_reduce(x, async_op=True); z = dist.barrier(async_op=True) if i < 0 else y; y.wait()": [[3.0] * 4] * 2,
    "dist.barrier()": [[1.0] * 4, [2.0] * 4],
    "dist.barrier(group=pair)": [[1.0] * 4, [2.0] * 4],
}


@pytest.fixture(scope="module", params=[True, False], ids=["checked", "unchecked"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with wb.launch(2, check_collectives=request.param) as made:
        made.execute(COUNT)
        yield made


@pytest.fixture(params=[True, False], ids=["checked", "unchecked"])
def own(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with wb.launch(2, check_collectives=request.param) as made:
        made.execute(COUNT)
        yield made


def is_checked(request: pytest.FixtureRequest) -> bool:
    return "unchecked" not in request.node.name


def loop(*body: str, times: int = 4) -> str:
    lines = [
        "long_way.clear()",
        "found = []",
        f"for i in range({times}):",
        "    x = torch.full((4,), 1.0 + rank)",
        *("    " + b for b in body),
    ]
    return "\n".join([*lines, "    found.append(x.tolist())"])


def num_long_ways(cluster: Cluster) -> list[int]:
    return [len(one) for one in cluster.pull("long_way")]


@pytest.mark.parametrize("call", CALLS)
def test_a_loop_goes_the_long_way_once_and_gives_and_leaves_the_same(cluster, call):
    handle = cluster.execute(loop(call), block=False)
    handle.result(timeout_s=30)
    assert [set(map(tuple, found)) for found in cluster.pull("found")] == [{tuple(one)} for one in CALLS[call]]
    assert num_long_ways(cluster) == [1, 1]
    frame = cluster.ledger()
    for _, rows in frame[frame.cell == handle.number].groupby("rank"):
        assert len(rows) == 4 and len(set(zip(rows.op, rows.group, rows.num_bytes, rows.line, strict=True))) == 1
        assert rows.sequence.diff().dropna().eq(1).all() and (rows.wait_s <= rows.duration_s).all() and (rows.duration_s > 0).all()


@pytest.mark.parametrize(
    ("body", "given", "num_long"),
    [
        (["x = x.repeat(1 + i % 2); dist.all_reduce(x)"], [[3.0] * 4, [3.0] * 8], 1),
        (["x = x.to((torch.float32, torch.int64)[i % 2]); dist.all_reduce(x)"], [[3.0] * 4, [3] * 4], 2),
        (["dist.all_reduce(x, op=(dist.ReduceOp.SUM, dist.ReduceOp.MAX)[i % 2])"], [[3.0] * 4, [2.0] * 4], 2),
        (["dist.all_reduce(x, op=dist.ReduceOp((dist.ReduceOp.SUM, dist.ReduceOp.MAX)[i % 2]))"], [[3.0] * 4, [2.0] * 4], 4),
        (["dist.broadcast(x, i % 2)"], [[1.0] * 4, [2.0] * 4], 2),
        (["dist.reduce(x, **{('dst', 'group_dst')[i % 2]: 0}); x *= 1 - rank"], None, 2),
        (["work = dist.all_reduce(x, async_op=i % 2 == 1)", "if i % 2: work.wait()"], [[3.0] * 4] * 2, 2),
        (["x.requires_grad_(i % 2 == 1); dist.all_reduce(x)"], [[3.0] * 4] * 2, 3),
        (["x = torch.complex(x, x); dist.all_reduce(x)"], [[3 + 3j] * 4] * 2, 4),
        (["x = torch.complex(-x, -x).conj().imag if i % 2 else x; dist.all_reduce(x); x = x * (i % 2 == 0)"], [[3.0] * 4, [0.0] * 4], 3),
        (["x = torch.nn.Parameter(x, requires_grad=False); dist.all_reduce(x)"], [[3.0] * 4] * 2, 4),
        (["dist.all_reduce(tensor=x)"], [[3.0] * 4] * 2, 4),
        (["(dist.all_reduce, dist.broadcast)[i % 2](x, *[0] * (i % 2))"], [[3.0] * 4, [1.0] * 4], 2),
        (
            ["y = [torch.zeros(4 + 4 * (i % 2)) for _ in 'ab']; dist.all_gather(y, x.repeat(1 + i % 2)); x = y[1]"],
            [[2.0] * 4, [2.0] * 8],
            1,
        ),
        (["y = [torch.zeros(4)] * 2 if i % 2 else [torch.zeros(4), 0 * x]; dist.all_gather(y, x); x = sum(y)"], [[3.0] * 4, [4.0] * 4], 1),
        (["y = [torch.zeros(4), 0 * x] if i % 2 else [torch.zeros(4)] * 2; dist.all_gather(y, x); x = sum(y)"], [[4.0] * 4, [3.0] * 4], 2),
        (["x = torch.complex(x, x); y = [0 * x, 0 * x]; dist.all_gather(y, x); x = y[1]"], [[2 + 2j] * 4] * 2, 4),
        (["dist.gather(x, [0 * x, 0 * x] if rank == i % 2 else None, i % 2); x *= 0"], [[0.0] * 4] * 2, 2),
        (["dist.scatter(x, [0 * x, 1 * x] if rank == 0 else None, async_op=i % 2 == 1); dist.barrier(); x *= 0"], [[0.0] * 4] * 2, 3),
        (
            [
                "n = [260, 40][:: 1 - 2 * rank]; y = torch.zeros(520 if rank == 0 else 80)",
                "dist.all_to_all_single(y, torch.ones(300), [n[0]] * 2, [260, 40]); x = y[:1]",
            ],
            [[1.0]] * 2,
            4,
        ),
    ],
)
def test_what_differs_from_the_call_before_is_another_call(cluster, body, given, num_long):
    cluster.execute(loop(*body), timeout_s=30)
    for rank, found in enumerate(cluster.pull("found")):
        assert found == (given or [[3.0 * (1 - rank)] * 4] * 2) * 2
    assert num_long_ways(cluster) == [num_long] * 2


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("all_reduce", "dist.all_reduce(x)"),
        ("all_reduce", "work = dist.all_reduce(x, async_op=True); work.wait()"),
        ("all_gather", "y = [0 * x, 0 * x]; dist.all_gather(y, x); x = y[0] + y[1]"),
        ("broadcast", "dist.broadcast(x, src=1); x = 1.5 * x"),
        ("scatter", "x *= 1.5 * (1 - rank); dist.scatter(x, [2 * x, 2 * x] if rank == 0 else None)"),
    ],
)
def test_calls_of_other_shapes_are_described_anew(own, request, op, call):
    end = 1200 if call == "dist.all_reduce(x)" else 40  # more than are kept, once
    handle = own.execute(
        f"def step(*shape):\n    x = torch.full(shape, 1.0 + rank); {call}; return x.sum().item()\n"
        f"step(1)\nlong_way.clear()\ngiven = [step(n) for n in range(2, {end})] + [step(2, 3), step()]",
        block=False,
    )
    handle.result(timeout_s=60)
    assert num_long_ways(own) == [0, 0]
    assert own.pull("given") == [[3.0 * n for n in range(2, end)] + [18.0, 3.0]] * 2
    frame = own.ledger()
    rows = frame[(frame.cell == handle.number) & (frame["rank"] == 0)]
    each = 2 if op == "all_gather" else 1  # bytes of what is filled
    assert rows.num_bytes.tolist() == [4 * n * each for n in range(1, end)] + [24 * each, 4 * each]
    assert set(rows.op) == {op} and set(rows.line) == {2}
    handle = own.execute("step(77, 2) if rank else None\ntime.sleep(60)", block=False)
    time.sleep(0.7)
    waiting = own.diagnose().waiting
    own.interrupt()
    with pytest.raises(wb.RankInterrupted):
        handle.result(timeout_s=15)
    for waiter in waiting.values():  # who gives alone need not wait, without the check
        assert waiter.op == op and waiter.line == 2 and call in waiter.source
    assert waiting or op == "broadcast"
    if is_checked(request):
        assert waiting
        with pytest.raises(wb.CollectiveMismatch, match=r"float32\[50, 2\]"):
            own.execute("step(50 + rank, 2)", timeout_s=15)


def test_a_line_whose_first_tensor_was_strided_tells_of_others_their_shape_alone():
    with wb.launch(2) as cluster:
        cluster.execute("def step(x): dist.all_reduce(x)\nstep(torch.ones(2, 3).t())\nstep(torch.ones(4))")
        with pytest.raises(wb.CollectiveMismatch) as caught:
            cluster.execute("step(torch.ones(5 + rank))")
    assert "called all_reduce(float32[5], op=sum), rank" in str(caught.value)


def test_calls_of_a_library_are_known_by_the_line_that_they_come_from(cluster):
    cluster.execute(
        "from accelerate import Accelerator\nfrom accelerate.utils import broadcast, reduce\naccelerator = Accelerator(cpu=True)\n"
        + loop(
            "kept = accelerator.gather(x), reduce(x, 'sum'), broadcast(x, from_process=1)",
            "objects = [None, None]; dist.all_gather_object(objects, rank)",
            "x = torch.cat([kept[0], kept[1], torch.tensor(objects)])",
        ),
        timeout_s=60,
    )
    assert cluster.pull("found") == [[[1.0] * 4 + [2.0] * 4 + [3.0] * 4 + [0.0, 1.0]] * 4] * 2
    assert len(set(num_long_ways(cluster))) == 1 and num_long_ways(cluster)[0] <= 6
    frame = cluster.ledger()
    rows = frame[(frame.cell == frame.cell.max()) & (frame["rank"] == 0)]
    assert set(rows.line) == {8, 9} and len(rows) % 4 == 0


def test_many_places_and_shapes_are_forgotten_and_found_again(cluster):
    cluster.execute("for n in range(1, 1100):\n    exec('dist.all_reduce(torch.ones(2))')\n" + loop("dist.all_reduce(x)"), timeout_s=60)
    assert num_long_ways(cluster) == [1, 1]
    sizes = [*range(1, 150), *range(100, 0, -1)]  # those of the second half were seen before, some long ago
    handle = cluster.execute(
        f"long_way.clear()\nfound = []\nfor n in {sizes}:\n    x = torch.ones(n); dist.all_reduce(x); found.append(x.sum().item())",
        block=False,
    )
    handle.result(timeout_s=60)
    assert num_long_ways(cluster) == [1, 1] and cluster.pull("found") == [[2.0 * n for n in sizes]] * 2
    frame = cluster.ledger()
    for _, rows in frame[frame.cell == handle.number].groupby("rank"):
        assert list(rows.num_bytes) == [4 * n for n in sizes]


def test_those_who_want_to_see_calls_of_torch_see_them(cluster):
    cluster.execute(
        "from torch.profiler import profile\nfrom torch.utils._python_dispatch import TorchDispatchMode\n"
        "from torch.overrides import TorchFunctionMode\n"
        "class Seen(TorchDispatchMode):\n    def __torch_dispatch__(self, f, types, args=(), kw=None):\n"
        "        seen.append(str(f)); return f(*args, **(kw or {}))\n"
        "class Called(TorchFunctionMode):\n    def __torch_function__(self, f, types, args=(), kw=None):\n"
        "        seen.append(f.__name__); return f(*args, **(kw or {}))\n"
        "seen = []\ndef step(): dist.all_reduce(torch.ones(3))\n"
        "step(); step()\nassert not seen\n"
        "with Seen(): step()\n"
        "with Called(): step()\n"
        "with profile() as profiled: step()\n"
        "events = [event.name for event in profiled.events()]",
        timeout_s=60,
    )
    for seen, events in zip(cluster.pull("seen"), cluster.pull("events"), strict=True):
        assert "c10d.allreduce_.default" in seen and "all_reduce" in seen and "c10d::allreduce_" in events


def test_what_cpp_waits_for_goes_the_long_way(cluster):
    cluster.execute(
        "def later(value): return dist.all_reduce(value, async_op=True)\nfor _ in range(2): later(torch.ones(3)).wait()\n"
        "model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1, bias=False))\n"
        "model.register_comm_hook(None, lambda _, bucket: later(bucket.buffer()).get_future().then(lambda f: f.value()[0]))\n"
        "long_way.clear()\nmodel(torch.full((1, 3), 1.0 + rank)).sum().backward()\ngiven = model.module.weight.grad.tolist()\n"
        "seen = list(long_way)\nlong_way.clear()\nlater(torch.ones(3)).wait()",
        timeout_s=60,
    )
    assert cluster.pull("seen") == [["allreduce_"]] * 2 and cluster.pull("given") == [[[3.0] * 3]] * 2
    assert num_long_ways(cluster) == [0, 0]


def test_collected_calls_are_made_together(cluster):
    cluster.execute(
        "def step(value): dist.all_reduce(value)\nparts = [torch.full((2,), 1.0 + i) for i in range(3)]\n"
        "step(torch.zeros(2)); step(torch.zeros(2))\n"
        "with dist._coalescing_manager(group=None, async_ops=True) as work:\n    for part in parts: step(part)\nwork.wait()"
    )
    assert [[part.tolist() for part in parts] for parts in cluster.pull("parts")] == [[[2.0, 2.0], [4.0, 4.0], [6.0, 6.0]]] * 2


def test_a_group_of_several_backends_is_torchs_to_serve(cluster):
    cluster.execute(
        "import torch.testing._internal.distributed.fake_pg\nmixed = dist.new_group([0, 1], backend='cpu:gloo,cuda:fake')\n"
        + loop("dist.barrier(group=mixed); dist.all_reduce(x, group=mixed)"),
        timeout_s=30,
    )
    assert num_long_ways(cluster) == [8, 8] and cluster.pull("found") == [[[3.0] * 4] * 4] * 2


def test_torch_compile_knows_the_functions_still(cluster):
    cluster.execute(
        "def step(value):\n    dist.all_reduce(value)\n    return value + 1\n"
        "made = torch.compile(step, fullgraph=True, backend='aot_eager')(torch.ones(2)).tolist()",
        timeout_s=120,
    )
    assert cluster.pull("made") == [[3.0, 3.0]] * 2


def test_faults_and_tapes_meet_calls_that_were_made_before(own, tmp_path):
    own.execute("def step():\n    x = torch.ones(2); dist.all_reduce(x); return x.tolist()\nstep(); step()")
    with own.inject(wb.Fault(rank=1, op="all_reduce", at=2, action="corrupt")):
        own.execute("spoiled = [step() for _ in range(3)]", timeout_s=30)
    own.execute("mended = step()")
    assert own.pull("mended") == [[2.0, 2.0]] * 2
    first, second, third = own.pull("spoiled")[1]
    assert first == third == [2.0, 2.0] != second
    with own.record(tmp_path / "tape"):
        own.execute("kept = [step() for _ in range(2)]")
    replayed = wb.replay(tmp_path / "tape", rank=1)
    assert len(replayed.collectives) == 2 and not replayed.differing_results


@pytest.mark.parametrize(
    "line",
    ["dist.all_reduce(torch.ones(n))", "dist.all_reduce(torch.ones(n), async_op=True).wait()"],
)
def test_who_waits_in_a_call_that_was_made_before_is_told_and_freed(own, request, line):
    own.execute(f"def step(n):\n    {line}  # the step\nkept, old = rank, dist.group.WORLD\nfor _ in range(6): step(5)")
    own.execute("num_before = carrier().board.count(rank, carrier().groups.find(dist.group.WORLD).key)")
    handle = own.execute("step(5)\nif rank == 0:\n    step(5)\nelse: time.sleep(60)", block=False)
    time.sleep(0.7)
    found = own.diagnose()
    own.interrupt()
    with pytest.raises(wb.RankInterrupted):
        handle.result(timeout_s=15)
    (waiter,) = found.waiting.values()
    assert (waiter.op, waiter.line, waiter.source) == ("all_reduce", 2, f"{line}  # the step")
    assert waiter.sequence == own.pull("num_before")[0] + 2 and waiter.for_s > 0.3
    breaks = not is_checked(request) or "async" in line  # on the board nothing does; gloo has begun what is asynchronous
    assert own.pull("kept") == [0, 1] and own.generation == int(breaks)
    own.execute("step(5)\nlong_way.clear()\nfor _ in range(3): step(5)")
    assert num_long_ways(own) == [0, 0]  # known again after the first
    own.execute(
        "try: dist.all_reduce(torch.ones(5), group=old)\nexcept wb.StaleGroupError: said = 'stale'\nelse: said = 'fine'", timeout_s=10
    )
    assert own.pull("said") == ["stale" if breaks else "fine"] * 2


def test_calls_that_differ_are_told_though_both_were_made_before(own, request):
    own.execute(
        "def step(n):\n    dist.all_reduce(torch.ones(n))\ndef meet(): dist.barrier()\nfor _ in range(5): step(3); step(100_000); meet()"
    )
    handle = own.execute("step(3)\nstep(3) if rank else meet()\ntime.sleep(60)", block=False)
    if is_checked(request):
        with pytest.raises(wb.CollectiveMismatch) as caught:
            handle.result(timeout_s=15)
        assert "rank 0 called barrier(), rank 1 called all_reduce(float32[3], op=sum)" in str(caught.value)
        own.execute("long_way.clear()\nmeet(); step(3)")
        assert own.generation == 0 and num_long_ways(own) == [0, 0]
        return
    time.sleep(0.7)
    found = own.diagnose()
    own.interrupt()
    with pytest.raises(wb.WorkbenchError):
        handle.result(timeout_s=15)
    if found.waiting:  # gloo may also take the bytes of one for those of the other
        assert "another operation" in str(found)


def test_an_error_of_gloo_in_a_call_that_was_made_before_is_the_ranks_own(own):
    with pytest.raises(wb.RankFailed) as caught:
        own.execute(
            "def step():\n    dist.all_reduce(torch.ones(4))\nstep(); step()\ncarrier().shut() if rank else None\nstep()", timeout_s=15
        )
    assert "rank 0 of 2 failed" in str(caught.value) and "RuntimeError" in str(caught.value) and "rank 1 was freed" in str(caught.value)
    own.execute("step(); step()", timeout_s=15)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("dist.broadcast(torch.ones(2), src=9)", "RuntimeError: ProcessGroupGloo::broadcast: invalid root rank: 9"),
        ("dist.all_gather([torch.ones(1)] * 2, 3)", "TypeError: Invalid function argument"),
        ("dist.all_to_all_single(torch.ones(2), torch.ones(3), [1, 1], [1, 1])", "RuntimeError: "),
    ],
)
def test_an_error_of_torchs_own_shows_the_users_line_and_torchs(own, call, said):
    with pytest.raises(wb.RankFailed) as caught:
        own.execute(f"def step():\n    {call}\nfor i in range(3):\n    step()", timeout_s=15)
    text = str(caught.value)
    assert said in text and f"----> 2     {call}" in text and "distributed_c10d.py" in text
    assert "workbench/ranks" not in text and "During handling" not in text


def test_a_group_that_was_destroyed_is_torchs_to_refuse(own):
    own.execute(
        "mine = dist.new_group([0, 1])\nheld = mine\ndef step(group): dist.all_reduce(torch.ones(2), group=group)\nstep(mine); step(mine)"
    )
    own.execute("dist.destroy_process_group(mine)\nlong_way.clear()\nstep(mine)")
    assert num_long_ways(own) == [1, 1]  # torch is asked again; it takes one that somebody still holds
    with pytest.raises(wb.RankFailed, match="Default process group has not been initialized"):
        own.execute("kept = dist.group.WORLD\nstep(None)\nstep(None)\ndist.destroy_process_group()\nstep(None)")


def test_groups_come_and_go_while_calls_are_known(own):
    own.execute(
        "import gc, weakref\nfor i in range(30):\n    g = dist.new_group([0, 1])\n"
        "    for _ in range(3): dist.all_reduce(torch.ones(2), group=g)\n"
        "    dist.destroy_process_group(g)\nlast = weakref.ref(g)\ndel g\ngc.collect()\nis_gone = last() is None",
        timeout_s=60,
    )
    assert own.pull("is_gone") == [True, True]
