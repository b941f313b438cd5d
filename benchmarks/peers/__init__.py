"""The same work done by others, each in an interpreter of its own, which prints one JSON object as its last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["NO_IPYPARALLEL", "Answer", "has_ipyparallel", "python", "run_peer", "torchrun"]

NO_IPYPARALLEL = "not installed: pip install ipyparallel"
_ROOT = Path(__file__).resolve().parents[2]
_LIMIT_S = 400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a peer printed, and when its interpreter was started (monotonic clock, the same in all processes)."""

    started_s: float
    values: dict[str, Any]


def has_ipyparallel() -> bool:
    return find_spec("ipyparallel") is not None


def python(*arguments: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *arguments]


def torchrun(num_ranks: int, module: str, *arguments: str) -> list[str]:
    """A command that runs a module under torchrun."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m", module, *arguments)


def run_peer(command: list[str], *, limit_s: float = _LIMIT_S) -> Answer:
    """Run a peer to its end.

    Raises:
        RuntimeError: it failed; its last words are in the text.
        subprocess.TimeoutExpired: it took longer than `limit_s`.
    """
    with tempfile.TemporaryDirectory(prefix="workbench-bench-") as folder:  # torchrun leaves its own behind
        started_s = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env={**environment(), "TMPDIR": folder})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return Answer(started_s=started_s, values=json.loads(lines[-1]))


def environment() -> dict[str, str]:
    """This process's, with the package and the benchmarks importable; TORCH_* and thread settings are the peers' own."""
    paths = [str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
