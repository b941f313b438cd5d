"""What runs inside the ranks of a world under fault: what lives there, work that checks itself, and mistakes on purpose.

Every round of work knows its right answer, so a wrong result is an error at once and never goes by unseen.
Knows one rank. Does not know which fault comes, nor when.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import workbench as wb

__all__ = [
    "FOREVER",
    "MEETING",
    "MISMATCHES",
    "OBJECTS",
    "WORK",
    "Names",
    "WrongResult",
    "checksum_of",
    "generate",
    "give_back",
    "make_engine",
    "mismatch",
    "settle",
    "tell_names",
    "use",
    "verify",
    "work",
]

FOREVER = 10**9  # rounds
OBJECTS = ("process group", "group", "model")  # what a new generation makes stale
PROMPTS = ["12+34=", "7+8=", "90+9="]
_NUM_VALUES = 1 << 18
_NUM_LARGE = 1 << 22
_LEAF = 4  # inputs of the model


class WrongResult(Exception):
    """A collective, a model or an engine gave something else than it must."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What tells that a rank kept its names: the token that it was given once, and the checksum of a tensor of its own."""

    pid: int
    token: str
    checksum: int


@dataclass(slots=True)
class Belongings:
    """What lives on one rank under the name `mine`."""

    token: str
    values: torch.Tensor
    own: Any = None
    group: Any = None
    model: Any = None
    engine: Any = None


def _names() -> dict[str, Any]:
    return sys.modules["__main__"].__dict__


def _mine() -> Belongings:
    found: Belongings = _names()["mine"]
    return found


def _check(what: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise WrongResult(f"{what} on rank {dist.get_rank()}: got {got!r}, must be {wanted!r}")


def checksum_of(data: Any) -> int:
    """Of a tensor's or an array's bytes."""
    array = data.detach().numpy() if isinstance(data, torch.Tensor) else data
    return zlib.crc32(np.ascontiguousarray(array).data)


# -- what lives there -------------------------------------------------------------------------------------------------------------------


def settle(token: str) -> Names:
    """Names where this rank has none yet; groups and a model of the present generation. All ranks make this call."""
    names, ranks = _names(), list(range(dist.get_world_size()))
    if "mine" not in names:
        seed = torch.Generator().manual_seed(zlib.crc32(f"{token}:{dist.get_rank()}".encode()))
        names["mine"] = Belongings(token=token, values=torch.randint(1 << 30, (_NUM_VALUES,), generator=seed))
    mine = _mine()
    mine.own = dist.new_group(ranks, group_desc="own")
    mine.group = wb.Group.create(ranks[::-1], "mine", checks=True)
    net = torch.nn.Linear(_LEAF, 2) if mine.model is None else mine.model.module
    mine.model = DistributedDataParallel(net)
    return tell_names()


def tell_names() -> Names:
    """A rank that has lost its names has the token ""."""
    mine = _names().get("mine")
    if mine is None:
        return Names(pid=os.getpid(), token="", checksum=0)
    return Names(pid=os.getpid(), token=mine.token, checksum=checksum_of(mine.values))


def make_engine(kind: str, members: list[int]) -> bool:
    """An engine on each of `members`, or one over all of them ("vllm tp"); all ranks make this call. False where one lives already."""
    mine, is_shared = _mine(), kind == "vllm tp"
    group = dist.new_group(members, group_desc="engine") if is_shared else None
    if dist.get_rank() not in members:
        return False
    if mine.engine is not None and mine.engine.status == "awake":
        return False
    if mine.engine is not None:
        mine.engine.close()
    if kind == "hf":
        mine.engine = wb.HFEngine("tiny")
    else:
        mine.engine = wb.VLLMEngine("tiny", kv_cache_bytes=2**24, tp=len(members) if is_shared else 1, process_group=group)
    return True


def generate() -> list[int]:
    """Greedy tokens of the fixed prompts, which any engine must give alike; [] on a rank without an engine."""
    engine = _mine().engine
    if engine is None:
        return []
    tokens: list[int] = engine.generate(PROMPTS, wb.Sampling(max_tokens=12, temperature=0.0)).tokens.tolist()
    _names().setdefault("greedy", tokens)
    _check("greedy tokens", tokens, _names()["greedy"])
    return tokens


def give_back(array: Any) -> Any:
    """What travelled there travels back."""
    return array


# -- checks -----------------------------------------------------------------------------------------------------------------------------


def verify(nonce: int) -> int:
    """The world, the layout's groups, objects and messages between neighbours give what they must.

    Returns:
        The sum over ranks of rank + nonce, as the ranks got it.
    """
    here = wb.current()
    total = torch.tensor([here.rank + nonce])
    dist.all_reduce(total)
    _check("all_gather", here.group.all_gather(torch.tensor([here.rank + nonce])).tolist(), [r + nonce for r in range(here.world_size)])
    for axis, group in here.groups.items():
        _check(f"all_gather over {axis}", group.all_gather(torch.tensor([here.rank])).tolist(), list(group.ranks))
    _check("broadcast_object", here.group.broadcast_object({"nonce": nonce} if here.rank == 0 else None), {"nonce": nonce})
    _neighbours(nonce)
    return int(total.item())


def use(what: str) -> str:
    """Use one of `OBJECTS`: "right", or "stale" where it says that it is; a wrong result is an error."""
    try:
        {"process group": _use_own, "group": _use_group, "model": lambda: _train(0)}[what]()
    except wb.StaleGroupError:
        return "stale"
    return "right"


def _use_own() -> None:
    one = torch.ones(1)
    if wb.current().generation % 2:  # torch looks some calls' groups up before it makes them
        dist.all_reduce(one, group=_mine().own)
        _check("all_reduce over an own process group", one.item(), float(dist.get_world_size()))
    else:
        dist.broadcast(one, src=0, group=_mine().own)


def _use_group() -> None:
    group = _mine().group
    _check("all_gather over an own group", group.all_gather(torch.tensor([dist.get_rank()])).tolist(), list(group.ranks))


# -- work that checks itself ------------------------------------------------------------------------------------------------------------


def _sum_of_ranks() -> int:
    size = dist.get_world_size()
    return size * (size - 1) // 2


def _reduce(i: int) -> None:
    data = torch.arange(64) + dist.get_rank() + i
    dist.all_reduce(data)
    _check("all_reduce", data.tolist(), [_sum_of_ranks() + dist.get_world_size() * (i + k) for k in range(64)])


def _reduce_async(i: int) -> None:
    data = [torch.tensor([dist.get_rank() + i + k]) for k in range(3)]
    for handle in [dist.all_reduce(one, async_op=True) for one in data]:
        handle.wait()
    _check("asynchronous all_reduce", [int(one) for one in data], [_sum_of_ranks() + dist.get_world_size() * (i + k) for k in range(3)])


def _gather_lists(i: int) -> None:
    """Of seven shapes in turns, so that most were made before and some were not."""
    size = 1 + i % 7
    parts = [torch.empty(size, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.arange(size) + dist.get_rank() + i)
    _check("all_gather of lists", [part.tolist() for part in parts], [[rank + i + k for k in range(size)] for rank in range(len(parts))])


def _neighbours(i: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    got = torch.empty(1, dtype=torch.int64)
    sending = dist.isend(torch.tensor([1000 * i + rank]), (rank + 1) % size)
    dist.recv(got, (rank - 1) % size)
    if sending is not None:
        sending.wait()
    _check("recv", got.item(), 1000 * i + (rank - 1) % size)


def _objects(i: int) -> None:
    here = wb.current()
    source = i % here.world_size
    _check("broadcast_object", here.group.broadcast_object([i] if here.rank == source else None, src=source), [i])
    for axis, group in here.groups.items():
        _check(f"all_reduce over {axis}", group.all_reduce(torch.tensor([here.rank + i])).item(), sum(group.ranks) + i * group.world_size)


def _form(i: int) -> None:
    group = dist.new_group(list(range(dist.get_world_size())))
    one = torch.ones(1)
    dist.all_reduce(one, group=group)
    _check("all_reduce over a new group", one.item(), float(dist.get_world_size()))
    dist.destroy_process_group(group)


def _train(i: int) -> None:
    """Every element of the gradient is the mean over ranks of rank + 1, as the loss is the sum over one row of rank + 1."""
    model = _mine().model
    model.zero_grad()
    model(torch.full((1, _LEAF), dist.get_rank() + 1.0)).sum().backward()
    wanted = (dist.get_world_size() + 1) / 2
    _check("gradient", {round(value, 4) for value in model.module.weight.grad.flatten().tolist()}, {wanted})


def _reduce_large(i: int) -> None:
    data = torch.full((_NUM_LARGE,), dist.get_rank() + i, dtype=torch.int32)
    dist.all_reduce(data)
    wanted = _sum_of_ranks() + dist.get_world_size() * i
    _check("large all_reduce", (int(data.min()), int(data.max())), (wanted, wanted))


def _compute(i: int) -> None:
    _check("a sum in Python", sum(range(20_000)), 199_990_000)
    _check("a product in torch", (torch.ones(64, 64) @ torch.ones(64, 64)).sum().item(), 64.0**3)


def _generate(i: int) -> None:
    if not generate():
        time.sleep(0.02)


def _sleep(i: int) -> None:
    time.sleep(0.1)


WORK: dict[str, Callable[[int], None]] = {
    "all_reduce": _reduce,
    "asynchronous all_reduce": _reduce_async,
    "all_gather of lists": _gather_lists,
    "large all_reduce": _reduce_large,
    "send and recv": _neighbours,
    "objects and groups": _objects,
    "new groups": _form,
    "DDP": _train,
    "computing": _compute,
    "generate": _generate,
    "sleeping": _sleep,
}
MEETING = tuple(name for name in WORK if name not in ("computing", "generate", "sleeping"))  # work in which ranks wait for each other


def work(body: str, num_rounds: int, culprit: int = -1, at: int = 0, trouble: str = "") -> int:
    """Do rounds of `WORK[body]`; on rank `culprit` the trouble comes before round `at`. Returns the rounds done."""
    for i in range(num_rounds):
        if i == at and dist.get_rank() == culprit:
            if trouble == "leave":
                return i
            _TROUBLES[trouble]()
        WORK[body](i)
    return num_rounds


def meet(op: str) -> None:
    """One barrier, or one round of all_reduce that checks itself."""
    dist.barrier() if op == "barrier" else _reduce(0)


def _raise() -> None:
    raise ValueError("on purpose")


def _swallow() -> None:
    while True:
        try:
            time.sleep(0.05)
        except KeyboardInterrupt:
            continue


_TROUBLES: dict[str, Callable[[], Any]] = {
    "raise": _raise,
    "exit": lambda: os._exit(3),
    "abort": os.abort,
    "segfault": lambda: ctypes.string_at(0),
    "swallow": _swallow,
    "C loop": lambda: sum(range(10**14)),
}


# -- mistakes ---------------------------------------------------------------------------------------------------------------------------

MISMATCHES: dict[str, Callable[[], Any]] = {  # what the odd rank calls while the others call all_reduce(float32[8], op=sum)
    "operation": lambda: dist.broadcast(torch.ones(8), src=0),
    "shape": lambda: dist.all_reduce(torch.ones(9)),
    "dtype": lambda: dist.all_reduce(torch.ones(8, dtype=torch.float64)),
    "reduce op": lambda: dist.all_reduce(torch.ones(8), op=dist.ReduceOp.MAX),
    "barrier": lambda: dist.barrier(),
    "asynchronous": lambda: dist.all_reduce(torch.ones(5), async_op=True).wait(),
}


def mismatch(kind: str, culprit: int) -> None:
    """All ranks call all_reduce, but for one; "group": all_gather of a `wb.Group` with checks of its own, also in a world without."""
    is_odd = dist.get_rank() == culprit
    if kind == "group":
        group = _mine().group
        group.barrier() if is_odd else group.all_gather(torch.ones(1))
    elif is_odd:
        MISMATCHES[kind]()
    else:
        dist.all_reduce(torch.ones(8))
