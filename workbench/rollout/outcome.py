"""What a session compares of an engine's calls: what must be the same when they are made again, not times nor measured bytes.

Knows the records of the calls. Does not know sessions' files, nor engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from workbench.ranks.history import Told
from workbench.records import RolloutBatch, Sampling
from workbench.rollout.engine import PhaseTimes
from workbench.run import count

if TYPE_CHECKING:
    import torch

__all__ = ["told_batch", "told_phase", "told_weights"]


def told_batch(batch: RolloutBatch, sampling: Sampling) -> Told:
    """Completions with all that stands beside them; the prompts were given, and their hashes are in it."""
    if sampling.temperature and sampling.seed is None:
        return Told(
            text=f"{count(len(batch), 'completion')} of {count(len(batch.prompts), 'prompt')}",
            reason="it was drawn without a seed; Sampling(seed=...) makes completions that can be compared",
        )
    return Told(text=repr(batch.texts), content=replace(batch, prompts=()))


def told_phase(status: str, times: PhaseTimes) -> Told:
    """How the engine is after a sleep or wake; the size of its KV cache depends on what memory was free when it started."""
    return Told(text=f"{status}, level {times.level}" + (f" ({times.note})" if times.note else ""))


def told_weights(pairs: Sequence[tuple[str, torch.Tensor]], version: int) -> Told:
    """The tensors that were given."""
    num_bytes = sum(tensor.numel() * tensor.element_size() for _, tensor in pairs)
    return Told(text=f"{count(len(pairs), 'tensor')}, {count(num_bytes, 'byte')}, version {version}", content=[version, *pairs])
