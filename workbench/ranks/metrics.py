"""Metrics of all ranks as one: numbers and dicts of them, as trainers log them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import GroupError
from workbench.ranks import arguments
from workbench.ranks.called import named
from workbench.ranks.current import current
from workbench.ranks.group import Group

__all__ = ["reduce_metrics"]

_OPS: dict[str, Callable[[Sequence[Any]], Any]] = {
    "sum": sum,
    "mean": lambda values: sum(values) / len(values),
    "max": max,
    "min": min,
}


@named
def reduce_metrics(metrics: Any, op: str = "mean", *, group: Group | None = None) -> Any:
    """Combine the metrics of all members: the same number, tensor or dict on each, with the values reduced; the input stays as it is.

    {"loss": 1.0, "tokens": 3} on one rank and {"loss": 3.0, "tokens": 4} on the other give {"loss": 2.0, "tokens": 3.5}.

    Args:
        metrics: a number, a tensor, or a dict of them, nested as you like.
        op: "mean", "sum", "max" or "min"; a mean of integers is a float, and of integer tensors float32.
        group: whose members; by default all ranks.

    Raises:
        ValueError: another op, or a value that is no number.
        GroupError: members differ in their keys or shapes; on all of them.
    """
    group = group or current().group
    gathered = group._all_gather_object(f"reduce_metrics {op}", lambda: _checked(metrics, op))
    return _combined(gathered, op, "metrics", group)


def _checked(metrics: Any, op: str) -> Any:
    if op not in _OPS:
        raise ValueError(f"reduce_metrics(op={op!r}): op must be one of {', '.join(map(repr, _OPS))}")
    return _plain(metrics, "metrics")


def _plain(value: Any, path: str) -> Any:
    """The metrics as they travel: plain numbers, and tensors on the CPU."""
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{path}[{key!r}]") for key, item in value.items()}
    if isinstance(value, Tensor):
        kept = value.detach().cpu()
        return kept.item() if kept.dim() == 0 else kept.clone()
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    if not isinstance(value, int | float):
        raise ValueError(f"{path} is a {type(value).__name__}: metrics are numbers, tensors, or dicts of them")
    return value


def _combined(values: list[Any], op: str, path: str, group: Group) -> Any:
    forms = [_form(value) for value in values]
    if any(form != forms[0] for form in forms):
        table = "\n".join(f"  rank {rank}: {form}" for rank, form in zip(group.ranks, forms, strict=True))
        raise GroupError(f"reduce_metrics: the ranks of group {group.name!r} differ in {path}\n{table}\nlog the same names on all of them")
    if isinstance(values[0], dict):
        return {key: _combined([value[key] for value in values], op, f"{path}[{key!r}]", group) for key in values[0]}
    if isinstance(values[0], Tensor):
        reduced = arguments.combine(torch.stack(values), op)
        return reduced.to(arguments.reduced_dtype(values[0].dtype, op))
    return _OPS[op](values)


def _form(value: Any) -> str:
    """What must be equal on all ranks: names of a dict in any order, dtype and shape of a tensor."""
    if isinstance(value, dict):
        return f"names {', '.join(sorted(map(repr, value)))}"
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else "a number"
