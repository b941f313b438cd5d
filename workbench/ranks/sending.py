"""Handles of messages that are on their way."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

__all__ = ["Sending"]


class Sending:
    """Messages sent without waiting; holds their bytes until they are taken.

    gloo's `wait` may be called once only: a second call on a send that is done blocks for ever. Here it may be called again.
    """

    def __init__(self) -> None:
        self._works: list[dist.Work] = []
        self._held: list[Tensor] = []

    def add(self, work: dist.Work | None, data: Tensor) -> None:
        """Take charge of one message."""
        if work is not None:
            self._works.append(work)
            self._held.append(data)

    def is_completed(self) -> bool:
        """Whether all were taken, as far as gloo tells."""
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        """Return once all were taken."""
        while self._works:
            self._works.pop(0).wait()
            self._held.pop(0)
