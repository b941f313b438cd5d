"""The shape of a Llama checkpoint: its config and the names and shapes of its weights.

Knows arithmetic and file formats only; torch is imported where weights are made or written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.models.tokens import EOS_ID, PAD_ID, VOCABULARY, write_tokenizer

if TYPE_CHECKING:
    import torch

__all__ = ["LlamaShape", "random_weights", "write_checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """Sizes of a Llama; every layer is the same, input and output embeddings are apart."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    max_tokens: int
    vocab_size: int = len(VOCABULARY)

    def config(self) -> dict[str, Any]:
        """What `config.json` says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "head_dim": self.hidden_size // self.num_heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_tokens,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
            "dtype": "float32",
        }

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint name -> shape of every weight."""
        hidden, inner = self.hidden_size, self.intermediate_size
        layer: dict[str, tuple[int, ...]] = {
            **{f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"},
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        return {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            **{f"model.layers.{index}.{name}": shape for index in range(self.num_layers) for name, shape in layer.items()},
            "model.norm.weight": (hidden,),
            "lm_head.weight": (self.vocab_size, hidden),
        }

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.weights().values())


def random_weights(shapes: Mapping[str, tuple[int, ...]], *, seed: int, head_gain: float = 1.0) -> dict[str, torch.Tensor]:
    """Float32 weights: norms are ones, biases zeros, all else is normal with a variance of 1 / (numbers that are summed up).

    Args:
        shapes: name -> shape.
        seed: of torch's generator; equal seeds give equal weights.
        head_gain: standard deviation of the output logits; a few nats keep the greedy token clear of rounding.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
            continue
        scale = head_gain if name.endswith("lm_head.weight") else 1.0
        fan_in = 1 if "embed_tokens" in name else math.prod(shape[1:])
        weights[name] = torch.randn(shape, generator=generator).mul_(scale / math.sqrt(fan_in))
    return weights


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], *, max_tokens: int, has_images: bool = False
) -> None:
    """Write config, generation config, tokenizer and safetensors into a folder, which is made when missing."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_ID, "pad_token_id": PAD_ID}, indent=2) + "\n")
    write_tokenizer(folder, max_tokens=max_tokens, has_images=has_images)
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable for its owner only
