"""Small worlds of gloo ranks for tests of what lives inside ranks; each test's body runs in every rank of one world."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.multiprocessing as mp

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed"])


def run_world(world_size: int, body: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Run `body(rank, *args)` in each rank of a fresh gloo world: its results in rank order.

    Raises:
        AssertionError: a rank raised, died or was late; its traceback is in the text.
    """
    with tempfile.TemporaryDirectory() as folder:
        return run_processes(world_size, _in_world, world_size, f"{folder}/store", body, args, timeout_s=timeout_s)


def run_processes(num_processes: int, body: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Run `body(rank, *args)` in processes of no world."""
    world_size = num_processes
    results = _context.SimpleQueue()
    processes = [_context.Process(target=_main, args=(rank, results, body, args)) for rank in range(num_processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout_s)
    late = [process.pid for process in processes if process.exitcode is None]
    for process in processes:
        process.kill()
        process.join()
    told: dict[int, tuple[bool, Any]] = {}
    while not results.empty():
        rank, is_ok, value = results.get()
        told[rank] = (is_ok, value)
    results.close()
    bad = [f"rank {rank}: {value}" for rank, (is_ok, value) in sorted(told.items()) if not is_ok]
    silent = [rank for rank in range(world_size) if rank not in told]
    assert not bad and not silent, "\n".join([*bad, f"silent ranks {silent}, late processes {late}"])
    return [told[rank][1] for rank in range(world_size)]


def _main(rank: int, results: Any, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, True, body(rank, *args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


def _in_world(rank: int, world_size: int, path: str, body: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size, timeout=timedelta(seconds=30))
    result = body(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
    return result
