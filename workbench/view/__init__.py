"""Figures and widgets over records; never imports ranks or rollout.

Names are looked up when first used: importing this loads neither matplotlib nor ipywidgets.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.view.layout import plot_layout
    from workbench.view.layout_explorer import layout_explorer
    from workbench.view.length_explorer import length_explorer
    from workbench.view.lengths import plot_lengths
    from workbench.view.memory import plot_memory
    from workbench.view.timeline import plot_timeline

__all__ = ["layout_explorer", "length_explorer", "plot_layout", "plot_lengths", "plot_memory", "plot_timeline"]

_HOME_OF = {
    "length_explorer": "workbench.view.length_explorer",
    "layout_explorer": "workbench.view.layout_explorer",
    "plot_layout": "workbench.view.layout",
    "plot_lengths": "workbench.view.lengths",
    "plot_memory": "workbench.view.memory",
    "plot_timeline": "workbench.view.timeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'workbench.view' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
