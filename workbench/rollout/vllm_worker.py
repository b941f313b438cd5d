"""A vLLM worker for CPUs whose sleep is real; vLLM loads it by name (`worker_cls`).

Upstream's CPU worker answers sleep with a warning, hides linear weights in oneDNN handles that nobody can free, and meets its peers
in shared memory named by rank alone.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm import _custom_ops
from vllm.distributed.device_communicators import cpu_communicator
from vllm.v1.worker.cpu_worker import CPUWorker

from workbench.errors import EngineError
from workbench.rollout.engine import PhaseTimes
from workbench.rollout.sleep import Sleeper, default_backup_dir
from workbench.rollout.vllm_engine import reload_checkpoint

__all__ = ["SleepingCPUWorker"]


class SleepingCPUWorker(CPUWorker):  # type: ignore[misc]  # vLLM has no types here
    """Plain parameters, gloo between the members, and a `Sleeper` over weights and KV cache."""

    phase: PhaseTimes | None = None

    def init_device(self) -> None:
        # Members that do not agree on a name fall back from shared memory to gloo: no file in /dev/shm that outlives a crash and
        # stops the next start, and a member whose peer died gets an error instead of spinning for ever.
        upstream = cpu_communicator._CPUSHMDistributed.make_group_name
        cpu_communicator._CPUSHMDistributed.make_group_name = staticmethod(lambda communicator: f"{os.getpid()}")
        try:
            super().init_device()
        finally:
            cpu_communicator._CPUSHMDistributed.make_group_name = staticmethod(upstream)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load plain parameters: packed ones are empty afterwards, and could be neither freed, checked nor replaced."""
        packs, _custom_ops._supports_onednn = _custom_ops._supports_onednn, False
        try:
            super().load_model(*args, **kwargs)
        finally:
            _custom_ops._supports_onednn = packs
        empty = [name for name, parameter in self.model_runner.model.named_parameters() if parameter.numel() == 0]
        if empty:
            raise EngineError(
                f"vLLM packed {len(empty)} weights out of sight ({empty[0]}, ...), so this engine could not sleep or take new weights\n"
                "it does that on this processor for this dtype; pass dtype='float32'"
            )

    def prepare_sleep(self) -> None:
        """After the KV cache is there: know all memory, and commit the cache so that the first sleep frees all of it."""
        self.model_runner.model.requires_grad_(False)
        folder = self.vllm_config.additional_config.get("workbench_backup_dir")
        self.sleeper = Sleeper(
            weights=self.model_runner.model.parameters(),
            kept=self.model_runner.model.buffers(),
            kv_cache=_tensors(self.model_runner.kv_caches),
            backup_dir=folder or default_backup_dir(),
            reload=lambda: reload_checkpoint(self),
        )
        self.sleeper.commit_kv_cache()

    def sleep(self, level: int = 1) -> None:
        self.phase = self.sleeper.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.phase = self.sleeper.wake_up(tags or ["weights", "kv_cache"])


def _tensors(nested: Any) -> list[torch.Tensor]:
    """The tensors of a KV cache, which some attention backends nest in lists."""
    if isinstance(nested, torch.Tensor):
        return [nested]
    return [tensor for item in nested for tensor in _tensors(item)]
