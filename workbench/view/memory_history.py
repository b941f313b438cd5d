"""Memory samples turned into what a page draws: layers and points; bounded, ever coarser further back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from workbench.records import MemorySample
from workbench.view.style import PROCESS_COLORS, rank_blocks

__all__ = ["MemoryHistory", "Point"]

MIB = 2**20
MAX_POINTS = 1200  # of 720 pixels

Point = tuple[float, list[float], float]  # seconds, MiB (PSS) of each layer, MiB on GPUs of all processes


class MemoryHistory:
    """Engines lowest, then ranks (or blocks of neighbours), then the driver; as `plot_memory` stacks them.

    A sampler reads all its processes at one time, so samples of one time make one point.
    """

    def __init__(self, *, start_s: float, num_ranks: int = 0) -> None:
        self._start_s = start_s
        self._num_ranks = num_ranks
        self._samples: list[tuple[MemorySample, ...]] = []

    @property
    def latest_s(self) -> float:
        """Time of the last sample on the records' clock, -inf before the first."""
        return self._samples[-1][0].time_s if self._samples else float("-inf")

    @property
    def samples(self) -> list[MemorySample]:
        """All that are kept, in order of time."""
        return [sample for tick in self._samples for sample in tick]

    def add(self, samples: Iterable[MemorySample]) -> list[Point]:
        """Take in samples in order of time; their points."""
        fresh = [tuple(group) for _, group in groupby(samples, key=lambda sample: sample.time_s)]
        self._num_ranks = max([self._num_ranks, *(s.rank + 1 for tick in fresh for s in tick if s.process == "rank")])
        self._samples += fresh
        if len(self._samples) > MAX_POINTS:
            half = len(self._samples) // 2
            self._samples = self._samples[:half:2] + self._samples[half:]
        return [self._point(tick) for tick in fresh]

    def layers(self) -> list[dict[str, str]]:
        """Name and colour of each layer, the lowest first."""
        blocks = [{"name": block.label, "color": block.color} for block in rank_blocks(range(self._num_ranks))]
        return [{"name": "engine", "color": PROCESS_COLORS["engine"]}, *blocks, {"name": "driver", "color": PROCESS_COLORS["driver"]}]

    def points(self) -> list[Point]:
        return [self._point(tick) for tick in self._samples]

    def _point(self, tick: Sequence[MemorySample]) -> Point:
        blocks = rank_blocks(range(self._num_ranks))
        place = {rank: 1 + index for index, block in enumerate(blocks) for rank in block.ranks}
        held = [0.0] * (len(blocks) + 2)
        for sample in tick:
            layer = place[sample.rank] if sample.process == "rank" else 0 if sample.process == "engine" else -1
            held[layer] += sample.pss_bytes / MIB
        device = sum(sample.device_used_bytes for sample in tick) / MIB
        return round(tick[0].time_s - self._start_s, 2), [round(mib, 1) for mib in held], round(device, 1)
