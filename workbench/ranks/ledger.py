"""The collective ledger: what every rank's last collectives cost, as a table and as a trace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.ranks.board import Board
from workbench.ranks.messages import GroupFormed

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ledger_frame", "write_perfetto"]

_COLUMNS = ("rank", "op", "group", "sequence", "num_bytes", "start_s", "skew_s", "wait_s", "duration_s", "cell", "line")


def ledger_frame(board: Board, groups: Mapping[int, GroupFormed], *, since_s: float) -> pd.DataFrame:
    """A row a collective and rank.

    Columns: num_bytes of this rank's tensors; start_s after `since_s` on the monotonic clock; skew_s after the first member that arrived;
    wait_s until the last peer had arrived (of an asynchronous call: while it was waited for; of a send, and where calls are not checked:
    the moving of data too); duration_s in all.
    """
    import pandas as pd

    from workbench.ranks.operations import LEDGER_NAMES as names

    since_ns = int(since_s * 1e9)
    held = {rank: board.ledger_rows(rank) for rank in range(board.world_size)}
    first: dict[tuple[int, int], int] = {}
    for _, key, sequence, _, start, *_ in (row for own in held.values() for row in own):
        first[key, sequence] = min(start, first.get((key, sequence), start))
    rows = []
    for rank, own in held.items():
        for op, key, sequence, size, start, arrived, end, where in own:
            group = groups[key].name if key in groups else "(earlier generation)"
            times = [t / 1e9 for t in (start - since_ns, start - first[key, sequence], arrived - start, end - start)]
            rows.append((rank, names[op], group, sequence, size, *times, where >> 20, where & 0xFFFFF))
    return pd.DataFrame(rows, columns=list(_COLUMNS)).sort_values(["start_s", "rank"], ignore_index=True)


def write_perfetto(frame: pd.DataFrame, path: Path) -> Path:
    """Chrome's trace-event JSON: a process a rank, a slice a collective, its wait inside it. Times in microseconds."""
    events: list[dict[str, Any]] = []
    for rank in sorted(set(frame["rank"])):
        events.append({"ph": "M", "name": "process_name", "pid": int(rank), "args": {"name": f"rank {rank}"}})
    first = float(frame.start_s.min()) if len(frame) else 0.0
    for rank, op, group, sequence, size, start_s, skew_s, wait_s, duration_s, cell, line in zip(
        *(frame[c].tolist() for c in _COLUMNS), strict=True
    ):
        common = {"ph": "X", "pid": rank, "tid": 0, "ts": (start_s - first) * 1e6}
        args = {"group": group, "sequence": sequence, "bytes": size, "skew_us": skew_s * 1e6, "cell": cell, "line": line}
        events.append({**common, "name": op, "dur": duration_s * 1e6, "args": args})
        if wait_s > 0:
            events.append({**common, "name": "wait", "dur": wait_s * 1e6})
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    return path
