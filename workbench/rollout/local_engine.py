"""What every engine in this process has in common: its state, the checks before each verb, and the packing after it.

Knows the `Engine` contract. A subclass knows one library and does the work in `_complete`, `_sleep`, `_wake_up` and `_load`.
"""

from __future__ import annotations

import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil

from workbench.errors import EngineError
from workbench.postponing import interrupts_postponed
from workbench.records import EngineMemory, EngineStatus, FinishedCompletion, FinishReason, Prompt, RolloutBatch, Sampling
from workbench.rollout.batch import Completion, pack_completions
from workbench.rollout.checkpoint import Checkpoint
from workbench.rollout.engine import Origin, PhaseTimes
from workbench.rollout.reader import PromptReader
from workbench.rollout.requests import Request, expand, sample_seed
from workbench.rollout.sleep import TAGS

if TYPE_CHECKING:
    import torch

__all__ = ["LocalEngine"]


class LocalEngine(ABC):
    """An `Engine` in this process; a subclass sets `_reader`, `_checkpoint` and `_bytes` and then `_is_started`.

    Attributes:
        on_finished: called with each completion as it ends, while `generate` goes on; None when nobody listens.
    """

    _reader: PromptReader
    _checkpoint: Checkpoint
    _bytes: dict[str, int]  # tag -> bytes when awake

    def __init__(self, model: str) -> None:
        self._model = model
        self._is_started = False
        self._death = ""
        self._asleep: frozenset[str] = frozenset()
        self._level: int | None = None  # of the sleep that lasts; 0 is a pause
        self._is_kept = False  # the weights that sleep are kept on the host
        self._version = 0
        self._entropy = secrets.randbits(62)  # what unseeded samples are drawn from
        self._num_calls = 0
        self._at_step = 0  # of the rollout, as the latest generate was told
        self.on_finished: Callable[[FinishedCompletion], None] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._model}: {self.status}, weights version {self._version}>"

    @property
    def status(self) -> EngineStatus:
        if self._death or not self._is_started:
            return EngineStatus.DEAD
        if self._level is None:
            return EngineStatus.AWAKE
        return EngineStatus.WEIGHTS_ONLY if self._asleep == {"kv_cache"} else EngineStatus.ASLEEP

    @property
    def is_sleeping(self) -> bool:
        return self._level is not None

    @property
    def weight_version(self) -> int:
        return self._version

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        num_samples: Sequence[int] | None = None,
        origins: Sequence[Origin] | None = None,
        step: int = 0,
    ) -> RolloutBatch:
        """See `Engine.generate`. Without `Sampling.seed` each call draws afresh."""
        self._check_awake()
        self._at_step = step
        where = [Origin(rank=0, index=i) for i in range(len(prompts))] if origins is None else list(origins)
        try:
            requests = expand(prompts, sampling, num_samples=num_samples, origins=where, step=step)
        except ValueError as error:
            raise EngineError(str(error)) from error
        ids = self._reader.token_ids(prompts, where)
        lengths = [len(item or ()) for item in ids]
        completions = self._complete(self._seeded(requests, sampling), ids, sampling, lengths) if requests else []
        return pack_completions(
            prompts, requests, completions, num_prompt_tokens=lengths, weight_version=self._version, with_logprobs=sampling.logprobs
        )

    def _tell(self, request: Request, length_tokens: int, finish: FinishReason) -> None:
        """Tell who listens that a completion has ended."""
        if self.on_finished is None:
            return
        self.on_finished(
            FinishedCompletion(
                step=self._at_step,
                origin_rank=request.origin.rank,
                prompt_index=request.origin.index,
                sample_index=request.sample_index,
                length_tokens=length_tokens,
                finish_reason=finish.label,
                at_s=time.monotonic(),
            )
        )

    def _check_awake(self) -> None:
        self._check_alive()
        if self._level is not None:
            raise EngineError(f"generate: the engine is {self._asleep_text()}\ncall wake_up() first")

    def _check_alive(self) -> None:
        if self.status is EngineStatus.DEAD:
            raise EngineError(f"the engine is dead: {self._death or 'it was closed'}\nstart another")

    def _asleep_text(self) -> str:
        what = f": {' and '.join(tag for tag in TAGS if tag in self._asleep)}" if self._asleep else ""
        return f"asleep at sleep level {self._level}{what}"

    def _seeded(self, requests: list[Request], sampling: Sampling) -> list[Request]:
        """Requests with a seed each; fresh ones come from the engine's own entropy, so the process's random states stay untouched."""
        self._num_calls += 1
        if sampling.temperature == 0.0 or sampling.seed is not None:
            return requests
        seeds = (
            sample_seed(self._entropy, self._num_calls, Origin(rank=r.origin.rank, index=r.prompt_index), r.sample_index) for r in requests
        )
        return [replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]

    def sleep(self, level: int = 1) -> PhaseTimes:
        """Give memory back: level 0 pauses only, 1 keeps the weights outside (CPU: a private file; GPU: host memory), 2 discards them.

        After level 2 the checkpoint is read again on wake. Once weights were pushed nobody else holds them, so level 2 then keeps them
        as level 1 does, at its cost.

        Raises:
            EngineError: the level is none of these, the backup has no room, or the engine is dead.
        """
        self._check_alive()
        if isinstance(level, bool) or level not in (0, 1, 2):
            raise EngineError(f"sleep level {level!r} is none of 0 (pause), 1 (weights kept) and 2 (weights discarded)")
        if self._level is not None and (level == 0 or "weights" in self._asleep):
            return _no_op(self._level, f"already asleep at level {self._level}; wake_up() first to sleep at another")
        is_kept = level == 1 or self._version > 0
        with self._whole("sleep"):
            if level == 0:
                self._sleep(0, [])
                self._level = 0
                return _no_op(0, "")
            times = self._sleep(1 if is_kept else 2, [tag for tag in TAGS if tag not in self._asleep])
            self._level, self._asleep, self._is_kept = level, frozenset(TAGS), is_kept
        return replace(times, level=level)

    def wake_up(self, tags: Sequence[str] | None = None) -> PhaseTimes:
        """Bring back "weights", "kv_cache" or, with None, all; the note says what was awake already.

        Raises:
            EngineError: an unknown tag, or the engine is dead.
        """
        self._check_alive()
        if unknown := sorted(set(tags or ()) - set(TAGS)):
            raise EngineError(f"wake_up has no tag {unknown[0]!r}\ntags are 'weights' and 'kv_cache'; None wakes both")
        if self._level is None:
            return _no_op(0, "already awake")
        wanted = [tag for tag in TAGS if tag in self._asleep and (tags is None or tag in tags)]
        left = [tag for tag in tags or () if tag not in wanted]
        note = f"{' and '.join(left)}: awake already" if left else ""
        if self._asleep and not wanted:
            return _no_op(self._level, note)
        with self._whole("wake_up"):
            times = replace(self._wake_up(wanted), level=self._level, note=note)
            self._asleep -= set(wanted)
            if not self._asleep:
                self._level = None
        return times

    @contextmanager
    def _whole(self, verb: str) -> Iterator[None]:
        """An interrupt waits for the end of the block; one that cannot wait any longer leaves an engine of which nobody knows the state."""
        with interrupts_postponed():
            try:
                yield
            except KeyboardInterrupt:
                self._death = f"{verb} was interrupted in its middle"
                raise

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `Engine.update_weights`; a part of the checkpoint's tensors is enough. Caches are reset."""
        self._check_alive()
        if "weights" in self._asleep:
            raise EngineError(f"update_weights: the engine is {self._asleep_text()}\ncall wake_up(['weights']) first")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise EngineError(f"update_weights(version={version!r}): a version is an int of at least 1; 0 is the checkpoint")
        checked = self._checkpoint.check(named_tensors)
        with self._whole("update_weights"):
            try:
                self._load(checked)
            except Exception as error:
                self._death = f"weights of version {version} were written in part: {type(error).__name__}: {error}"
                raise EngineError(f"the engine is dead: {self._death}\nstart another") from error
            self._version = version

    def memory(self) -> EngineMemory:
        """See `EngineMemory`; `other_bytes` holds Python and the libraries themselves."""
        held = frozenset() if self.status is EngineStatus.DEAD else frozenset(TAGS) - self._asleep
        weights, kv_cache = (self._bytes[tag] if tag in held else 0 for tag in TAGS)
        is_kept = self._is_kept and "weights" in self._asleep and self.status is not EngineStatus.DEAD
        return EngineMemory(
            rank=_own_rank(),
            pid=os.getpid(),
            weights_bytes=weights,
            kv_cache_bytes=kv_cache,
            other_bytes=max(0, self._used_bytes() - weights - kv_cache),
            host_backup_bytes=self._bytes["weights"] if is_kept else 0,
        )

    def _used_bytes(self) -> int:
        return int(psutil.Process().memory_full_info().pss)

    @abstractmethod
    def _complete(
        self, requests: Sequence[Request], ids: Sequence[list[int] | None], sampling: Sampling, lengths: list[int]
    ) -> list[Completion]:
        """One completion a request; sets `lengths[prompt]` where `ids` is None."""

    @abstractmethod
    def _sleep(self, level: int, tags: Sequence[str]) -> PhaseTimes:
        """Give back the tags, which are awake; level 0 pauses only."""

    @abstractmethod
    def _wake_up(self, tags: Sequence[str]) -> PhaseTimes:
        """Bring back the tags, which are asleep; none of them after level 0."""

    @abstractmethod
    def _load(self, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
        """Write checked weights in place and reset caches."""

    @abstractmethod
    def close(self) -> None: ...


def _own_rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else -1


def _no_op(level: int, note: str) -> PhaseTimes:
    return PhaseTimes(level=level, weights_s=0.0, kv_cache_s=0.0, tidy_s=0.0, weights_bytes=0, kv_cache_bytes=0, note=note)
