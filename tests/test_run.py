"""Run: its tables, its folder and the runs that are kept."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_builders import MIB, make_batch, make_memory, make_run, make_sleep, make_spans

import workbench as wb
from workbench.records import Prompt, RolloutBatch, Span
from workbench.run import Run
from workbench.store.folder import save_run
from workbench.store.kept import keep_run

FRAMES = ("completions", "lengths", "timeline", "memory", "sleep_report")


def assert_equal_batches(a: RolloutBatch, b: RolloutBatch) -> None:
    for field in dataclasses.fields(RolloutBatch):
        one, two = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == two.dtype, field.name
            np.testing.assert_array_equal(one, two, err_msg=field.name)
        else:
            assert one == two, field.name


# Tables


def test_completions_stand_in_the_order_of_the_prompts_of_each_rank():
    late = make_batch(rank=1, prompts=["c", "d"], lengths=[[2, 1], [5]], version=3)
    early = make_batch(rank=0, prompts=["a", "b"], lengths=[[], [4]])
    table = Run(batches={1: {0: early}, 0: {1: late, 0: early}}).completions
    rows = list(zip(table.step, table.origin_rank, table.prompt_index, table.sample_index, table.prompt, table.length_tokens, strict=True))
    assert rows == [(0, 0, 1, 0, "b", 4), (0, 1, 0, 0, "c", 2), (0, 1, 0, 1, "c", 1), (0, 1, 1, 0, "d", 5), (1, 0, 1, 0, "b", 4)]
    assert table.text.tolist()[1] == "text 1.0 ünï" and table.weight_version.tolist() == [0, 3, 3, 3, 0]


def test_logprobs_are_summed_per_completion_and_a_missing_one_is_nan_there_only():
    batch = make_batch(prompts=["a"], lengths=[[3, 2, 1]])
    assert batch.logprobs is not None
    batch.logprobs[4] = np.nan
    sums = Run(batches={0: {0: batch}}).completions.sum_logprob
    assert sums[0] == pytest.approx(float(batch.logprobs[:3].astype(float).sum())) and math.isnan(sums[1])
    assert sums[2] == pytest.approx(float(batch.logprobs[5]))


def test_without_logprobs_the_sums_are_nan():
    assert Run(batches={0: {0: make_batch(with_logprobs=False)}}).completions.sum_logprob.isna().all()


def test_a_failed_completion_is_a_row_with_its_error_and_counts_in_no_length():
    run = Run(batches={0: {0: make_batch(prompts=["a", "b"], lengths=[[3], [4]], failed=[1])}})
    assert run.completions.finish_reason.tolist() == ["stop", "error"] and run.completions.error.tolist()[1] == "prompt too long"
    assert run.completions.error.isna().tolist() == [True, False]
    assert run.lengths.length_tokens.tolist() == [3] and math.isnan(run.completions.sum_logprob[1])
    assert (run.summary.num_failed, run.summary.num_completions, run.truncated_share) == (1, 2, 0.0)


def test_prompts_of_every_kind_are_shown_as_text_with_their_images():
    prompts: list[Prompt] = [
        "plain",
        [5, 6],
        {"prompt": "look <image>", "images": [b"1", b"2"]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]},
    ]
    table = Run(batches={0: {0: make_batch(prompts=prompts, lengths=[[1]] * 4)}}).completions
    assert table.prompt.tolist()[:3] == ["plain", "[5, 6]", "look <image>"] and '"text": "hi"' in table.prompt[3]
    assert table.num_images.tolist() == [0, 0, 2, 1]


def test_an_empty_run_has_every_column_with_its_dtype():
    empty, full = Run(batches={}), make_run()
    for name in FRAMES:
        assert len(getattr(empty, name)) == 0
        pd.testing.assert_series_equal(getattr(empty, name).dtypes, getattr(full, name).dtypes)
    assert repr(empty) == "Run(0 steps, 0 ranks, 0 completions, 0 tokens)"


def test_times_count_from_the_start_of_the_run():
    run = make_run(start_s=1000.0)
    assert run.timeline.start_s.min() == 0.0 and run.timeline.end_s.max() == pytest.approx(4.1)
    assert run.memory.time_s.min() == 0.0 and run.memory.time_s.max() == pytest.approx(4.1)


def test_a_phase_that_nobody_told_is_read_from_the_spans_of_the_same_rank():
    samples = [replace(s, phase="") for s in make_memory(num_ranks=1, start_s=50.0)]
    table = Run(batches={}, spans=make_spans(num_ranks=1, start_s=50.0), memory=samples, start_s=50.0).memory
    at = {name: group.set_index(group.time_s.round(1)).phase for name, group in table.groupby("process")}
    assert at["engine"][[0.1, 0.5, 1.8, 2.0, 2.3]].tolist() == ["wake_up", "generate", "sleep", "asleep", "wake_up"]
    assert at["rank"][[0.1, 0.3, 0.5]].tolist() == ["", "gather", ""] and set(at["driver"]) == {""}
    assert set(make_run().memory.phase) == {"generate", "asleep"}  # what was told stays


def test_marks_are_in_the_timeline_with_their_labels():
    run = make_run()
    assert run.timeline[run.timeline.span == "mark"].label.tolist() == ["after training"]
    assert [mark.label for mark in run.marks] == ["after training"]


def test_speed_counts_the_seconds_in_which_the_engine_generates():
    run = Run(batches={0: {0: make_batch(lengths=[[60]])}}, spans=make_spans(num_ranks=1, num_steps=1))
    assert run.tokens_per_s == pytest.approx(60 / 1.25)
    ranks = [Span(step=0, rank=r, span="generate", start_s=r, end_s=r + 2.0) for r in range(2)]  # ranks with engines of their own overlap
    assert Run(batches=run.batches, spans=ranks).tokens_per_s == pytest.approx(60 / 3.0)
    assert math.isnan(Run(batches=run.batches).tokens_per_s)


def test_a_run_says_itself_in_one_line():
    batches = {0: {0: make_batch(prompts=["a"], lengths=[[60, 64]]), 1: make_batch(rank=1, lengths=[[1]], failed=[0])}}
    run = Run(batches=batches, spans=make_spans(num_ranks=2, num_steps=1))
    assert repr(run) == "Run(1 step, 2 ranks, 3 completions, 1 failed, 124 tokens, 99 tokens/s, 50% cut)"


def test_batch_gives_the_last_step_unless_told():
    run = make_run(num_ranks=4, num_steps=2)
    assert run.batch(3) is run.batches[1][3] and run.batch(3, step=0) is run.batches[0][3] is run.batch(3, step=-2)


@pytest.mark.parametrize(
    "arguments, told", [((9, -1), "step 1 has ranks 0, 1, 2, 3"), ((0, 7), "it has steps 0, 1"), ((0, -3), "it has steps 0, 1")]
)
def test_a_batch_that_is_not_there_is_told(arguments, told):
    with pytest.raises(ValueError, match=told):
        make_run().batch(*arguments)


# Folders


def awkward_run() -> Run:
    """Everything that could get lost on the way: no logprobs, errors, dict prompts, metadata, ranks without prompts, NaN, long offsets."""
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    metadata = (("t", 1.5), {1: b"x"}, np.float32(0.1))
    batches = {
        0: {
            0: make_batch(prompts=[], lengths=[]),
            1: make_batch(rank=1, prompts=["ünï\n\0", [1, 2], "none"], lengths=[[3, 0], [5], []], metadata=metadata),
            3: make_batch(rank=3, prompts=[{"prompt": "p", "images": [image]}], lengths=[[7, 2]], with_logprobs=False, failed=[1]),
        },
        4: {1: make_batch(rank=1, prompts=["z"], lengths=[[64]], version=2)},
    }
    return Run(
        batches=batches,
        spans=make_spans(num_ranks=3, start_s=77.25),
        memory=make_memory(num_ranks=3, start_s=77.25),
        sleeps=[make_sleep(), make_sleep(step=1, wake_s=float("nan"))],
        manifest={"model": "tiny", "mode": "rooted", "layout": {"tp": 2}, "sampling": wb.Sampling(stop=("a",)), "seeds": (1, 2)},
        start_s=77.25,
    )


@pytest.mark.parametrize("make", [make_run, awkward_run, lambda: Run(batches={})], ids=["plain", "awkward", "empty"])
def test_a_saved_run_comes_back_exactly(tmp_path, make):
    run = make()
    run.save(tmp_path / "runs" / "one")
    again = wb.load_run(tmp_path / "runs" / "one")
    for name in FRAMES:
        pd.testing.assert_frame_equal(getattr(again, name), getattr(run, name), check_exact=True)
    assert again.manifest == run.manifest and repr(again) == repr(run)
    assert {s: list(of_rank) for s, of_rank in again.batches.items()} == {s: list(of_rank) for s, of_rank in run.batches.items()}
    assert os.listdir(tmp_path / "runs") == ["one"]


def test_tokens_logprobs_prompts_and_metadata_come_back_exactly(tmp_path):
    run = awkward_run()
    run.save(tmp_path / "run")
    again = wb.load_run(tmp_path / "run")
    for step, rank in ((0, 0), (0, 1), (4, 1)):
        assert_equal_batches(run.batch(rank, step), again.batch(rank, step))
    before, after = run.batch(3, 0), again.batch(3, 0)
    (one,), (two,) = before.prompts, after.prompts
    assert isinstance(one, dict) and isinstance(two, dict)
    np.testing.assert_array_equal(one["images"][0], two["images"][0])
    assert after.logprobs is None and after.errors == (None, "prompt too long")
    assert isinstance(again.batch(1, 0).metadata[2], np.float32)


def test_images_come_back_and_what_has_no_form_on_disk_comes_back_as_its_text(tmp_path):
    from PIL import Image

    image = Image.new("RGB", (3, 2), (10, 20, 30))
    batch = make_batch(prompts=[{"prompt": "p", "images": [image]}], lengths=[[1]], metadata=(slice(1, 2),))
    Run(batches={0: {0: batch}}).save(tmp_path / "run")
    again = wb.load_run(tmp_path / "run").batch(0)
    assert again.prompts[0]["images"][0].tobytes() == image.tobytes() and again.metadata == ("slice(1, 2, None)",)


def test_any_program_can_read_the_tables(tmp_path):
    make_run().save(tmp_path / "run")
    table = pd.read_parquet(tmp_path / "run" / "completions.parquet")
    assert len(table) == len(make_run().completions) and {"text", "tokens", "logprobs", "origin_ranks"} <= set(table)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["run"]["sampling"] == {"n": 4, "stop": ["\n"]} and manifest["summary"]["num_completions"] == len(table)


def test_saving_again_replaces_the_run(tmp_path):
    make_run().save(tmp_path / "run")
    make_run(num_ranks=1).save(tmp_path / "run")
    assert wb.load_run(tmp_path / "run").summary.num_ranks == 1 and os.listdir(tmp_path) == ["run"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    make_run().save(tmp_path / "run")
    assert len(wb.load_run(tmp_path / "run").completions)


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(wb.RunError) as caught:
        make_run().save(tmp_path)
    assert f"the folder {tmp_path} holds something else\nseen: thesis.tex; needed: a new or empty folder" in str(caught.value)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(wb.RunError, match="thesis.tex is a file"):
        make_run().save(tmp_path / "thesis.tex")


def test_a_run_with_something_else_beside_it_is_not_replaced(tmp_path):
    make_run().save(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(wb.RunError, match="holds something else"):
        make_run().save(tmp_path / "run")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_save_that_fails_leaves_nothing_and_keeps_the_earlier_run(tmp_path, monkeypatch):
    import pyarrow.parquet

    make_run(num_ranks=1).save(tmp_path / "run")
    monkeypatch.setattr(pyarrow.parquet, "write_table", full_disk)
    with pytest.raises(wb.RunError, match="No space left on device\nnothing was left there\nfree space, or choose another folder"):
        make_run().save(tmp_path / "run")
    assert os.listdir(tmp_path) == ["run"] and wb.load_run(tmp_path / "run").summary.num_ranks == 1


def full_disk(*arguments: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


def flip_a_byte(folder: Path) -> None:
    path = folder / "completions.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "harm, told",
    [
        (flip_a_byte, "is damaged: completions.parquet was changed after it was written\nseen: sha256 "),
        (lambda f: (f / "memory.parquet").unlink(), "is damaged: memory.parquet missing\nneeded: batches.parquet, "),
        (lambda f: (f / "manifest.json").write_text("{half"), "is damaged: manifest.json is no JSON"),
        (lambda f: edit_manifest(f, run={}), "is damaged: manifest.json was changed after it was written\ntake another copy"),
        (lambda f: edit_manifest(f, format_version=2, workbench="9.9"), "is of a newer format\nseen: format 2, written by workbench 9.9"),
        (lambda f: edit_manifest(f, format="npm"), "its manifest.json is another program's\nseen: format 'npm'; needed: 'workbench-run'"),
        (lambda f: (f / "manifest.json").unlink(), "it has no manifest.json\nseen: batches.parquet, completions.parquet, memory.parquet"),
        (shutil.rmtree, "there is no such folder\ngive the folder that run.save(folder) wrote; wb.runs() lists"),
    ],
)
def test_a_folder_that_cannot_be_trusted_is_told(tmp_path, harm, told):
    make_run().save(tmp_path / "run")
    harm(tmp_path / "run")
    with pytest.raises(wb.RunError) as caught:
        wb.load_run(tmp_path / "run")
    assert told in str(caught.value) and str(tmp_path / "run") in str(caught.value)


# Runs that are kept


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    return tmp_path


def test_there_are_no_runs_at_first(home):
    assert list(wb.runs().columns) == ["started_at", "model", "mode", "num_completions", "path"] and wb.runs().empty


def test_the_last_20_runs_are_kept_newest_first(home):
    for num_ranks in range(1, 23):
        keep_run(Run(batches={0: {r: make_batch(rank=r) for r in range(num_ranks)}}, manifest={"model": "tiny", "mode": "rooted"})).join()
    table = wb.runs()
    assert table.num_completions.tolist() == list(range(22, 2, -1)) and len(os.listdir(home / "runs")) == 20
    assert set(table.model) == {"tiny"} and str(table.started_at.dt.tz) == "UTC"
    assert wb.load_run(table.path[0]).summary.num_ranks == 22
    assert (home / "runs").stat().st_mode & 0o077 == 0


def test_what_a_killed_driver_left_half_written_is_cleared_away_later(home):
    for name, age_s in (("old", 7200), ("fresh", 60)):
        half = home / "runs" / f".{name}"
        half.mkdir(parents=True)
        os.utime(half, (time.time() - age_s,) * 2)
    keep_run(make_run()).join()
    assert not (home / "runs" / ".old").exists() and (home / "runs" / ".fresh").exists() and len(wb.runs()) == 1


def test_a_run_that_is_just_being_kept_is_listed(home):
    keep_run(make_run())
    assert len(wb.runs()) == 1


def test_a_run_that_cannot_be_kept_is_told_and_nothing_breaks(home, capsys):
    (home / "runs").write_text("in the way")
    keep_run(make_run()).join()
    assert f"this run was not kept in {home / 'runs'}" in capsys.readouterr().err


def test_foreign_folders_among_the_kept_runs_are_passed_over(home):
    (home / "runs" / "1-broken").mkdir(parents=True)
    (home / "runs" / "1-broken" / "manifest.json").write_text("[]")
    keep_run(make_run()).join()
    assert len(wb.runs()) == 1


def test_keeping_a_small_run_costs_the_caller_little(home):
    run = make_run()
    save_run(run, home / "warm")  # what is imported once is not the run's cost
    began_s = time.perf_counter()
    keep_run(run).join()
    assert time.perf_counter() - began_s < 0.5  # 0.02 s measured alone; the limit leaves room for a busy machine


def test_memory_is_in_bytes():
    assert make_run().memory.pss_bytes.max() == 900 * MIB
