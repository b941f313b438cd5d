"""How long until ranks are ready, and what an idle one holds, beside torchrun and ipyparallel."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

from benchmarks.line import Line, Reach
from benchmarks.peers import NO_IPYPARALLEL, Answer, has_ipyparallel, python, run_peer, torchrun

__all__ = ["LaunchResult", "measure"]

_MB = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchResult:
    """Seconds from the start of an interpreter to ranks that are ready (torch imported; group made, but in ipyparallel), a number a repeat.

    Attributes:
        warm_s, warm_many_s: seconds of `wb.launch` in a driver that has launched before, of `num_ranks` and `num_ranks_many`.
        private_bytes: memory of one idle rank that nobody shares, a number a rank.
        ipyparallel_s, ipyparallel_bytes: () where it is not installed.
    """

    num_ranks: int
    num_ranks_many: int
    ready_s: tuple[float, ...]
    torchrun_s: tuple[float, ...]
    ipyparallel_s: tuple[float, ...]
    warm_s: tuple[float, ...]
    warm_many_s: tuple[float, ...]
    private_bytes: tuple[int, ...]
    ipyparallel_bytes: tuple[int, ...]

    def lines(self) -> list[Line]:
        ready, ipp = median(self.ready_s), (median(self.ipyparallel_s) if self.ipyparallel_s else None)
        ipp_bytes = median(self.ipyparallel_bytes) / _MB if self.ipyparallel_bytes else None
        peer = "ipyparallel" if self.ipyparallel_s else NO_IPYPARALLEL
        what = f"{self.num_ranks} ranks ready, from a fresh interpreter"
        return [
            Line(what=what, unit="s", ours=ready, theirs=ipp, peer=peer, reach=Reach(limit=1 / 8)),
            Line(what=what, unit="s", ours=ready, theirs=median(self.torchrun_s), peer="torchrun", reach=Reach(limit=1 / 4)),
            Line(what=f"the second launch({self.num_ranks})", unit="s", ours=median(self.warm_s), reach=Reach(limit=0.5, is_ours=True)),
            Line(
                what=f"a later launch({self.num_ranks_many})", unit="s", ours=median(self.warm_many_s), reach=Reach(limit=3.0, is_ours=True)
            ),
            Line(
                what="private memory of an idle rank",
                unit="MB",
                ours=median(self.private_bytes) / _MB,
                theirs=ipp_bytes,
                peer=peer,
                reach=Reach(limit=12.0, is_ours=True),
            ),
        ]


def measure(*, num_ranks: int = 8, num_ranks_many: int = 64, repeats: int = 3) -> LaunchResult:
    """Start ranks in turns by all three, then launch again and again in this driver."""
    ours, theirs, ipp = [], [], []
    for _ in range(repeats):
        ours.append(_ready_s(run_peer(python("-m", "benchmarks.peers.workbench_ranks", str(num_ranks)))))
        theirs.append(_ready_s(run_peer(torchrun(num_ranks, "benchmarks.peers.torchrun_ranks", "1", "0"))))
        if has_ipyparallel():
            ipp.append(run_peer(python("-m", "benchmarks.peers.ipyparallel_engines", str(num_ranks), "0")))
    private_bytes = _launch(num_ranks)[1]  # and the fork server is warm
    return LaunchResult(
        num_ranks=num_ranks,
        num_ranks_many=num_ranks_many,
        ready_s=tuple(ours),
        torchrun_s=tuple(theirs),
        ipyparallel_s=tuple(map(_ready_s, ipp)),
        warm_s=tuple(_launch(num_ranks)[0] for _ in range(max(repeats, 2 * repeats - 1))),
        warm_many_s=tuple(_launch(num_ranks_many)[0] for _ in range(repeats)),
        private_bytes=tuple(private_bytes),
        ipyparallel_bytes=tuple(size for answer in ipp for size in answer.values["private_bytes"]),
    )


def _ready_s(answer: Answer) -> float:
    return float(answer.values["ready_s"]) - answer.started_s


def _launch(num_ranks: int) -> tuple[float, list[int]]:
    """Seconds of one launch, and the private bytes of its ranks."""
    import workbench as wb

    start_s = time.monotonic()
    with wb.launch(num_ranks) as cluster:
        seconds = time.monotonic() - start_s
        return seconds, [status.private_bytes for status in cluster.status()]
