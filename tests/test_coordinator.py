"""Our groups against real vLLM's GroupCoordinator, on 2 and 4 gloo ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_every_operation_gives_what_vllms_gives() -> None:
    script = Path(__file__).with_name("coordinator_reference.py")
    done = subprocess.run([sys.executable, script, "2", "4"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert sorted((size, rank) for size, rank, _, _ in told) == [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)]
    assert all(not differing for _, _, _, differing in told), told
    assert all(count > 400 for _, _, count, _ in told), [row[:3] for row in told]
