"""`launch(..., record="failures")`: the tape of a cell that failed is kept, whatever else the session did, and can be replayed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import workbench as wb
from workbench.ranks import failures, recording
from workbench.ranks.cluster import Cluster
from workbench.ranks.tape import CellStart, TapeReader


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(3, seed=7, record="failures") as cluster:
        yield cluster


def train_until(step: int) -> float:
    import __main__

    model, optimizer = __main__.model, __main__.optimizer
    for number in range(6):
        optimizer.zero_grad()
        loss = model(torch.rand(4, 3)).square().mean()
        loss.backward()
        optimizer.step()
        if number == step and torch.distributed.get_rank() == 1:
            raise ValueError(f"loss {loss.item():.9f} at step {number}")
    return loss.item()


MAKE = """
import random
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
half = dist.new_group([0, 1])
drawn = random.random()
"""


def test_a_failure_deep_in_a_session_is_replayed_to_the_same_bits(cluster):
    cluster.execute(MAKE)
    cluster.use(wb.Layout(world_size=3, dp=3))
    cluster.run(train_until, 99)
    cluster.push({"offset": 0.25})
    with pytest.raises(wb.RankFailed, match="ValueError: loss") as caught:
        cluster.run(train_until, 4)
    folder = caught.value.tape
    assert folder == cluster.last_tape and folder is not None
    assert f"wb.replay({str(folder)!r}, rank=1) runs rank 1 again, alone" in str(caught.value)
    message = str(caught.value).splitlines()[0].partition("ValueError: ")[2]
    with pytest.raises(ValueError, match=message):  # nine digits of the loss, after Adam, DDP and a layout made in earlier cells
        wb.replay(folder, rank=1)
    freed = wb.replay(folder, rank=2)
    assert freed.freed_from and freed.names["drawn"] == cluster.pull("drawn", ranks=2)[0] and not freed.differing_results
    weights = cluster.pull("model.module.weight.tolist()", ranks=2)[0]
    assert freed.names["model"].module.weight.tolist() == weights


def test_a_later_failure_has_the_cells_since(cluster):
    before = cluster.last_tape
    cluster.execute("value = torch.ones(1) * rank\ndist.all_reduce(value)")
    with pytest.raises(wb.RankFailed):
        cluster.execute("dist.all_reduce(value)\nassert rank != 0, value.item()")
    assert cluster.last_tape not in (None, before)
    with pytest.raises(AssertionError, match="9.0"):
        wb.replay(cluster.last_tape, rank=0)


@pytest.mark.parametrize(
    "cell, kind", [("if rank: dist.barrier()", wb.RankDeadlock), ("dist.all_reduce(torch.ones(1 + rank // 2))", wb.CollectiveMismatch)]
)
def test_deadlocks_and_mismatches_keep_tapes_too(cluster, cell, kind):
    with pytest.raises(kind) as caught:
        cluster.execute(cell)
    assert caught.value.tape == cluster.last_tape and str(cluster.last_tape) in str(caught.value)


def test_what_ends_well_or_is_interrupted_keeps_none(cluster):
    before = cluster.last_tape
    cluster.execute("1")
    handle = cluster.execute("import time; time.sleep(60)", block=False)
    cluster.interrupt()
    with pytest.raises(wb.RankInterrupted):
        handle.result(timeout_s=10)
    assert cluster.last_tape == before


def test_a_stop_that_comes_before_the_cell_has_begun_is_not_lost(cluster):
    pids = [cluster.pid(rank) for rank in range(3)]
    for _ in range(5):
        handle = cluster.execute("import time; time.sleep(60)", block=False)
        cluster.interrupt()
        with pytest.raises(wb.RankInterrupted):
            handle.result(timeout_s=10)
    assert pids == [cluster.pid(rank) for rank in range(3)]  # none had to be killed


def test_after_a_cell_that_was_stopped_in_its_code_the_tape_begins_anew(cluster):
    cluster.execute("import threading\nnumber, lock = 5 + rank, threading.Lock()")
    with pytest.raises(wb.RankTimeout):
        cluster.execute("import time; time.sleep(60)", timeout_s=0.3)
    with pytest.raises(wb.RankFailed):
        cluster.execute("number / (rank - 1)", ranks=1)
    with pytest.raises(ZeroDivisionError):
        wb.replay(cluster.last_tape, rank=1)
    reader = TapeReader(cluster.last_tape, 1)
    assert [r.text for r in reader.records if isinstance(r, CellStart)] == ["number / (rank - 1)"]
    assert "lock" in reader.records[0].unkept and "half" in reader.records[0].unkept


@pytest.mark.parametrize("wraps", [False, True])
def test_a_model_outlives_the_beginning_of_a_new_tape_but_not_its_wrapper(cluster, wraps):
    cluster.execute(MAKE if wraps else MAKE.replace("torch.nn.parallel.DistributedDataParallel", ""))
    cluster.run(train_until, 99)
    with pytest.raises(wb.RankTimeout):
        cluster.execute("import time; time.sleep(60)", timeout_s=0.3)
    with pytest.raises(wb.RankFailed, match="ValueError: loss") as caught:
        cluster.run(train_until, 2)
    message = str(caught.value).splitlines()[0].partition("ValueError: ")[2]
    assert caught.value.tape is not None
    kind, told = (wb.ReplayError, "'model'.*\nit could not be kept: a DDP model holds connections") if wraps else (ValueError, message)
    with pytest.raises(kind, match=told):  # the model, Adam's moments on it and the random numbers came from the snapshot
        wb.replay(caught.value.tape, rank=1)


def test_a_killed_rank_leaves_its_tape_up_to_the_last_finished_collective(tmp_path):
    with wb.launch(2, record="failures") as cluster:
        cluster.execute("kept = 3")
        with pytest.raises(wb.RankFailed, match="SIGKILL") as caught:
            cluster.execute(
                f"x = torch.ones(1)\nfor _ in range(5): dist.all_reduce(x)\nimport os\nif rank: os.kill(os.getpid(), {int(signal.SIGKILL)})"
            )
        assert "wb.replay(" in str(caught.value) and "rank=1) runs rank 1 again, alone" in str(caught.value)
        assert caught.value.signal_name == "SIGKILL" and caught.value.exit_code == -9
        cluster.respawn(1)
        cluster.execute("fresh = 1")
        with pytest.raises(wb.RankFailed) as again:
            cluster.execute("1 / 0", ranks=1)
    dead = TapeReader(caught.value.tape, 1)
    assert [type(record).__name__ for record in dead.records].count("Collective") == 5
    assert wb.replay(caught.value.tape, rank=0).names["kept"] == 3  # the folder outlives the cluster
    with pytest.raises(ZeroDivisionError):
        wb.replay(again.value.tape, rank=1)


def test_a_block_of_ones_own_rests_it(cluster, tmp_path):
    before = cluster.last_tape
    with cluster.record(tmp_path / "tape"), pytest.raises(wb.RankFailed) as caught:
        cluster.execute("1 / 0")
    assert caught.value.tape is None and cluster.last_tape == before
    with pytest.raises(wb.RankFailed) as caught:
        cluster.execute("2 / 0")
    assert caught.value.tape == cluster.last_tape != before
    with pytest.raises(ZeroDivisionError):
        wb.replay(cluster.last_tape, rank=0)


def test_only_the_newest_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(failures, "_NUM_KEPT", 3)
    for number in range(5):
        (tmp_path / f"2026-{number}").mkdir()
    failures._prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2026-3", "2026-4"]


def test_a_tape_that_grows_too_long_ends_and_is_told_as_cut_short(tmp_path):
    from workbench.plan.layout import Layout
    from workbench.ranks.messages import Outcome
    from workbench.ranks.tape import TapeWriter

    writer = TapeWriter(tmp_path / "rank-0.tape", most_bytes=100_000)
    writer.start(rank=0, world_size=1, layout=Layout(world_size=1), has_layout=False)
    for number in range(1, 20):
        writer.begin_cell(number, "source", f"x = {number}", None)
        writer.end_cell(Outcome.OK, "", "", "")
    assert not writer.can_go_on
    writer.close()
    reader = TapeReader(tmp_path, 0)
    assert 2 < len([r for r in reader.records if isinstance(r, CellStart)]) < 19
    assert (tmp_path / "rank-0.tape").stat().st_size <= 110_000 < recording.MOST_TAPE_BYTES


def test_a_wrong_word_is_refused():
    with pytest.raises(ValueError, match="record is 'all'; it must be \"failures\" or None"):
        wb.launch(2, record="all")


def test_the_home_of_kept_tapes_is_private(cluster):
    with pytest.raises(wb.RankFailed):
        cluster.execute("1 / 0")
    folder = Path(cluster.last_tape)
    assert folder.parent.stat().st_mode & 0o077 == 0 and folder.stat().st_mode & 0o077 == 0
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
