"""Figures and widgets over records; never imports ranks or rollout.

Names are looked up when first used: importing this loads neither matplotlib nor ipywidgets.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.view.collective import plot_collective
    from workbench.view.idle import plot_idle
    from workbench.view.layout import plot_layout
    from workbench.view.layout_explorer import layout_explorer
    from workbench.view.length_explorer import length_explorer
    from workbench.view.lengths import plot_lengths
    from workbench.view.live_panel import live
    from workbench.view.live_rollout import live_rollout
    from workbench.view.memory import plot_memory
    from workbench.view.memory_explorer import memory_explorer
    from workbench.view.timeline import plot_timeline
    from workbench.view.trace_collective import trace_collective

__all__ = [
    "layout_explorer",
    "length_explorer",
    "live",
    "live_rollout",
    "memory_explorer",
    "plot_collective",
    "plot_idle",
    "plot_layout",
    "plot_lengths",
    "plot_memory",
    "plot_timeline",
    "trace_collective",
]

_HOME_OF = {
    "layout_explorer": "workbench.view.layout_explorer",
    "length_explorer": "workbench.view.length_explorer",
    "live": "workbench.view.live_panel",
    "live_rollout": "workbench.view.live_rollout",
    "memory_explorer": "workbench.view.memory_explorer",
    "plot_collective": "workbench.view.collective",
    "plot_idle": "workbench.view.idle",
    "plot_layout": "workbench.view.layout",
    "plot_lengths": "workbench.view.lengths",
    "plot_memory": "workbench.view.memory",
    "plot_timeline": "workbench.view.timeline",
    "trace_collective": "workbench.view.trace_collective",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'workbench.view' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Importing the file `workbench.view.memory_explorer` binds it here; it must not hide the function of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
