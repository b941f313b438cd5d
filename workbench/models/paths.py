"""Where a model lies: bundled in the package, in a local folder, or on the model hub.

Never touches the network: a hub name is looked up in the local cache only.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import ModelError

if TYPE_CHECKING:
    import torch

__all__ = ["bundled", "path", "state_dict"]

_HERE = Path(__file__).parent
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def bundled() -> tuple[str, ...]:
    """Names of the models in the package."""
    return tuple(sorted(config.parent.name for config in _HERE.glob("*/config.json")))


def path(model: str | os.PathLike[str]) -> Path | str:
    """Where to load a model from.

    Args:
        model: a bundled name ("tiny"), a local folder, or a hub name ("Qwen/Qwen2.5-0.5B").

    Returns:
        The folder; for a hub name the name itself, which transformers and vLLM understand.

    Raises:
        ModelError: a folder without `config.json`, or a name that is neither bundled, nor a folder, nor in the hub's cache
            (an "owner/name" is taken on trust when downloads are allowed).
    """
    name = os.fspath(model)
    if name in bundled():
        return _HERE / name
    folder = Path(name).expanduser()
    if name and os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        return _checked(folder)
    if _looks_like_hub_name(name) and (_is_cached(name) or (name.count("/") == 1 and not _is_offline())):
        return name
    raise ModelError(
        f"model {name!r} is not here: no bundled model, no local folder, nothing in the hub's cache\n"
        f"bundled is {', '.join(bundled())}; downloads are {'off (' + ' or '.join(_OFFLINE) + ' is set)' if _is_offline() else 'allowed'}\n"
        "pass a bundled name, a folder with config.json, or a hub name as owner/name that is cached or can be downloaded"
    )


def state_dict(model: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint in a folder, by its checkpoint name.

    Args:
        model: a bundled name or a local folder with safetensors files.

    Raises:
        ModelError: the model is not in a folder, or the folder has no safetensors.
    """
    from safetensors.torch import load_file

    folder = path(model)
    files = sorted(folder.glob("*.safetensors")) if isinstance(folder, Path) else []
    if not files:
        raise ModelError(f"model {os.fspath(model)!r} has no weights here\n"
                         f"looked for *.safetensors in {folder if isinstance(folder, Path) else 'a local folder; this is a hub name'}\n"
                         "pass a bundled name or a folder that holds a safetensors checkpoint")  # fmt: skip
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _checked(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    seen = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
    raise ModelError(f"folder {str(folder)!r} is no model: it has no config.json\nit holds {seen}\npass the folder of a checkpoint")


def _looks_like_hub_name(name: str) -> bool:
    return bool(name) and name.count("/") <= 1 and not name.startswith(("/", ".", "~")) and not name.endswith("/")


def _is_offline() -> bool:
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in _OFFLINE)


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # not a name that a hub could have
        return False
