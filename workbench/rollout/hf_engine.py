"""transformers in this process as an `Engine`: slower than vLLM, readable, and equal to it to the token in float32.

Knows transformers. Does not know ranks or vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from workbench import models
from workbench.errors import EngineError
from workbench.records import FinishReason, Sampling
from workbench.rollout.batch import Completion
from workbench.rollout.checkpoint import Checkpoint
from workbench.rollout.engine import PhaseTimes
from workbench.rollout.local_engine import LocalEngine
from workbench.rollout.reader import PromptReader
from workbench.rollout.requests import Request
from workbench.rollout.sleep import TAGS, Sleeper, default_backup_dir, tidy

__all__ = ["HFEngine", "pick_tokens"]


class HFEngine(LocalEngine):
    """One transformers model in this process.

    Its KV cache lives only while it generates, so sleep gives back the weights alone.

    Args:
        model: "tiny", a folder or a hub name.
        dtype: None is float32.
        max_model_len: prompt and completion together, tokens; None is the model's own limit.
        max_batch: completions that are generated side by side.
        backup_dir: a folder on a disk for the weights at sleep level 1; None takes a temporary folder that is no tmpfs.
        device: "auto" and "cpu" run on the CPU.

    Raises:
        EngineError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "tiny",
        *,
        dtype: str | None = None,
        max_model_len: int | None = None,
        max_batch: int = 64,
        backup_dir: str | os.PathLike[str] | None = None,
        device: str = "auto",
    ) -> None:
        super().__init__(str(models.path(model)))
        if device not in ("auto", "cpu"):
            raise EngineError(f"device={device!r}: this engine runs on the CPU\npass device='cpu', or use the vLLM engine")
        self._checkpoint = Checkpoint.read(self._model)
        self._max_batch = max_batch
        self._net = _load_model(self._model, getattr(torch, dtype or "float32"))
        limit = max_model_len or int(self._net.config.max_position_embeddings)
        self._reader = PromptReader(_load_tokenizer(self._model), self._model, limit)
        self._ends = _end_tokens(self._net, self._reader.tokenizer)
        self._sleeper = Sleeper(
            weights=self._net.parameters(),
            kept=self._net.buffers(),
            backup_dir=Path(backup_dir or default_backup_dir()),
            reload=self._reload,
        )
        self._bytes = {tag: self._sleeper.num_bytes(tag) for tag in TAGS}
        self._is_started = True
        tidy()

    def _complete(
        self, requests: Sequence[Request], ids: Sequence[list[int] | None], sampling: Sampling, lengths: list[int]
    ) -> list[Completion]:
        rows = [_Row(request, _text_ids(ids[request.prompt_index], request)) for request in requests]
        for start in range(0, len(rows), self._max_batch):
            self._generate(rows[start : start + self._max_batch], sampling)
        return [self._finished(row, sampling) for row in rows]

    @torch.inference_mode()
    def _generate(self, rows: Sequence[_Row], sampling: Sampling) -> None:
        """Grow rows side by side: prompts padded on the left, then a token each, until all have ended."""
        longest = max(len(row.prompt) for row in rows)
        given = torch.tensor([[0] * (longest - len(row.prompt)) + row.prompt for row in rows])
        mask = torch.tensor([[0] * (longest - len(row.prompt)) + [1] * len(row.prompt) for row in rows])
        positions, cache = (mask.cumsum(1) - 1).clamp(min=0), None
        while True:
            out = self._net(input_ids=given, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1].float()
            tokens = self._step(rows, logits, sampling)
            if all(row.finish is not None for row in rows):
                return
            given, positions = tokens[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(given)], dim=1)

    def _step(self, rows: Sequence[_Row], logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        """Pick a token a row and give it to the rows that still run; returns all, [num_rows]."""
        logprobs = logits.log_softmax(-1) if sampling.logprobs else None
        if sampling.min_tokens and len(rows[0].tokens) < sampling.min_tokens:
            logits[:, list(self._ends)] = -torch.inf
        tokens = pick_tokens(logits, sampling, [row.generator for row in rows])
        for index, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if row.finish is None:
                row.tokens.append(token)
                if logprobs is not None:
                    row.logprobs.append(float(logprobs[index, token]))
                self._check_end(row, sampling)
                if row.finish is not None:
                    self._tell(row.request, len(row.tokens), row.finish)
        return tokens

    def _check_end(self, row: _Row, sampling: Sampling) -> None:
        is_end = row.tokens[-1] in self._ends and not sampling.ignore_eos
        is_long_enough = len(row.tokens) >= sampling.min_tokens
        if is_end or (sampling.stop and is_long_enough and any(stop in self._text(row) for stop in sampling.stop)):
            row.finish = FinishReason.STOP
        elif len(row.tokens) >= sampling.max_tokens or len(row.prompt) + len(row.tokens) >= self._reader.max_model_len:
            row.finish = FinishReason.LENGTH

    def _text(self, row: _Row) -> str:
        return str(self._reader.tokenizer.decode(row.tokens, skip_special_tokens=True))

    def _finished(self, row: _Row, sampling: Sampling) -> Completion:
        assert row.finish is not None
        text = self._text(row)
        cuts = [text.index(stop) for stop in sampling.stop if stop in text] if row.finish is FinishReason.STOP else []
        text = text[: min(cuts)] if cuts else text
        return Completion(row.tokens, text, row.finish, row.request.prompt_hash, row.logprobs if sampling.logprobs else None)

    def _sleep(self, level: int, tags: Sequence[str]) -> PhaseTimes:
        if level == 0:
            return PhaseTimes(level=0, weights_s=0.0, kv_cache_s=0.0, tidy_s=0.0, weights_bytes=0, kv_cache_bytes=0)
        return self._sleeper.sleep(level)

    def _wake_up(self, tags: Sequence[str]) -> PhaseTimes:
        return self._sleeper.wake_up(tags)

    def _reload(self) -> None:
        self._load(list(models.state_dict(self._checkpoint.folder).items()))

    def _load(self, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
        own = self._net.state_dict(keep_vars=True)
        missing = [name for name, _ in named_tensors if name not in own]
        if missing:
            raise EngineError(f"weight {missing[0]!r} of the checkpoint has no parameter of that name in transformers' model")
        with torch.no_grad():
            for name, tensor in named_tensors:
                own[name].copy_(tensor)

    def close(self) -> None:
        """Drop the model; may be called twice."""
        if sleeper := self.__dict__.pop("_sleeper", None):
            sleeper.close()
        self.__dict__.pop("_net", None)
        self._is_started = False
        tidy()


@dataclass(slots=True)
class _Row:
    """One completion as it grows."""

    request: Request
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    finish: FinishReason | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.request.seed is not None:
            self.generator.manual_seed(self.request.seed)


def _text_ids(ids: list[int] | None, request: Request) -> list[int]:
    if ids is None:
        where = f"prompt {request.origin.index} of rank {request.origin.rank}"
        raise EngineError(f"{where} has images; this engine reads text only\nuse the vLLM engine")
    return ids


def pick_tokens(logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """The next token of each row, [num_rows].

    Drawn as argmax of p / e with e exponential from the row's own generator, so a sample does not depend on its neighbours. Same
    distribution as vLLM, other noise: with equal seeds the two engines agree in greedy tokens only.

    Args:
        logits: [num_rows, vocabulary].
    """
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.min_p > 0.0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), -torch.inf)
    if sampling.top_k > 0:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1.0:
        logits = _keep_top_p(logits, sampling.top_p)
    noise = torch.stack([torch.empty(logits.shape[-1]).exponential_(generator=generator) for generator in generators])
    return (logits.softmax(-1) / noise).argmax(-1)


def _keep_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the most likely tokens until their sum reaches top_p; one at least."""
    ordered, order = logits.sort(dim=-1)
    mass = ordered.softmax(-1).cumsum(-1)  # from the least likely up
    drop = mass <= 1 - top_p
    drop[:, -1] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)


def _load_model(model: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        net = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except Exception as error:
        raise EngineError(f"transformers could not load {model!r}: {type(error).__name__}: {error}") from error
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    for parameter in net.parameters():  # memory of its own: what is mapped from the checkpoint's file could not be written again
        parameter.data = parameter.data.clone()
    return net.eval().requires_grad_(False)


def _load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _end_tokens(net: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a completion: of the generation settings, the configuration and the tokenizer."""
    found: set[int] = set()
    for holder in (net.generation_config, net.config, tokenizer):
        ends = getattr(holder, "eos_token_id", None)
        found |= set(ends) if isinstance(ends, list) else {ends} if ends is not None else set()
    return frozenset(found)
