"""The memory explorer as the kernel sees it: layers, parts of the engine, rows of spans, and the static face."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from run_builders import make_memory, make_run, make_sleep, make_spans

from workbench.records import MemorySample, Span
from workbench.run import Run
from workbench.view import memory_explorer
from workbench.view.memory import asleep_stretches
from workbench.view.memory_history import MemoryHistory

MIB = 2**20


def layer(scene, name: str) -> np.ndarray:
    return np.array(scene["values"])[:, [one["name"] for one in scene["layers"]].index(name)]


def test_layers_add_up_to_what_all_processes_hold():
    run = make_run(num_ranks=2)
    scene = json.loads(json.dumps(memory_explorer(run).scene))
    total = run.memory.groupby("time_s")["pss_bytes"].sum() / MIB
    assert np.allclose(np.array(scene["values"]).sum(axis=1), total, atol=0.05) and np.allclose(scene["times"], total.index)


def test_the_engines_parts_count_while_it_is_awake_and_add_up_to_the_engine():
    reports = [replace(make_sleep(step=step), weights_bytes=200 * MIB, kv_cache_bytes=300 * MIB) for step in range(2)]
    run = Run(batches={}, spans=make_spans(num_ranks=1), memory=make_memory(num_ranks=1, engine_mib=900), sleeps=reports)
    scene = memory_explorer(run).scene
    parts = [layer(scene, name) for name in ("engine: the rest", "engine: weights", "engine: KV cache")]
    times = np.array(scene["times"])
    awake, asleep = (times > 0.5) & (times < 1.7), (times > 1.95) & (times < 2.15)
    assert [set(part[awake]) for part in parts] == [{400.0}, {200.0}, {300.0}]
    assert [set(part[asleep]) for part in parts] == [{300.0}, {0.0}, {0.0}]


def test_a_part_is_never_more_than_what_the_process_holds():
    report = replace(make_sleep(), weights_bytes=200 * MIB, kv_cache_bytes=5000 * MIB)
    run = Run(batches={}, spans=make_spans(num_ranks=1, num_steps=1), memory=make_memory(num_ranks=1, engine_mib=900), sleeps=[report])
    scene = memory_explorer(run).scene
    assert max(layer(scene, "engine: KV cache")) == 700.0 and min(layer(scene, "engine: the rest")) == 0.0


def test_without_a_sleep_nobody_told_the_parts_and_the_engine_stays_whole():
    run = Run(batches={}, spans=make_spans(num_ranks=1), memory=make_memory(num_ranks=1))
    assert [one["name"] for one in memory_explorer(run).scene["layers"]] == ["engine", "rank 0", "driver"]


def test_an_engine_kept_from_an_earlier_run_sleeps_from_the_beginning():
    spans = [Span(step=0, rank=-1, span=name, start_s=low, end_s=high) for name, low, high in (("wake_up", 1.0, 1.2), ("sleep", 3.0, 3.5))]
    timeline = Run(batches={}, spans=spans).timeline
    assert asleep_stretches(timeline, since_s=0.0, until_s=5.0) == [(0.0, 1.0), (3.5, 5.0)]
    assert asleep_stretches(timeline, since_s=1.0, until_s=5.0) == [(3.5, 5.0)]


def test_spans_lie_in_the_row_of_their_rank_on_the_same_clock():
    run = make_run(num_ranks=2)
    scene = memory_explorer(run).scene
    assert scene["rows"] == ["engine", "rank 0", "rank 1"]
    told = {(scene["rows"][row], kind, start) for row, kind, start, _ in scene["spans"]}
    wanted = run.timeline[run.timeline["span"] != "mark"]
    assert told == {
        ("engine" if r < 0 else f"rank {r}", k, round(s, 3)) for r, k, s in wanted[["rank", "span", "start_s"]].itertuples(index=False)
    }
    assert scene["steps"][0][0] == 0 and scene["steps"][0][1] <= scene["steps"][0][2] <= scene["steps"][1][2]
    assert [name for _, name in scene["events"]] == ["after training"]


def test_the_sleep_report_stands_beside_it():
    run = make_run(num_ranks=2)
    rows = memory_explorer(run).scene["sleeps"]
    assert len(rows) == len(run.sleep_report) > 0 and rows[0]["engine"] == "own process"
    assert [row["wake, s"] for row in rows] == ["asleep" if np.isnan(s) else f"{s:.3f}" for s in run.sleep_report["wake_s"]]


def test_memory_on_gpus_is_a_line_of_its_own():
    memory = [replace(one, device_used_bytes=512 * MIB if one.process == "engine" else 0) for one in make_memory(num_ranks=1)]
    scene = memory_explorer(Run(batches={}, memory=memory)).scene
    assert set(scene["device"]) == {512.0} and len(scene["device"]) == len(scene["times"])
    assert MemoryHistory(start_s=0.0).add(memory)[0][2] == 512.0


def test_a_long_run_becomes_a_message_of_bounded_size():
    held: dict[str, Any] = dict(rss_bytes=MIB, pss_bytes=MIB, device_used_bytes=0, phase="")
    memory = [MemorySample(time_s=i / 10, rank=-1, pid=1, process="driver", **held) for i in range(20_000)]
    scene = memory_explorer(Run(batches={}, memory=memory)).scene
    assert len(scene["times"]) <= 1500 and len(json.dumps(scene)) < 100_000


@pytest.mark.parametrize(
    "run, text", [(make_run(num_ranks=2), "while the engine sleeps"), (Run(batches={}), "no memory samples to show")], ids=["run", "empty"]
)
def test_it_has_a_static_picture(run, text):
    data, metadata = memory_explorer(run)._repr_mimebundle_()
    assert metadata["image/png"]["width"] == 640
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG") and text in data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in data
