"""The ledger of collectives, and the bill of those who made others wait; point-to-point and asynchronous calls too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from IPython.lib.pretty import pretty

import workbench as wb
from workbench.ranks.board import Board
from workbench.ranks.cluster import Cluster
from workbench.ranks.messages import GroupFormed
from workbench.ranks.stragglers import find_stragglers


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(3) as made:
        made.execute("import time; x = torch.ones(256)")
        yield made


def last_cell(cluster: Cluster, source: str) -> int:
    handle = cluster.execute(source, block=False)
    handle.result(timeout_s=20)
    return handle.number


def test_arrivals_are_told_from_the_first(cluster):
    cell = last_cell(cluster, "time.sleep(0.2 * rank)\ndist.all_reduce(x)")
    frame = cluster.ledger()
    assert frame.start_s.is_monotonic_increasing and 0 < frame.start_s.iloc[0] < frame.start_s.iloc[-1] < 120  # since launch
    mine = frame[frame.cell == cell].set_index("rank")
    assert mine.skew_s[0] == 0 and 0.1 < mine.skew_s[1] < mine.skew_s[2] < 2
    assert mine.wait_s[0] > mine.wait_s[1] > mine.wait_s[2] and (mine.duration_s >= mine.wait_s).all()
    assert list(frame.columns) == [
        "rank",
        "op",
        "group",
        "sequence",
        "num_bytes",
        "start_s",
        "skew_s",
        "wait_s",
        "duration_s",
        "cell",
        "line",
    ]


@pytest.mark.parametrize("call", ["dist.all_reduce(x)", "dist.all_reduce(x, async_op=True).wait()", "group.barrier()"])
def test_the_bill_names_the_late_rank_and_those_who_waited(cluster, call):
    cell = last_cell(cluster, f"if rank == 1:\n    time.sleep(0.4)\n{call}")
    bill = cluster.stragglers(cell)
    owed = {row.waiting_rank: row.waited_s for row in bill.frame[bill.frame.late_rank == 1].itertuples()}
    assert sorted(owed) == [0, 2] and all(0.3 < waited_s < 2 for waited_s in owed.values())
    assert bill.sentence.startswith(f"in cell {cell} rank 1 made the others wait 0.") or owed[0] + owed[2] >= 1
    assert "of all waiting), most in " in bill.sentence and "of group 'world'" in bill.sentence
    assert str(bill).startswith(bill.sentence) and "<table" in bill._repr_html_() and "waited_s" in str(bill)
    assert pretty(bill) == str(bill)


def test_time_of_work_beside_an_asynchronous_call_is_no_wait(cluster):
    cell = last_cell(
        cluster, "if rank == 1: time.sleep(0.4)\nw = dist.all_reduce(x, async_op=True)\nif rank != 1: time.sleep(0.6)\nw.wait()"
    )
    assert cluster.stragglers(cell).frame.waited_s.sum() < 0.3


@pytest.mark.parametrize("late", [0, 2])
def test_messages_are_billed_to_either_end(cluster, late):
    cell = last_cell(cluster, f"if rank == {late}: time.sleep(0.4)\nif rank == 0: dist.send(x, 2)\nif rank == 2: dist.recv(x, 0)")
    (row,) = cluster.stragglers(cell).frame.itertuples()
    assert (row.late_rank, row.waiting_rank, row.num_collectives) == (late, 2 - late, 1) and 0.3 < row.waited_s < 2


def test_without_checks_the_bill_stands_too():
    with wb.launch(2, check_collectives=False) as cluster:
        cell = last_cell(cluster, "import time\nif rank == 1: time.sleep(0.4)\ndist.all_reduce(torch.ones(1))")
        (row,) = cluster.stragglers(cell).frame.itertuples()
        assert (row.late_rank, row.waiting_rank) == (1, 0) and 0.3 < row.waited_s < 2


def test_groups_of_one_name_are_kept_apart_and_all_cells_are_added_up():
    board = Board.create(4)
    ms = 1_000_000
    groups = {7: GroupFormed(key=7, name="tp", ranks=(0, 1)), 8: GroupFormed(key=8, name="tp", ranks=(2, 3))}
    for rank, key, start, arrived in ((0, 7, 0, 30), (1, 7, 30, 30), (2, 8, 0, 5), (3, 8, 5, 5), (0, 7, 50, 60), (1, 7, 60, 60)):
        sequence = sum(row[1] == key for row in board.ledger_rows(rank)) + 1
        board.note(rank, (0, key, sequence, 4, start * ms, arrived * ms, (arrived + 1) * ms, 5 << 20 | 3))
    bill = find_stragglers(board, groups)
    assert bill.frame.values.tolist() == [[5, 1, 0, 2, 0.04], [5, 3, 2, 1, 0.005]]
    assert (
        bill.sentence
        == "in cell 5 rank 1 made the others wait 0.04 s in all (89% of all waiting), most in all_reduce of group 'tp' (line 3)"
    )
    empty = find_stragglers(board, groups, cell=6)
    assert "the ledger holds no collective of cell 6: it has the last ones of each rank, or the cell called none" in str(empty)
    assert "<table" not in empty._repr_html_()
    board.close()


def test_a_row_is_completed_only_while_the_ring_holds_it():
    board = Board.create(1)
    first = board.note(0, (0, 1, 1, 4, 100, 100, 110, 0))
    board.amend(0, first, waited_ns=50, end_ns=400)
    assert board.ledger_rows(0)[0][4:7] == (100, 150, 400)
    for number in range(4096):
        board.note(0, (0, 1, number + 2, 4, 1, 1, 2, 0))
    board.amend(0, first, waited_ns=7, end_ns=7)
    board.amend(0, -1, waited_ns=7, end_ns=7)
    assert {row[4:7] for row in board.ledger_rows(0)} == {(1, 1, 2)}
    board.close()
