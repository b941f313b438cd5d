"""Plain torch under torchrun: when its ranks are ready, and how long plain collectives take.

torchrun --nproc-per-node NUM_RANKS -m benchmarks.peers.torchrun_ranks NUM_CALLS NUM_BATCHES NUM_BYTES...
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.distributed as dist

from benchmarks.collectives import Way, seconds_per_call


def main(num_calls: int, num_batches: int, *sizes: int) -> None:
    dist.init_process_group("gloo")
    dist.barrier()
    ready_s = torch.tensor(time.monotonic(), dtype=torch.float64)
    torch.set_num_threads(1)
    dist.all_reduce(ready_s, dist.ReduceOp.MAX)
    timed = {str(size): {way: seconds_per_call(way, size, num_calls=num_calls, num_batches=num_batches) for way in Way} for size in sizes}
    if dist.get_rank() == 0:
        print(json.dumps({"ready_s": ready_s.item(), "seconds": timed}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
