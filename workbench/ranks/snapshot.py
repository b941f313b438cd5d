"""The names of a rank's namespace as one pickle: what was shared stays shared (an optimizer and its model), functions find their globals.

Also which files of the user's own modules stand behind them. Knows pickling. Does not know ranks or tapes.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cloudpickle

__all__ = ["changed_files", "files_of_modules", "restore_names", "snapshot_names"]

_PACKAGE = __file__.rpartition("/ranks/")[0] + "/"
_NOT_THE_USERS = (sys.prefix + "/lib", sys.base_prefix + "/lib", _PACKAGE)
_INSTALLED = ("/site-packages/", "/dist-packages/")
_NAMESPACE = "namespace"


class _TooLarge(Exception):
    pass


class _Bounded(io.BytesIO):
    """Refuses to grow beyond a size."""

    def __init__(self, most: int | None) -> None:
        super().__init__()
        self._most = most

    def write(self, data: Any, /) -> int:
        if self._most is not None and self.tell() + memoryview(data).nbytes > self._most:
            raise _TooLarge
        return super().write(data)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """Writes the namespace itself as a reference, so that a function of a cell keeps reading what later cells bind."""

    def __init__(self, file: io.BytesIO, namespace: dict[str, Any]) -> None:
        super().__init__(file, protocol=5)
        self._globals: dict[str, Any] = {}
        self.globals_ref[id(namespace)] = self._globals

    def reducer_override(self, obj: Any) -> Any:
        if type(obj).__name__ == "DistributedDataParallel":  # torch pickles it, but what comes back sends its gradients in another order
            raise pickle.PicklingError("a DDP model holds connections and an order of gradients that it has learned: wrap the model again")
        reduced = getattr(type(obj), "__snapshot__", None)
        if reduced is not None:  # the class says how it is held here, in the form of `__reduce__`
            return reduced(obj)
        return super().reducer_override(obj)

    def persistent_id(self, obj: Any) -> str | None:
        return _NAMESPACE if obj is self._globals else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, namespace: dict[str, Any]) -> None:
        super().__init__(file)
        self._namespace = namespace

    def persistent_load(self, pid: Any) -> Any:
        return self._namespace


def snapshot_names(names: Mapping[str, Any], namespace: dict[str, Any], most_bytes: int | None = None) -> tuple[bytes, dict[str, str]]:
    """Pickle names of a namespace together.

    Args:
        names: which of them, with their values.
        namespace: the globals of functions that were defined in cells.
        most_bytes: the largest pickle; the largest names are left out until the rest fits. None: no limit.

    Returns:
        The pickle, and name -> why it is not in it.
    """
    with contextlib.suppress(Exception):
        return _dump(names, namespace, most_bytes), {}
    sizes: dict[str, int] = {}
    unkept: dict[str, str] = {}
    for name, value in names.items():
        try:
            sizes[name] = len(_dump({name: value}, namespace, most_bytes))
        except _TooLarge:
            unkept[name] = f"it is larger than {(most_bytes or 0) >> 20} MiB"
        except Exception as error:  # pickle raises whatever the value's own hooks raise
            unkept[name] = str(error).partition("\n")[0] or type(error).__name__
    while sizes:
        try:
            return _dump({name: names[name] for name in sizes}, namespace, most_bytes), unkept
        except Exception:
            largest = max(sizes, key=lambda name: sizes[name])
            unkept[largest] = f"with it the names are larger than {(most_bytes or 0) >> 20} MiB"
            del sizes[largest]
    return _dump({}, namespace, None), unkept


def restore_names(data: bytes, namespace: dict[str, Any]) -> None:
    """Bind the names of a snapshot in a namespace."""
    namespace.update(_Unpickler(io.BytesIO(data), namespace).load())


def _dump(names: Mapping[str, Any], namespace: dict[str, Any], most_bytes: int | None) -> bytes:
    file = _Bounded(most_bytes)
    _Pickler(file, namespace).dump(dict(names))
    return file.getvalue()


def files_of_modules(known: set[str]) -> dict[str, int]:
    """file -> checksum of the user's own modules that were imported since; `known` names all modules seen so far and is updated."""
    found: dict[str, int] = {}
    if len(sys.modules) == len(known):
        return found
    new = [(name, module) for name, module in list(sys.modules.items()) if name not in known]
    known.update(name for name, _ in new)
    for _, module in new:
        path = getattr(module, "__file__", None)
        if (
            isinstance(path, str)
            and path.endswith(".py")
            and not path.startswith(_NOT_THE_USERS)
            and not any(p in path for p in _INSTALLED)
        ):
            with contextlib.suppress(OSError):
                found[path] = zlib.crc32(Path(path).read_bytes())
    return found


def changed_files(files: Mapping[str, int]) -> list[str]:
    """Those files that are no longer what they were, each with how."""
    told = []
    for path, checksum in files.items():
        try:
            is_same = zlib.crc32(Path(path).read_bytes()) == checksum
        except OSError:
            told.append(f"{path} is not here")
        else:
            told += [] if is_same else [f"{path} has changed"]
    return told
