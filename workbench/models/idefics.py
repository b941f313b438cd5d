"""The shape of an Idefics3 checkpoint: a small vision tower and connector in front of a Llama, and its image processor.

Of the image models that vLLM runs, this one needs no torchvision: its processor works on PIL images.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.models.llama import LlamaShape
from workbench.models.tokens import IMAGE_TOKENS, PAD_ID, VOCABULARY

__all__ = ["IdeficsShape", "write_processor"]

_IMAGE_SIZE, _PATCH_SIZE, _SCALE_FACTOR, _NUM_CHANNELS = 56, 14, 2, 3
_TOKENS_PER_IMAGE = (_IMAGE_SIZE // _PATCH_SIZE // _SCALE_FACTOR) ** 2
_IMAGE_TOKEN_ID = len(VOCABULARY)  # the image tokens follow the characters, "<image>" first


@dataclass(frozen=True, slots=True, kw_only=True)
class IdeficsShape:
    """A Llama that reads images of 56 by 56 pixels as four tokens each.

    Attributes:
        text: the Llama behind, its vocabulary with the image tokens.
        num_layers, hidden_size, num_heads: of the vision tower; its MLP is twice as wide.
    """

    text: LlamaShape
    num_layers: int = 2
    hidden_size: int = 64
    num_heads: int = 2

    def config(self) -> dict[str, Any]:
        """What `config.json` says."""
        return {
            "architectures": ["Idefics3ForConditionalGeneration"],
            "model_type": "idefics3",
            "image_token_id": _IMAGE_TOKEN_ID,
            "scale_factor": _SCALE_FACTOR,
            "pad_token_id": PAD_ID,
            "eos_token_id": self.text.config()["eos_token_id"],
            "tie_word_embeddings": False,
            "dtype": "float32",
            "text_config": self.text.config(),
            "vision_config": {
                "model_type": "idefics3_vision",
                "hidden_size": self.hidden_size,
                "intermediate_size": 2 * self.hidden_size,
                "num_hidden_layers": self.num_layers,
                "num_attention_heads": self.num_heads,
                "num_channels": _NUM_CHANNELS,
                "image_size": _IMAGE_SIZE,
                "patch_size": _PATCH_SIZE,
            },
        }

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint name -> shape of every weight."""
        text = {name.replace("model.", "model.text_model.", 1): shape for name, shape in self.text.weights().items()}
        connector = {"model.connector.modality_projection.proj.weight": (self.text.hidden_size, self.hidden_size * _SCALE_FACTOR**2)}
        return {f"model.vision_model.{name}": shape for name, shape in self._vision_weights().items()} | connector | text

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.weights().values())

    def _vision_weights(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, 2 * self.hidden_size
        layer: dict[str, tuple[int, ...]] = {
            "layer_norm1": (hidden,),
            **{f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")},
            "layer_norm2": (hidden,),
            "mlp.fc1": (inner, hidden),
            "mlp.fc2": (hidden, inner),
        }
        parts: dict[str, tuple[int, ...]] = {
            "embeddings.patch_embedding": (hidden, _NUM_CHANNELS, _PATCH_SIZE, _PATCH_SIZE),
            **{f"encoder.layers.{index}.{name}": shape for index in range(self.num_layers) for name, shape in layer.items()},
            "post_layernorm": (hidden,),
        }
        weights: dict[str, tuple[int, ...]] = {"embeddings.position_embedding.weight": ((_IMAGE_SIZE // _PATCH_SIZE) ** 2, hidden)}
        weights |= {f"{name}.weight": shape for name, shape in parts.items()}
        return weights | {f"{name}.bias": shape[:1] for name, shape in parts.items()}


def write_processor(folder: Path) -> None:
    """Write what turns images into pixels and placeholders: every image is scaled to one square of 56 pixels, never split."""
    image = {
        "image_processor_type": "Idefics3ImageProcessorPil",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "do_image_splitting": False,
        "size": {"longest_edge": _IMAGE_SIZE},
        "max_image_size": {"longest_edge": _IMAGE_SIZE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": _TOKENS_PER_IMAGE, "image_processor": image}
    (folder / "preprocessor_config.json").write_text(json.dumps({**image, "processor_class": "Idefics3Processor"}, indent=2) + "\n")
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


assert IMAGE_TOKENS[0] == "<image>"
