"""Objects, tensor dicts and ragged token data through our groups, torch's own object collectives and vLLM's GroupCoordinator.

All three in the same shape of world; ours and torch's in turns in the same ranks, with the check of collectives on; vLLM's under torchrun.
"Packed tokens" are completions as the pipeline keeps them, token ids and lengths in one int32 tensor, against what people send today: the
same completions as lists of Python ints through `all_gather_object`. Beside it the same tensor through `all_gather_object`, pickled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.line import Line, Reach
from benchmarks.peers import run_peer, torchrun

__all__ = ["GroupsResult", "Timing", "calls_of_torch", "make_inputs", "measure", "seconds_of"]

SIZES = (1 << 10, 1 << 20, 1 << 26)
PACKED, PICKLED = "all_gatherv of packed tokens", "all_gather_object of the tensor"
Calls = dict[str, tuple[float, ...]]  # operation -> seconds, a number a call


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one call on the slowest rank, a number a call.

    Attributes:
        operation: "broadcast_object", "all_gather_object", "send_object", "broadcast_tensor_dict" or `PACKED`.
        num_bytes: payload of all ranks together; of tokens, 4 bytes each.
        torch_s: torch's object collectives; for tokens, of lists of ints.
        pickled_s: for tokens, torch's of the packed tensor; else empty.
        vllm_s: empty where vLLM has no such operation on a CPU, or was not asked.
    """

    operation: str
    num_ranks: int
    num_bytes: int
    ours_s: tuple[float, ...]
    torch_s: tuple[float, ...]
    pickled_s: tuple[float, ...] = ()
    vllm_s: tuple[float, ...] = ()

    def lines(self) -> list[Line]:
        what = f"{self.operation}, {self.num_bytes:,} bytes, {self.num_ranks} ranks"
        is_packed = self.operation == PACKED
        others = (
            (self.torch_s, "torch, lists of ints" if is_packed else "torch object collective", Reach(limit=1 / 3 if is_packed else 1.0)),
            (self.pickled_s, "torch, the tensor pickled", Reach(limit=1.0)),
            (self.vllm_s, "vLLM GroupCoordinator", None),
        )
        ours = 1e3 * median(self.ours_s)
        return [Line(what=what, unit="ms", ours=ours, theirs=1e3 * median(s), peer=peer, reach=reach) for s, peer, reach in others if s]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupsResult:
    timings: tuple[Timing, ...]

    def lines(self) -> list[Line]:
        return [line for timing in self.timings for line in timing.lines()]


def make_inputs(rank: int, num_ranks: int, num_bytes: int) -> dict[str, Any]:
    """What a rank passes: objects, a dict of four tensors, and its ragged share of completions, as lists and packed."""
    import torch

    share = num_bytes // num_ranks
    tokens, lengths = _tokens(rank, int(share * (0.6 + 0.8 * rank / max(1, num_ranks - 1))) // 4)
    return {
        "object": {"texts": "x" * num_bytes, "rank": rank},
        "share": {"texts": "x" * share, "rank": rank},
        "tensors": {f"t{n}": torch.ones(num_bytes // 16, dtype=torch.float32) for n in range(4)},
        "completions": [ids.tolist() for ids in tokens.split(lengths)],
        "packed": torch.cat([torch.tensor([len(lengths), *lengths], dtype=torch.int32), tokens]),
    }


def _tokens(rank: int, num_tokens: int) -> tuple[Any, list[int]]:
    """Token ids of a vocabulary of 32,000, and the lengths of the completions that they make: 512, the last one shorter."""
    import torch

    tokens = torch.randint(0, 32_000, (num_tokens,), generator=torch.Generator().manual_seed(rank), dtype=torch.int32)
    return tokens, [512] * (num_tokens // 512) + ([num_tokens % 512] if num_tokens % 512 else [])


def calls_of_torch(rank: int, num_ranks: int, inputs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The same work by torch's object collectives."""
    import torch.distributed as dist

    def broadcast(name: str) -> Any:
        box = [inputs[name] if rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(name: str) -> list[Any]:
        boxes: list[Any] = [None] * num_ranks
        dist.all_gather_object(boxes, inputs[name])
        return boxes

    def send() -> Any:
        box = [inputs["object"]]
        if rank == 0:
            dist.send_object_list(box, dst=1)
        elif rank == 1:
            dist.recv_object_list(box, src=0)
        return box[0]

    return {
        "broadcast_object": lambda: broadcast("object"),
        "all_gather_object": lambda: gather("share"),
        "send_object": send,
        "broadcast_tensor_dict": lambda: broadcast("tensors"),
        PACKED: lambda: gather("completions"),
        PICKLED: lambda: gather("packed"),
    }


def seconds_of(calls: Sequence[Callable[[], Any]], num_calls: int) -> list[tuple[float, ...]]:
    """Seconds of single calls on this rank, a row for each of `calls`; they take turns, and each is begun together."""
    import torch.distributed as dist

    found: list[list[float]] = [[] for _ in calls]
    for _ in range(num_calls + 1):
        for call, seconds in zip(calls, found, strict=True):
            dist.barrier()
            start_s = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start_s)
    return [tuple(seconds[1:]) for seconds in found]  # the first warms up


def measure(
    *, world_sizes: Sequence[int] = (2, 4), sizes: Sequence[int] = SIZES, num_calls: int = 15, with_vllm: bool = True
) -> GroupsResult:
    """Time all operations at all sizes."""
    timings = []
    for num_ranks in world_sizes:
        theirs = _vllm(num_ranks, sizes, num_calls) if with_vllm else {}
        for size, (ours, plain) in _ours_and_torch(num_ranks, sizes, num_calls).items():
            timings += [
                Timing(
                    operation=operation,
                    num_ranks=num_ranks,
                    num_bytes=size,
                    ours_s=seconds,
                    torch_s=plain[operation],
                    pickled_s=plain[PICKLED] if operation == PACKED else (),
                    vllm_s=tuple(theirs.get(f"{size} {operation}", ())),
                )
                for operation, seconds in ours.items()
            ]
    return GroupsResult(timings=tuple(timings))


def _ours_and_torch(num_ranks: int, sizes: Sequence[int], num_calls: int) -> dict[int, tuple[Calls, Calls]]:
    import workbench as wb

    with wb.launch(num_ranks) as cluster:
        told = {size: cluster.run(_in_rank, size, _calls_of(size, num_calls)) for size in sizes}
    return {size: (_slowest([ours for ours, _ in ranks]), _slowest([plain for _, plain in ranks])) for size, ranks in told.items()}


def _slowest(ranks: list[Calls]) -> Calls:
    """Each call's time on the rank where it took longest."""
    return {name: tuple(map(max, zip(*(told[name] for told in ranks), strict=True))) for name in ranks[0]}


def _calls_of(size: int, num_calls: int) -> int:
    """More of the smallest, which a core that slept or was taken away makes many times longer; fewer of the largest."""
    if size < 1 << 16:
        return 10 * num_calls
    return num_calls if size < 1 << 24 else max(2, num_calls // 4)


def _in_rank(size: int, num_calls: int) -> tuple[Calls, Calls]:
    import workbench as wb

    here = wb.current()
    group, inputs = here.group, make_inputs(here.rank, here.world_size, size)

    def send() -> Any:
        return group.send_object(inputs["object"], dst=1) if here.rank == 0 else group.recv_object(0) if here.rank == 1 else None

    ours: dict[str, Callable[[], Any]] = {
        "broadcast_object": lambda: group.broadcast_object(inputs["object"] if here.rank == 0 else None),
        "all_gather_object": lambda: group.all_gather_object(inputs["share"]),
        "send_object": send,
        "broadcast_tensor_dict": lambda: group.broadcast_tensor_dict(inputs["tensors"] if here.rank == 0 else None),
        PACKED: lambda: group.all_gatherv(inputs["packed"]),
    }
    theirs = calls_of_torch(here.rank, here.world_size, inputs)
    ours_s: Calls = {}
    theirs_s: Calls = {}
    for name, call in ours.items():
        names = [name, PICKLED] if name == PACKED else [name]
        ours_s[name], *others = seconds_of([call, *(theirs[other] for other in names)], num_calls)
        theirs_s.update(zip(names, others, strict=True))
    return ours_s, theirs_s


def _vllm(num_ranks: int, sizes: Sequence[int], num_calls: int) -> dict[str, list[float]]:
    answer = run_peer(torchrun(num_ranks, "benchmarks.peers.vllm_coordinator", *(f"{size}:{_calls_of(size, num_calls)}" for size in sizes)))
    return dict(answer.values["seconds"])
