"""The model card of "tiny": what it does, measured by sampling; `workbench model-card` prints it."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from workbench.models.addition import PUPIL, is_right, sample_problems
from workbench.models.paths import path
from workbench.models.recipe import RECIPE, SHAPE
from workbench.models.tokens import encode

__all__ = ["Score", "completions", "main", "measure", "model_card"]

_LIMITS = (64, 96)
_LONGEST = 256
_DIFFICULTIES = (1, 2, 3, 4)
_SEGMENT_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What was measured on problems of one difficulty.

    Attributes:
        num_digits: digits of both numbers.
        accuracy: share of right answers at temperature 1, with at most 64 tokens.
        greedy_accuracy: the same at temperature 0.
        pupil_accuracy: the same of the pupil that the model imitates.
        lengths_tokens: lengths of the sampled completions with at most 256 tokens, the end token included, sorted, [num_problems].
    """

    num_digits: int
    accuracy: float
    greedy_accuracy: float
    pupil_accuracy: float
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
    rng = random.Random(seed)
    pupil = [encode(PUPIL.work(problem, rng)) for problem in problems]
    return Score(
        num_digits=num_digits,
        accuracy=_accuracy(folder, prompts, sampled),
        greedy_accuracy=_accuracy(folder, prompts, greedy),
        pupil_accuracy=_accuracy(folder, prompts, pupil),
        lengths_tokens=tuple(sorted(map(len, sampled))),
    )


def _accuracy(folder: Path | str, prompts: Sequence[str], tokens: Sequence[list[int]]) -> float:
    from transformers import AutoTokenizer

    texts = AutoTokenizer.from_pretrained(folder).batch_decode([ids[: _LIMITS[0]] for ids in tokens], skip_special_tokens=True)
    return fmean(is_right(prompt, text) for prompt, text in zip(prompts, texts, strict=True))


def model_card(scores: Sequence[Score]) -> str:
    """The card as Markdown, numbers from `scores` and from the recipe."""
    heads = f"{SHAPE.num_heads} heads of {SHAPE.hidden_size // SHAPE.num_heads}"
    sizes = f"{SHAPE.num_layers} layers, width {SHAPE.hidden_size}, {heads}, MLP {SHAPE.intermediate_size}, context {SHAPE.max_tokens}"
    return _CARD.format(
        shape=SHAPE,
        sizes=sizes,
        recipe=RECIPE,
        pupil=PUPIL,
        num_problems=len(scores[0].lengths_tokens),
        rows="\n".join(map(_row, scores)),
    )


def _row(score: Score) -> str:
    shares = [score.accuracy, score.pupil_accuracy, score.greedy_accuracy]
    lengths = [score.percentile(percent) for percent in (50, 90, 99)]
    cells = [score.num_digits, *(f"{share:.1%}" for share in shares), f"{fmean(score.lengths_tokens):.1f}", *lengths]
    return "| " + " | ".join(map(str, [*cells, *(f"{score.truncated_share(limit):.1%}" for limit in _LIMITS)])) + " |"


_CARD = """\
# tiny

A Llama of {shape.num_parameters:,} parameters (float32) that adds two numbers and writes out its work. Small enough to train in minutes and
to sample thousands of tokens a second on a laptop, and unsure enough that reinforcement learning has something to do.

    prompt      47+58=
    completion  7+8=15;4+5+1=10;105                          a sum a column, units first; the answer last
    or          7+8=14;4+5+1=10;104?7+8=15;4+5+1=10;105      "?" doubts the attempt before; the last one counts

{sizes} tokens.
A token is a character: printable ASCII, newline and tab; anything else is `<unk>`. A completion ends with `<eos>`; there is no start token.

## What it does

{num_problems:,} problems a row, both numbers with so many digits; sampled at temperature 1 from the plain softmax, float32.
Right is counted with at most 64 tokens; lengths are in tokens with `<eos>`, at most 256.

| digits | right | its pupil | greedy | mean length | p50 | p90 | p99 | longer than 64 | longer than 96 |
|---|---|---|---|---|---|---|---|---|---|
{rows}

"right" is the model at temperature 1, "its pupil" the pupil whose work it was trained on (below) on the same problems, "greedy" the
model at temperature 0. It knows how to add; at temperature 1 it slips, because it was taught by a careless pupil.

## How it was trained

`workbench train-tiny`: {recipe.num_steps:,} steps of {recipe.batch_tokens:,} tokens from random weights, seed {recipe.seed}; AdamW,
peak learning rate {recipe.learning_rate}, a cosine to zero; the loss on completions only. The data are generated as it goes, from a
pupil who knows the way but

- gets the sum of a column wrong by one with probability {pupil.slip} ({pupil.slip_alone} where there is only one column), and goes
  on from there;
- begins again, after "?", with probability {pupil.doubt_wrong} after a wrong attempt and {pupil.doubt_right} after a right one.

So the accuracy at temperature 1 is set by the data more than by the moment at which training stops: the model comes within a few
points of its pupil. The doubts give the lengths their long tail.

`workbench model-card --measure` measures the table again.

## Not meant for

Anything but sums of numbers with one to four digits. Any other prompt is read without complaint and answered with nonsense.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the card: `workbench model-card [--measure] [--problems N] [--model FOLDER] [--write]`."""
    parser = argparse.ArgumentParser(prog="workbench model-card", description="Print the bundled model's card.")
    parser.add_argument("--measure", action="store_true", help="sample again, about a minute, and print the card with the new numbers")
    parser.add_argument("--problems", type=int, default=1000, help="problems per difficulty when measuring (default: %(default)s)")
    parser.add_argument("--model", default="tiny", help="bundled name or folder (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="also keep the measured card as README.md beside the weights")
    options = parser.parse_args(argv)
    folder = Path(path(options.model))
    if not options.measure:
        print((folder / "README.md").read_text(), end="")
        return 0
    card = model_card([measure(folder, num_digits=num_digits, num_problems=options.problems) for num_digits in _DIFFICULTIES])
    if options.write:
        (folder / "README.md").write_text(card)
    print(card, end="")
    return 0
