"""A cell to all ranks and back, beside ipyparallel."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

from benchmarks.line import Line, Reach
from benchmarks.peers import NO_IPYPARALLEL, has_ipyparallel, python, run_peer

__all__ = ["CellsResult", "measure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CellsResult:
    """Seconds of each round trip of the cell `x = 1`; ipyparallel's () where it is not installed."""

    num_ranks: int
    cell_s: tuple[float, ...]
    ipyparallel_s: tuple[float, ...]

    def lines(self) -> list[Line]:
        theirs = 1e3 * median(self.ipyparallel_s) if self.ipyparallel_s else None
        return [
            Line(
                what=f"a cell to {self.num_ranks} ranks and back",
                unit="ms",
                ours=1e3 * median(self.cell_s),
                theirs=theirs,
                peer=NO_IPYPARALLEL if theirs is None else "ipyparallel",
                reach=Reach(limit=5.0, is_ours=True),
            )
        ]


def measure(*, num_ranks: int = 8, num_cells: int = 200) -> CellsResult:
    """Half of ours, theirs, the other half of ours."""
    first = _cells(num_ranks, num_cells // 2)
    theirs: list[float] = []
    if has_ipyparallel():
        theirs = run_peer(python("-m", "benchmarks.peers.ipyparallel_engines", str(num_ranks), str(num_cells))).values["cell_s"]
    return CellsResult(num_ranks=num_ranks, cell_s=(*first, *_cells(num_ranks, num_cells - num_cells // 2)), ipyparallel_s=tuple(theirs))


def _cells(num_ranks: int, num_cells: int) -> list[float]:
    import workbench as wb

    seconds = []
    with wb.launch(num_ranks) as cluster:
        cluster.execute("x = 0")
        for _ in range(num_cells):
            start_s = time.monotonic()
            cluster.execute("x = 1")
            seconds.append(time.monotonic() - start_s)
    return seconds
