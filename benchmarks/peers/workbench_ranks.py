"""Ranks of the workbench from a fresh interpreter: python -m benchmarks.peers.workbench_ranks NUM_RANKS"""

from __future__ import annotations

import json
import sys
import time


def main(num_ranks: int) -> None:
    import workbench as wb

    with wb.launch(num_ranks):
        ready_s = time.monotonic()
    print(json.dumps({"ready_s": ready_s}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
