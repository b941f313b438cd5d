"""What a checkpoint holds (names, shapes, dtypes), and whether new weights fit it.

Knows safetensors headers. Does not know engines.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import EngineError

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "TensorSpec"]

_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and safetensors dtype ("F32", "BF16", ...) of one tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_floating(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Names of a checkpoint and the folder that holds it.

    Attributes:
        tied: name of the output head when it shares the embedding's weight and is not stored itself, else "".
    """

    folder: Path
    specs: Mapping[str, TensorSpec]
    tied: str = ""

    @classmethod
    def read(cls, model: str | os.PathLike[str]) -> Checkpoint:
        """Read the headers of a checkpoint's safetensors files.

        Args:
            model: a folder, or a hub name (downloaded unless the hub is off line).

        Raises:
            EngineError: no safetensors file there.
        """
        folder = Path(model) if os.path.isdir(model) else _cached(os.fspath(model))
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise EngineError(f"{folder} has no *.safetensors\nan engine needs a checkpoint in that form")
        specs = {name: spec for file in files for name, spec in _header(file).items()}
        config = json.loads((folder / "config.json").read_text())
        is_tied = bool(config.get("tie_word_embeddings")) and "lm_head.weight" not in specs
        return cls(folder, specs, "lm_head.weight" if is_tied else "")

    def num_bytes(self, item_bytes: int | None = None) -> int:
        """Bytes of the weights, as stored or with floating tensors at `item_bytes` an element."""
        return sum(
            prod(spec.shape) * (item_bytes if item_bytes and spec.is_floating else _ITEM_BYTES.get(spec.dtype, 1))
            for spec in self.specs.values()
        )

    def check(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """New weights that all fit; a part of the checkpoint is enough.

        A tied head (`lm_head.weight` of a model that ties it) is left out. Any floating dtype fits a floating tensor: it is cast
        when it is loaded.

        Raises:
            EngineError: a name, shape or dtype does not fit, or a name comes twice; names the tensor.
        """
        found: dict[str, torch.Tensor] = {}
        for name, tensor in named_tensors:
            if name in found:
                raise EngineError(f"weight {name!r} comes twice in one update\nnothing was changed; pass each name once")
            if name != self.tied:
                self._check_one(name, tensor)
                found[name] = tensor
        return list(found.items())

    def _check_one(self, name: str, tensor: torch.Tensor) -> None:
        spec = self.specs.get(name)
        if spec is None:
            near = difflib.get_close_matches(name, self.specs, n=3)
            raise EngineError(
                f"weight {name!r} is not in the checkpoint {self.folder}\n"
                f"nearest names: {', '.join(near) or 'none; the first is ' + min(self.specs)}\n"
                "nothing was changed; pass the names of the checkpoint"
            )
        if tuple(tensor.shape) != spec.shape:
            raise EngineError(
                f"weight {name!r} does not fit: its shape is {tuple(tensor.shape)}, the checkpoint's is {spec.shape}\n"
                "nothing was changed; pass full (unsharded) tensors"
            )
        if tensor.is_floating_point() != spec.is_floating:
            raise EngineError(
                f"weight {name!r} does not fit: its dtype is {tensor.dtype}, the checkpoint's is {spec.dtype}\n"
                "nothing was changed; cast it first"
            )


def _header(file: Path) -> dict[str, TensorSpec]:
    """The JSON header of a safetensors file: 8 bytes of its length, then itself.

    Source: https://github.com/huggingface/safetensors#format
    """
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: TensorSpec(tuple(item["shape"]), item["dtype"]) for name, item in header.items() if name != "__metadata__"}


def _cached(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:
        raise EngineError(f"model {name!r} is no folder and could not be had from the hub: {error}") from error
