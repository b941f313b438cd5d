"""Objects and tensor dicts through vLLM's GroupCoordinator, under torchrun; arguments are BYTES:CALLS."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import torch
import torch.distributed as dist
from vllm.distributed.parallel_state import GroupCoordinator

from benchmarks.groups import make_inputs, seconds_of


def calls_of(group: GroupCoordinator, inputs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    rank = group.rank

    def send() -> Any:
        return group.send_object(inputs["object"], 1) if rank == 0 else group.recv_object(0) if rank == 1 else None

    return {
        "broadcast_object": lambda: group.broadcast_object(inputs["object"] if rank == 0 else None),
        "send_object": send,
        "broadcast_tensor_dict": lambda: group.broadcast_tensor_dict(inputs["tensors"] if rank == 0 else None),
    }


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    group = GroupCoordinator([list(range(num_ranks))], rank, "gloo", use_device_communicator=True, group_name="bench")
    seconds = {}
    for argument in sys.argv[1:]:
        size, num_calls = map(int, argument.split(":"))
        for name, call in calls_of(group, make_inputs(rank, num_ranks, size)).items():
            found = [torch.empty(num_calls, dtype=torch.float64) for _ in range(num_ranks)]
            dist.all_gather(found, torch.tensor(seconds_of([call], num_calls)[0], dtype=torch.float64))
            seconds[f"{size} {name}"] = torch.stack(found).amax(0).tolist()
    if rank == 0:
        print(json.dumps({"seconds": seconds}), flush=True)
    dist.destroy_process_group()


main()
