"""Generation that survives a bad prompt: a failing batch is halved until the prompt that fails is alone.

Knows the `Engine` protocol. Does not know why a prompt fails.
"""

from __future__ import annotations

from collections.abc import Sequence

from workbench.errors import EngineError
from workbench.records import EngineStatus, Prompt, RolloutBatch, Sampling
from workbench.rollout.batch import concat, failed_batch
from workbench.rollout.engine import Engine, Origin
from workbench.rollout.requests import expand

__all__ = ["generate_bisected"]


def generate_bisected(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    num_samples: Sequence[int] | None = None,
    origins: Sequence[Origin] | None = None,
    step: int = 0,
) -> RolloutBatch:
    """`engine.generate`, but prompts that fail come back as failed completions (`FinishReason.ERROR`) beside the others.

    Samples are the same as without a failure, for a sample's seed depends on its origin alone. One bad prompt among n costs
    about 2 log2(n) further calls.

    Raises:
        EngineError: the engine is asleep or dead; a retry could not help.
        ValueError: num_samples or origins do not fit the prompts.
    """
    where = [Origin(rank=0, index=i) for i in range(len(prompts))] if origins is None else list(origins)
    counts = [sampling.n] * len(prompts) if num_samples is None else list(num_samples)
    expand([""] * len(prompts), sampling, num_samples=counts, origins=where)  # one error for all, before any is generated
    return _generate(engine, list(prompts), sampling, counts, where, step)


def _generate(
    engine: Engine, prompts: list[Prompt], sampling: Sampling, counts: list[int], origins: list[Origin], step: int
) -> RolloutBatch:
    try:
        return engine.generate(prompts, sampling, num_samples=counts, origins=origins, step=step)
    except (EngineError, ValueError, TypeError, RuntimeError) as error:
        if engine.status is not EngineStatus.AWAKE or not prompts:
            raise
        if len(prompts) == 1:
            return _failed(engine, prompts[0], sampling, counts[0], origins[0], str(error))
    half = len(prompts) // 2
    parts = (slice(None, half), slice(half, None))
    return concat([_generate(engine, prompts[p], sampling, counts[p], origins[p], step) for p in parts])


def _failed(engine: Engine, prompt: Prompt, sampling: Sampling, count: int, origin: Origin, error: str) -> RolloutBatch:
    try:
        requests = expand([prompt], sampling, num_samples=[count], origins=[origin])
    except ValueError:  # what is no prompt at all keeps its place under the hash of an empty text
        requests = expand([""], sampling, num_samples=[count], origins=[origin])
    return failed_batch([prompt], requests, error, weight_version=engine.weight_version, with_logprobs=sampling.logprobs)
