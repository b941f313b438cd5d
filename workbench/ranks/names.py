"""What the names of a rank are: completed, described, found; answered beside the cell that runs, from a thread of its own.

Knows a namespace. Does not know who asks.
"""

from __future__ import annotations

import builtins
import inspect
import keyword
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from workbench.ranks.messages import Answer, Inquiry, Question
from workbench.ranks.shown import show_value, text_of

__all__ = ["answer"]

_MOST_NAMES = 500
_MOST_LINES = 12  # of a repr
_MOST_SOURCE_LINES = 400


def answer(question: Question, namespace: Mapping[str, Any]) -> Answer:
    """Answer one question; what cannot be found or fails has no lines."""
    tell: Callable[[str, Mapping[str, Any]], list[str]] = {
        Inquiry.COMPLETE: _complete,
        Inquiry.DESCRIBE: _describe,
        Inquiry.SOURCE: _source,
        Inquiry.HAS: lambda name, names: [name] if name in names else [],
    }[question.inquiry]
    try:
        lines = tell(question.text, namespace)
    except Exception:  # the user's own attributes and reprs
        lines = []
    return Answer(ticket=question.ticket, lines=tuple(lines))


def _value(path: str, namespace: Mapping[str, Any]) -> Any:
    """What "x.y.z" is; calls nothing but the attributes' own code."""
    first, *rest = path.split(".")
    value = namespace[first] if first in namespace else vars(builtins)[first]
    for name in rest:
        value = getattr(value, name)
    return value


def _complete(text: str, namespace: Mapping[str, Any]) -> list[str]:
    """Names that "x.sh" or "sh" may become, in full: "x.shape"; private ones only when asked for."""
    path, dot, start = text.rpartition(".")
    found = dir(_value(path, namespace)) if dot else [*namespace, *dir(builtins), *keyword.kwlist]
    names = {name for name in found if name.startswith(start) and (start.startswith("_") or not name.startswith("_"))}
    return [f"{path}{dot}{name}" for name in sorted(names)][:_MOST_NAMES]


def _describe(path: str, namespace: Mapping[str, Any]) -> list[str]:
    """Type, summary or signature; then documentation of what can be called, the text of what cannot."""
    value = _value(path, namespace)
    if callable(value) or isinstance(value, ModuleType):
        return [f"{path}{_signature(value)}: {type(value).__name__}", *(inspect.getdoc(value) or "").splitlines()]
    text = text_of(value)
    shown = show_value(value, text)
    lines = text.splitlines()
    rest = [f"... {len(lines) - _MOST_LINES:,} more lines"] if len(lines) > _MOST_LINES else []
    return [f"{path}: {shown.summary if shown and shown.summary else type(value).__name__}", *lines[:_MOST_LINES], *rest]


def _source(path: str, namespace: Mapping[str, Any]) -> list[str]:
    """As `_describe`, with the source where there is one: cells' too."""
    lines = _describe(path, namespace)
    try:
        return [*lines, "", *inspect.getsource(_value(path, namespace)).splitlines()[:_MOST_SOURCE_LINES]]
    except (OSError, TypeError):  # built in, or no code at all
        return lines


def _signature(value: Any) -> str:
    try:
        return str(inspect.signature(value))
    except (TypeError, ValueError):
        return ""
