"""Runs our Group and real vLLM's GroupCoordinator side by side on gloo ranks; prints what differs as JSON on the last line of stdout."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

DTYPES = (torch.bool, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((4,), (2, 4), (4, 2, 4), (0, 4))


def cases(size: int) -> Iterator[tuple[str, Any]]:
    """Name and call of each case; a call takes either group, this rank's place, and a function that makes its input anew."""
    for dtype in DTYPES:
        for shape in SHAPES:
            label = f"{dtype} {shape}"
            yield f"all_reduce {label}", lambda g, me, make, d=dtype, s=shape: g.all_reduce(make(d, s))
            for dim in range(-len(shape), len(shape)):
                yield f"all_gather {label} {dim}", lambda g, me, make, d=dtype, s=shape, at=dim: g.all_gather(make(d, s), at)
                for dst in range(size):
                    name = f"gather {label} {dim} to {dst}"
                    yield name, lambda g, me, make, d=dtype, s=shape, at=dim, to=dst: g.gather(make(d, s), to, at)
                if dim % len(shape) < 2 and shape[dim] % size == 0:  # beyond dim 1 vLLM's result has the wrong shape
                    yield f"reduce_scatter {label} {dim}", lambda g, me, make, d=dtype, s=shape, at=dim: g.reduce_scatter(make(d, s), at)
            for src in range(size):
                yield f"broadcast {label} {src}", lambda g, me, make, d=dtype, s=shape, at=src: g.broadcast(make(d, s), at)
            yield f"ring {label}", lambda g, me, make, d=dtype, s=shape: ring(g, me, make(d, s))
    for src in range(size):
        yield f"broadcast_object {src}", lambda g, me, make, at=src: g.broadcast_object({"from": me, "deep": [me, {"x": (me,)}]}, at)
        yield f"broadcast_object_list {src}", lambda g, me, make, at=src: g.broadcast_object_list([me, str(me), None], at)
        yield f"broadcast_tensor_dict {src}", lambda g, me, make, at=src: g.broadcast_tensor_dict(mixed(make) if me == at else None, at)
    yield "objects", lambda g, me, make: object_ring(g, me)
    yield "tensor dicts", lambda g, me, make: dict_ring(g, me, mixed(make))
    yield "places", lambda g, me, make: [
        g.rank, g.rank_in_group, g.world_size, list(g.ranks), g.first_rank, g.last_rank, g.is_first_rank, g.is_last_rank, g.next_rank,
        g.prev_rank,
    ]  # fmt: skip


def mixed(make: Any) -> dict[str, Any]:
    return {"z": make(torch.float32, (2, 3)), "n": 3, "a": make(torch.int64, ()), "empty": torch.empty(0, 2), "deep": {"k": [1, "two"]}}


def ring(g: Any, me: int, tensor: torch.Tensor) -> torch.Tensor | None:
    """Pass a tensor from place 0 to the next ones, neighbours by default."""
    if tensor.numel() == 0:
        return None
    got = tensor if me == 0 else g.recv(tensor.shape, tensor.dtype)
    if me < g.world_size - 1:
        g.send(got)
    return got


def object_ring(g: Any, me: int) -> Any:
    got = [0] if me == 0 else g.recv_object(me - 1)
    if me < g.world_size - 1:
        g.send_object([*got, me + 1], me + 1)
    return got


def dict_ring(g: Any, me: int, values: dict[str, Any]) -> Any:
    got = values if me == 0 else g.recv_tensor_dict()
    if me < g.world_size - 1:
        g.send_tensor_dict(got)
    return list(got.items())


def is_same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(is_same, a, b))
    return is_same(list(a.items()), list(b.items())) if isinstance(a, dict) and isinstance(b, dict) else bool(a == b)


def rank_main(rank: int, size: int, path: str, results: Any) -> None:
    try:
        results.put((rank, *compare(rank, size, path)))
        dist.barrier()
    except BaseException:
        results.put((rank, 0, [traceback.format_exc()]))


def compare(rank: int, size: int, path: str) -> tuple[int, list[str]]:
    """How many cases ran, and which of them differ."""
    import vllm.distributed.parallel_state as state

    from workbench.ranks.group import Group

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    ranks = list(range(size))
    theirs = state.GroupCoordinator([ranks], rank, "gloo", use_device_communicator=True, group_name="compared")
    ours = Group.create(ranks, "compared")

    def make(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(rank)).to(dtype)

    differing, count = [], 0
    for name, call in cases(size):
        count += 1
        if not is_same(call(ours, rank, make), call(theirs, rank, make)):
            differing.append(name)
    return count, differing


def main() -> None:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["vllm.distributed.parallel_state", "workbench.ranks.group"])
    told = []
    for size in map(int, sys.argv[1:]):
        results = context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            processes = [context.Process(target=rank_main, args=(rank, size, f"{folder}/store", results)) for rank in range(size)]
            for process in processes:
                process.start()
            told += [[size, *results.get()] for _ in processes]
            for process in processes:
                process.join()
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    main()
