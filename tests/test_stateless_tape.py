"""Stateless groups on tapes: what came through them is there again without peers, stores or sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import workbench as wb
from workbench.ranks.cluster import Cluster

MEET = """
made = wb.StatelessGroup.create("127.0.0.1", 0, 0, 2) if rank == 0 else None
port = group.broadcast_object(made.port if made else None, src=0)
made = made or wb.StatelessGroup.create("127.0.0.1", port, 1, 2)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(2) as cluster:
        yield cluster


@pytest.fixture
def taped(cluster, tmp_path) -> Callable[..., Path]:
    """Record cells and give the folder of their tapes; `raises` is what the last one raises."""

    def record(*sources: str, raises: type[Exception] | None = None, **options: Any) -> Path:
        folder = tmp_path / "tape"
        with cluster.record(folder):
            for source in sources[:-1]:
                cluster.execute(source)
            with pytest.raises(raises) if raises else nullcontext():
                cluster.execute(sources[-1], **options)
        return folder

    return record


def reading(folder: Path) -> str:
    """A line of a cell that reads what a test may change before the replay."""
    return f"import pathlib; v = pathlib.Path({str(folder / 'value.txt')!r}).read_text()"


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a replay opened a socket or a store")


@pytest.fixture
def no_sockets(cluster, monkeypatch) -> None:
    """This process, in which replays run, opens none; the ranks are others."""
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(dist, "TCPStore", refuse)


EVERYTHING = """
other = 1 - rank
made.send_obj({"from": rank, "noise": torch.rand(3), "words": {"a", "b", "c", str(rank)}}, dst=other)
got = made.recv_obj(src=other)
told = made.broadcast_obj({"step": 7} if rank else None, src=1)
rows = made.all_gather_obj([rank] * (rank + 1))
total = made.all_reduce(torch.rand(4) + rank)
if rank == 0:
    made.send(torch.rand(2, 2).T, dst=1)
else:
    matrix = made.recv(torch.empty(2, 2), src=0)
spread = made.broadcast(torch.rand(2), src=0)
free = wb.free_port()
made.barrier()
dist.all_reduce(spread)
(got, told, rows, total, spread, free, port)
"""


def test_objects_tensors_and_barriers_are_there_again_bit_for_bit(cluster, taped, no_sockets):
    folder = taped(MEET, EVERYTHING, "made.destroy()\ntry: made.barrier()\nexcept wb.GroupError as error: left = str(error)")
    for rank in range(2):
        again = wb.replay(folder, rank=rank)
        assert not again.differing_results and not again.is_cut_short
        assert again.names["total"].tolist() == cluster.pull("total.tolist()")[rank] and again.names["free"] == cluster.pull("free")[rank]
        assert "has left this group" in again.names["left"]
    assert again.names["matrix"].tolist() == cluster.pull("matrix.tolist()", ranks=1)[0]
    assert [call.label.partition(" of ")[0] for call in again.outsides][:5] == [
        "StatelessGroup.create(rank=1, world_size=2)", "send_obj(dst=0)", "recv_obj(src=0)", "broadcast_obj(src=1)", "all_gather_obj()",
    ]  # fmt: skip


def test_a_group_from_before_the_tape_is_answered_from_it_too(cluster, taped, no_sockets):
    cluster.execute(MEET + "made.send_obj('early', dst=1 - rank)")
    folder = taped("both = [made]", "(made.recv_obj(src=1 - rank), both[0].all_gather_obj(rank), both[0] is made)", "made.destroy()")
    for rank in range(2):
        assert wb.replay(folder, rank=rank).result_texts[1] == "('early', [0, 1], True)"


def test_a_socket_that_the_cell_opens_itself_is_taken_over_as_it_was(taped):
    folder = taped(
        "import socket\nlistener = socket.create_server(('127.0.0.1', 0))\n"
        "alone = wb.StatelessGroup.create('127.0.0.1', 0, 0, 1, listen_socket=listener)\nalone.all_gather_obj(rank)",
        "alone.destroy()\nlistener.fileno()",
        "listener = socket.create_server(('127.0.0.1', 0))\npg = wb.stateless_gloo('127.0.0.1', 0, 0, 1, listen_socket=listener)\n"
        "wb.destroy_stateless_gloo(pg)\ndel pg\nlistener.fileno()",
    )
    again = wb.replay(folder, rank=1)
    assert again.result_texts == ("[1]", "-1", "-1") and not again.differing_results


def test_a_wait_that_ended_in_an_error_ends_so_again_and_the_cell_goes_on(cluster, taped, no_sockets):
    folder = taped(
        MEET,
        "texts = []\nmade.store_timeout_s = 0.2\n"
        "for call in (lambda: made.recv_obj(0), lambda: made.barrier(timeout_s=0.2)):\n"
        "    try:\n        if rank: call()\n    except wb.GroupError as error: texts.append(str(error))\n"
        "dist.barrier()\nmade.store_timeout_s = 30\nmade.barrier()\nmade.destroy()\ntexts",
    )
    again = wb.replay(folder, rank=1)
    assert again.names["texts"] == cluster.pull("texts")[1] and not again.differing_results
    assert "nothing came from rank 0" in again.names["texts"][0] and "ranks [0] did not arrive" in again.names["texts"][1]


@pytest.mark.parametrize(
    "then, now, cell, told",
    [
        ("1", "2", "made.send_obj(v, dst=1 - rank)", ["send_obj(dst=0) of StatelessGroup(rank 1", "the object is 2.0, on the tape 1.0"]),
        ("1", "2", "made.broadcast_obj({'a': 0, 'b': [0, v]}, src=rank)", ["line 2)", "the object['b'][1] is 2.0, on the tape 1.0"]),
        (
            "0.5",
            "0.25",
            "x = torch.ones(4); x[2] = v; made.all_gather_obj({'x': x})",
            ["all_gather_obj()", "element 2 of the object['x'] is 0.25, on the tape 0.5", "1 of 4 elements differ"],
        ),
        ("2", "3", "made.all_reduce(torch.ones(int(v)))", ["the object is tensor([1., 1., 1.]), on the tape tensor([1., 1.])"]),
        ("0", "1", "made.barrier() if not v else made.recv_obj(0)", ["line 2: it asks for recv_obj(src=0)", "the tape has barrier()"]),
        ("0", "1", "if v: made.barrier()", ["it asks for barrier() of StatelessGroup", "where the tape has the end of the cell"]),
        ("0", "1", "if not v: made.barrier()", ["it ended, where the tape goes on with barrier() of StatelessGroup"]),
    ],
)
def test_what_is_given_or_asked_otherwise_diverges_with_place_and_both_values(taped, tmp_path, then, now, cell, told):
    (tmp_path / "value.txt").write_text(then)
    folder = taped(MEET, f"{reading(tmp_path)}; v = float(v)\n{cell}", "made.destroy()")
    (tmp_path / "value.txt").write_text(now)
    with pytest.raises(wb.ReplayError, match="the replay diverged") as caught:
        wb.replay(folder, rank=1)
    assert [part for part in told if part not in str(caught.value)] == []


def test_a_set_in_another_order_is_no_divergence_and_a_class_of_ones_own_is_compared(taped, tmp_path):
    (tmp_path / "value.txt").write_text("abc")
    folder = taped(
        MEET,
        reading(tmp_path) + "\nclass Own:\n    def __init__(self, x): self.x = x\n"
        "made.send_obj(dict.fromkeys(v), dst=1 - rank)\nmade.send_obj(Own(sorted(v)), dst=1 - rank)",
        "made.destroy()",
    )
    (tmp_path / "value.txt").write_text("cab")
    wb.replay(folder, rank=0)
    (tmp_path / "value.txt").write_text("caba")
    with pytest.raises(wb.ReplayError, match=r"line 5\): the object is <.*Own object at"):
        wb.replay(folder, rank=0)


def test_a_divergence_that_the_cell_itself_catches_is_told_all_the_same(taped, tmp_path):
    (tmp_path / "value.txt").write_text("1")
    cell = "try: made.send_obj(v, dst=0)\nexcept Exception: pass"
    folder = taped(MEET, f"{reading(tmp_path)}\n{cell}", "made.destroy()")
    (tmp_path / "value.txt").write_text("2")
    with pytest.raises(wb.ReplayError, match="the object is '2', on the tape '1'\nthe code, its inputs or its random numbers are not"):
        wb.replay(folder, rank=0)


def test_a_rank_that_was_stopped_in_a_wait_stops_there_again(taped, no_sockets):
    folder = taped(MEET, "kept = 1\nif rank: made.recv_obj(0)\nkept = 2", raises=wb.RankTimeout, timeout_s=0.5)
    again = wb.replay(folder, rank=1)
    assert again.freed_from.startswith("recv_obj(src=0) of StatelessGroup(rank 1 of 2") and again.names["kept"] == 1
    assert not again.is_cut_short and wb.replay(folder, rank=0).names["kept"] == 2


def test_a_tape_cut_short_is_played_as_far_as_it_goes_and_the_command_tells(taped, tmp_path, capsys, no_sockets):
    from workbench.cli import main

    folder = taped(MEET + "for step in range(4): made.barrier()", "made.destroy()")
    written = tmp_path / "test_it.py"
    assert main(["replay", str(folder), "--rank", "1", "--pytest", str(written)]) == 0
    names: dict[str, Any] = {}
    exec(written.read_text(), names)
    names["test_rank_1_replays"]()
    capsys.readouterr()
    assert main(["replay", str(folder), "--rank", "1"]) == 0
    told = capsys.readouterr().out
    assert "line 5: barrier() of StatelessGroup(rank 1 of 2" in told and "and 6 calls out of the world replayed" in told
    os.truncate(folder / "rank-1.tape", (folder / "rank-1.tape").stat().st_size * 9 // 10)
    again = wb.replay(folder, rank=1)
    assert again.is_cut_short and 1 <= len(again.outsides) < 6
    with pytest.raises(AssertionError):
        names["test_rank_1_replays"]()


def test_the_death_of_the_rank_that_serves_is_on_the_tape_of_failures(monkeypatch):
    with wb.launch(2, record="failures") as cluster:
        cluster.execute(MEET)
        with pytest.raises(wb.RankFailed) as caught:
            cluster.execute("import os\nif rank == 0: os._exit(3)\nmade.recv_obj(0)")
        assert caught.value.rank == 0
        folder = cluster.last_tape
        assert folder is not None
        monkeypatch.setattr(dist, "TCPStore", refuse)
        try:
            told = wb.replay(folder, rank=1).freed_from
        except wb.GroupError as error:  # it saw that before it was freed
            told = str(error)
    assert "recv_obj(src=0)" in told or "lost the store" in told


GLOO = """
port = group.broadcast_object(wb.free_port() if rank == 0 else None, src=0)
pg = wb.stateless_gloo("127.0.0.1", port, 1 - rank, 2, timeout_s=30)
mine = 1 - rank
x = torch.rand(3)
dist.all_reduce(x, group=pg)
work = dist.broadcast(y := torch.rand(2), src=1, group=pg, async_op=True)
work.wait()
pg.allreduce([z := torch.rand(2)]).wait()
got, later = torch.empty(2), torch.empty(2)
if mine:
    dist.send(x[:2].clone(), dst=0, group=pg)
    receive = dist.irecv(later, 0, group=pg)
    receive.wait()
else:
    dist.recv(got, src=1, group=pg)
    dist.isend(y, 1, group=pg).wait()
rows = [None, None]
dist.all_gather_object(rows, {"r": rank, "t": torch.rand(1)}, group=pg)
dist.barrier(group=pg)
dist.all_reduce(y)
[x.tolist(), y.tolist(), z.tolist(), rows] + [(got if rank else later).tolist()]
"""


def test_a_stateless_gloo_group_is_replayed_without_peers(cluster, taped, no_sockets):
    folder = taped(GLOO, "wb.destroy_stateless_gloo(pg)\ndel pg")
    for rank in range(2):
        again = wb.replay(folder, rank=rank)
        assert not again.differing_results and not again.is_cut_short
    assert [call.op for call in again.collectives if call.line][:6] == [
        "all_gather_into_tensor", "all_reduce", "broadcast", "all_reduce", "recv", "send"
    ]  # fmt: skip


def test_what_is_given_to_a_stateless_gloo_group_is_compared(taped, tmp_path):
    (tmp_path / "value.txt").write_text("1")
    form = "port = group.broadcast_object(wb.free_port() if rank == 0 else None, src=0)\npg = wb.stateless_gloo('127.0.0.1', port, rank, 2)"
    folder = taped(form, f"{reading(tmp_path)}\ndist.all_reduce(torch.ones(2) * int(v), group=pg)", "wb.destroy_stateless_gloo(pg)\ndel pg")
    (tmp_path / "value.txt").write_text("2")
    with pytest.raises(
        wb.ReplayError, match=r"all_reduce.*line 2\): element 0 of tensor 0 is 2.0, on the tape 1.0\n2 of 2 elements differ"
    ):
        wb.replay(folder, rank=0)
