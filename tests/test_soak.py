"""The reliability run at a small size: each kind of fault is struck, told, recovered from and counted; what breaks a zero is not hidden."""

from __future__ import annotations

import json
import os
import random
import subprocess
import tempfile
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import pytest

import workbench as wb
from benchmarks import soak
from benchmarks.soak import Outcome, Soak
from benchmarks.soaking import faults, ranks, world
from benchmarks.soaking.world import Broken, Plan, World, Zero

SMALL = Plan(number=0, world_size=3, is_checked=True, tp=1, engine="", members=())


@pytest.fixture(scope="module")
def small():
    made = World(plan=SMALL)
    made.open()
    yield made
    made.close()


def test_some_seconds_of_faults_break_nothing():
    kinds = [kind for kind in faults.FAULTS if kind not in ("C loop", "200 MB", "200 MB cut")]
    said: list[str] = []
    run = Soak(seed=5, engines=("",), kinds=kinds, say=said.append)
    run.run(range(6), until_s=time.monotonic() + 12)
    assert run.outcomes and not [one for one in run.outcomes if one.broken], said
    assert all(one.recovery_s is not None and one.recovery_s < 30 for one in run.outcomes)


def test_a_fault_and_its_world_are_drawn_from_the_seed_and_its_number_alone():
    assert Plan.draw(0, 5) == Plan.draw(0, 5) != Plan.draw(1, 5)
    plans = [Plan.draw(0, number) for number in range(200)]
    assert {plan.world_size for plan in plans} == set(range(2, 9)) and {plan.is_checked for plan in plans} == {True, False}
    assert all(plan.world_size % plan.tp == 0 and set(plan.members) <= set(range(plan.world_size)) for plan in plans)
    assert {plan.engine for plan in plans} == {"", "hf", "vllm", "vllm tp"}
    draws = [[faults.choose(random.Random(number)) for number in range(300)] for _ in range(2)]
    assert draws[0] == draws[1] and set(draws[0]) == set(faults.FAULTS)


def test_names_that_a_healthy_rank_lost_are_seen(small):
    small.cluster.execute("del mine", ranks=1)
    with pytest.raises(Broken, match="rank 1 was healthy: it had .*it has .*token=''") as caught:
        small.check(frozenset())
    assert caught.value.zero is Zero.LOST
    small.settle()
    small.check(frozenset())


def test_a_wrong_result_is_seen(small):
    with small.cluster.inject(wb.Fault(rank=1, op="all_reduce", at=1, action="corrupt")), pytest.raises(Broken) as caught:
        small.recover()
    assert caught.value.zero is Zero.WRONG and "WrongResult" in str(caught.value) or "must be" in str(caught.value)
    small.recover()


def test_an_error_that_the_fault_did_not_ask_for_is_seen(small):
    with pytest.raises(Broken, match="RankFailed where RankInterrupted was due: rank 2 of 3 failed") as caught:
        small.end(small.start(ranks.work, "all_reduce", 5, 2, 1, "raise"), wb.RankInterrupted)
    assert caught.value.zero is Zero.ERROR
    with pytest.raises(Broken, match="the call ended well where RankTimeout was due"):
        small.end(small.start(ranks.work, "all_reduce", 1), wb.RankTimeout)


def test_a_call_that_does_not_come_back_is_a_hang(small):
    handle = small.start(ranks.work, "sleeping", ranks.FOREVER)
    with pytest.raises(Broken, match="did not end within 0 s") as caught:
        small.end(handle, limit_s=0.2)
    assert caught.value.zero is Zero.HANG
    small.cluster.interrupt()
    small.end(handle, wb.RankInterrupted)


def test_an_orphan_is_seen(small):
    assert small.orphans() == []
    with subprocess.Popen(["sleep", "60"]) as orphan:
        known = {small.cluster.pid(rank) for rank in range(3)}
        assert any(f"process {orphan.pid}: sleep 60" == line for line in world.orphans(known, limit_s=0.1))
        orphan.kill()


def test_shared_memory_that_nobody_maps_any_more_is_seen():
    began_s = time.time() - 0.1
    shared = SharedMemory(create=True, size=1000)
    assert world.lost_memory(began_s) == []
    shared.close()
    assert world.lost_memory(began_s, limit_s=0.1) == [f"shared memory {shared.name}"] and world.lost_memory(time.time() + 1) == []
    shared.unlink()
    assert world.lost_memory(began_s) == []


def test_the_table_counts_kinds_and_zeros_and_a_broken_one_is_the_exit_code(monkeypatch, capsys, tmp_path):
    def outcome(number: int, **changes: object) -> Outcome:
        values = {"number": number, "kind": "interrupt", "what": "DDP", "world": "w", "recovery_s": 0.5, **changes}
        return Outcome(**values)  # type: ignore[arg-type]

    made = [outcome(0), outcome(1, recovery_s=1.5), outcome(2, kind="pause", recovery_s=None, broken=str(Zero.HANG), text="it hangs")]
    text = soak.table(made)
    rows = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}
    assert rows["interrupt"][1:] == ["2", "1.00", "s", "1.50", "s", "0"] and rows["pause"][-1] == "1" and rows["hangs"][-1] == "1"
    assert rows["orphans"][-1] == "0" and rows["all"][1] == "3"

    monkeypatch.setattr(Soak, "_do", lambda self, number: made[number])
    before = os.environ["TMPDIR"], tempfile.gettempdir()
    assert soak.main(["--only", "0-1", "--out", str(tmp_path / "well.txt")]) == 0
    assert soak.main(["--only", "2", "--seed", "7", "--out", str(tmp_path / "ill.txt")]) == 1
    assert (os.environ["TMPDIR"], tempfile.gettempdir()) == before
    printed = capsys.readouterr().out
    assert "it hangs" in printed and "again alone: --seed 7 --only 2" in printed
    assert json.loads((tmp_path / "ill.json").read_text())["outcomes"][0]["broken"] == "hangs"
    assert "2 faults in" in Path(tmp_path, "well.txt").read_text()


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing():
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    run = Soak(seed=1, engines=("",), kinds=("driver killed",), say=print)
    run.run(range(2))
    assert [one.broken for one in run.outcomes] == ["", ""], run.outcomes
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_numbers_of_faults_are_one_or_a_range(capsys):
    with pytest.raises(SystemExit):
        soak.main(["--help"])
    assert "--minutes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        soak.main(["--only", "some"])
    assert "argument --only: invalid" in capsys.readouterr().err
