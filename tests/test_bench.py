"""The benchmarks at small sizes: each measurement runs and gives numbers that can be; the table says reached or short."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import workbench as wb
from benchmarks import cells, collectives, groups, launch, peers, run, scatter, sleep, tokens
from benchmarks.line import Line, Reach, Verdict

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture
def without_ipyparallel(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (launch, cells):
        monkeypatch.setattr(module, "has_ipyparallel", lambda: False)


@pytest.mark.parametrize(
    "ours, theirs, reach, ratio, verdict",
    [
        (1.0, 8.0, Reach(limit=1 / 8), 0.125, Verdict.REACHED),
        (1.1, 8.0, Reach(limit=1 / 8), 0.1375, Verdict.SHORT),
        (0.96, 1.0, Reach(limit=0.95, is_least=True), 0.96, Verdict.REACHED),
        (0.94, 1.0, Reach(limit=0.95, is_least=True), 0.94, Verdict.SHORT),
        (4.0, 40.0, Reach(limit=5.0, is_ours=True), 0.1, Verdict.REACHED),
        (6.0, None, Reach(limit=5.0, is_ours=True), None, Verdict.SHORT),
        (1.0, None, Reach(limit=1 / 8), None, Verdict.NOT_COMPARED),
        (1.0, 2.0, None, 0.5, Verdict.TOLD),
    ],
)
def test_a_line_tells_ratio_and_verdict(ours, theirs, reach, ratio, verdict):
    line = Line(what="it", unit="s", ours=ours, theirs=theirs, reach=reach)
    assert (line.ratio, line.verdict) == (ratio, verdict)


def test_a_line_shows_three_digits_units_and_what_to_reach():
    line = Line(what="it", unit="ms", ours=0.03456, theirs=1234.5, peer="theirs", reach=Reach(limit=0.2))
    assert line.cells() == ("it", "0.0346 ms", "1,234 ms  theirs", "2.8e-05 x", "<= 0.2 x", "reached")
    line = Line(what="it", unit="MB", ours=11.94, peer="absent", reach=Reach(limit=12.0, is_ours=True))
    assert line.cells() == ("it", "11.9 MB", "absent", "", "<= 12 MB", "reached")


def test_launch(without_ipyparallel):
    result = launch.measure(num_ranks=2, num_ranks_many=3, repeats=1)
    assert 0 < result.warm_s[0] < result.ready_s[0] < 120 and 0 < result.torchrun_s[0] < 120 and result.warm_many_s[0] > 0
    assert len(result.private_bytes) == 2 and all(1e6 < size < 1e8 for size in result.private_bytes)
    compared, *others = result.lines()
    assert compared.verdict is Verdict.NOT_COMPARED and "pip install ipyparallel" in compared.peer
    assert [line.unit for line in others] == ["s", "s", "s", "MB"]


def test_cells(without_ipyparallel):
    result = cells.measure(num_ranks=2, num_cells=7)
    assert len(result.cell_s) == 7 and all(0 < seconds < 10 for seconds in result.cell_s)


def test_scatter():
    result = scatter.measure(num_ranks=2, num_completions=16, num_samples=4, length_tokens=8, repeats=2)
    assert [timing.has_logprobs for timing in result.timings] == [False, True]
    for timing in result.timings:
        assert all(len(way) == 2 and min(way) > 0 for way in (timing.packed_s, timing.objects_s, timing.packed_objects_s))
    assert "give back 16 completions of 8 tokens to 2 ranks (4 a prompt, logprobs too)" in [line.what for line in result.lines()]


def test_collectives():
    result = collectives.measure(world_sizes=(2,), sizes=(64, 4096), num_calls=5, repeats=1)
    made = [(t.way, t.num_ranks, t.num_bytes) for t in result.timings]
    assert made == [(way, 2, size) for size in (64, 4096) for way in collectives.Way]
    assert [len(t.with_check_s) > 0 for t in result.timings] == [t.way is collectives.Way.AGAIN for t in result.timings]
    for timing in result.timings:
        timed = [timing.without_check_s, timing.plain_s, timing.without_check_cpu_s, timing.plain_cpu_s]
        timed += [timing.without_row_cpu_s] if timing.way is collectives.Way.AS_CPP else []
        assert all(len(one) == 15 and 0 < min(one) <= max(one) < 1 for one in timed)


def test_rows_are_left_out_where_it_is_timed_without_them():
    def made(way, size):
        for _ in range(size):
            dist.distributed_c10d._get_default_group().allreduce([torch.ones(1)]).wait()
        return way

    with wb.launch(2) as cluster:
        for call, *given, num_rows in ((made, "noted", 3, 6), (collectives._without_rows, made, "not", 4, 6), (made, "again", 1, 8)):
            cluster.run(call, *given)
            assert (cluster.ledger().op == "all_reduce").sum() == num_rows, given


def test_collectives_have_to_reach_what_was_promised(monkeypatch):
    def verdicts(way: collectives.Way, num_bytes: int, *us: float, no_row: float | None = None) -> list[tuple[float, str]]:
        on, off, plain = ((1e-6 * one,) for one in us)
        timing = collectives.Timing(
            way=way,
            num_ranks=2,
            num_bytes=num_bytes,
            with_check_s=on if way is collectives.Way.AGAIN else (),
            without_check_s=off,
            plain_s=plain,
            without_check_cpu_s=off,
            plain_cpu_s=plain,
            without_row_cpu_s=() if no_row is None else (1e-6 * no_row,),
        )
        return [(round(line.ours), str(line.verdict)) for line in timing.lines()]

    again, *others, from_cpp = collectives.Way
    assert verdicts(again, 4, 159, 149, 100) == [(159, "reached"), (149, ""), (49, "reached"), (49, "")]
    assert verdicts(again, 4, 161, 151, 100) == [(161, "short"), (151, ""), (51, "short"), (51, "")]
    assert verdicts(again, 1_000_000, 2000, 1009, 1000) == [(2000, ""), (1009, "reached"), (9, "")]
    for way in others:
        assert verdicts(way, 4, 0, 149, 100) == [(149, ""), (49, "reached"), (49, "")]
        assert verdicts(way, 4, 0, 151, 100) == [(151, ""), (51, "short"), (51, "")]
        assert verdicts(way, 1_000_000, 0, 1011, 1000) == [(1011, "short"), (11, "")]
    assert verdicts(from_cpp, 1_000_000, 0, 1011, 1000, no_row=1000) == [(1011, "short"), (11, ""), (11, "")]
    monkeypatch.setattr(collectives, "num_usable_cores", lambda: 1)  # ranks share it, and with it what each takes
    assert verdicts(again, 4, 161, 151, 100) == [(161, "short"), (151, ""), (51, "short"), (51, "")]
    assert verdicts(again, 1_000_000, 2000, 1011, 1000) == [(2000, ""), (1011, "short"), (11, "")]
    for way in others:
        assert verdicts(way, 4, 0, 149, 100) == [(149, ""), (49, ""), (49, "reached")]
        assert verdicts(way, 4, 0, 151, 100) == [(151, ""), (51, ""), (51, "short")]
        assert verdicts(way, 1_000_000, 0, 1011, 1000) == [(1011, ""), (11, "")]
    assert verdicts(from_cpp, 4, 0, 300, 100, no_row=251) == [(300, ""), (200, ""), (200, ""), (49, "reached")]
    assert verdicts(from_cpp, 4, 0, 300, 100, no_row=249) == [(300, ""), (200, ""), (200, ""), (51, "short")]
    assert verdicts(from_cpp, 1_000_000, 0, 1200, 1000, no_row=1100) == [(1200, ""), (200, ""), (100, "")]


def test_groups():
    result = groups.measure(world_sizes=(2,), sizes=(1 << 10,), num_calls=2, with_vllm=False)
    assert [timing.operation for timing in result.timings] == [
        "broadcast_object", "all_gather_object", "send_object", "broadcast_tensor_dict", groups.PACKED,
    ]  # fmt: skip
    assert all(len(way) == 20 and min(way) > 0 for timing in result.timings for way in (timing.ours_s, timing.torch_s))
    *objects, packed, pickled = result.lines()
    assert [line.reach for line in objects] == [Reach(limit=1.0)] * 4
    assert (packed.peer, packed.reach) == ("torch, lists of ints", Reach(limit=1 / 3)) and pickled.reach == Reach(limit=1.0)


def test_the_tokens_that_are_compared_are_the_same():
    inputs = groups.make_inputs(1, 2, 8192)
    number, *rest = inputs["packed"].tolist()
    lengths, tokens = rest[:number], rest[number:]
    assert lengths == [len(ids) for ids in inputs["completions"]] and tokens == sum(inputs["completions"], [])


def test_sleep():
    result = sleep.measure(num_parameters=2_000_000, kv_cache_bytes=2**25, repeats=2)
    assert result.are_tokens_equal and result.weights_bytes == pytest.approx(8e6, rel=0.1) and result.kv_cache_bytes > 2**24
    assert min(result.freed_bytes) > 0.5 * (result.weights_bytes + result.kv_cache_bytes)
    assert all(min(way) > 0 for way in (result.sleep_s, result.wake_s, result.write_s, result.read_s, result.kv_wake_s))


@pytest.mark.slow
def test_tokens():
    result = tokens.measure(num_ranks=2, prompts_per_rank=2, num_samples=2, max_tokens=8, repeats=1)
    assert result.are_texts_equal and result.num_completions == 8 and 8 <= result.num_tokens <= 64
    assert len(result.rollout_s) == len(result.llm_s) == 1


@dataclass(frozen=True)
class Made:
    value: float

    def lines(self) -> list[Line]:
        return [Line(what="made up", unit="s", ours=self.value, reach=Reach(limit=1.0, is_ours=True))]


def made(value: float = 2.0) -> Made:
    return Made(value)


def fails(**options: object) -> Made:
    raise OSError("no such thing")


def test_the_command_prints_and_keeps_a_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "MEASUREMENTS", {"made": run.Measurement(measure=made, quick={"value": 0.5})})
    assert run.main(["--out", str(tmp_path / "slow.txt")]) == 0
    assert run.main(["made", "--quick", "--out", str(tmp_path / "quick.txt")]) == 0
    printed = capsys.readouterr().out
    assert "made up" in printed and "short" in printed and "reached" in printed and "slow.json" in printed
    kept = json.loads((tmp_path / "quick.json").read_text())
    assert kept["results"] == {"made": {"value": 0.5}} and kept["lines"][0]["verdict"] == "reached" and kept["failures"] == {}
    text = (tmp_path / "slow.txt").read_text()
    assert "cores" in text and "torch" in text and "load of the machine" in text and "short" in text


def test_a_measurement_that_fails_leaves_the_others_and_is_told(monkeypatch, capsys, tmp_path):
    both = {"fails": run.Measurement(measure=fails, quick={}), "made": run.Measurement(measure=made, quick={})}
    monkeypatch.setattr(run, "MEASUREMENTS", both)
    assert run.main(["--out", str(tmp_path / "out.txt")]) == 1
    assert "fails failed: OSError: no such thing" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["failures"] == {"fails": "OSError: no such thing"}
    assert "made up" in Path(tmp_path, "out.txt").read_text()


def test_an_unknown_measurement_is_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        run.main(["lanch"])
    assert "no measurement 'lanch'; there are launch, cells" in capsys.readouterr().err


def test_a_peer_that_fails_is_told_in_its_own_words():
    with pytest.raises(RuntimeError, match="ended with code 1(.|\n)*NameError: name 'nothing' is not defined"):
        peers.run_peer(peers.python("-c", "nothing"))
