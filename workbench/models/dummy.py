"""Local checkpoints with random weights, of a wished size: for memory, speed and weight pushes, not for sense."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from workbench.errors import ModelError
from workbench.models.idefics import IdeficsShape, write_processor
from workbench.models.llama import LlamaShape, random_weights, write_checkpoint
from workbench.models.tokens import IMAGE_TOKENS

__all__ = ["make_dummy"]

_HEAD_SIZE = 64
_HEAD_GAIN = 4.0
_MAX_TOKENS = 2048
_KINDS = ("text", "vision")


def make_dummy(folder: str | os.PathLike[str], *, num_parameters: int = 1_000_000, kind: str = "text", seed: int = 0) -> Path:
    """Write a checkpoint with random float32 weights that transformers and vLLM load offline.

    Args:
        folder: where to; made when missing.
        num_parameters: wished size; the checkpoint has it within 2 %.
        kind: "text" (a Llama) or "vision" (an Idefics3, which takes images).
        seed: of the weights.

    Returns:
        The folder.

    Raises:
        ModelError: an unknown kind, or fewer parameters than the smallest shape has.
    """
    if kind not in _KINDS:
        raise ModelError(f"make_dummy cannot make a model of kind {kind!r}\nkinds are {', '.join(_KINDS)}\npass one of these")
    target = Path(folder)
    shape = _shape_of(num_parameters, kind)
    weights = random_weights(shape.weights(), seed=seed, head_gain=_HEAD_GAIN)
    write_checkpoint(target, shape.config(), weights, max_tokens=_MAX_TOKENS, has_images=kind == "vision")
    if kind == "vision":
        write_processor(target)
    return target


def _shape_of(num_parameters: int, kind: str) -> LlamaShape | IdeficsShape:
    """A shape of about `num_parameters`: width and depth by a rule of thumb, then the MLP's width takes up what is left.

    A layer has about 12 hidden_size**2 parameters, and there is a layer for 64 of width. Heads and widths are even, so that
    two ranks can share them.
    """
    width = (_HEAD_SIZE * max(0, num_parameters) / 12) ** (1 / 3)
    hidden = max(1, round(width / (2 * _HEAD_SIZE))) * 2 * _HEAD_SIZE
    num_layers = max(1, round(num_parameters / (12 * hidden**2)))

    def shape(intermediate: int) -> LlamaShape | IdeficsShape:
        text = LlamaShape(
            num_layers=num_layers,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_heads=hidden // _HEAD_SIZE,
            max_tokens=_MAX_TOKENS,
        )
        return text if kind == "text" else IdeficsShape(text=replace(text, vocab_size=text.vocab_size + len(IMAGE_TOKENS)))

    bare, step = shape(0).num_parameters, 8
    intermediate = round((num_parameters - bare) / (3 * hidden * num_layers * step)) * step
    if intermediate < step:
        raise ModelError(
            f"make_dummy cannot make a {kind} model of {num_parameters:,} parameters\n"
            f"the smallest of that width has {shape(step).num_parameters:,}\n"
            "ask for more"
        )
    return shape(intermediate)
