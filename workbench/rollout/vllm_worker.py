"""A vLLM worker for CPUs whose sleep is real; vLLM loads it by name (`worker_cls`).

Upstream's CPU worker answers sleep with a warning, hides linear weights in oneDNN handles that nobody can free, and meets its peers
in shared memory named by rank alone.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from vllm import _custom_ops
from vllm.distributed.device_communicators import cpu_communicator
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.worker.cpu_worker import CPUWorker

from workbench.errors import EngineError
from workbench.rollout.engine import PhaseTimes
from workbench.rollout.sleep import Sleeper, default_backup_dir
from workbench.rollout.vllm_engine import reload_checkpoint

__all__ = ["SleepingCPUWorker"]

_ONEDNN_FROM = 2**20  # multiplications; below, its call costs more than it saves


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
        for layer in self.model_runner.model.modules():
            # vLLM's name for what multiplies with a layer's weights; for other dtypes it chooses well itself
            if getattr(layer, "cpu_linear", None) is not None and layer.weight.dtype == torch.float32:
                layer.cpu_linear = _linear

    def prepare_sleep(self) -> None:
        """After the KV cache is there: know all memory, and commit the cache so that the first sleep frees all of it."""
        _rewind_generators(self.model_runner)
        if hasattr(torch.ops._C, "fused_gumbel_argmax"):  # vLLM 0.24 draws otherwise
            _draw_in_place(self.model_runner.sampler.topk_topp_sampler)
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


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear` over plain float32 weights; torch gives them to MKL, which on AMD's processors takes 2 to 4 times as long as oneDNN."""
    if x.numel() * weight.shape[0] >= _ONEDNN_FROM and torch.backends.mkldnn.is_available():
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return torch.nn.functional.linear(x, weight, bias)


def _rewind_generators(runner: Any) -> None:
    """Give partly read prompts their random state back by a copy of it.

    What is sampled before a prompt is read to its end is thrown away. Upstream then moves the request's generator back by an offset, which
    only CUDA's generators have: seeded requests that are read in pieces fail on a CPU (`_bookkeeping_sync`, vLLM 0.32.0).
    """
    sample, bookkeep = runner._sample, runner._bookkeeping_sync
    states: dict[int, torch.Tensor] = {}

    def keep_and_sample(*args: Any, **kwargs: Any) -> Any:
        states.clear()
        for index in np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs]).tolist():
            if (generator := runner.input_batch.generators.get(index)) is not None:
                states[index] = generator.get_state()
        return sample(*args, **kwargs)

    def bookkeep_and_restore(*args: Any, **kwargs: Any) -> Any:
        held = {index: runner.input_batch.generators.pop(index) for index in states}  # so that upstream finds none to move
        try:
            return bookkeep(*args, **kwargs)
        finally:
            for index, generator in held.items():
                generator.set_state(states[index])
                runner.input_batch.generators[index] = generator

    runner._sample, runner._bookkeeping_sync = keep_and_sample, bookkeep_and_restore


def _draw_in_place(sampler: Any) -> None:
    """Draw the number of each seeded row where it belongs: the same numbers that upstream draws.

    Upstream makes two tensors a token for that, which takes a twentieth of a small model's time (`forward_cpu`, vLLM 0.32.0).
    """
    upstream = sampler.forward

    def forward(
        logits: torch.Tensor, generators: dict[int, torch.Generator], k: torch.Tensor | None, p: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        is_plain = not sampler.use_fp64_gumbel and sampler.logprobs_mode.startswith("raw_")
        if not is_plain or len(generators) < len(logits):
            numbers: tuple[torch.Tensor, torch.Tensor | None] = upstream(logits, generators, k, p)
            return numbers
        seeds = torch.empty(len(logits), dtype=torch.long)
        for row, place in enumerate(seeds.unbind()):
            place.random_(0, 2**31, generator=generators[row])
        return torch.ops._C.fused_gumbel_argmax(apply_top_k_top_p(logits, k, p).float(), seeds), None

    sampler.forward = forward


def _tensors(nested: Any) -> list[torch.Tensor]:
    """The tensors of a KV cache, which some attention backends nest in lists."""
    if isinstance(nested, torch.Tensor):
        return [nested]
    return [tensor for item in nested for tensor in _tensors(item)]
