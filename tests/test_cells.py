"""Cells on ranks: what goes in, what comes out, how each failure is told; names live on."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest
import torch

import workbench as wb


@pytest.fixture(scope="module")
def cluster():
    with wb.launch(4) as made:
        yield made


def world_sum():
    import torch.distributed as dist

    x = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(x)
    return x.item()


def test_a_cell_sees_its_names(cluster):
    result = cluster.execute("(rank, world_size, group.ranks, sorted(groups), torch.__name__, dist.__name__, wb.__name__)", ranks=2)
    assert result[2].result_text == "(2, 4, (0, 1, 2, 3), [], 'torch', 'torch.distributed', 'workbench')"


def test_functions_and_classes_of_a_cell_live_on(cluster):
    cluster.execute("import dataclasses\n@dataclasses.dataclass\nclass Point:\n    x: int\ndef twice(p):\n    return Point(p.x * 2)")
    assert cluster.execute("twice(Point(rank)).x")[3].result_text == "6"


def test_the_last_expression_is_shown_but_for_none_and_a_semicolon(cluster):
    texts = [cluster.execute(source, ranks=0)[0].result_text for source in ("1 + 1", "None", "1;", "x = 1", "", "'a\\n'", "x = 5; x")]
    assert texts == ["2", "", "", "", "", "'a\\n'", "5"]


def test_a_long_result_is_cut_and_says_so(cluster):
    text = cluster.execute("'x' * 50_000", ranks=0)[0].result_text
    assert len(text) < 20_100 and text.endswith("... (50,002 characters)")


def test_equal_outputs_are_folded(cluster):
    result = cluster.execute("print('a' if rank != 2 else 'b')")
    assert str(result) == "[ranks 0-1, 3] a\n[rank 2] b"
    assert result.folded() == [((0, 1, 3), "a\n"), ((2,), "b\n")]
    assert "ranks 0-1, 3" in result._repr_html_()
    assert repr(cluster.execute("x = 1")) == "<no output of ranks 0-3>"


def test_arguments_travel_and_results_come_back_in_rank_order(cluster):
    def scaled(base, *, by):
        return base * by + wb.current().rank

    assert cluster.run(scaled, torch.ones(2), by=10, ranks=[3, 1])[0].tolist() == [11.0, 11.0]
    assert cluster.run(lambda: wb.current().rank, ranks="1-2") == [1, 2]
    assert cluster.run(lambda: None) == [None] * 4


def peak_bytes() -> int:
    """Most memory that this process has held, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def test_a_large_tensor_travels_in_one_copy(cluster):
    size = 200_000_000
    before = cluster.run(peak_bytes, ranks=0)[0]
    cluster.push({"large": torch.ones(size // 4)}, ranks=0)
    grown = cluster.run(peak_bytes, ranks=0)[0] - before
    assert 0.9 * size < grown < 1.3 * size
    own = peak_bytes()
    large = cluster.pull("large", ranks=0)[0]
    assert large.shape == (size // 4,) and float(large[-1]) == 1.0
    assert peak_bytes() - own < 1.3 * size


def test_pull_takes_expressions(cluster):
    cluster.push({"table": {"a": 1}})
    assert cluster.pull("table['a'] + rank", ranks=slice(0, 2)) == [1, 2]
    with pytest.raises(wb.RankFailed, match=r"NameError: name 'nowhere' is not defined on this rank; an earlier cell must bind it there"):
        cluster.pull("nowhere", ranks=0)


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda c: c.run("x = 1"), "cluster.run takes a function, not str: 'x = 1'; cluster.execute runs source text"),
        (lambda c: c.push({"a b": 1}), "push: 'a b' is no name; every key must be an identifier"),
        (lambda c: c.push("x"), "push takes a dict of names and values, not str: 'x'; push({\"x\": x}) binds x"),
        (lambda c: c.execute("x ="), "invalid syntax"),
        (lambda c: c.execute(len), "cluster.execute takes source text, not builtin_function_or_method: <built-in function len>"),
        (lambda c: c.pid(9), "there is no rank 9 in this cluster\nranks run from 0 to 3\npass one of them, an int"),
        (lambda c: c.kill("0"), "there is no rank '0' in this cluster"),
        (lambda c: c.respawn(-5), "there is no rank -5 in this cluster"),
        (lambda c: c.execute("rank", timeout_s="5"), "timeout_s is '5'; it must be seconds above 0, or None for no limit"),
        (lambda c: c.execute("rank", timeout_s=0), "timeout_s is 0; it must be seconds above 0, or None for no limit"),
        (lambda c: c.pull(["x"]), "pull takes one name or expression as text, not list: ['x']; \"(x, y)\" brings two"),
        (lambda c: c.pull("x = 1"), "invalid syntax"),
        (lambda c: c.respawn(1), "rank 1 is alive (pid "),
        (lambda c: c.use("tp=2"), "use takes a layout, not str: 'tp=2'; wb.Layout(world_size=4, tp=...) is one"),
        (lambda c: c.use(wb.Layout(world_size=8)), "the layout has 8 ranks, the cluster 4; they must be equal\nmake a layout"),
    ],
)
def test_what_cannot_be_is_refused_before_it_is_sent(cluster, call, told):
    before = cluster.execute("1", block=False).number
    time.sleep(0.2)
    with pytest.raises((TypeError, ValueError, SyntaxError)) as caught:
        call(cluster)
    assert told in str(caught.value)
    assert cluster.execute("1", block=False).number == before + 1
    time.sleep(0.2)


def test_an_argument_that_cannot_travel_is_told_in_the_driver(cluster):
    with pytest.raises(TypeError, match=r"an argument of consume\(\) cannot travel to the ranks: .*lock.*\npass numbers, arrays"):
        cluster.run(consume, threading.Lock())
    with pytest.raises(TypeError, match=r"push: x \(generator\) cannot travel to the ranks: .*generator"):
        cluster.push({"x": (i for i in range(2))})
    with pytest.raises(TypeError, match=r"a cluster stays in the process that launched it; on ranks wb.current\(\) has rank, world_size"):
        cluster.run(lambda: cluster.world_size)
    assert cluster.run(world_sum) == [6.0] * 4


def consume(value):
    return value


def test_a_result_that_cannot_travel_names_its_type(cluster):
    with pytest.raises(wb.RankFailed, match=r"the result of .* cannot travel to the driver: a generator cannot be pickled"):
        cluster.run(lambda: (i for i in range(3)))
    with pytest.raises(wb.RankFailed, match=r"open_range cannot travel to the driver: a generator cannot be pickled .*\nbring numbers"):
        cluster.execute("open_range = (i for i in range(3))")
        cluster.pull("open_range")


def test_what_the_workbench_refuses_on_a_rank_ends_with_the_users_own_line(cluster):
    with pytest.raises(wb.CollectiveMismatch) as caught:
        cluster.execute("x = torch.ones(rank + 1)\ndist.all_reduce(x)")
    assert "----> 2 dist.all_reduce(x)" in caught.value.rank_traceback and "intercept.py" not in caught.value.rank_traceback
    assert str(caught.value).count("every rank of a group must make the same calls") == 1
    with pytest.raises(wb.RankFailed) as caught:
        cluster.pull("nowhere")
    assert "rank.py" not in str(caught.value)


LATE = """
import time
from workbench.ranks.board import Board
def odd_one(*asked):
    time.sleep(0.3 if rank else 0)
    odd = look(*asked)
    time.sleep(0 if rank else 0.6)
    return odd
def take_back(*asked):
    go_back(*asked)
    time.sleep(1 if rank else 0)
look, go_back, Board.odd_one, Board.take_back = Board.odd_one, Board.take_back, odd_one, take_back
"""


def test_a_mismatch_shows_ranks_that_took_their_calls_back_while_one_looked():
    with wb.launch(3) as cluster:
        cluster.execute(LATE)
        with pytest.raises(wb.CollectiveMismatch) as caught:
            cluster.execute("dist.all_reduce(torch.ones(1 + rank // 2))")
    assert "rank 2 called all_reduce(float32[2], op=sum), ranks 0, 1 called all_reduce(float32[1], op=sum)" in str(caught.value)
    assert caught.value.rank == 0


def test_what_torch_says_of_a_pasted_script_gets_a_hint():
    with wb.launch(2) as cluster:
        with pytest.raises(wb.RankFailed, match="process group already: leave init_process_group out"):
            cluster.execute("dist.init_process_group('gloo')")
        cluster.execute("dist.destroy_process_group()")
        with pytest.raises(wb.RankFailed, match=r"a cell destroyed the process group of the ranks: cluster.restart\(\) makes fresh ranks"):
            cluster.execute("dist.barrier()")
        cluster.restart()
        cluster.execute("dist.barrier()")


def test_a_peer_outside_the_group_is_named(cluster):
    with pytest.raises(wb.RankFailed, match=r"send to rank 7: group 'world' has ranks \(0, 1, 2, 3\)"):
        cluster.execute("if rank == 1: dist.send(torch.ones(1), 7)")


@pytest.mark.parametrize("kind", ["ValueError('bad')", "SystemExit(3)", "KeyError('k')", "BaseException('base')", "StopIteration()"])
def test_a_cell_that_raises_on_all_ranks_is_one_error(cluster, kind):
    cluster.execute("kept = rank")
    with pytest.raises(wb.RankFailed) as caught:
        cluster.execute(f"def f():\n    raise {kind}\nf()")
    text, name = str(caught.value), kind.partition("(")[0]
    assert re.match(rf"rank [0-3] of 4 failed in cell \d+: {name}", text)
    assert len(re.findall(rf"^  rank \d: {name}", text, re.MULTILINE)) == 3
    assert 'File "<cell ' in text and f"raise {kind}" in text and "/workbench/" not in text
    assert cluster.pull("kept") == [0, 1, 2, 3] and cluster.run(world_sum) == [6.0] * 4


def test_an_error_of_a_class_that_only_the_rank_knows_and_whose_text_fails(cluster):
    with pytest.raises(wb.RankFailed, match=r"Odd: \(its text cannot be made: ZeroDivisionError"):
        cluster.execute("class Odd(Exception):\n    def __str__(self):\n        return str(1 / 0)\nraise Odd", ranks=1)


def test_a_syntax_error_inside_a_rank_is_its_own(cluster):
    with pytest.raises(wb.RankFailed, match="SyntaxError"):
        cluster.execute("eval('1 +')", ranks=0)


def test_a_failed_cell_shows_its_text_in_place_of_the_drivers_stack(cluster):
    with pytest.raises(wb.RankFailed) as caught:
        cluster.execute("1 / 0", ranks=2)
    (shown,) = caught.value._render_traceback_()
    assert shown.startswith("RankFailed: rank 2 of 4 failed in cell") and shown.endswith("ZeroDivisionError: division by zero")
    assert caught.value.rank == 2 and caught.value.world_size == 4 and "ZeroDivisionError" in caught.value.rank_traceback


def test_an_error_has_no_line_of_ours_that_runs_out_of_the_page(cluster):
    with pytest.raises(wb.RankDeadlock) as caught:
        cluster.execute("summed_gradient = torch.ones(3)\nif rank != 2: dist.all_reduce(summed_gradient)")
    (shown,) = caught.value._render_traceback_()
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 100 < max(map(len, str(caught.value).splitlines()))
    assert shown.split() == f"RankDeadlock: {caught.value}".split()
    assert lines[1].startswith("    ") and lines[1].endswith("without it")


def test_the_lines_of_a_ranks_own_traceback_stay_whole(cluster):
    with pytest.raises(wb.RankFailed) as caught:
        cluster.execute(f"raise ValueError('{'long ' * 40}')", ranks=2)
    (shown,) = caught.value._render_traceback_()
    assert shown.endswith(caught.value.rank_traceback.rstrip()) and max(map(len, shown.splitlines())) > 200
    assert max(map(len, shown.partition("Traceback")[0].splitlines())) <= 100


def test_the_failing_line_is_marked_among_its_neighbours(cluster):
    with pytest.raises(wb.RankFailed) as caught:
        cluster.execute("x = 1\n\ndef f(a):\n    return a / 0\n\nf(x)\nprint(x)", ranks=2)
    told = caught.value.rank_traceback.splitlines()
    assert [line for line in told if "---->" in line] == ["  ----> 6 f(x)", "  ----> 4     return a / 0"]
    assert told[-4:-1] == ["                     ~~^~~", "        5", "        6 f(x)"]
    assert told[-1] == "ZeroDivisionError: division by zero" and "workbench" not in str(caught.value)


def test_a_handle_waits_tells_and_cancels(cluster):
    handle = cluster.execute("import time; time.sleep(600)", block=False)
    assert repr(handle) == f"<cell {handle.number}: running>" and not handle.done()
    with pytest.raises(TimeoutError, match=rf"cell {handle.number} still runs after 0.1 s; cancel\(\) stops it"):
        handle.result(timeout_s=0.1)
    with pytest.raises(wb.ClusterBusy, match=rf"cell {handle.number} still runs on ranks \[0, 1, 2, 3\]\nwait for its handle's result\(\)"):
        cluster.push({"x": 1})
    assert "cell" in repr(cluster) and all(s.state == "running" for s in cluster.status())
    handle.cancel()
    with pytest.raises(wb.RankInterrupted, match="was interrupted"):
        handle.result(timeout_s=10)
    handle.cancel()
    assert handle.done() and all(s.state == "idle" for s in cluster.status())


def test_layouts_choose_ranks_and_groups(cluster):
    cluster.use(wb.Layout(world_size=4, tp=2, dp=2))
    try:
        assert cluster.run(lambda: wb.current().rank, ranks="tp=0") == [0, 2]
        assert cluster.run(lambda: wb.current().rank, ranks="dp=1,tp=1") == [3]
        result = cluster.execute(
            "x = torch.ones(1) * rank\nis_used = wb.current().layout == wb.Layout(world_size=4, tp=2, dp=2)\n"
            "(groups['tp'].all_reduce(x).item(), groups['tp'].ranks, is_used)"
        )
        assert [result[r].result_text for r in (0, 3)] == ["(1.0, (0, 1), True)", "(5.0, (2, 3), True)"]
    finally:
        cluster.use(wb.Layout(world_size=4))


def test_accelerate_prepares_trains_and_gathers():
    def train():
        import torch
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model, optimizer = torch.nn.Linear(2, 1), None
        torch.nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        loss = model(torch.full((1, 2), float(accelerator.process_index))).sum()
        accelerator.backward(loss)
        grad = accelerator.unwrap_model(model).weight.grad.tolist()
        optimizer.step()
        return grad, accelerator.gather(torch.tensor([accelerator.process_index])).tolist()

    with wb.launch(2) as cluster:
        assert cluster.run(train) == [([[0.5, 0.5]], [0, 1])] * 2  # DDP's mean of the gradients 0 and 1


def test_object_collectives_of_torch(cluster):
    result = cluster.execute(
        "objects = [None] * 4\ndist.all_gather_object(objects, {'rank': rank})\n"
        "told = ['from 1', [1, 2]] if rank == 1 else [None, None]\ndist.broadcast_object_list(told, src=1)\n"
        "mine = [None]\ndist.scatter_object_list(mine, list('abcd') if rank == 0 else None, src=0)\n"
        "([o['rank'] for o in objects], told, mine)"
    )
    assert [result[r].result_text for r in range(4)] == [f"([0, 1, 2, 3], ['from 1', [1, 2]], ['{c}'])" for c in "abcd"]


def test_a_ledger_of_collectives(cluster):
    cluster.execute(
        "x = torch.ones(256)\nfor _ in range(3):\n    dist.all_reduce(x)\n"
        "if rank == 0:\n    dist.send(x, 1)\nif rank == 1:\n    dist.recv(x)"
    )
    frame = cluster.ledger()
    last = frame[frame.cell == frame.cell.max()]
    assert (last[last.op == "all_reduce"].groupby("rank").size() == 3).all() and len(last) == 14
    assert set(last[last.op == "all_reduce"].line) == {3} and set(last.num_bytes) == {1024}
    assert (last.wait_s >= 0).all() and (last.duration_s >= last.wait_s).all()
    assert sorted(last[last.op.isin(["send", "recv_any"])].group) == ["0 to 1 in world", "any to 1 in world"]


def test_a_trace_for_perfetto(cluster, tmp_path):
    import json

    cluster.run(world_sum)
    events = json.loads(cluster.to_perfetto(tmp_path / "trace.json").read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {f"rank {r}" for r in range(4)}
    assert {"all_reduce", "wait"} <= {e["name"] for e in events if e["ph"] == "X"} and min(e["ts"] for e in events if "ts" in e) == 0


def test_a_mark_is_kept_with_its_time(cluster):
    before = time.monotonic()
    cluster.mark("driver")
    cluster.execute("wb.current().mark('rank')", ranks=1)
    (first_s, first), (second_s, second) = cluster.marks[-2:]
    assert (first, second) == ("driver", "rank") and before <= first_s <= second_s <= time.monotonic()
