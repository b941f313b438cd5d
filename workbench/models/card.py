"""The model card of "tiny": what it does, measured by sampling; `workbench model-card` prints it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from workbench.models.addition import PUPIL, is_right, sample_problems
from workbench.models.paths import path
from workbench.models.recipe import RECIPE, SHAPE

__all__ = ["Score", "completions", "main", "measure", "model_card"]

_LIMITS = (64, 96)
_LONGEST = 256
_SEGMENT_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What was measured on problems of one difficulty.

    Attributes:
        num_digits: digits of both numbers.
        accuracy: share of right answers at temperature 1, with at most 64 tokens.
        greedy_accuracy: the same at temperature 0.
        lengths_tokens: lengths of the sampled completions with at most 256 tokens, the end token included, sorted, [num_problems].
    """

    num_digits: int
    accuracy: float
    greedy_accuracy: float
    lengths_tokens: tuple[int, ...]

    def percentile(self, percent: float) -> int:
        """The length that `percent` % of the completions do not exceed."""
        num = len(self.lengths_tokens)
        return self.lengths_tokens[min(num - 1, int(num * percent / 100))]

    def truncated_share(self, max_tokens: int) -> float:
        """Share of the completions that a limit cuts."""
        return fmean(length > max_tokens for length in self.lengths_tokens)


def completions(folder: Path | str, prompts: Sequence[str], *, max_tokens: int, temperature: float = 1.0, seed: int = 0) -> list[list[int]]:
    """One completion a prompt, with transformers on the CPU.

    Args:
        folder: a checkpoint.
        prompts: [num_prompts].
        temperature: 0 is greedy; else plain sampling from the softmax.

    Returns:
        Token ids, the end token included where it came, [num_prompts][num_tokens].
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    done: list[list[int]] = [[] for _ in prompts]
    unfinished, length = list(range(len(prompts))), 0
    while unfinished and length < max_tokens:  # in segments, so that the few long ones do not make all rows wait
        num_new = min(_SEGMENT_TOKENS, max_tokens - length)
        texts = [{"input_ids": tokenizer(prompts[row])["input_ids"] + done[row]} for row in unfinished]
        inputs = tokenizer.pad(texts, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=num_new, **how)[:, inputs["input_ids"].shape[1] :]
        for row, ids in zip(unfinished, out.tolist(), strict=True):
            end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            done[row] += ids[:end]
        unfinished = [row for row in unfinished if done[row][-1] != tokenizer.eos_token_id]
        length += num_new
    return done


def measure(folder: Path | str, *, num_digits: int, num_problems: int = 1000, seed: int = 1) -> Score:
    """Sample problems of one difficulty, answer them at temperature 1 and 0, and count."""
    problems = sample_problems(num_problems, num_digits=num_digits, seed=seed)
    prompts = [problem.prompt for problem in problems]
    sampled = completions(folder, prompts, max_tokens=_LONGEST, seed=seed)
    greedy = completions(folder, prompts, max_tokens=_LIMITS[0], temperature=0.0)
    return Score(
        num_digits=num_digits,
        accuracy=_accuracy(folder, prompts, sampled),
        greedy_accuracy=_accuracy(folder, prompts, greedy),
        lengths_tokens=tuple(sorted(map(len, sampled))),
    )


def _accuracy(folder: Path | str, prompts: Sequence[str], tokens: Sequence[list[int]]) -> float:
    from transformers import AutoTokenizer

    texts = AutoTokenizer.from_pretrained(folder).batch_decode([ids[: _LIMITS[0]] for ids in tokens], skip_special_tokens=True)
    return fmean(is_right(prompt, text) for prompt, text in zip(prompts, texts, strict=True))
