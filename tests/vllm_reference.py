"""Asks real vLLM for its groups and layer cuts: JSON questions on stdin, JSON answers on the last line of stdout."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

import torch.distributed as dist
import vllm.distributed.parallel_state as state
from torch.testing._internal.distributed.fake_pg import FakeStore
from vllm.distributed.utils import get_pp_indices


def groups_of(world_size: int, tp: int, pp: int, dp: int, pcp: int, dcp: int) -> dict[str, list[list[int]]]:
    """The group lists that `initialize_model_parallel` asks for."""
    from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config

    asked: dict[str, list[list[int]]] = {}

    def record(group_ranks: list[list[int]], local_rank: int, backend: str, **options: Any) -> Any:
        asked[options["group_name"]] = group_ranks
        return state._WORLD

    state.init_model_parallel_group = record
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    config = VllmConfig(parallel_config=ParallelConfig())
    config.parallel_config.data_parallel_size = dp
    for name in ("_TP", "_ETP", "_DCP", "_PCP", "_PP", "_DP", "_EP", "_EPLB"):
        setattr(state, name, None)
    state._WORLD = _World()
    try:
        with set_current_vllm_config(config):
            state.initialize_model_parallel(tp, pp, pcp, dcp, backend="fake")
    finally:
        dist.destroy_process_group()
    return asked


class _World:
    """What `initialize_model_parallel` reads of the world group."""

    local_rank = 0
    rank_in_group = 0
    rank = 0


def main() -> None:
    questions = json.load(sys.stdin)
    answers = {
        "groups": [groups_of(**sizes) for sizes in questions["layouts"]],
        "layers": [[get_pp_indices(layers, rank, size) for rank in range(size)] for layers, size in questions["cuts"]],
    }
    print("\n" + json.dumps(answers))


if __name__ == "__main__":
    main()
