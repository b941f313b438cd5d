"""Engines of ipyparallel with torch imported: python -m benchmarks.peers.ipyparallel_engines NUM_ENGINES NUM_CELLS"""

from __future__ import annotations

import json
import os
import sys
import time

import psutil


def main(num_engines: int, num_cells: int) -> None:
    import ipyparallel  # type: ignore[import-not-found]

    cluster = ipyparallel.Cluster(n=num_engines, log_level=40)
    try:
        client = cluster.start_and_connect_sync()
        view = client[:]
        view.execute("import torch, torch.distributed", block=True)
        ready_s = time.monotonic()
        private_bytes = [psutil.Process(pid).memory_full_info().uss for pid in view.apply_sync(os.getpid)]
        seconds = []
        for _ in range(num_cells):
            start_s = time.monotonic()
            view.execute("x = 1", block=True)
            seconds.append(time.monotonic() - start_s)
    finally:
        cluster.stop_cluster_sync()
    print(json.dumps({"ready_s": ready_s, "private_bytes": private_bytes, "cell_s": seconds}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
