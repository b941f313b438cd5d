"""The character tokenizer that every model of ours shares: one token a character.

Knows the vocabulary and the files that transformers and vLLM read. Does not know models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["EOS_ID", "IMAGE_TOKENS", "PAD_ID", "UNK_ID", "VOCABULARY", "encode", "write_tokenizer"]

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
_SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
IMAGE_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")  # the names that Idefics3Processor looks for
_PRINTABLE = "\n\t" + "".join(chr(code) for code in range(32, 127))
VOCABULARY: dict[str, int] = {token: index for index, token in enumerate((*_SPECIAL_TOKENS, *_PRINTABLE))}


def encode(text: str) -> list[int]:
    """Token ids of plain text, one a character; the ids that the written tokenizer gives."""
    return [VOCABULARY.get(character, UNK_ID) for character in text]


def write_tokenizer(folder: Path, *, max_tokens: int, has_images: bool = False) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    Args:
        folder: where to; must exist.
        max_tokens: the longest text that the model can read.
        has_images: add `IMAGE_TOKENS` behind the vocabulary.
    """
    _character_tokenizer(_SPECIAL_TOKENS + (IMAGE_TOKENS if has_images else ())).save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _character_tokenizer(special: tuple[str, ...]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
