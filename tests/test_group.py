"""Group operations in real gloo worlds, each body one world: what every rank saw comes back and is compared here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from worlds import run_world

from workbench.errors import GroupError, StaleGroupError, WorkbenchError
from workbench.ranks.graph_capture import graph_capture
from workbench.ranks.group import Group
from workbench.ranks.metrics import reduce_metrics

MOVABLE = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip


def world() -> Group:
    return Group.from_process_group(dist.group.WORLD, name="world")


def told(call: Callable[[], Any]) -> str:
    """The error of a call as text."""
    try:
        return f"no error: {call()}"
    except (ValueError, WorkbenchError) as error:
        return f"{type(error).__name__}: {error}"


def values(rank: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Small numbers that differ by rank and fit every dtype."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_collectives_of_four_ranks() -> None:
    outs = run_world(4, _collectives)
    assert outs[0]["sum"] == [[600, 604, 608], [612, 616, 620]] and all(o["untouched"] for o in outs)
    assert outs[0]["cat"] == (8, 3) and outs[0]["last"] == (2, 12)
    assert [o["gather"] for o in outs] == [None, None, (8, 3), None]
    assert all(o["object"] == {"from": 3} and o["objects"] == [{0}, {1}, {2}, {3}] for o in outs)
    assert outs[0]["next"] == (1, 3, 0, 3) and outs[3]["next"] == (0, 2, 0, 3)
    assert all(o["mean"] == 1.5 and o["max"] == 3 and o["list"] == [3, 30] for o in outs)
    assert outs[1]["ragged"] == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3] and outs[1]["deep"] == [[[10.0], [50.0]], [[90.0], [130.0]]]
    assert [o["parts"] for o in outs] == [[[4]], [[]], [[8, 12]], [[16, 20, 24]]]
    assert all(o["inplace"] == (4.0, True) and o["half"] == 60000.0 for o in outs)


def _collectives(rank: int) -> dict[str, Any]:
    g = world()
    x = torch.arange(6).reshape(2, 3) + 100 * rank
    kept = x.clone()
    gathered = g.gather(x, dst=2, dim=0)
    one = torch.ones(1)
    return {
        "sum": g.all_reduce(x).tolist(), "cat": g.all_gather(x, dim=0).shape, "last": g.all_gather(x).shape,
        "gather": None if gathered is None else tuple(gathered.shape), "objects": g.all_gather_object({rank}),
        "object": g.broadcast_object({"from": rank} if rank == 3 else None, src=3), "untouched": torch.equal(x, kept),
        "next": (g.next_rank, g.prev_rank, g.first_rank, g.last_rank), "list": g.broadcast_object_list([rank, rank * 10], src=3),
        "mean": g.all_reduce(torch.tensor(rank), op="mean").item(), "max": g.all_reduce(torch.tensor(rank), op="max").item(),
        "ragged": g.all_gatherv(torch.full((rank, 2), rank), sizes=[0, 1, 2, 3]).flatten().tolist(),
        "deep": g.reduce_scatter(torch.arange(16.0).reshape(2, 2, 4) * (rank + 1), dim=-1).tolist(),
        "parts": g.reduce_scatterv(torch.arange(1, 7).reshape(1, 6), sizes=[1, 0, 2, 3]).tolist(),
        "inplace": (g.all_reduce(one, inplace=True).item(), one.item() == 4.0),
        "half": g.all_reduce(torch.tensor(60000.0, dtype=torch.float16), op="mean").item(),
    }  # fmt: skip


def test_every_dtype_shape_and_dim_moves() -> None:
    assert run_world(3, _moves) == [[], [], []]


def _moves(rank: int) -> list[str]:
    """Compare with torch.cat of what the peers are known to hold; names of what differs."""
    g, wrong = world(), []
    for dtype in MOVABLE:
        for shape, dim in [((3,), 0), ((2, 3), 0), ((2, 3), 1), ((2, 3, 2), -2), ((0, 4), 1), ((1, 0), -1)]:
            parts = [values(r, dtype, shape) for r in range(3)]
            odd = parts[rank].t().contiguous().t() if len(shape) == 2 else parts[rank]
            expected = torch.cat(parts, dim=dim)
            gathered, rooted = g.all_gather(odd, dim=dim), g.gather(odd, dst=1, dim=dim)
            if not same(gathered, expected) or (rooted is None) != (rank != 1) or (rooted is not None and not same(rooted, expected)):
                wrong.append(f"gather {dtype} {shape} {dim}")
        for shape in [(), (4,), (0,), (2, 2)]:
            target = values(rank, dtype, shape)
            if g.broadcast(target, src=2) is not target or not same(target, values(2, dtype, shape)):
                wrong.append(f"broadcast {dtype} {shape}")
            if rank == 0:
                g.send(values(0, dtype, shape), dst=1)
            elif rank == 1 and not same(g.recv(torch.Size(shape), dtype, src=0), values(0, dtype, shape)):
                wrong.append(f"recv {dtype} {shape}")
        pair = [values(rank, dtype, (rank, 2)), values(rank, dtype, (rank,))]
        rows = [g.all_gatherv(pair, sizes=sizes) for sizes in (None, [0, 1, 2])]
        if any(not same(r[0], torch.cat([values(k, dtype, (k, 2)) for k in range(3)])) or r[1].shape != (3,) for r in rows):
            wrong.append(f"all_gatherv {dtype}")
    strided = torch.zeros(4, 6)[:, ::2]
    g.broadcast(strided if rank else strided.fill_(7.0), src=0)
    sides = g.all_gatherv(torch.full((2, rank), float(rank)), dim=1)
    big = g.all_gatherv(torch.full((100_000 * rank,), rank, dtype=torch.uint8))  # beyond the padded way
    if strided.sum() != 84 or sides.tolist() != [[1, 2, 2]] * 2 or big.bincount().tolist() != [0, 100_000, 200_000]:
        wrong.append("strided, wide or big")
    return wrong


def test_reductions_match_local_arithmetic() -> None:
    assert run_world(3, _reductions) == [[], [], []]


def _reductions(rank: int) -> list[str]:
    g, wrong = world(), []
    for dtype in MOVABLE:
        if dtype.is_complex or dtype in (torch.int16, torch.uint16, torch.float8_e4m3fn):
            continue
        parts = torch.stack([values(r, dtype, (2, 3, 6)) for r in range(3)])
        wide = parts.to(torch.float64)
        expected = {"sum": wide.sum(0), "mean": wide.mean(0), "max": wide.amax(0), "min": wide.amin(0), "product": wide.prod(0)}
        for op, result in expected.items():
            got = g.all_reduce(parts[rank], op)
            wanted = torch.float32 if op == "mean" and not dtype.is_floating_point else dtype
            if got.dtype != wanted or not torch.allclose(got.double(), result.to(wanted).double(), rtol=1e-2):
                wrong.append(f"{op} {dtype}")
        for dim in (2, -1):
            if not same(g.reduce_scatter(parts[rank], dim), wide.sum(0).to(dtype).chunk(3, dim)[rank].contiguous()):
                wrong.append(f"reduce_scatter {dtype} {dim}")
    if g.all_reduce(torch.full((2,), 1 + 2j)).tolist() != [3 + 6j] * 2 or g.all_reduce(torch.empty(0, 3)).shape != (0, 3):
        wrong.append("complex or empty")
    leaf = torch.ones(2, requires_grad=True)
    if g.all_reduce(leaf).requires_grad or g.broadcast(leaf, src=0) is not leaf:
        wrong.append("autograd")
    return wrong


def test_messages_arrive_in_order_and_what_does_not_fit_is_told() -> None:
    sent, received = run_world(2, _messages)
    assert sent == "sent"
    assert received == (["a", ("b", 2)], True, ["tensor", "object", "object"], [1.0] * 4)


def _messages(rank: int) -> Any:
    g = world()
    if rank == 0:
        g.send_object("a", dst=1)
        g.isend_object(("b", 2), dst=1)
        for tensor in (torch.ones(8), torch.ones(4)):
            g.send(tensor)
        g.send_object("unexpected", dst=1)
        g.send_tensor_dict({"x": torch.ones(3), "y": torch.ones(0)})
        g.send(torch.ones(4))
        return "sent"
    objects = [g.recv_object(0), g.recv_object(0)]
    text = told(lambda: g.recv(torch.Size([4]), torch.float32))
    refused = text.startswith("ValueError") and "float32 [8]" in text and "float32 [4]" in text
    dropped = [told(lambda: g.recv_object(0)), told(lambda: g.recv(torch.Size([4]), torch.float32)), told(lambda: g.recv_object(0))]
    waited = [text.partition("the call waits for: ")[2].split()[0] for text in dropped]
    assert "it is: tensor float32 4" in dropped[0] and "it is: object" in dropped[1] and "it is: tensor_dict" in dropped[2]
    assert waited == ["object", "tensor", "object"]
    return objects, refused, ["tensor", "object", "object"], g.recv(torch.Size([4]), torch.float32).tolist()


def test_tensor_dicts_keep_order_values_and_pieces() -> None:
    outs = run_world(4, _dicts)
    assert outs == [True] * 4


def _dicts(rank: int) -> bool:
    tp, pp = _pairs(rank)
    values: dict[str, Any] = {"h": torch.arange(8.0).reshape(2, 4), "odd": torch.arange(3), "empty": torch.empty(0, 4), "name": "x"}
    values |= {"deep": {"a": [1, torch.ones(1)]}}
    differing = {"mix": torch.full((4,), float(rank)), "own": torch.full((4,), float(rank))}
    if pp.is_first_rank:
        for handle in pp.isend_tensor_dict(values, all_gather_group=tp):
            handle.wait()
            handle.wait()
        pp.send_tensor_dict(differing, all_gather_group=tp, all_gather_tensors={"own": False})
        pp.send_tensor_dict(values, all_gather_group=tp)
        pp.send_tensor_dict({"after": torch.ones(1)})
        got = pp.broadcast_tensor_dict(values)
        return got is values
    got = pp.recv_tensor_dict(all_gather_group=tp)
    mixed = pp.recv_tensor_dict(all_gather_group=tp)
    text = told(lambda: pp.recv_tensor_dict())
    after = pp.recv_tensor_dict()
    broadcast = pp.broadcast_tensor_dict(src=0)
    for received in (got, broadcast):
        assert received is not None and list(received) == list(values)
        assert received["deep"]["a"][1].item() == 1.0 and received["name"] == "x"
        assert all(same(received[key], values[key]) for key in ("h", "odd", "empty"))
    assert mixed is not None and mixed["mix"].tolist() == [0, 0, 1, 1] and mixed["own"].tolist() == [float(rank - 2)] * 4
    return text.startswith("ValueError") and "in 2 pieces; the call has no all_gather_group" in text and after == {"after": torch.ones(1)}


def _pairs(rank: int) -> tuple[Group, Group]:
    """tp (0, 1) (2, 3) and pp (0, 2) (1, 3)."""
    made = [Group.create(ranks, name) for name, ranks in (("tp", [0, 1]), ("tp", [2, 3]), ("pp", [0, 2]), ("pp", [1, 3]))]
    tp, pp = (g for g in made if g.is_member)
    return tp, pp


def test_an_unsorted_group_keeps_its_order_everywhere() -> None:
    outs = run_world(4, _unsorted)
    assert [o[0] for o in outs] == [0, 2, 1, 3]
    assert all(o[1] == [0, 2, 1, 3] and o[2] == 2 and o[3] == [0, 2, 1, 3] for o in outs)
    assert [o[4] for o in outs] == [None, [0, 2, 1, 3], None, None] and [o[5] for o in outs] == [4, 12, 8, 16]
    assert [o[6] for o in outs] == [3, 2, 0, 1] and all(o[7] == [2, 2, 1, 3, 3, 3] for o in outs)


def _unsorted(rank: int) -> Any:
    g = Group.create([0, 2, 1, 3], "odd")
    mine = torch.tensor([rank])
    rooted = g.gather(mine, dst=2)
    scattered = g.reduce_scatter(torch.arange(1, 5)).item()
    if g.is_first_rank:
        g.send_object(rank, dst=1)
    passed = g.recv_object((g.rank_in_group - 1) % 4) if g.rank_in_group else None
    if g.rank_in_group:
        g.send_object(rank, dst=(g.rank_in_group + 1) % 4)
    passed = g.recv_object(3) if passed is None else passed
    ragged = g.all_gatherv(torch.full((rank,), rank)).tolist()
    return (g.rank_in_group, g.all_gather(mine).tolist(), g.broadcast_object(rank, src=1), g.all_gather_object(rank),
            None if rooted is None else rooted.tolist(), scattered, passed, ragged)  # fmt: skip


def test_a_mistake_of_one_rank_is_an_error_on_all_and_the_group_lives() -> None:
    first, second = run_world(2, _one_mistake)
    assert all(text.startswith("ValueError: ") for text in first[:5])
    assert all(text.startswith("GroupError: rank 0 of group 'world' refused its part") for text in second[:5])
    assert "all_gather: invalid dim 3 for a tensor of shape [2]: choose one of -1..0" in first[0] and "invalid dim 3" in second[0]
    for texts in (first, second):
        assert all("GroupError: the ranks of group 'world' met with different calls; no data was sent" in text for text in texts[5:-1])
        assert "  rank 0: all_reduce sum float32 [2]\n  rank 1: all_reduce sum float32 [3]" in texts[5]
        assert "make the calls the same" in texts[5]
        assert texts[-1] == "2.0"


def _one_mistake(rank: int) -> list[str]:
    g, bad = world(), rank == 0
    calls: list[Callable[[], Any]] = [
        lambda: g.all_gather(torch.ones(2), dim=3 if bad else 0),
        lambda: g.all_gatherv(torch.ones(1, 2), sizes=[2, 1]),
        lambda: g.broadcast_object(1, src=7 if bad else 1),
        lambda: g.all_reduce(torch.ones(2, dtype=torch.int16 if bad else torch.int32)),
        lambda: g.all_gather_object(dist.group.WORLD if bad else 1),
        lambda: g.all_reduce(torch.ones(2 + rank)),
        lambda: g.all_reduce(torch.ones(2), "max" if bad else "sum"),
        lambda: g.broadcast(torch.ones(2), src=rank),
        lambda: g.barrier() if bad else g.all_gather(torch.ones(1)),
        lambda: g.all_gatherv(torch.ones(1, 2 + rank)),
        lambda: g.broadcast_object_list([1] * (rank + 1)),
        lambda: g.reduce_scatter(torch.ones(2, 2), dim=rank),
    ]
    return [*map(told, calls), str(g.all_reduce(torch.ones(1)).item())]


@pytest.mark.parametrize("checks", [True, False])
def test_wrong_arguments_are_refused_before_anything_is_sent(checks: bool) -> None:
    for texts in run_world(2, _wrong_arguments, checks):
        for expected, text in texts:
            assert text.startswith("ValueError") and expected in text, (expected, text)


def _wrong_arguments(rank: int, checks: bool) -> list[tuple[str, str]]:
    g, x = Group.create([0, 1], checks=checks), torch.ones(2, 3)
    numbers: Any = [1]
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("src=2 is outside the group of 2", lambda: g.broadcast(x, src=2)), ("src=-1 is outside", lambda: g.broadcast(x, src=-1)),
        ("dst=-1 is outside", lambda: g.gather(x, dst=-1)), ("dst=True is outside", lambda: g.gather(x, dst=True)),
        ("src=2 is outside", lambda: g.broadcast_object(1, src=2)), ("src=2 is outside", lambda: g.broadcast_object_list([1], src=2)),
        ("src=5 is outside", lambda: g.broadcast_tensor_dict({}, src=5)), ("dst=2 is outside", lambda: g.send(x, dst=2)),
        ("is this rank itself in group", lambda: g.send_object(1, dst=g.rank_in_group)),
        ("src=-1 is outside", lambda: g.recv_object(-1)),
        ("is this rank itself", lambda: g.recv(x.shape, x.dtype, src=g.rank_in_group)),
        ("dst=9 is outside", lambda: g.send_tensor_dict({}, dst=9)),
        ("all_gather: invalid dim 2 for a tensor of shape [2, 3]: choose one of -2..1", lambda: g.all_gather(x, dim=2)),
        ("a 0-dim tensor has none: pass x.reshape(1)", lambda: g.all_gather(torch.tensor(1))),
        ("invalid dim -3", lambda: g.gather(x, dim=-3)),
        ("3 rows along dim 1 do not divide among 2 members", lambda: g.reduce_scatter(x, dim=1)),
        ("invalid dim 2", lambda: g.reduce_scatter(x, 2)),
        ("sizes [1, 1] add up to 2, but dim 1 has 3 rows", lambda: g.reduce_scatterv(x, dim=1, sizes=[1, 1])),
        ("must be 2 numbers of at least 0", lambda: g.reduce_scatterv(x, dim=1, sizes=[4, -1])),
        ("rows, but its tensor has 3 along dim 0", lambda: g.all_gatherv(torch.ones(3, 1), sizes=[2, 2])),
        ("must be 2 numbers of at least 0", lambda: g.all_gatherv(x, sizes=[2])), ("got an empty list", lambda: g.all_gatherv([])),
        ("have [2, 3] rows along dim 0", lambda: g.all_gatherv([torch.ones(2), torch.ones(3)])),
        ("gloo cannot reduce int16: convert with", lambda: g.all_reduce(x.to(torch.int16))),
        ("op must be one of 'sum'", lambda: g.all_reduce(x, "avg")),
        ("gloo only adds complex numbers", lambda: g.all_reduce(x.to(torch.complex64), "max")),
        ("a mean of int64 is float32: leave inplace out", lambda: g.all_reduce(x.long(), "mean", inplace=True)),
        ("expected a tensor, got list", lambda: g.all_gather(numbers)),
        ("only dense tensors travel", lambda: g.all_gather(x.to_sparse(), dim=0)),
        ("expected a dict of tensors, got list", lambda: g.broadcast_tensor_dict(numbers, src=rank)),
        ("3 elements do not divide among 2 ranks", lambda: g.send_tensor_dict({"a": torch.ones(3)}, None, g, {"a": True})),
        ("op must be one of 'sum', 'mean', 'max', 'min'", lambda: reduce_metrics(1, "product", group=g)),
        ("metrics['a'] is a str", lambda: reduce_metrics({"a": "b"}, group=g)),
        ("ranks [2] are outside the world of 2", lambda: Group.create([0, 2])), ("name a rank twice", lambda: Group.create([0, 0])),
        ("a group needs at least one rank", lambda: Group.create([])),
        ("has ranks [0, 1, 1], its process group [0, 1]", lambda: Group.from_process_group(dist.group.WORLD, [0, 1, 1])),
    ]  # fmt: skip
    texts = [(expected, told(call)) for expected, call in calls]
    assert g.all_reduce(torch.ones(1)).item() == 2.0
    return texts


def test_a_group_of_one_gives_back_what_it_gets() -> None:
    run_world(1, _alone)


def _alone(rank: int) -> None:
    g, x = world(), torch.ones(2, 3)
    results = (g.all_reduce(x), g.all_gather(x), g.gather(x), g.reduce_scatter(x), g.broadcast(x), g.all_gatherv(x))
    assert all(result is x for result in results)
    assert g.broadcast_object("o") == "o" and g.all_gather_object("o") == ["o"] and g.broadcast_object_list(["o"]) == ["o"]
    values = {"x": x}
    assert g.send_tensor_dict(values) is values and g.recv_tensor_dict() is None and g.broadcast_tensor_dict(values) is values
    assert g.isend_tensor_dict(values) == [] and g.all_reduce(torch.tensor([3]), "mean").dtype is torch.float32
    assert "this rank itself" in told(lambda: g.send(x)) and "invalid dim 5" in told(lambda: g.all_gather(x, dim=5))
    with graph_capture(g, g) as context:
        assert (context.stream is None) == (not torch.cuda.is_available())
    assert g.create_mq_broadcaster() is None and reduce_metrics({"a": 1}, group=g) == {"a": 1.0}
    g.barrier()


def test_outsiders_closed_and_stale_groups_say_so() -> None:
    inside, outside = run_world(2, _gone)
    assert inside == outside == True  # noqa: E712


def _gone(rank: int) -> bool:
    solo = Group.create([0], "solo")
    if rank:
        assert repr(solo) == "Group('solo', ranks=[0], rank 1 is not a member)" and solo.rank_in_group == -1
        assert "GroupError: rank 1 is not in group 'solo'" in told(solo.barrier) and "is_member" in told(lambda: solo.process_group)
    pair = Group.create([1, 0], "pair")
    kept = Group.create([0, 1], "kept")
    with pytest.raises(TypeError, match="belongs to the process of rank"):
        pair.__reduce__()
    pair.destroy()
    pair.destroy()
    assert "group 'pair' was destroyed" in told(lambda: pair.all_reduce(torch.ones(1)))
    whole = world()
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    dist.destroy_process_group()
    assert "StaleGroupError: group 'kept' belongs to an older generation" in told(lambda: kept.barrier())
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=2)
    with pytest.raises(StaleGroupError):
        kept.send_object(1, dst=1 - kept.rank_in_group)
    whole.rebind(dist.group.WORLD)
    kept.rebind(dist.new_group([0, 1]))
    return kept.all_gather(torch.tensor([rank])).tolist() == [0, 1] and whole.all_reduce(torch.ones(1)).item() == 2.0


def test_experts_exchange_ragged_tokens() -> None:
    outs = run_world(3, _experts)
    assert [o[0] for o in outs] == [[[0.0] * 2] * 0, [[3.0] * 2], [[6.0] * 2] * 2]
    assert all(o[1:] == ((3, 2), [1, 2, 2], (3, 2), [10, 20, 20]) for o in outs)


def _experts(rank: int) -> Any:
    g = world()
    tokens, weights, ids = torch.full((rank, 2), float(rank)), torch.ones(rank, 2), torch.full((rank,), rank)
    hidden, all_weights, all_ids, *extra = g.dispatch(tokens, weights, ids, True, extra_tensors=[ids * 10])
    combined = g.combine(hidden, is_sequence_parallel=True)
    with g.graph_capture() as context:
        assert context.stream is None or torch.cuda.is_available()
    g.prepare_communication_buffer_for_model(None)
    return combined.tolist(), tuple(hidden.shape), all_ids.tolist(), tuple(all_weights.shape), extra[0][0].tolist()


def test_metrics_of_all_ranks_become_one() -> None:
    for reduced, total, text, refused in run_world(2, _metrics):
        assert reduced == {"loss": 2.0, "n": {"tokens": 3.5}, "last": 0.5} and total == 7 and isinstance(total, int)
        assert "differ in metrics\n  rank 0: names 'b'\n  rank 1: names 'a'\nlog the same names" in text and "metrics is a str" in refused


def _metrics(rank: int) -> Any:
    g = world()
    reduced = reduce_metrics({"loss": torch.tensor(1.0 + 2 * rank), "n": {"tokens": 3 + rank}, "last": rank == 1}, group=g)
    assert reduce_metrics(torch.tensor([1, 2]) * rank, "max", group=g).tolist() == [1, 2]
    differing = told(lambda: reduce_metrics({"a": 1} if rank else {"b": 1}, group=g))
    refused = told(lambda: reduce_metrics("x" if rank else 1.0, group=g))
    return reduced, reduce_metrics(3 + rank, "sum", group=g), differing, refused


def test_an_object_of_another_key_is_not_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.ranks.wire import KEY_VARIABLE, seal, unseal

    monkeypatch.setenv(KEY_VARIABLE, "ours")
    sealed = seal({"a": 1})
    assert unseal(sealed) == {"a": 1}
    monkeypatch.setenv(KEY_VARIABLE, "theirs")
    with pytest.raises(GroupError, match="does not carry this world's key; it was not unpickled"):
        unseal(sealed)


def test_a_peer_that_is_late_is_waited_for() -> None:
    assert run_world(2, _late) == [1, 1]


def _late(rank: int) -> int:
    g = world()
    time.sleep(0.5 * rank)
    return int(g.all_reduce(torch.tensor(rank)).item())
