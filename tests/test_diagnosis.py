"""Who waits for whom, and why: circles over several groups, every cause, from wherever one asks; legal programs raise no alarm."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from IPython.lib.pretty import pretty

import workbench as wb
from workbench.ranks.cluster import Cluster
from workbench.ranks.outside import ProcessLook, find_py_spy, look_at
from workbench.records import Diagnosis

NUM_RANKS = 4


SETUP = """
import threading, time
from torch.ops import _c10d_functional as functional  # as torch.distributed._functional_collectives calls it, without the slow import
a, b = dist.new_group([0, 1], group_desc='a'), dist.new_group([0, 1], group_desc='b')
trio = dist.new_group([0, 1, 2], group_desc='trio')
x = torch.ones(1)
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Four ranks with groups; after the test the world must work."""
    with wb.launch(NUM_RANKS) as made:
        made.execute(SETUP)
        yield made
        result = made.execute("t = torch.ones(1); dist.all_reduce(t); t.item()", timeout_s=20)
        assert {output.result_text for output in result.values()} == {"4.0"}


def told(cluster: Cluster, source: str, *, within_s: float = 1.5) -> wb.RankDeadlock:
    started = time.monotonic()
    with pytest.raises(wb.RankDeadlock) as caught:
        cluster.execute(source, timeout_s=20)
    assert time.monotonic() - started < within_s
    return caught.value


# -- circles ----------------------------------------------------------------------------------------------------------------------------

TWO_GROUPS = "dist.all_reduce(x, group=a) if rank == 0 else dist.all_reduce(x, group=b) if rank == 1 else None"
CIRCLES = {
    TWO_GROUPS: "ranks 0 and 1 wait for each other: rank 0 in all_reduce #1 of group 'a' (line 1) for rank 1, "
    "rank 1 in all_reduce #1 of group 'b' (line 1) for rank 0",
    "if rank < 2: dist.recv(x, 1 - rank)": "ranks 0 and 1 wait for each other: rank 0 in recv #",
    "if rank < 2: dist.irecv(x, 1 - rank).wait()": "ranks 0 and 1 wait for each other: rank 0 in recv #",
    "if rank < 2: dist.send(x, 1 - rank)": "ranks 0 and 1 wait for each other: rank 0 in send #",
    "dist.recv(x, (rank + 1) % 4)": "ranks 0, 1, 2, 3 wait in a circle: rank 0 in recv #",
    "if rank < 2: dist.recv(x)\nif rank == 2: dist.recv(x, 0)\nif rank == 3: dist.recv(x, 1)": "; ranks 2, 3 wait behind them",
    "dist.recv(x, 3 - rank) if rank in (1, 2) else dist.barrier()": "; ranks 0, 3 wait behind them",
    "if rank == 0: dist.all_reduce(x, group=a)\nif rank == 1: dist.recv(x, 2)\nif rank == 2: dist.barrier(group=trio)": (
        "ranks 1 and 2 wait for each other: rank 1 in recv #1 of group '2 to 1 in world' (line 2) for rank 2, "
        "rank 2 in barrier #1 of group 'trio' (line 3) for rank 1; rank 0 waits behind them"
    ),
    "if rank == 0: dist.all_reduce(x, group=a, async_op=True).wait()\nif rank == 1: dist.all_reduce(x, group=b, async_op=True).wait()": (
        "rank 1 in all_reduce #1 of group 'b' (line 2) for rank 0"
    ),
    "if rank < 2: y = functional.wait_tensor(functional.all_reduce(x, 'sum', (a if rank == 0 else b).group_name))": (
        "ranks 0 and 1 wait for each other: rank 0 in all_reduce #1 of group 'a' (line 1) for rank 1"
    ),
}


@pytest.mark.parametrize("source, sentence", CIRCLES.items(), ids=range(len(CIRCLES)))
def test_ranks_that_wait_in_a_circle_are_told_at_once(cluster, source, sentence):
    error = told(cluster, source)
    first, needed, *_ = str(error).splitlines()
    assert first.startswith("cell 2 could never end: ranks ") and sentence in first
    assert needed.startswith("ranks must come to the collectives and messages that they share in one order; all ranks were freed")
    assert error.diagnosis is not None and len(error.diagnosis.circle) >= 2 and error.diagnosis.is_certain_deadlock


def test_a_functional_collective_that_a_rank_never_reaches_is_told(cluster):
    error = told(cluster, "if rank != 2: y = functional.wait_tensor(functional.all_reduce(x, 'sum', dist.group.WORLD.group_name))")
    assert "ranks 0, 1, 3 wait in all_reduce (line 1); rank 2 finished the cell without it" in str(error)


def test_a_wait_with_a_limit_of_its_own_ends_by_itself(cluster):
    result = cluster.execute(
        "from datetime import timedelta\ntext = ''\n"
        "if rank == 0:\n    try: dist.all_reduce(x, async_op=True).wait(timedelta(seconds=1))\n"
        "    except RuntimeError as error: text = str(error)\n'imed out' in text",
        timeout_s=20,
    )
    assert result[0].result_text == "True"
    cluster.restart()  # what rank 0 has begun the others never will


def test_a_thread_that_may_still_come_is_no_deadlock(cluster):
    cell = (
        "def later(group):\n    time.sleep(0.6)\n    dist.all_reduce(torch.ones(1), group=group)\n"
        "if rank < 2:\n    other = threading.Thread(target=later, args=(b if rank == 0 else a,)); other.start()\n"
        "    dist.all_reduce(x, group=a if rank == 0 else b); other.join()"
    )
    cluster.execute(cell, timeout_s=20)


# -- random programs --------------------------------------------------------------------------------------------------------------------

GROUPS = {"a": (0, 1), "b": (0, 1), "trio": (0, 1, 2), "dist.group.WORLD": (0, 1, 2, 3)}


@dataclass(frozen=True, slots=True)
class Step:
    """A call of one rank: a collective of `group`, or a message to or from `peer`."""

    group: str = ""
    peer: int = -1
    is_send: bool = False

    def source(self) -> str:
        if self.group:
            return f"dist.all_reduce(torch.ones(1), group={self.group})"
        return f"dist.{'send' if self.is_send else 'recv'}(torch.ones(1), {self.peer})"


def random_program(draw: random.Random, *, num_swaps: int) -> list[list[Step]]:
    """Steps of each rank, legal as drawn; swapping neighbours on some ranks may make a deadlock of it, or not."""
    program: list[list[Step]] = [[] for _ in range(NUM_RANKS)]
    for _ in range(draw.randrange(6, 14)):
        if draw.random() < 0.6:
            group = draw.choice(list(GROUPS))
            for rank in GROUPS[group]:
                program[rank].append(Step(group=group))
        else:
            source, target = draw.sample(range(NUM_RANKS), 2)
            program[source].append(Step(peer=target, is_send=True))
            program[target].append(Step(peer=source))
    for _ in range(num_swaps):
        steps = program[draw.randrange(NUM_RANKS)]
        if len(steps) > 1:
            at = draw.randrange(len(steps) - 1)
            steps[at], steps[at + 1] = steps[at + 1], steps[at]
    return program


def ends(program: list[list[Step]]) -> bool:
    """Whether a program ends, by playing it: a call returns once all whom it needs have begun theirs."""
    begun = [Counter[tuple[object, ...]]() for _ in program]

    def channel(rank: int, step: Step) -> tuple[object, ...]:
        return (step.group,) if step.group else (rank, step.peer) if step.is_send else (step.peer, rank)

    def needed(rank: int, step: Step) -> tuple[int, ...]:
        return GROUPS[step.group] if step.group else (step.peer,)

    at = [0] * len(program)
    for rank, steps in enumerate(program):
        if steps:
            begun[rank][channel(rank, steps[0])] += 1
    is_moving = True
    while is_moving:
        is_moving = False
        for rank, steps in enumerate(program):
            while at[rank] < len(steps):
                key = channel(rank, steps[at[rank]])
                if any(begun[other][key] < begun[rank][key] for other in needed(rank, steps[at[rank]])):
                    break
                at[rank] += 1
                is_moving = True
                if at[rank] < len(steps):
                    begun[rank][channel(rank, steps[at[rank]])] += 1
    return all(place == len(steps) for place, steps in zip(at, program, strict=True))


def source_of(program: list[list[Step]], seed: int) -> str:
    calls = [[f"lambda: {step.source()}" for step in steps] for steps in program]
    lists = ", ".join(f"[{', '.join(steps)}]" for steps in calls)
    loop = f"for call in [{lists}][rank]:\n    time.sleep(draw.random() * 0.01)\n    call()"
    return f"import random\ndraw = random.Random({seed} + rank)\n{loop}"


@pytest.mark.parametrize("check_collectives", [True, False])
def test_random_programs_are_called_deadlocks_exactly_when_they_are(check_collectives):
    draw = random.Random(5 + check_collectives)
    expected, found = [], []
    with wb.launch(NUM_RANKS, check_collectives=check_collectives) as cluster:
        cluster.execute(SETUP)
        for number in range(16):
            program = random_program(draw, num_swaps=draw.choice((0, 2, 4)))
            expected.append(ends(program))
            generation = cluster.generation
            try:
                cluster.execute(source_of(program, number), timeout_s=20)
                found.append(True)
            except wb.RankDeadlock:
                found.append(False)
            if cluster.generation != generation:
                cluster.execute(SETUP)
    assert found == expected and 3 < sum(expected) < 13  # both kinds were drawn


def test_legal_programs_under_load_raise_no_alarm(cluster):
    """Many short waits in many groups, in changing order of arrival, with cores taken away: none of them may look like a circle."""
    program = [step for number in range(12) for step in [random_program(random.Random(number), num_swaps=0)]]
    joined = [[step for one in program for step in one[rank]] for rank in range(NUM_RANKS)]
    assert ends(joined)
    stop = time.monotonic() + 3
    burners = [threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(lambda: time.monotonic() < stop, False)]) for _ in range(2)]
    for burner in burners:
        burner.start()
    for seed in range(4):
        cluster.execute(source_of(joined, seed), timeout_s=60)
    for burner in burners:
        burner.join()


# -- causes -----------------------------------------------------------------------------------------------------------------------------


def while_it_runs(cluster: Cluster, source: str, *, after_s: float = 0.5, native: bool | None = None) -> Diagnosis:
    """The diagnosis of a cell that hangs, taken while it does."""
    handle = cluster.execute(source, block=False)
    time.sleep(after_s)
    try:
        assert not handle.done()
        return cluster.diagnose(native=native)
    finally:
        cluster.interrupt()
        with pytest.raises(wb.RankInterrupted):
            handle.result(timeout_s=15)


def test_computing_and_sleeping_are_told_apart_with_their_stacks(cluster):
    cell = "def busy():\n    while True: pass\nif rank == 1: busy()\nif rank == 2: time.sleep(60)\ndist.barrier()"
    found = while_it_runs(cluster, cell)
    assert sorted(found.waiting) == [0, 3] and sorted(found.missing) == [1, 2]
    assert found.missing[1].cause == "is computing" and found.missing[1].where == "line 2: while True: pass"
    assert 'File "<cell 2>", line 3, in <module>' in found.missing[1].stack and "in busy" in found.missing[1].stack
    assert "workbench" not in found.missing[1].stack and found.missing[1].cell == 2
    assert found.missing[2].cause == "sleeps, or waits for something that is no collective"
    assert "rank 1 is computing: line 2: while True: pass\n    Python stack:\n" in found.text
    assert found.sentence.startswith(
        "ranks 0, 3 wait in barrier (line 5); rank 1 is computing, line 2: while True: pass; rank 2 sleeps, or"
    )
    assert pretty(found) == found.text
    page = found._repr_html_()
    assert "<details><summary>Python stack</summary>" in page and "&lt;cell 2&gt;" in page


def test_a_paused_rank_is_told_wherever_it_stands(cluster):
    handle = cluster.execute("dist.barrier()\ntime.sleep(0.4)\ndist.barrier()", block=False)
    time.sleep(0.2)
    os.kill(cluster.pid(2), signal.SIGSTOP)
    time.sleep(0.7)
    found = cluster.diagnose()
    os.kill(cluster.pid(2), signal.SIGCONT)
    handle.result(timeout_s=10)
    assert found.missing[2].cause == "is paused (SIGSTOP, or a debugger holds it); kill -CONT lets it go on"
    assert "ranks 0, 1, 3 wait in barrier (line 3); rank 2 is paused" in found.sentence and not found.is_certain_deadlock


def test_a_dead_rank_and_one_outside_the_cell_are_told():
    with wb.launch(3) as cluster:
        cluster.kill(2)
        with pytest.raises(wb.RankDeadlock, match=r"rank 1 does not take part in this cell; rank 2 is dead \(SIGKILL\)"):
            cluster.execute("dist.barrier()", ranks=0, timeout_s=20)


def test_a_rank_that_waits_in_a_group_without_the_other_is_told_so(cluster):
    cell = "if rank == 3: dist.barrier()\nif rank in (0, 1): dist.barrier(group=trio)\nif rank == 2: time.sleep(60)"
    found = while_it_runs(cluster, cell)
    assert found.missing[0].cause == "waits in barrier #1 of group 'trio' (line 2), which rank 3 is not in"
    assert found.missing[2].where == "line 3: if rank == 2: time.sleep(60)" and not found.is_certain_deadlock


@pytest.mark.parametrize(
    "call, difference",
    [
        (
            "dist.all_reduce(x) if rank == 2 else dist.barrier()",
            "another operation: all_reduce(float32[1], op=sum) where others called barrier()",
        ),
        (
            "dist.all_reduce(torch.ones(1 + 100_000 * (rank == 2)))",
            "another shape, dtype, reduce op or root: all_reduce(float32[100001], op=sum) where others called all_reduce(float32[1], op=",
        ),
    ],
)
def test_unchecked_calls_that_differ_are_told(call, difference):
    with wb.launch(3, check_collectives=False) as cluster:
        cluster.execute(SETUP)
        handle = cluster.execute(f"{call}\ntime.sleep(60)", block=False)
        time.sleep(0.5)
        found = cluster.diagnose()
        cluster.interrupt()
        with pytest.raises(wb.WorkbenchError):
            handle.result(timeout_s=15)
    if found.waiting:  # gloo may also fail at once, or take bytes of another shape
        assert difference in found.missing[2].cause


@pytest.mark.parametrize(
    "look, trouble, doing",
    [
        (ProcessLook(state="R"), "", "is computing"),
        (ProcessLook(state="S"), "", "sleeps, or waits for something that is no collective"),
        (
            ProcessLook(state="S", rss_bytes=2**28, swap_bytes=3 * 2**28),
            "is swapped out (0.8 of its 1.0 GiB): the machine is short of memory",
            "",
        ),
        (ProcessLook(state="S", rss_bytes=2**20, swap_bytes=2**22), "", "sleeps, or waits for something that is no collective"),
        (ProcessLook(state="D"), "waits for a disk, or for memory to come back from one", ""),
        (ProcessLook(state="T"), "is paused (SIGSTOP, or a debugger holds it); kill -CONT lets it go on", ""),
    ],
)
def test_the_state_of_a_process_in_words(look, trouble, doing):
    assert look.trouble == trouble and (not doing or look.doing == doing)


def test_a_process_is_looked_at_from_outside():
    look = look_at(os.getpid())
    assert look is not None and look.rss_bytes > 10 * 2**20 and not look.is_paused
    assert look_at(2**22 + 1) is None


# -- native stacks ----------------------------------------------------------------------------------------------------------------------

needs_py_spy = pytest.mark.skipif(find_py_spy() is None, reason="py-spy is not installed")


@needs_py_spy
def test_native_stacks_are_read_on_demand(cluster):
    found = while_it_runs(cluster, "if rank == 1: time.sleep(60)\ndist.barrier()", native=True)
    assert "nanosleep" in found.missing[1].native and "<cell 2>:1" in found.missing[1].native
    assert "native stack, innermost first:" in found.text and "forkserver" not in found.text


@needs_py_spy
def test_a_rank_that_lets_no_other_thread_run_is_seen_all_the_same(cluster):
    handle = cluster.execute("if rank == 1:\n    sum(range(10**13))\ndist.barrier()", block=False)
    time.sleep(0.5)
    found = cluster.diagnose()
    assert found.missing[1].cause == "is computing in native code that lets no other thread run" and found.missing[1].where == "line 2"
    cluster.interrupt()
    time.sleep(0.8)
    cluster.interrupt()
    with pytest.raises(wb.RankInterrupted) as caught:
        handle.result(timeout_s=15)
    assert "rank 1 was in, innermost first:\n  " in str(caught.value) and "(<cell 2>:2)" in str(caught.value)


def test_a_rank_is_looked_at_once_and_goes_on_where_the_look_has_left_it_stopped(cluster, monkeypatch, tmp_path):
    """A signal that comes while py-spy holds a process can leave it, or threads of it, stopped; this one does so always."""
    spy, looks = tmp_path / "py-spy", tmp_path / "looks"
    spy.write_text(f'#!/bin/sh\nsleep 0.8\nkill -STOP "$5"\necho "$5" >> {looks}\n')
    spy.chmod(0o755)
    monkeypatch.setattr("workbench.ranks.outside.find_py_spy", lambda: str(spy))
    handle = cluster.execute("kept = rank\nif rank == 1:\n    import ctypes; ctypes.PyDLL(None).sleep(60)\ndist.barrier()", block=False)
    time.sleep(0.3)
    cluster.interrupt()
    with pytest.raises(wb.RankInterrupted):
        handle.result(timeout_s=5)
    limit = time.monotonic() + 10
    while not looks.exists() and time.monotonic() < limit:
        time.sleep(0.05)
    time.sleep(0.3)
    assert len(looks.read_text().split()) == 1
    assert cluster.execute("kept", timeout_s=2)[1].result_text == "1"


# -- from wherever one asks -------------------------------------------------------------------------------------------------------------


def test_any_thread_may_ask_while_a_cell_runs_in_the_main_one(cluster):
    found: list[Diagnosis] = []

    def ask() -> None:
        time.sleep(0.5)
        found.append(cluster.diagnose())
        cluster.interrupt()

    asker = threading.Thread(target=ask)
    asker.start()
    with pytest.raises(wb.RankInterrupted):
        cluster.execute("if rank == 3: time.sleep(60)\ndist.barrier()")
    asker.join()
    assert sorted(found[0].waiting) == [0, 1, 2] and list(found[0].missing) == [3]


STATELESS = "if rank < 2: s = wb.StatelessGroup.create('127.0.0.1', {port}, rank, 2)"
ACCELERATE = "from accelerate import Accelerator\nacc = Accelerator(cpu=True)"
LIBRARIES = {
    "plain": ("", "dist.all_gather([torch.empty(1) for _ in range(4)], x) if rank != 1 else time.sleep(60)", "all_gather", [0, 2, 3]),
    "Group": ("", "group.all_reduce(x) if rank != 1 else time.sleep(60)", "", [0, 2, 3]),
    "StatelessGroup": (STATELESS, "s.recv_obj(1) if rank == 0 else time.sleep(60)", "recv_obj", [0]),
    "StatelessGroup.barrier": (STATELESS, "s.barrier() if rank == 0 else time.sleep(60)", "barrier", [0]),
    "accelerate": (ACCELERATE, "acc.gather(x) if rank != 1 else time.sleep(60)", "all_gather", [0, 2, 3]),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_waits_are_seen_over(library, cluster):
    setup, cell, op, waiting = LIBRARIES[library]
    if setup:
        cluster.execute(setup.format(port=wb.free_port()), timeout_s=60)
    found = while_it_runs(cluster, cell)
    assert sorted(found.waiting) == waiting and found.waiting[0].op.startswith(op)
    assert found.waiting[0].line == 1 and found.waiting[0].source == cell  # the cell's line, not the library's
    assert 1 in found.missing and found.missing[1].cause.startswith("sleeps") and not found.is_certain_deadlock
