"""A layout as the few values that it is made from: what the explorer's page changes, and the call that makes it again."""

from __future__ import annotations

import ast
from typing import Any, TypedDict

from workbench.errors import LayoutError
from workbench.plan.layout import Layout

__all__ = ["MAX_RANKS", "LayoutSpec", "code_of", "layout_of", "spec_of"]

MAX_RANKS = 1024  # what the explorer can show
_MEGATRON_ORDER = "tp-cp-ep-dp-pp"


class LayoutSpec(TypedDict):
    """Plain JSON values: `kind` is "vllm" or the name of a constructor of `Layout`; `sizes` are its numbers that are not 1."""

    kind: str
    sizes: dict[str, int]
    order: str
    groups: dict[str, list[list[int]]]


def spec_of(layout: Layout) -> LayoutSpec:
    """What a layout was made from, read from its repr, which is the call; groups of one's own are listed.

    Raises:
        LayoutError: it is too large to be shown.
    """
    if layout.world_size > MAX_RANKS:
        raise LayoutError(
            f"{layout}: {layout.world_size:,} ranks are more than the explorer can show\nneeded: at most {MAX_RANKS:,}\n"
            "show a smaller world of the same degrees"
        )
    name, _, _ = repr(layout).partition("(")
    kind = name.removeprefix("Layout").removeprefix(".") or "vllm"
    if kind == "custom":
        listed = {axis: [list(group) for group in layout.groups(axis)] for axis in layout.axes}
        return LayoutSpec(kind=kind, sizes={}, order=_MEGATRON_ORDER, groups=listed)
    call = ast.parse(repr(layout), mode="eval").body
    assert isinstance(call, ast.Call)
    values = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    order = values.pop("order", _MEGATRON_ORDER)
    values.pop("ranks_per_node", None)
    return LayoutSpec(kind=kind, sizes=values, order=order, groups={})


def layout_of(spec: LayoutSpec) -> Layout:
    """The layout of a spec.

    Raises:
        LayoutError: the sizes do not fit.
    """
    sizes: dict[str, Any] = dict(spec["sizes"])
    match spec["kind"]:
        case "vllm":
            return Layout(**sizes)
        case "custom":
            return Layout.custom(spec["groups"])
        case "megatron":
            return Layout.megatron(**sizes, order=spec["order"])
        case "subgroups":
            return Layout.subgroups(**{"size": 1} | sizes)
        case "sequence_parallel":
            return Layout.sequence_parallel(**{"sp": 1} | sizes)
        case "supernode":
            return Layout.supernode(**sizes)
    known = "vllm, megatron, supernode, subgroups, sequence_parallel, custom"
    raise LayoutError(f"layouts of kind {spec['kind']!r} are not known\nknown are {known}\nchoose one of them")


def code_of(layout: Layout) -> str:
    """The call that makes a layout again, as Python."""
    spec = spec_of(layout)
    if spec["kind"] == "custom":
        return f"layout = wb.Layout.custom({spec['groups']!r})"
    return f"layout = wb.{layout!r}"
