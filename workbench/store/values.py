"""Prompts and metadata as JSON and back, exactly: text, numbers, lists, tuples, dicts, bytes, arrays and images.

Never pickle: a run's folder may come from elsewhere, and unpickling runs its code. A value of another kind is kept as its text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np

__all__ = ["from_json", "to_json"]

# What JSON lacks is an object with one key that begins with "$"; any other object stands for itself.


def to_json(value: Any) -> str:
    """`value` as JSON text."""
    return json.dumps(_encoded(value), ensure_ascii=False)


def from_json(text: str) -> Any:
    """What `to_json` was given."""
    return _decoded(json.loads(text))


def _encoded(value: Any) -> Any:
    if value is None or type(value) in (str, bool, int, float):
        return value
    if type(value) is list:
        return [_encoded(item) for item in value]
    if type(value) is tuple:
        return {"$tuple": [_encoded(item) for item in value]}
    if type(value) is dict:
        if all(type(key) is str for key in value) and not any(key.startswith("$") for key in value):
            return {key: _encoded(item) for key, item in value.items()}
        return {"$dict": [[_encoded(key), _encoded(item)] for key, item in value.items()]}
    if type(value) is bytes:
        return {"$bytes": _base64(value)}
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        kind = "$array" if isinstance(value, np.ndarray) else "$scalar"
        return {kind: [value.dtype.str, list(value.shape), _base64(value.tobytes())]}
    if type(value).__module__.startswith("PIL.") and hasattr(value, "save"):
        return _encoded_image(value)
    return {"$text": repr(value)}


def _encoded_image(image: Any) -> dict[str, Any]:
    buffer = BytesIO()
    try:
        image.save(buffer, format="PNG")
    except OSError:  # a mode that PNG has no room for, such as CMYK
        return {"$text": repr(image)}
    return {"$png": _base64(buffer.getvalue())}


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: _decoded(item) for key, item in value.items()}
    ((kind, held),) = value.items()
    return _DECODERS[kind](held)


def _array(held: list[Any]) -> Any:
    dtype, shape, data = held
    return np.frombuffer(base64.b64decode(data), np.dtype(dtype)).reshape(shape).copy()


def _image(held: str) -> Any:
    from PIL import Image

    image = Image.open(BytesIO(base64.b64decode(held)))
    image.load()
    return image


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$tuple": lambda held: tuple(_decoded(item) for item in held),
    "$dict": lambda held: {_decoded(key): _decoded(item) for key, item in held},
    "$bytes": base64.b64decode,
    "$array": _array,
    "$scalar": lambda held: _array(held)[()],
    "$png": _image,
    "$text": str,
}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
