"""How "tiny" is trained: `workbench train-tiny`, from random weights and generated sums, seed fixed, minutes on two cores.

The data come from a careless pupil (`addition.PUPIL`), and a model trained on them to the end samples like that pupil: its accuracy at
temperature 1 is set by the pupil's slips more than by the moment at which training stops.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.models.addition import PUPIL, Problem
from workbench.models.llama import LlamaShape, random_weights, write_checkpoint
from workbench.models.tokens import EOS_ID, PAD_ID, encode

if TYPE_CHECKING:
    import torch

__all__ = ["RECIPE", "SHAPE", "Recipe", "main", "train"]

SHAPE = LlamaShape(num_layers=3, hidden_size=128, intermediate_size=256, num_heads=4, max_tokens=512)
_SHARES = {1: 0.3, 2: 0.3, 3: 0.2, 4: 0.2}  # of problems, by digits of the longer number
_IGNORED = -100  # the label that cross_entropy leaves out


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What decides the weights, apart from the data's rules.

    Attributes:
        batch_tokens: tokens in a batch, padding included.
        shuffle_batches: batches drawn at a time, sorted by length and shuffled, so that little is padding.
        num_threads: of torch; the batches are small, and one thread does not wait for another on a busy machine.
    """

    num_steps: int = 2000
    batch_tokens: int = 2048
    shuffle_batches: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    seed: int = 0
    num_threads: int = 1


RECIPE = Recipe()


def train(recipe: Recipe = RECIPE, *, shape: LlamaShape = SHAPE, log_every: int = 100) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train from random weights.

    Returns:
        The weights by checkpoint name, and the loss of every step, nats a token.
    """
    import torch

    torch.set_num_threads(recipe.num_threads)
    model = _model(shape, recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, recipe))
    losses: list[float] = []
    start = time.monotonic()
    for step, (inputs, labels) in zip(range(1, recipe.num_steps + 1), batches(recipe), strict=False):
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if log_every and step % log_every == 0:
            mean, seconds = sum(losses[-log_every:]) / log_every, time.monotonic() - start
            print(f"step {step:5d} of {recipe.num_steps}  loss {mean:.4f}  {seconds:.0f} s", flush=True)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, losses


def batches(recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of about equally many tokens: inputs and labels, [num_rows, num_tokens], padded on the right.

    Prompts and padding have no label. Rows of one batch have about the same length, and every batch about the same number of tokens, so
    that each token weighs the same.
    """
    import torch

    rng = random.Random(recipe.seed)
    while True:
        rows: list[tuple[list[int], int]] = []
        while sum(len(ids) for ids, _ in rows) < recipe.batch_tokens * recipe.shuffle_batches:
            rows += [_row(rng) for _ in range(256)]
        rows.sort(key=lambda row: len(row[0]))
        cut = list(_cut(rows, recipe.batch_tokens))
        rng.shuffle(cut)
        for part in cut:
            width = len(part[-1][0])
            inputs = torch.tensor([ids + [PAD_ID] * (width - len(ids)) for ids, _ in part])
            labels = torch.tensor([[_IGNORED] * start + ids[start:] + [_IGNORED] * (width - len(ids)) for ids, start in part])
            yield inputs, labels


def _cut(rows: list[tuple[list[int], int]], batch_tokens: int) -> Iterator[list[tuple[list[int], int]]]:
    """Cut rows that are sorted by length into parts of at most `batch_tokens` when padded; the rest that fills no part is left out."""
    part: list[tuple[list[int], int]] = []
    for row in rows:
        if (len(part) + 1) * len(row[0]) > batch_tokens:
            yield part
            part = []
        part.append(row)


def _row(rng: random.Random) -> tuple[list[int], int]:
    """Token ids of a prompt, a completion and the end; and where the completion begins."""
    problem = _problem(rng)
    prompt = encode(problem.prompt)
    return [*prompt, *encode(PUPIL.work(problem, rng)), EOS_ID], len(prompt)


def _problem(rng: random.Random) -> Problem:
    """A problem whose longer number has 1 to 4 digits; in a third of them the other number is shorter, or as long by chance."""
    (digits,) = rng.choices(list(_SHARES), list(_SHARES.values()))
    least = 10 ** (digits - 1) if digits > 1 else 0
    numbers = [rng.randrange(least, 10**digits) for _ in range(2)]
    if rng.random() < 1 / 3:
        numbers[1] %= 10 ** rng.randint(1, digits)
    rng.shuffle(numbers)
    return Problem(a=numbers[0], b=numbers[1])


def _model(shape: LlamaShape, seed: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**shape.config()))
    model.load_state_dict(random_weights(shape.weights(), seed=seed))
    return model.train()


def _warm_cosine(step: int, recipe: Recipe) -> float:
    """Share of the learning rate: linear up to 1, then a cosine down to 0."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.num_steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def main(argv: Sequence[str] | None = None) -> int:
    """Train and write the checkpoint: `workbench train-tiny [--out FOLDER] [--steps N]`."""
    parser = argparse.ArgumentParser(prog="workbench train-tiny", description="Train the bundled model from random weights.")
    parser.add_argument("--out", type=Path, default=Path("tiny"), help="folder to write to (default: ./tiny; the package's own stays)")
    parser.add_argument("--steps", type=int, default=RECIPE.num_steps, help="optimizer steps (default: %(default)s)")
    options = parser.parse_args(argv)
    weights, losses = train(Recipe(num_steps=options.steps))
    write_checkpoint(options.out, SHAPE.config(), weights, max_tokens=SHAPE.max_tokens)
    print(f"wrote {options.out.resolve()}: {SHAPE.num_parameters:,} parameters, last loss {losses[-1]:.4f}")
    return 0
