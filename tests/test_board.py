"""The arrival board alone, with threads and forked processes in the place of ranks."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from workbench.errors import GroupError
from workbench.ranks.board import AreaState, Board, Post, Stopped
from workbench.ranks.diagnosis import Scene, diagnose
from workbench.ranks.messages import GroupFormed, Seen

KEY = 77


def never() -> bool:
    return False


def arrive(board: Board, rank: int, text: str = "barrier()", *, key: int = KEY, line: int = 3) -> int:
    return board.begin(rank, key, Post.of(text, f"{text}\0dist.barrier()".encode(), line), AreaState.ON_BOARD)


@pytest.fixture
def board():
    made = Board.create(3)
    yield made
    made.close()


def test_calls_are_numbered_per_rank_and_group(board):
    assert [arrive(board, 0), arrive(board, 0), arrive(board, 1), arrive(board, 0, key=5)] == [1, 2, 1, 1]
    assert (board.count(0, KEY), board.count(1, KEY), board.count(2, KEY), board.count(0, 5)) == (2, 1, 0, 1)


def test_a_wait_ends_when_the_last_peer_arrives(board):
    ended: list[float] = []
    sequence = arrive(board, 0)

    def wait() -> None:
        board.wait(0, KEY, sequence, (1, 2), never)
        ended.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    arrive(board, 1)
    time.sleep(0.1)
    assert not ended
    arrived = time.monotonic()
    arrive(board, 2)
    thread.join(5)
    assert 0 <= ended[0] - arrived < 0.1


def test_a_wait_is_stopped_for_its_cell_and_later_ones_are_not(board):
    board.enter_cell(0, 4)
    sequence = arrive(board, 0)
    board.stop([0], 3)
    assert not board.is_stopped(0)
    board.stop([0], 4)
    with pytest.raises(Stopped):
        board.wait(0, KEY, sequence, (1,), lambda: board.is_stopped(0))
    board.take_back(0, KEY)
    assert board.count(0, KEY) == 0 and board.read(0).state is AreaState.NOWHERE
    board.enter_cell(0, 5)
    assert not board.is_stopped(0)


def test_whoever_has_arrived_is_not_stopped_any_more(board):
    for rank in (0, 1):
        board.enter_cell(rank, 1)
        arrive(board, rank)
        board.stop([rank], 1)
    board.wait(0, KEY, 1, (1,), lambda: board.is_stopped(0))


def test_texts_are_compared_and_shown(board):
    arrive(board, 0, "all_reduce(float32[3])")
    arrive(board, 1, "all_reduce(float32[4])")
    assert board.odd_one(KEY, 1, "all_reduce(float32[3])", (0, 1)) == 1 and board.odd_one(KEY, 1, "all_reduce(float32[4])", (1,)) is None
    assert board.odd_one(KEY, 1, "anything", (2,)) is None  # has posted nothing
    assert board.texts(KEY, 1, (0, 1, 2)) == {0: "all_reduce(float32[3])", 1: "all_reduce(float32[4])"}
    board.take_back(1, KEY)
    assert board.odd_one(KEY, 1, "all_reduce(float32[3])", (1,)) is None and board.texts(KEY, 1, (1,)) == {}
    assert board.texts(KEY, 1, (0, 1), taken_back=True) == {0: "all_reduce(float32[3])", 1: "all_reduce(float32[4])"}
    arrive(board, 1, "barrier()")
    assert board.texts(KEY, 1, (1,), taken_back=True) == {1: "barrier()"}


def test_long_texts_are_compared_as_far_as_they_are_kept(board):
    arrive(board, 0, "x" * 500)
    assert board.odd_one(KEY, 1, "x" * 500, (0,)) is None and board.odd_one(KEY, 1, "x" * 100, (0,)) == 0
    assert board.texts(KEY, 1, (0,)) == {0: "x" * 159}


def test_a_message_from_any_is_waited_for_until_one_is_not_taken(board):
    channels = [(1, 11), (2, 12)]
    arrive(board, 1, "send", key=11)
    board.wait_any(0, channels, never)
    arrive(board, 0, "recv", key=11)  # taken
    threading.Timer(0.1, arrive, (board, 2, "send"), {"key": 12}).start()
    started = time.monotonic()
    board.wait_any(0, channels, never)
    assert 0.05 < time.monotonic() - started < 1
    arrive(board, 0, "recv", key=12)
    with pytest.raises(Stopped):
        board.wait_any(0, channels, lambda: True)


def test_a_call_that_nobody_should_await_is_seen_a_moment_later_by_one_that_does(board):
    threading.Timer(0.1, board.begin, (1, KEY, Post.of("it", b"it", 1), AreaState.IN_GLOO), {"is_awaited": False}).start()
    started = time.monotonic()
    board.wait(0, KEY, 1, (1,), never)
    assert 0.05 < time.monotonic() - started < 1


def test_what_the_driver_reads_is_what_was_posted(board):
    board.enter_cell(1, 9)
    before = time.monotonic()
    arrive(board, 1, "reduce(é)", line=12)
    posted = board.read(1)
    assert (posted.rank, posted.state, posted.cell, posted.key, posted.sequence) == (1, AreaState.ON_BOARD, 9, KEY, 1)
    assert (posted.place.text, posted.place.line, posted.place.source) == ("reduce(é)", 12, "dist.barrier()")
    assert before <= posted.since_s <= time.monotonic()


@pytest.mark.parametrize("state", [AreaState.ON_BOARD, AreaState.IN_GLOO])
def test_what_is_prepared_leaves_the_same_as_what_is_not(board, state):
    post, is_awaited = Post.of("reduce(é)", "reduce(é)\0dist.reduce(x)".encode(), 12), state is AreaState.ON_BOARD
    begin, end = board.prepared(0, KEY, 3, state, is_awaited=is_awaited)
    found = []
    for rank in range(2):
        board.enter_cell(rank, 9)
        for _ in range(5):
            sequence = board.begin(rank, KEY, post, state, is_awaited=is_awaited) if rank else begin(time.monotonic_ns(), post)
        posted, rung = board.read(rank), board._words[rank * len(board._words) // 3]
        if rank:
            board.move(rank, AreaState.NOWHERE)
            board.note(rank, (3, KEY, sequence, 40, 100, 150, 160, 9 << 20 | 12))
        else:
            assert end(sequence, 100, 150, 40, 12) == 0  # its number, to amend it
        row = board.ledger_rows(rank)[-1]
        assert row[6] > row[5] >= row[4] and board.read(rank).state is AreaState.NOWHERE
        what = (posted.state, posted.cell, posted.key, posted.sequence, posted.place)
        found.append((what, rung, board.texts(KEY, 5, (rank,))[rank], row[:6], row[7], board.count(rank, KEY)))
    assert found[0] == found[1] and board.odd_one(KEY, 5, "reduce(é)", (0, 1)) is None
    end(6, 100, None, 40, 12)
    assert board.ledger_rows(0)[-1][5] == board.ledger_rows(0)[-1][6]  # not told apart


def test_more_groups_than_there_is_room_for_are_refused(board):
    for key in range(1, 2049):
        arrive(board, 0, key=key)
    with pytest.raises(GroupError) as refused:
        arrive(board, 0, key=9999)
    happened, seen, remedy = str(refused.value).splitlines()
    assert happened == "rank 0 uses 2048 groups and channels of messages at once, and needs one more"
    assert "each pair, direction and tag of send and recv" in seen and "group.destroy()" in remedy
    assert arrive(board, 0, key=7) == 2  # those that are there go on
    board.reset(0)
    assert arrive(board, 0, key=9999) == 1 and board.count(0, 1) == 0


def test_a_group_that_was_forgotten_makes_room_and_until_then_counts_on(board):
    for key in range(1, 2049):
        arrive(board, 0, key=key)
    for key in (5, 3, 8):
        board.forget(key)
    assert arrive(board, 0, key=5) == 2  # somebody uses it again
    assert arrive(board, 0, key=3000) == 1 and board.count(0, 3) == 0 and board.count(0, 8) == 1
    assert arrive(board, 0, key=3001) == 1 and board.count(0, 8) == 0 and board.count(0, 5) == 2
    with pytest.raises(GroupError):
        arrive(board, 0, key=3002)


def announce(board, rank, data, *, key=KEY):
    return board.begin(rank, key, Post.of("it", b"it", 1, compared="same"), AreaState.ON_BOARD, data=memoryview(data))


def test_data_stand_beside_a_text_until_the_announcement_after_the_next(board):
    assert announce(board, 0, b"first") == 1 and bytes(board.data(0, KEY, 1)[:5]) == b"first"
    arrive(board, 0)
    arrive(board, 0)  # calls without data in between
    assert announce(board, 0, b"fourth") == 4
    assert bytes(board.data(0, KEY, 1)[:5]) == b"first" and bytes(board.data(0, KEY, 4)[:6]) == b"fourth"
    announce(board, 0, b"fifth")
    assert board.data(0, KEY, 1) is None and board.data(0, KEY, 2) is None and board.data(1, KEY, 1) is None
    board.take_back(0, KEY)
    assert board.data(0, KEY, 5) is None and bytes(board.data(0, KEY, 4)[:6]) == b"fourth"
    announce(board, 0, b"again")
    assert bytes(board.data(0, KEY, 5)[:5]) == b"again" and bytes(board.data(0, KEY, 4)[:6]) == b"fourth"
    announce(board, 0, b"other", key=5)
    assert bytes(board.data(0, 5, 1)[:5]) == b"other" and bytes(board.data(0, KEY, 5)[:5]) == b"again"


def test_what_is_compared_may_differ_from_what_is_shown(board):
    board.begin(0, KEY, Post.of("Group.all_reduce(float32 [3])", b"it", 1, compared="announcement"), AreaState.ON_BOARD)
    board.begin(1, KEY, Post.of("Group.barrier()", b"it", 1, compared="announcement"), AreaState.ON_BOARD)
    assert board.odd_one(KEY, 1, "announcement", (0, 1)) is None and board.odd_one(KEY, 1, "barrier()", (0,)) == 0
    assert board.texts(KEY, 1, (0, 1)) == {0: "Group.all_reduce(float32 [3])", 1: "Group.barrier()"}


def test_the_ledger_keeps_the_last_rows(board):
    for number in range(5000):
        board.note(2, (0, KEY, number, 4, 1, 2, 3, 4))
    rows = board.ledger_rows(2)
    assert len(rows) == 4096 and [rows[0][2], rows[-1][2]] == [904, 4999] and board.ledger_rows(0) == []


def test_processes_meet_a_thousand_times(board):
    children = []
    for rank in (1, 2):
        pid = os.fork()
        if pid == 0:
            try:
                for _ in range(1000):
                    board.wait(rank, KEY, arrive(board, rank), tuple({0, 1, 2} - {rank}), never)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    started = time.monotonic()
    for _ in range(1000):
        board.wait(0, KEY, arrive(board, 0), (1, 2), never)
    assert time.monotonic() - started < 20
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]


def test_a_signal_wakes_a_rank_that_waits(board):
    stop = threading.Event()
    old = signal.signal(signal.SIGUSR1, lambda *_: stop.set())
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        started = time.monotonic()
        with pytest.raises(Stopped):
            board.wait(0, KEY, arrive(board, 0), (1,), stop.is_set)
        assert time.monotonic() - started < 1
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_nothing_of_a_board_has_a_name(board):
    assert os.readlink(f"/proc/self/fd/{board.fd}").startswith("/memfd:workbench-board")


# -- what the driver concludes from it


def scene(board: Board, *, members=(0, 1, 2), finished=(), dead=None, seen=None, ranks=(0, 1, 2), key=KEY):
    for rank in members:
        board.enter_cell(rank, 1)
    group = GroupFormed(key=key, name="world", ranks=ranks)
    found = {r: Seen(ticket=1, line=line, source=source, stack="") for r, (line, source) in (seen or {}).items()}
    told = Scene(cell=1, members=frozenset(members), finished=frozenset(finished), dead=dead or {}, groups={key: group}, seen=found)
    return diagnose(board, told)


def test_a_finished_rank_makes_a_deadlock_certain(board):
    arrive(board, 0), arrive(board, 1)
    found = scene(board, finished=[2])
    assert found.is_certain_deadlock and found.sentence == "ranks 0, 1 wait in barrier (line 3); rank 2 finished the cell without it"
    assert found.waiting[0].missing == (2,) and list(found.missing) == [2]
    assert "  rank 0 waits in barrier #1 of group 'world' since 0.0 s, line 3: dist.barrier()" in found.text


def test_a_rank_that_has_begun_it_and_finished_is_none(board):
    for rank in range(3):
        arrive(board, rank)
    board.move(2, AreaState.NOWHERE)
    assert not scene(board, finished=[2]).is_certain_deadlock


def test_a_rank_that_computes_is_none_and_its_line_is_told(board):
    arrive(board, 0)
    found = scene(board, seen={1: (5, "slow()"), 2: (0, "")})
    assert not found.is_certain_deadlock
    assert found.sentence == "rank 0 waits in barrier (line 3); rank 1 has not come, line 5: slow(); rank 2 has not come"


def test_the_dead_and_those_outside_the_cell_are_told(board):
    arrive(board, 0)
    assert scene(board, members=(0, 1), dead={1: "SIGKILL"}).sentence == (
        "rank 0 waits in barrier (line 3); rank 1 is dead (SIGKILL); rank 2 does not take part in this cell"
    )


def test_ranks_that_wait_elsewhere_are_told_where(board):
    arrive(board, 0)
    arrive(board, 1, "send(x)", key=5, line=8)
    found = scene(board, members=(0, 1), ranks=(0, 1))
    assert found.missing[1].cause == "has not come"  # channel 5 is not known to the driver yet
    assert not found.is_certain_deadlock


def test_a_receive_from_any_has_hope_while_one_rank_lives(board):
    arrive(board, 0, "recv_any(x)")
    assert not scene(board, finished=[1]).is_certain_deadlock
    assert scene(board, finished=[1, 2]).is_certain_deadlock


def test_a_message_on_its_way_is_hope_though_its_sender_is_gone(board):
    arrive(board, 0, "recv_any(x)")
    board.begin(1, 5, Post.of("send(x)", b"send(x)", 2), AreaState.NOWHERE)
    for rank in range(3):
        board.enter_cell(rank, 1)
    groups = {
        KEY: GroupFormed(key=KEY, name="any to 0 in world", ranks=(0, 1, 2)),
        5: GroupFormed(key=5, name="1 to 0 in world", ranks=(1, 0)),
    }
    told = Scene(cell=1, members=frozenset(range(3)), finished=frozenset([1, 2]), groups=groups)
    assert not diagnose(board, told).is_certain_deadlock
    board.begin(0, 5, Post.of("recv", b"recv_any(x)\0", 3), AreaState.ON_BOARD)  # taken
    board.show(0, KEY, 1, AreaState.ON_BOARD, b"recv_any(x)\0", 3)
    assert diagnose(board, told).is_certain_deadlock


def test_a_sender_inside_gloo_is_given_time_for_its_last_bytes(board):
    board.begin(0, 5, Post.of("send(x)", b"send(x)\0s", 2), AreaState.IN_GLOO)
    assert not scene(board, finished=[1], ranks=(0, 1), key=5).is_certain_deadlock
    time.sleep(0.3)
    found = scene(board, finished=[1], ranks=(0, 1), key=5)
    assert found.is_certain_deadlock and found.waiting[0].is_inside_gloo


def test_no_rank_waits(board):
    found = scene(board)
    assert str(found) == "no rank waits in a collective" and not found.waiting and not found.is_certain_deadlock
