"""A research workbench for simulated multi-rank experiments on one box.

Words: a *rank* is a process of the world, numbered 0 to world size - 1. An *axis* of a layout (dp, tp, pp, ...) has a *degree*, its size;
a *group* is the ranks that differ in one axis only; *dim* is a tensor's dimension, never an axis. A *prompt* gets *completions*, each one
sample; a *rollout* is one gather -> generate -> scatter, and a *step* is one of several. The *engine* generates. A *generation* of a
cluster is its n-th process group since launch. The *driver* is the notebook's kernel.

Importing this loads neither torch nor vllm: names are looked up when first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "workbench.ranks.cluster": "Cluster",
    "workbench.ranks.current": "Current current is_first_rank print_first_rank",
    "workbench.ranks.launch": "launch",
    "workbench.ranks.replay": "Replayed replay",
    "workbench.ranks.reproduce": "Reproduction reproduce",
    "workbench.errors": (
        "ClusterBusy ClusterClosed CollectiveMismatch EngineError GroupError LaunchError LayoutError ModelError RankDeadlock RankError "
        "RankFailed RankInterrupted RankTimeout ReplayError RunError SessionError StaleGroupError WorkbenchError"
    ),
    "workbench.live": "LiveRun",
    "workbench.plan.layout": "Layout",
    "workbench.plan.lengths": "LengthStats length_stats",
    "workbench.plan.partition": "divide partition_layers split_tensor",
    "workbench.ranks.faults": "Fault",
    "workbench.ranks.graph_capture": "graph_capture",
    "workbench.ranks.group": "Group",
    "workbench.ranks.message_queue": "MessageQueue",
    "workbench.ranks.metrics": "reduce_metrics",
    "workbench.ranks.stateless": "StatelessGroup free_port",
    "workbench.ranks.stateless_gloo": "destroy_stateless_gloo stateless_gloo",
    "workbench.records": "Diagnosis GatheredPrompts RolloutBatch Sampling",
    "workbench.rollout.hf_engine": "HFEngine",
    "workbench.rollout.handle": "EngineHandle",
    "workbench.rollout.pipeline": "GroupedRollout RootedRollout",
    "workbench.rollout.rollout": "rollout",
    "workbench.rollout.start": "start_engine",
    "workbench.rollout.vllm_engine": "VLLMEngine",
    "workbench.run": "Run load_run runs",
}
_SUBPACKAGES = ("models", "view")
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [*_HOME_OF, *_SUBPACKAGES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"workbench.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext workbench`."""
    import_module("workbench.magics").load_ipython_extension(shell)


def unload_ipython_extension(shell: Any) -> None:
    """`%unload_ext workbench`."""
    import_module("workbench.magics").unload_ipython_extension(shell)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Importing the folder `workbench.rollout` binds it here; it must not hide the function `wb.rollout`."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # functions of a notebook that say `wb` travel to ranks; cloudpickle knows plain modules only
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package
