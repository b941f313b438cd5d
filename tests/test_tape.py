"""Record and replay: one rank run again alone, bit for bit, or a clear word on why not."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.distributed as dist

import workbench as wb
from workbench.ranks.cluster import Cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(3) as cluster:
        yield cluster


@pytest.fixture
def taped(cluster, tmp_path) -> Callable[..., Path]:
    """Record cells and give the folder of their tapes; `raises` is what the last one raises."""

    def record(*sources: str, raises: type[Exception] | None = None) -> Path:
        folder = tmp_path / "tape"
        with cluster.record(folder):
            for source in sources[:-1]:
                cluster.execute(source)
            with pytest.raises(raises) if raises else nullcontext():
                cluster.execute(sources[-1])
        return folder

    return record


def train(scale: float) -> tuple[float, list[int]]:
    import torch
    import torch.distributed as dist

    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.rand(8, 4) * scale).square().mean().backward()
        optimizer.step()
    ranks: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, dist.get_rank())
    return sum(p.sum().item() for p in model.parameters()), ranks  # type: ignore[return-value]


EXCHANGE = """
right, left = (rank + 1) % world_size, (rank - 1) % world_size
got = torch.empty(2)
receive = dist.irecv(got, left)
send = dist.isend(torch.rand(2) + base, right)
receive.wait(), send.wait()
half = dist.new_group([0, 1])
if rank < 2:
    dist.all_reduce(got, group=half)
work = dist.all_reduce(got, async_op=True)
work.wait()
got.tolist()
"""


def test_a_training_step_is_replayed_bit_for_bit(cluster, tmp_path):
    with cluster.record(tmp_path / "tape"):
        live = cluster.run(train, 2.0)
    for rank in range(3):
        again = wb.replay(tmp_path / "tape", rank=rank)
        assert again.result == live[rank] and not again.is_cut_short
    assert "all_reduce" in {c.op for c in again.collectives} and "all_gather" in {c.op for c in again.collectives}


def test_cells_names_and_messages_are_replayed(cluster, tmp_path):
    cluster.execute("base = 10.0 * rank")
    with cluster.record(tmp_path / "tape"):
        cluster.push({"extra": torch.ones(2)})
        live = cluster.execute(EXCHANGE)
        cluster.execute("total = float((got + extra).sum()); total")
    again = wb.replay(tmp_path / "tape", rank=1)
    assert again.result_texts[0] == live[1].result_text and again.names["total"] == cluster.pull("total")[1]
    assert [c.op for c in again.collectives] == ["recv", "send", "all_reduce", "all_reduce"]


FROM_ANY = """
import time
heard = []
pair = dist.new_group([2, 0])
if rank == 0:
    first, second, third = torch.empty(2), torch.empty(2), torch.empty(1)
    heard.append((dist.recv(first), first.tolist()))
    work = dist.irecv(second)
    work.wait()
    heard.append((work._source_rank(), second.tolist()))
    heard.append((dist.recv(third, group=pair), third.tolist()))
else:
    time.sleep(0.2 * (2 - rank))
    dist.send(torch.rand(2) + rank, 0)
    if rank == 2:
        time.sleep(0.4)  # so that its first two messages are not met by the receive in the pair
        dist.send(torch.ones(1), 0, group=pair)
heard
"""


def test_a_receive_from_any_hears_the_same_one_again(cluster, taped):
    folder = taped(FROM_ANY)
    again = wb.replay(folder, rank=0)
    assert [source for source, _ in again.names["heard"]] == [2, 1, 2]
    assert again.names["heard"] == cluster.pull("heard")[0]
    assert [(c.op, c.source) for c in again.collectives] == [("recv_any", 2), ("recv_any", 1), ("recv_any", 1)], "members of their groups"
    assert {c.source for c in wb.replay(folder, rank=2).collectives} == {-1}
    assert not isinstance(dist.Work._source_rank, FunctionType), "torch's own again"


OBJECTS = """
small = group.broadcast_object({"w": torch.rand(3)} if rank == 0 else None, src=0)
large = group.broadcast_object([torch.rand(50_000)] if rank == 1 else None, src=1)
table = group.broadcast_tensor_dict({"x": torch.rand(5), "k": "v"} if rank == 2 else None, src=2)
rows = [None] * 3
dist.all_gather_object(rows, {"mine": torch.rand(2) + rank})
if rank == 0:
    group.send_object({"o": torch.rand(4)}, dst=1)
elif rank == 1:
    got = group.recv_object(src=0)
(small, large, table, rows)
"""


def test_objects_with_tensors_are_the_same_bytes_again(taped):
    folder = taped(OBJECTS)
    for rank in range(3):  # each is the sender of something: pickles of tensors hold addresses, but not on a tape
        assert not wb.replay(folder, rank=rank).differing_results


def test_a_pickle_while_recording_is_read_as_it_was():
    import pickle

    from workbench.ranks.steady import steady_pickles

    tensors = [torch.arange(6.0).reshape(2, 3).T, torch.ones(2, dtype=torch.bfloat16), torch.empty(0), torch.ones(1, requires_grad=True)]
    steady_pickles(True)
    try:
        first, second = pickle.dumps(tensors), pickle.dumps([tensor.clone() for tensor in tensors[:3]] + tensors[3:])
    finally:
        steady_pickles(False)
    again = pickle.loads(first)
    assert all(torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride() for a, b in zip(again, tensors, strict=True))
    assert again[3].requires_grad and len(first) == len(second)
    again[0][0, 0] = 9.0  # one's own memory


def test_names_bound_before_the_tape_are_there_as_they_were(cluster, taped):
    cluster.use(wb.Layout(world_size=3, tp=3))
    cluster.execute(
        "model = torch.nn.Linear(2, 1)\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)\nscale = 1.0\n"
        "def step():\n    (model(torch.ones(1, 2)) * scale).sum().backward()\n    optimizer.step()\n    return model.weight.tolist()"
    )
    folder = taped("scale = 2.0 + rank", "x = groups['tp'].all_reduce(torch.rand(1)); (step(), x.item())")
    again = wb.replay(folder, rank=2)
    assert again.names["scale"] == 4.0 and not again.differing_results  # the model is still its optimizer's, `step` reads the new scale
    assert again.result_texts[-1] == cluster.execute("(model.weight.tolist(), x.item())")[2].result_text
    cluster.use(wb.Layout(world_size=3))


def test_a_name_that_could_not_be_kept_is_told_when_it_is_read(cluster, taped):
    cluster.execute("import threading\nlock = threading.Lock()")
    folder = taped("dist.barrier()", "lock.acquire(); lock.release()")
    with pytest.raises(
        wb.ReplayError, match="reads 'lock', which the tape does not hold: it was bound before the tape began\nit could not"
    ):
        wb.replay(folder, rank=0)


def test_replaying_leaves_this_process_as_it_was(taped):
    folder = taped("torch.set_default_dtype(torch.float64)", "dist.barrier(); torch.rand(1)", "torch.set_default_dtype(torch.float32)")
    state, before = torch.get_rng_state(), (torch.get_num_threads(), torch.get_default_dtype())
    wb.replay(folder, rank=0)
    assert torch.equal(state, torch.get_rng_state()) and not torch.distributed.is_initialized()
    assert before == (torch.get_num_threads(), torch.get_default_dtype())


def test_a_debugger_stops_inside_the_replayed_code(cluster, taped, monkeypatch):
    folder = taped("x = torch.ones(2) * rank\ndist.all_reduce(x)\nimport sys\nsys.breakpointhook.__name__ == 'call' or breakpoint()")
    seen: list[list[float]] = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: seen.append(sys._getframe(1).f_globals["x"].tolist()))
    wb.replay(folder, rank=1)
    assert seen == [[3.0, 3.0]]


def test_a_failure_is_replayed_as_the_same_exception(taped):
    folder = taped("x = torch.ones(1)\ndist.all_reduce(x)\n1 / (rank - 2)", raises=wb.RankFailed)
    with pytest.raises(ZeroDivisionError):
        wb.replay(folder, rank=2)


def test_an_earlier_failure_is_passed_and_the_tape_goes_on(cluster, tmp_path):
    with cluster.record(tmp_path / "tape"):
        with pytest.raises(wb.RankFailed):
            cluster.execute("x = rank\n1 / 0")
        cluster.execute("x += 1\ntotal = torch.ones(1) * x\ndist.all_reduce(total)\ntotal.item()")
    again = wb.replay(tmp_path / "tape", rank=1)
    assert again.names["x"] == 2 and again.result_texts[-1] == "6.0"


def test_a_rank_that_was_freed_stops_where_it_waited(taped):
    folder = taped("kept = 1\ntry:\n    if rank != 2: dist.barrier()\nfinally: kept = 2", raises=wb.RankDeadlock)
    again = wb.replay(folder, rank=0)
    assert again.freed_from == "barrier()" and again.names["kept"] == 2 and not again.is_cut_short
    assert wb.replay(folder, rank=2).freed_from == ""


def test_a_mismatch_is_raised_again(taped):
    folder = taped("dist.all_reduce(torch.ones(2 + rank // 2))", raises=wb.CollectiveMismatch)
    told = []
    for rank in range(3):  # those who saw it before they were freed
        try:
            told.append(wb.replay(folder, rank=rank).freed_from)
        except wb.CollectiveMismatch as error:
            told.append(str(error).splitlines()[0])
    assert any("rank 2 called all_reduce(float32[3], op=sum), ranks 0, 1 called" in text for text in told)
    assert all("all_reduce(float32[" in text for text in told)


def test_what_a_fault_spoiled_is_on_the_tape(cluster, tmp_path):
    faults = [wb.Fault(rank=0, op="all_reduce", at=1, action="corrupt"), wb.Fault(rank=0, op="all_reduce", at=2, action="drop")]
    with cluster.record(tmp_path / "tape"), cluster.inject(*faults), pytest.raises(wb.RankDeadlock):
        cluster.execute("x = torch.ones(2)\ndist.all_reduce(x)\nfirst = x.tolist()\ndist.all_reduce(x)\nx.tolist()")
    again = wb.replay(tmp_path / "tape", rank=0)
    assert again.names["first"] == cluster.pull("first", ranks=0)[0] != [3.0, 3.0] and len(again.collectives) == 2


@pytest.mark.parametrize(
    "then, now, cell, told",
    [
        ("3", "4", "dist.all_reduce(torch.ones(int(v)))", ["diverged at collective 1", "line 2", "float32[4]", "float32[3]"]),
        (
            "0.5",
            "0.25",
            "x = torch.ones(4); x[2] = v; dist.all_reduce(x)",
            ["line 2", "element 2 of tensor 0 is 0.25, on the tape 0.5", "1 of 4"],
        ),
        ("1", "0", "if v: dist.barrier()", ["it ended, where the tape goes on with barrier()"]),
        ("0", "1", "if v: dist.barrier()", ["it asks for barrier(), where the tape has the end of the cell"]),
        ("1", "0", "dist.barrier(); 1 / v", ["it raised ZeroDivisionError: float division by zero, where the recorded one ended as ok"]),
    ],
)
def test_code_or_values_that_changed_diverge_with_place_and_both_values(taped, tmp_path, then, now, cell, told):
    (tmp_path / "value.txt").write_text(then)
    folder = taped(f"import pathlib; v = float(pathlib.Path({str(tmp_path / 'value.txt')!r}).read_text())\n{cell}")
    (tmp_path / "value.txt").write_text(now)
    with pytest.raises(wb.ReplayError, match="the replay diverged") as caught:
        wb.replay(folder, rank=1)
    assert [part for part in told if part not in str(caught.value)] == []


def test_a_failure_that_does_not_come_again_is_a_divergence(taped, tmp_path):
    (tmp_path / "value.txt").write_text("0")
    read = f"import pathlib; v = float(pathlib.Path({str(tmp_path / 'value.txt')!r}).read_text())"
    folder = taped(f"{read}\n1 / v", raises=wb.RankFailed)
    (tmp_path / "value.txt").write_text("1")
    with pytest.raises(wb.ReplayError, match="it ended well, where the recorded one raised ZeroDivisionError: float division by zero"):
        wb.replay(folder, rank=1)


def test_a_result_that_differs_is_told_and_does_not_stop(taped):
    folder = taped("import time; time.time()", "dist.barrier(); 5")
    (told,) = wb.replay(folder, rank=0).differing_results
    assert "on the tape 1" in told and "(hash " in told


def test_another_users_module_is_told(cluster, tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "taped_module.py").write_text("def size():\n    return 2\n")
    with cluster.record(tmp_path / "tape"):
        cluster.execute(f"import sys; sys.path.insert(0, {str(tmp_path / 'code')!r})\nimport taped_module\ndist.all_reduce(torch.ones(2))")
    wb.replay(tmp_path / "tape", rank=0)
    (tmp_path / "code" / "taped_module.py").write_text("def size():\n    return 3\n")
    with pytest.raises(wb.ReplayError, match="taped_module.py has changed since it was recorded\nstrict=False tries all the same"):
        wb.replay(tmp_path / "tape", rank=0)
    assert len(wb.replay(tmp_path / "tape", rank=0, strict=False).collectives) == 1
    sys.modules.pop("taped_module", None)
    sys.path[:] = [path for path in sys.path if path != str(tmp_path / "code")]


def test_the_command_replays_and_writes_a_test(taped, tmp_path, capsys):
    from workbench.cli import main

    folder = str(taped("x = torch.ones(2)\ndist.all_reduce(x)"))
    assert main(["replay", folder, "--rank", "2"]) == 0
    told = capsys.readouterr().out
    assert "line 2: all_reduce(float32[2], op=sum)" in told and "rank 2: 1 collectives replayed" in told
    written = tmp_path / "test_it.py"
    assert main(["replay", folder, "--rank", "2", "--pytest", str(written)]) == 0
    assert main(["replay", str(tmp_path / "nothing"), "--rank", "0"]) == 1 and "has no tape of rank 0" in capsys.readouterr().err
    names: dict[str, Any] = {}
    exec(written.read_text(), names)
    names["test_rank_2_replays"]()
    os.truncate(tmp_path / "tape" / "rank-2.tape", (tmp_path / "tape" / "rank-2.tape").stat().st_size - 100)
    with pytest.raises(AssertionError):  # the test that was written can fail
        names["test_rank_2_replays"]()


def test_a_tape_survives_the_death_of_its_rank(tmp_path):
    with wb.launch(2) as cluster:
        with cluster.record(tmp_path / "tape"), pytest.raises(wb.RankFailed):
            cluster.execute(
                f"x = torch.ones(1)\nfor _ in range(5): dist.all_reduce(x)\nimport os\nif rank: os.kill(os.getpid(), {int(signal.SIGKILL)})"
            )
        with pytest.raises(wb.RankFailed, match="rank 1 of 2 is dead"):
            cluster.execute("1")
    again = wb.replay(tmp_path / "tape", rank=0)
    assert len(again.collectives) == 5
    from workbench.ranks.tape import TapeReader

    cut = TapeReader(tmp_path / "tape", 1)
    assert [type(record).__name__ for record in cut.records].count("Collective") == 5


def test_a_tape_goes_on_over_the_death_of_another_rank(tmp_path):
    with wb.launch(2) as cluster, cluster.record(tmp_path / "tape"):
        cluster.execute("x = torch.ones(1) * rank")
        cluster.kill(1)
        cluster.respawn(1)
        cluster.execute(
            "y = group.broadcast_object([torch.ones(30_000)] if rank == 0 else None, src=0)\ndist.all_reduce(x := torch.ones(1)); x.item()"
        )
        cluster.execute("z = group.broadcast_object([torch.ones(30_000)] if rank == 1 else None, src=1); z[0].sum().item()")
    again = wb.replay(tmp_path / "tape", rank=0)
    assert again.result_texts == ("", "2.0", "30000.0") and not again.is_cut_short and not again.differing_results
    assert wb.replay(tmp_path / "tape" / "generation-1", rank=1).result_texts == ("2.0", "30000.0")


def test_a_tape_cut_short_is_played_as_far_as_it_goes(taped):
    folder = taped("x = torch.ones(1)\nfor _ in range(4): dist.all_reduce(x)\nx")
    path = folder / "rank-0.tape"
    os.truncate(path, path.stat().st_size - 300)
    again = wb.replay(folder, rank=0)
    assert again.is_cut_short and 0 < len(again.collectives) <= 4
    os.truncate(path, 100)
    with pytest.raises(wb.ReplayError, match="rank-0.tape is cut short before its first record\nrecord it again"):
        wb.replay(folder, rank=0)


def test_a_damaged_a_missing_and_a_foreign_tape_are_told(cluster, taped):
    folder = taped("dist.barrier()")
    with pytest.raises(wb.ReplayError, match="no tape of rank 7\nit holds rank-0.tape, rank-1.tape, rank-2.tape"):
        wb.replay(folder, rank=7)
    data = bytearray((folder / "rank-1.tape").read_bytes())
    data[-20] ^= 1
    (folder / "rank-1.tape").write_bytes(data)
    with pytest.raises(wb.ReplayError, match="rank-1.tape is damaged: a record at byte"):
        wb.replay(folder, rank=1)
    (folder / "rank-2.tape").write_bytes(b"something else")
    with pytest.raises(wb.ReplayError, match="rank-2.tape is no tape of workbench\nit begins with b'something else'"):
        wb.replay(folder, rank=2)
    (folder / "rank-2.tape").write_bytes(b"workbench tape 1\n...")
    with pytest.raises(wb.ReplayError, match="rank-2.tape was written by another version of workbench"):
        wb.replay(folder, rank=2)
    (folder / "rank-0.tape").chmod(0o666)
    with pytest.raises(wb.ReplayError, match="can be written by others"):
        wb.replay(folder, rank=0)
    with pytest.raises(ValueError, match="a tape needs a folder of its own"), cluster.record(folder):
        pass


def test_another_environment_is_refused(taped, monkeypatch):
    folder = taped("dist.barrier()")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "Z80")
    with pytest.raises(wb.ReplayError, match="processor capability .* on the tape, Z80 here"):
        wb.replay(folder, rank=0)
    assert wb.replay(folder, rank=0, strict=False).result is None


def test_a_rollout_is_replayed_without_an_engine(tmp_path: Path):
    with wb.launch(2) as cluster:
        with cluster.record(tmp_path / "tape"):
            run = wb.rollout(
                cluster, [["1+1=", "2+3="], ["4+4="]], backend="hf", sampling=wb.Sampling(max_tokens=8, temperature=0.0), keep=False
            )
    for rank in range(2):
        again = wb.replay(tmp_path / "tape", rank=rank)
        assert again.names["batch"].texts == run.batch(rank).texts
