"""An engine without a model, for tests of the pipeline only: what it writes is a hash of the prompt, the seed and the weights.

It follows the `Engine` contract to the letter (the contract tests run on it too), so that a pipeline test fails for the pipeline's reasons.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from workbench.errors import EngineError
from workbench.records import EngineMemory, EngineStatus, FinishReason, Prompt, RolloutBatch, Sampling
from workbench.rollout.batch import Completion, pack_completions
from workbench.rollout.engine import Origin, PhaseTimes
from workbench.rollout.requests import Request, expand, prompt_hash

ALPHABET = "0123456789+-=, "
END = len(ALPHABET)


class ScriptedEngine:
    """Writes characters of a small alphabet until a hash says stop.

    Args:
        max_model_len: prompt and completion together, tokens (a character of text is a token).
        fails_on: a text; a batch with a prompt that contains it raises RuntimeError, as an engine that chokes on one prompt does.
        mean_length: completions end after about this many tokens.
    """

    def __init__(self, *, max_model_len: int = 4096, fails_on: str | None = None, mean_length: int = 12) -> None:
        self.weights = {"model.embed_tokens.weight": torch.arange(32.0).reshape(8, 4), "lm_head.weight": torch.ones(8, 4)}
        self.calls: list[int] = []  # prompts of each generate
        self._max_model_len = max_model_len
        self._fails_on = fails_on
        self._mean_length = mean_length
        self._version = 0
        self._level: int | None = None
        self._asleep: set[str] = set()
        self._is_closed = False
        self._unseeded = 0

    @property
    def status(self) -> EngineStatus:
        if self._is_closed:
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
        if self._is_closed:
            raise EngineError("the engine is closed")
        if self._level is not None:
            raise EngineError(f"generate: the engine is asleep at sleep level {self._level}\ncall wake_up() first")
        requests = expand(prompts, sampling, num_samples=num_samples, origins=origins, step=step)
        self.calls.append(len(prompts))
        lengths = [len(_read(prompt)) for prompt in prompts]
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            if length >= self._max_model_len:
                raise EngineError(f"prompt {index} has {length} tokens; the model reads {self._max_model_len}, one kept for the answer")
            if self._fails_on is not None and self._fails_on in str(prompt):
                raise RuntimeError(f"the engine chokes on a prompt with {self._fails_on!r}")
        completions = [self._complete(request, sampling) for request in requests]
        return pack_completions(
            prompts,
            requests,
            completions,
            num_prompt_tokens=np.array(lengths, np.int32),
            weight_version=self._version,
            with_logprobs=sampling.logprobs,
        )

    def _complete(self, request: Request, sampling: Sampling) -> Completion:
        draw = self._generator(request, sampling)
        tokens: list[int] = []
        text, finish = "", FinishReason.LENGTH
        while len(tokens) < sampling.max_tokens:
            is_end = draw.random() < 1 / self._mean_length and len(tokens) >= sampling.min_tokens
            token = END if is_end and not sampling.ignore_eos else int(draw.integers(len(ALPHABET)))
            tokens.append(token)
            if token == END:
                finish = FinishReason.STOP
                break
            text += ALPHABET[token]
            if ended := [s for s in sampling.stop if text.endswith(s)]:
                text, finish = text.removesuffix(ended[0]), FinishReason.STOP
                break
        logprobs = [-float(x) for x in draw.random(len(tokens))] if sampling.logprobs else None
        return Completion(tokens, text, finish, prompt_hash(request.prompt), logprobs)

    def _generator(self, request: Request, sampling: Sampling) -> np.random.Generator:
        seed = 0 if sampling.temperature == 0.0 else request.seed
        if seed is None:
            self._unseeded += 1
            seed = -self._unseeded
        weights = hashlib.blake2b(b"".join(w.numpy().tobytes() for w in self.weights.values()), digest_size=8).hexdigest()
        key = f"{request.prompt_hash},{seed},{weights}".encode()
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little"))

    def sleep(self, level: int = 1) -> PhaseTimes:
        if self._level is not None and (level == 0 or "weights" in self._asleep):
            return _times(self._level, note=f"already asleep at level {self._level}")
        self._level = level
        self._asleep = {"weights", "kv_cache"} if level else set()
        return _times(level, weights=256 if level else 0, kv_cache=1024 if level else 0)

    def wake_up(self, tags: Sequence[str] | None = None) -> PhaseTimes:
        if self._level is None:
            return _times(0, note="already awake")
        wanted = self._asleep & set(tags if tags is not None else self._asleep)
        if self._asleep and not wanted:
            return _times(self._level, note="awake already")
        level = self._level
        self._asleep -= wanted
        self._level = level if self._asleep else None
        return _times(level, weights=256 * ("weights" in wanted), kv_cache=1024 * ("kv_cache" in wanted))

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        new = dict(named_tensors)
        for name, tensor in new.items():
            if name not in self.weights:
                raise EngineError(f"no tensor {name!r} in the model; it has {sorted(self.weights)}")
            if tensor.shape != self.weights[name].shape:
                raise EngineError(f"{name!r} has shape {tuple(tensor.shape)}; the model's is {tuple(self.weights[name].shape)}")
        self.weights |= {name: tensor.clone() for name, tensor in new.items()}
        self._version = version

    def memory(self) -> EngineMemory:
        held = {"weights", "kv_cache"} - self._asleep
        return EngineMemory(
            rank=-1,
            pid=os.getpid(),
            weights_bytes=256 * ("weights" in held),
            kv_cache_bytes=1024 * ("kv_cache" in held),
            other_bytes=0,
            host_backup_bytes=256 if self._level == 1 and "weights" in self._asleep else 0,
        )

    def close(self) -> None:
        self._is_closed = True


def _read(prompt: Prompt) -> Sequence[object]:
    if isinstance(prompt, dict):
        return str(prompt.get("prompt", prompt.get("messages")))
    return prompt


def _times(level: int, *, weights: int = 0, kv_cache: int = 0, note: str = "") -> PhaseTimes:
    return PhaseTimes(level=level, weights_s=0.0, kv_cache_s=0.0, tidy_s=0.0, weights_bytes=weights, kv_cache_bytes=kv_cache, note=note)
