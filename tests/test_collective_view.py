"""Traces of collectives as pictures and as the widget that steps through them."""

from __future__ import annotations

import base64
import itertools
import json
import re
from dataclasses import asdict
from typing import Any

import pytest
from javascript import evaluate
from matplotlib.collections import PatchCollection
from matplotlib.patches import FancyArrowPatch
from overlaps import check_texts
from run_builders import make_run

import workbench as wb
from workbench.plan.schedule import COLLECTIVES, Move, schedule_of
from workbench.records import CollectiveStep, CollectiveTrace, Held, Transfer
from workbench.run import Run
from workbench.view.collective import _kinds, _lanes, held_text, plot_collective
from workbench.view.rollout_trace import rollout_trace
from workbench.view.trace_collective import trace_collective

EVERY_OP = pytest.mark.parametrize("op", COLLECTIVES)


def make_trace(op: str, size: int, *, difference: float = 0.0) -> CollectiveTrace:
    """A trace as ranks would give it: a sum of 10, 20, ... for each part, moved as the schedule says."""
    schedule = schedule_of(op, size)
    held: list[list[Held]] = [
        [(10 * (place + 1) + part,) if part in before else None for part in range(schedule.num_parts)]
        for place, before in enumerate(schedule.before)
    ]
    steps = [_step("before: what each rank gives", (), held)]
    for step in schedule.steps:
        now = [list(row) for row in held]
        transfers = []
        for move in step.moves:
            came, own = held[move.source][move.part], held[move.target][move.part]
            both = (own[0] + came[0],) if move.is_reduced and isinstance(own, tuple) and isinstance(came, tuple) else came
            now[move.target][move.part] = both
            transfers.append(_transfer(move, came))
        held = now
        steps.append(_step(step.title, tuple(transfers), held))
    steps.append(_step("after: what each rank has", (), held))
    return CollectiveTrace(
        op=op,
        members=tuple(f"rank {place}" for place in range(size)),
        parts=tuple(f"part {part}" for part in range(schedule.num_parts)),
        steps=tuple(steps),
        results=schedule.after,
        dtype="int64",
        max_difference=difference,
    )


def _step(title: str, transfers: tuple[Transfer, ...], held: list[list[Held]]) -> CollectiveStep:
    return CollectiveStep(title=title, transfers=transfers, held=tuple(map(tuple, held)))


def _transfer(move: Move, carried: Held) -> Transfer:
    times = dict(start_s=0.0, end_s=0.1)
    return Transfer(
        source=move.source, target=move.target, part=move.part, carried=carried, num_bytes=8, is_reduced=move.is_reduced, **times
    )


def words(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


# The strip


@EVERY_OP
def test_a_strip_has_a_panel_a_step_an_arrow_a_message_and_every_value(op):
    trace = make_trace(op, 4)
    ax = plot_collective(trace)
    titles = [text for text in words(ax) if re.match(r"\d+  ", text)]
    assert [int(title.split()[0]) for title in titles] == list(range(len(trace.steps)))
    assert sum(isinstance(patch, FancyArrowPatch) for patch in ax.patches) == len(trace.transfers)
    shown = [held_text(held, max_letters=9) for step in trace.steps for row in step.held for held in row if held is not None]
    assert sorted(text for text in words(ax) if text.isdigit()) == sorted(shown)


def test_cells_are_drawn_once_each_in_the_colour_of_what_they_do():
    trace = make_trace("all_reduce", 4)
    ax = plot_collective(trace, step=1)
    drawn = {c.get_linewidth()[0]: len(c.get_paths()) for c in ax.collections if isinstance(c, PatchCollection)}  # type: ignore[index]
    assert sum(len(c.get_paths()) for c in ax.collections) == 16 and drawn[1.6] == 4  # those that have just got something
    assert set(_kinds(trace, 7).values()) == {"result"} and len(plot_collective(trace, step=7).collections) == 1


@pytest.mark.parametrize("op, size", [*itertools.product(COLLECTIVES, [2, 4, 8]), ("all_gather", 6), ("all_reduce", 16)])
def test_no_two_texts_overlap_and_none_is_cut_off(op, size):
    ax = plot_collective(make_trace(op, size))
    for scale in (1, 2):
        check_texts(ax, scale=scale, least=10)


@pytest.mark.parametrize("step", [0, 3])
def test_one_step_of_many_ranks_has_its_values(step):
    ax = plot_collective(make_trace("all_reduce", 16), step=step)
    check_texts(ax, least=16 * 16)


def test_the_middle_of_many_steps_is_left_out_and_said():
    ax = plot_collective(make_trace("all_reduce", 16))
    title = ax.get_title(loc="left").replace("\n", " ")
    assert title == "all_reduce on 16 ranks: 30 steps, 480 messages, 3,840 bytes; equal to torch's (20 steps in the middle not drawn)"


def test_a_result_that_differs_is_said():
    title = plot_collective(make_trace("scatter", 2, difference=2.5)).get_title(loc="left").replace("\n", " ")
    assert title == "scatter on 2 ranks: 1 step, 1 message, 8 bytes; differs from torch's by up to 2.5"


def test_a_step_that_is_not_there_is_refused():
    text = "plot_collective(step=9): the trace has no such step\nits steps are 0..7"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        plot_collective(make_trace("all_reduce", 4), step=9)


# The rooted rollout


def test_a_rooted_run_is_told_as_gather_generate_scatter():
    run = make_run(num_ranks=4)
    trace = rollout_trace(run)
    assert [step.title.partition(":")[0] for step in trace.steps] == ["before", "gather", "generate", "generate", "scatter", "after"]
    assert trace.members[-1] == "engine" and trace.steps[1].held[0] == ("0\nprompts", "1\nprompt", "2\nprompts", "3\nprompts")
    made = trace.steps[-1].held
    assert [made[rank][rank] for rank in range(4)] == [
        f"{len(b)} texts\n{b.tokens.size:,} tok" for b in (run.batch(rank) for rank in range(4))
    ]
    counted = run.timeline[run.timeline.span.isin(["gather", "scatter"]) & (run.timeline["step"] == 1) & (run.timeline["rank"] > 0)]
    assert sum(t.num_bytes for t in trace.transfers) == counted.num_bytes.sum() > 0


@pytest.mark.parametrize("num_ranks", [1, 4, 12])
def test_texts_of_a_rollout_do_not_overlap(num_ranks):
    check_texts(plot_collective(rollout_trace(make_run(num_ranks=num_ranks))), least=8)


@pytest.mark.parametrize(
    "run, step, text",
    [
        (Run(batches={}, manifest={"mode": "grouped"}), -1, "the run was made in mode 'grouped', where nothing goes to a root and back"),
        (make_run(), 7, "the run has no step 7\nit has 2: 0, 1"),
        (Run(batches={}, manifest={"mode": "rooted"}), -1, "the run has no step -1\nit has 0: none"),
    ],
)
def test_other_runs_and_steps_are_refused(run, step, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        rollout_trace(run, step)


# The widget


def test_a_saved_notebook_shows_the_strip_and_words():
    data, metadata = wb.view.trace_collective(make_trace("gather", 4))._repr_mimebundle_()
    assert 300 < metadata["image/png"]["width"] < 1300
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG") and "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"] == "gather on 4 ranks: 3 steps, 3 messages, 24 bytes; equal to torch's"


def test_a_cluster_is_asked_to_trace_and_a_run_is_read():
    class Cluster:
        def trace_collective(self, op: str, inputs: Any = None, **options: Any) -> CollectiveTrace:
            assert (op, inputs, options) == ("scatter", [[1, 2], None], {"root": 0})
            return make_trace(op, 2)

    assert trace_collective(Cluster(), "scatter", [[1, 2], None], root=0).trace == make_trace("scatter", 2)
    assert trace_collective(make_run(), step=0).trace == rollout_trace(make_run(), 0)


def test_what_has_nothing_to_trace_is_refused():
    text = "trace_collective(int): nothing to trace there\nneeded: a cluster, a run in rooted mode, or a trace\npass what wb.launch"
    with pytest.raises(ValueError, match=re.escape(text)):
        trace_collective(3)  # type: ignore[arg-type]


def test_a_step_can_be_set_from_python_within_the_trace():
    explorer = trace_collective(make_trace("all_reduce", 4))
    explorer.step = 7
    with pytest.raises(ValueError, match=r"step 8 is outside the trace\nits steps are 0\.\.7"):
        explorer.step = 8
    assert explorer.step == 7


@pytest.mark.parametrize("op, size", [("all_reduce", 4), ("broadcast", 8), ("gather", 5)])
def test_the_page_draws_what_the_figure_draws(op, size):
    trace = make_trace(op, size)
    scene = json.loads(json.dumps(asdict(trace)))
    kinds, lanes = evaluate(
        "trace_collective.js",
        "[scene.steps.map((_, i) => m.kindsOf(scene, i)), scene.steps.map((s) => m.lanesOf(s.transfers))]",
        scene=scene,
    )
    for number, step in enumerate(trace.steps):
        assert {(i, j): kind for i, row in enumerate(kinds[number]) for j, kind in enumerate(row)} == _kinds(trace, number)
        assert dict(enumerate(lanes[number])) == _lanes(step)


def test_the_page_says_messages_in_words():
    scene = json.loads(json.dumps(asdict(make_trace("all_reduce", 2))))
    assert evaluate("trace_collective.js", "[1, 2].map((i) => m.inWords(scene, i, scene.steps[i].transfers[0]))", scene=scene) == [
        "rank 0 sends part 1 (11) to rank 1, which has 21: together 32",
        "rank 0 sends part 0 (30) to rank 1",
    ]
    texts = [(10, 11), (1.23456, 2, 3), "2\nprompts", None]
    assert evaluate("trace_collective.js", "texts.map((t) => m.heldText(t, 8))", texts=texts) == [
        held_text(t, max_letters=8) for t in texts
    ]
