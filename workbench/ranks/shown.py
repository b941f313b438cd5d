"""A value of a rank as a person wants to see it: its text, its rich forms, its numbers.

    DataFrame, anything with `_repr_html_` and the like -> that form      figure, axes -> PNG      tensor, array, number -> numbers too

Knows values and, where they are loaded, torch and matplotlib. Does not know channels, nor how a page shows what is made here.
"""

from __future__ import annotations

import io
import re
import sys
import zlib
from collections.abc import Iterator
from numbers import Number
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from workbench.records import Shown

__all__ = ["open_figures", "show_value", "text_of"]

_LONGEST_TEXT = 20_000  # characters of a repr
_LONGEST_FORM = 4 << 20  # bytes of one rich form
_MOST_NUMBERS = 1 << 18  # that travel to be compared
_LARGEST_SUMMED_BYTES = 1 << 28  # beyond, reading it all would be felt
_PICTURE_DPI = 110
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # it differs on every rank, and equal pictures are shown once
_FORMS = {
    "_repr_html_": "text/html",
    "_repr_svg_": "image/svg+xml",
    "_repr_png_": "image/png",
    "_repr_jpeg_": "image/jpeg",
}


def text_of(value: object) -> str:
    """Its repr, cut where it is long; "" for None."""
    if value is None:
        return ""
    text = repr(value)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}... ({len(text):,} characters)"


def show_value(value: object, text: str) -> Shown | None:
    """What goes to the driver beside the text; None where the text says it all."""
    forms = _forms(value)
    array = _array(value)
    if array is None:
        return Shown(text=_ADDRESS.sub("", text) if "image/png" in forms else text, forms=forms) if forms else None
    is_read = array.nbytes <= _LARGEST_SUMMED_BYTES
    return Shown(
        text=text,
        summary=_summary(value, array, is_read) if array.ndim else "",
        forms=forms,
        shape=tuple(array.shape),
        dtype=_dtype(value, array),
        numbers=np.ascontiguousarray(array).reshape(-1)[:_MOST_NUMBERS].copy(),
        digest=zlib.crc32(np.ascontiguousarray(array).data) if is_read and array.size else 0,
    )


def open_figures() -> Iterator[Shown]:
    """Figures that pyplot holds open, each closed once it is drawn, as notebooks do at the end of a cell."""
    pyplot: Any = sys.modules.get("matplotlib.pyplot")
    for number in pyplot.get_fignums() if pyplot is not None else ():
        figure = pyplot.figure(number)
        if figure.axes:
            yield Shown(text="", forms={"image/png": _picture(figure)})
        pyplot.close(figure)


def _forms(value: object) -> dict[str, str | bytes]:
    """Rich forms by the names that IPython uses; a form that cannot be made is left out, as IPython does."""
    figure = _figure(value)
    if figure is not None:
        return {"image/png": _picture(figure)}
    if isinstance(value, type):
        return {}
    forms = {}
    for method, kind in _FORMS.items():
        try:
            form = getattr(value, method)()
        except Exception:  # the value's own code: no such form, or none that works here
            continue
        if isinstance(form, (str, bytes)) and form and len(form) <= _LONGEST_FORM:
            forms[kind] = form
    return forms


def _figure(value: object) -> Any:
    """The matplotlib figure that a value is, or belongs to; None for others."""
    if "matplotlib.figure" not in sys.modules:
        return None
    module = sys.modules["matplotlib.figure"]
    if isinstance(value, np.ndarray) and value.dtype == object and value.size:  # plt.subplots(2, 2)[1]
        value = value.flat[0]
    elif isinstance(value, (list, tuple)) and value:  # what plt.plot gives
        value = value[0]
    found = value if isinstance(value, module.FigureBase) else getattr(value, "figure", None)
    while found is not None and not isinstance(found, module.Figure):
        found = getattr(found, "figure", None)  # of a subfigure
    return found


def _picture(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_PICTURE_DPI, bbox_inches="tight", metadata={"Software": None})
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None and pyplot.fignum_exists(getattr(figure, "number", -1)):
        pyplot.close(figure)
    return buffer.getvalue()


def _array(value: object) -> NDArray[Any] | None:
    """The numbers of a tensor, array or number; None for others, and for tensors that have no numbers to read (meta, sparse, ...)."""
    try:
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu()
            array = np.asarray((plain.float() if plain.dtype in (torch.bfloat16, torch.float16) else plain).numpy())
        elif isinstance(value, (np.ndarray, np.generic, Number)):
            array = np.asarray(value)
        else:
            return None
    except (RuntimeError, TypeError, ValueError, OverflowError, NotImplementedError):
        return None
    return array if array.dtype.kind in "iufb" else None


def _dtype(value: object, array: NDArray[Any]) -> str:
    if isinstance(value, torch.Tensor):
        return str(value.dtype).removeprefix("torch.")
    return str(array.dtype) if isinstance(value, (np.ndarray, np.generic)) else type(value).__name__


def _summary(value: object, array: NDArray[Any], is_read: bool) -> str:
    """ "Tensor [1000, 1000] float32, 4.0 MB: min -4.8, mean 0.0012, max 4.9, 2 nan"."""
    num_bytes = value.element_size() * value.nelement() if isinstance(value, torch.Tensor) else array.nbytes
    place = f" on {value.device}" if isinstance(value, torch.Tensor) and value.device.type != "cpu" else ""
    head = f"{type(value).__name__} {list(array.shape)} {_dtype(value, array)}{place}, {_bytes(num_bytes)}"
    if not is_read or not array.size or array.dtype.kind == "b":
        return head
    is_nan = np.isnan(array) if array.dtype.kind == "f" else np.zeros((), dtype=bool)
    num_nan = int(is_nan.sum())
    if num_nan == array.size:
        return f"{head}: all nan"
    kept = array[~is_nan] if num_nan else array
    told = f"{head}: min {kept.min():.4g}, mean {kept.mean(dtype=np.float64):.4g}, max {kept.max():.4g}"
    return told + (f", {num_nan:,} nan" if num_nan else "")


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
