"""What every engine can do; the pipeline knows no more of one than this.

Knows the verbs and their records. Does not know vLLM, transformers or processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from workbench.records import EngineMemory, EngineStatus, Prompt, RolloutBatch, Sampling

if TYPE_CHECKING:
    import torch

__all__ = ["Engine", "Origin", "PhaseTimes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a prompt came from: `index` into the prompts of `rank`."""

    rank: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimes:
    """How long one sleep or wake took, seconds, and what it moved, bytes.

    Attributes:
        level: the sleep's level, also on the wake after it.
        weights_s: giving back or restoring the weights (level 1: with the file written or read and synced).
        kv_cache_s: giving back or committing the KV cache.
        tidy_s: garbage collection and returning freed pages to the system.
        weights_bytes, kv_cache_bytes: bytes that this call gave back or brought back; 0 when it changed nothing.
        note: said to the user when the call was a no-op ("already asleep at level 1"), else "".
    """

    level: int
    weights_s: float
    kv_cache_s: float
    tidy_s: float
    weights_bytes: int
    kv_cache_bytes: int
    note: str = ""


@runtime_checkable
class Engine(Protocol):
    """An engine: prompts in, packed completions out; it can sleep, wake and take new weights."""

    @property
    def status(self) -> EngineStatus: ...

    @property
    def is_sleeping(self) -> bool: ...

    @property
    def weight_version(self) -> int:
        """Version of the weights in use; 0 is the checkpoint."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        num_samples: Sequence[int] | None = None,
        origins: Sequence[Origin] | None = None,
        step: int = 0,
    ) -> RolloutBatch:
        """Complete prompts.

        Args:
            prompts: [num_prompts]; may be empty.
            num_samples: completions per prompt, [num_prompts], 0 allowed; None takes `sampling.n`.
            origins: rank and index of each prompt, [num_prompts]; None numbers them on rank 0. They seed the samples and are the
                provenance.
            step: rollout step; part of every sample's seed.

        Returns:
            Completions prompt by prompt, sample by sample; `origin_ranks` and `origin_indices` repeat `origins`, `prompt_index` counts in
            `prompts`.

        Raises:
            EngineError: asleep (text names `wake_up`), dead, or a prompt that cannot be read (text names it and the limit in tokens).
        """
        ...

    def sleep(self, level: int = 1) -> PhaseTimes: ...

    def wake_up(self, tags: Sequence[str] | None = None) -> PhaseTimes: ...

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace weights, all or nothing.

        Args:
            named_tensors: checkpoint names and full (unsharded) tensors.
            version: at least 1; stands on every later completion.

        Raises:
            EngineError: a name, shape or dtype does not fit; the old weights stay.
        """
        ...

    def memory(self) -> EngineMemory: ...

    def close(self) -> None: ...
