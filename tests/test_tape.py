"""Record and replay: one rank run again alone, bit for bit, or a clear word on why not."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import workbench as wb
from workbench.ranks.cluster import Cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(3) as cluster:
        yield cluster


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


def test_replaying_leaves_this_process_as_it_was(cluster, tmp_path):
    with cluster.record(tmp_path / "tape"):
        cluster.execute("dist.barrier(); torch.rand(1)")
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    wb.replay(tmp_path / "tape", rank=0)
    assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads() and not torch.distributed.is_initialized()


def test_a_failure_is_replayed_as_the_same_exception(cluster, tmp_path):
    with cluster.record(tmp_path / "tape"), pytest.raises(wb.RankFailed):
        cluster.execute("x = torch.ones(1)\ndist.all_reduce(x)\n1 / (rank - 2)")
    with pytest.raises(ZeroDivisionError):
        wb.replay(tmp_path / "tape", rank=2)


def test_code_that_changed_diverges_with_both_values(cluster, tmp_path):
    (tmp_path / "size.txt").write_text("3")
    with cluster.record(tmp_path / "tape"):
        read = f"import pathlib; n = int(pathlib.Path({str(tmp_path / 'size.txt')!r}).read_text())"
        cluster.execute(f"{read}\ndist.all_reduce(torch.ones(n))")
    (tmp_path / "size.txt").write_text("4")
    with pytest.raises(wb.ReplayError) as caught:
        wb.replay(tmp_path / "tape", rank=0)
    told = str(caught.value)
    assert "diverged at collective 1" in told and "line 2" in told and "float32[4]" in told and "float32[3]" in told


def test_values_that_changed_diverge_with_both_values(cluster, tmp_path):
    (tmp_path / "value.txt").write_text("0.5")
    with cluster.record(tmp_path / "tape"):
        read = f"import pathlib; v = float(pathlib.Path({str(tmp_path / 'value.txt')!r}).read_text())"
        cluster.execute(f"{read}\nx = torch.ones(4)\nx[2] = v\ndist.all_reduce(x)")
    (tmp_path / "value.txt").write_text("0.25")
    with pytest.raises(wb.ReplayError) as caught:
        wb.replay(tmp_path / "tape", rank=1)
    told = str(caught.value)
    assert "line 4" in told and "element 2 of tensor 0 is 0.25, on the tape 0.5" in told and "1 of 4 elements differ" in told


def test_the_command_replays_and_writes_a_test(cluster, tmp_path, capsys):
    from workbench.cli import main

    with cluster.record(tmp_path / "tape"):
        cluster.execute("x = torch.ones(2)\ndist.all_reduce(x)")
    assert main(["replay", str(tmp_path / "tape"), "--rank", "2"]) == 0
    told = capsys.readouterr().out
    assert "line 2: all_reduce(float32[2], op=sum)" in told and "rank 2: 1 collectives replayed" in told
    assert main(["replay", str(tmp_path / "tape"), "--rank", "2", "--pytest", str(tmp_path / "test_it.py")]) == 0
    names: dict[str, object] = {}
    exec((tmp_path / "test_it.py").read_text(), names)
    names["test_rank_2_replays"]()  # type: ignore[operator]
    assert main(["replay", str(tmp_path / "nothing"), "--rank", "0"]) == 1 and "has no tape of rank 0" in capsys.readouterr().err


def test_a_tape_survives_the_death_of_its_rank(tmp_path):
    with wb.launch(2) as cluster:
        with cluster.record(tmp_path / "tape"), pytest.raises(wb.RankFailed):
            cluster.execute(
                f"x = torch.ones(1)\nfor _ in range(5): dist.all_reduce(x)\nimport os\nif rank: os.kill(os.getpid(), {int(signal.SIGKILL)})"
            )
    again = wb.replay(tmp_path / "tape", rank=0)
    assert len(again.collectives) == 5
    from workbench.ranks.tape import TapeReader

    cut = TapeReader(tmp_path / "tape", 1)
    assert [type(record).__name__ for record in cut.records].count("Collective") == 5


def test_a_tape_cut_short_is_played_as_far_as_it_goes(cluster, tmp_path):
    with cluster.record(tmp_path / "tape"):
        cluster.execute("x = torch.ones(1)\nfor _ in range(4): dist.all_reduce(x)\nx")
    path = tmp_path / "tape" / "rank-0.tape"
    os.truncate(path, path.stat().st_size - 200)
    again = wb.replay(tmp_path / "tape", rank=0)
    assert again.is_cut_short and 0 < len(again.collectives) <= 4


def test_a_damaged_a_missing_and_a_foreign_tape_are_told(cluster, tmp_path):
    folder = tmp_path / "tape"
    with cluster.record(folder):
        cluster.execute("dist.barrier()")
    with pytest.raises(wb.ReplayError, match="no tape of rank 7\nit holds rank-0.tape, rank-1.tape, rank-2.tape"):
        wb.replay(folder, rank=7)
    data = bytearray((folder / "rank-1.tape").read_bytes())
    data[-20] ^= 1
    (folder / "rank-1.tape").write_bytes(data)
    with pytest.raises(wb.ReplayError, match="rank-1.tape is damaged: a record at byte"):
        wb.replay(folder, rank=1)
    (folder / "rank-2.tape").write_bytes(b"something else")
    with pytest.raises(wb.ReplayError, match="is no tape of this version"):
        wb.replay(folder, rank=2)
    (folder / "rank-0.tape").chmod(0o666)
    with pytest.raises(wb.ReplayError, match="can be written by others"):
        wb.replay(folder, rank=0)
    with pytest.raises(ValueError, match="a tape needs a folder of its own"), cluster.record(folder):
        pass


def test_another_environment_is_refused(cluster, tmp_path, monkeypatch):
    with cluster.record(tmp_path / "tape"):
        cluster.execute("dist.barrier()")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "Z80")
    with pytest.raises(wb.ReplayError, match="processor capability .* on the tape, Z80 here"):
        wb.replay(tmp_path / "tape", rank=0)
    assert wb.replay(tmp_path / "tape", rank=0, strict=False).result is None


def test_a_rollout_is_replayed_without_an_engine(tmp_path: Path):
    with wb.launch(2) as cluster:
        with cluster.record(tmp_path / "tape"):
            run = wb.rollout(
                cluster, [["1+1=", "2+3="], ["4+4="]], backend="hf", sampling=wb.Sampling(max_tokens=8, temperature=0.0), keep=False
            )
    for rank in range(2):
        again = wb.replay(tmp_path / "tape", rank=rank)
        assert again.names["batch"].texts == run.batch(rank).texts
