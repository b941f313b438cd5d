"""How many cores this process may use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["num_usable_cores"]

_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))  # of a container: control groups 2, and 1


def num_usable_cores(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Those it is bound to, and no more than its container's share of processor time is worth.

    Args:
        folder: where the container's control group is mounted.
    """
    bound = len(os.sched_getaffinity(0))
    for names in _QUOTAS:
        with suppress(OSError, ValueError):  # not there; or "max", -1: no limit
            quota, period = (int(word) for name in names for word in (folder / name).read_text().split())
            if quota > 0 and period > 0:
                return max(1, min(bound, quota // period))
    return bound
