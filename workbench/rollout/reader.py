"""Prompts into token ids, with their length checked before an engine sees them.

Knows tokenizers. Does not know models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.errors import EngineError
from workbench.records import Prompt
from workbench.rollout.engine import Origin

__all__ = ["PromptReader"]


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Reads prompts for one model.

    Attributes:
        tokenizer: a transformers tokenizer.
        model: its name, for errors.
        max_model_len: prompt and completion together, tokens.
    """

    tokenizer: Any
    model: str
    max_model_len: int

    def token_ids(self, prompts: Sequence[Prompt], origins: Sequence[Origin]) -> list[list[int] | None]:
        """Token ids of each prompt, [num_prompts]; None for a prompt with images, which only the engine can count.

        Raises:
            EngineError: a prompt is empty, or leaves no room for a completion; names it and the limit in tokens.
        """
        texts = [p for p in prompts if isinstance(p, str)]
        read = iter(self.tokenizer(texts, verbose=False).input_ids if texts else [])
        ids: list[list[int] | None] = []
        for prompt, origin in zip(prompts, origins, strict=True):
            ids.append(list(next(read)) if isinstance(prompt, str) else self._of_other(prompt))
            self._check_length(ids[-1], origin)
        return ids

    def _of_other(self, prompt: list[int] | dict[str, Any]) -> list[int] | None:
        if isinstance(prompt, list):
            return [int(token) for token in prompt]
        if "messages" in prompt:
            return self._of_messages(prompt["messages"])
        if prompt.get("images"):
            return None
        return list(self.tokenizer(prompt["prompt"], verbose=False).input_ids)

    def _of_messages(self, messages: list[dict[str, Any]]) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise EngineError(f"chat messages need a chat template, and model {self.model!r} has none\npass the prompt as text instead")
        read = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        return list(read["input_ids"])

    def _check_length(self, ids: list[int] | None, origin: Origin) -> None:
        if ids is None or 0 < len(ids) < self.max_model_len:
            return
        raise EngineError(
            f"prompt {origin.index} of rank {origin.rank} has {len(ids)} tokens\n"
            f"model {self.model!r} reads 1 to {self.max_model_len - 1} here: {self.max_model_len} in all, at least one of them generated\n"
            "pass another prompt, or start the engine with another max_model_len"
        )
