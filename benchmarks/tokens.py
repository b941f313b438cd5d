"""Tokens a second of a rooted rollout over ranks, beside one `LLM.generate` of bare vLLM in one process."""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

from benchmarks.line import Line, Reach
from benchmarks.peers import environment, python

__all__ = ["TokensResult", "measure"]

_KV_CACHE_BYTES = 2**29


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensResult:
    """The same prompts, settings and seed of each sample both ways; seconds a repeat.

    Attributes:
        rollout_s: a whole `wb.rollout`, from the call to its return, the engine awake; with checks, samples of memory and the kept records.
        llm_s: `LLM.generate`, its prompts tokenized beforehand.
        are_texts_equal: both ways gave the same texts, prompt by prompt and sample by sample.
    """

    num_ranks: int
    num_completions: int
    num_tokens: int
    num_threads: int
    rollout_s: tuple[float, ...]
    llm_s: tuple[float, ...]
    are_texts_equal: bool

    def lines(self) -> list[Line]:
        ours, theirs = (self.num_tokens / median(s) for s in (self.rollout_s, self.llm_s))
        same = "same texts" if self.are_texts_equal else "OTHER TEXTS"
        what = f"rollout over {self.num_ranks} ranks, {self.num_completions:,} completions ({same})"
        return [Line(what=what, unit="tokens/s", ours=ours, theirs=theirs, peer="one LLM.generate", reach=Reach(limit=0.95, is_least=True))]


def measure(
    *, num_ranks: int = 4, prompts_per_rank: int = 32, num_samples: int = 8, max_tokens: int = 64, repeats: int = 15
) -> TokensResult:
    """Both ways in turns, both engines started; the first of each warms up."""
    import workbench as wb

    numbers = random.Random(0)
    shards = [[f"{numbers.randrange(100)}+{numbers.randrange(100)}=" for _ in range(prompts_per_rank)] for _ in range(num_ranks)]
    sampling = wb.Sampling(n=num_samples, max_tokens=max_tokens, seed=0)
    job = _job(shards, sampling)
    ours, theirs, are_equal = [], [], True
    with _llm(job) as (asks, answers), wb.launch(num_ranks) as cluster:
        ready = json.loads(answers.readline())
        engine = wb.start_engine(cluster, kv_cache_bytes=_KV_CACHE_BYTES)
        for _ in range(repeats + 1):
            start_s = time.monotonic()
            run = wb.rollout(cluster, shards, engine=engine, sampling=sampling, sleep_level=None)
            ours.append(time.monotonic() - start_s)
            asks.write("again\n")
            asks.flush()
            answer = json.loads(answers.readline())
            theirs.append(float(answer["seconds"]))
            are_equal &= [text for rank in range(num_ranks) for text in run.batch(rank).texts] == answer["texts"]
    return TokensResult(
        num_ranks=num_ranks,
        num_completions=len(job["seeds"]),
        num_tokens=int(answer["num_tokens"]),
        num_threads=int(ready["num_threads"]),
        rollout_s=tuple(ours[1:]),
        llm_s=tuple(theirs[1:]),
        are_texts_equal=are_equal,
    )


def _job(shards: list[list[str]], sampling: Any) -> dict[str, Any]:
    """What bare vLLM is asked: a prompt and a seed for each sample."""
    from workbench import models
    from workbench.cores import num_usable_cores
    from workbench.rollout.engine import Origin
    from workbench.rollout.requests import expand

    prompts = [prompt for shard in shards for prompt in shard]
    origins = [Origin(rank=rank, index=index) for rank, shard in enumerate(shards) for index in range(len(shard))]
    requests = expand(prompts, sampling, origins=origins)
    return {
        "model": str(models.path("tiny")),
        "dtype": "float32",
        "kv_cache_bytes": _KV_CACHE_BYTES,
        "num_threads": num_usable_cores(),  # as `start_engine` gives to the one engine of a rooted rollout
        "prompts": [request.prompt for request in requests],
        "seeds": [request.seed for request in requests],
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
    }


@contextmanager
def _llm(job: dict[str, Any]) -> Iterator[tuple[IO[str], IO[str]]]:
    """Bare vLLM in an interpreter of its own: where to ask, where answers come."""
    with tempfile.TemporaryDirectory(prefix="workbench-bench-") as folder:
        path = Path(folder, "job.json")
        path.write_text(json.dumps(job))
        with open(Path(folder, "log"), "w+") as log:
            command = python("-m", "benchmarks.peers.vllm_llm", str(path))
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment())
            assert process.stdin is not None and process.stdout is not None
            try:
                yield process.stdin, _JsonLines(process.stdout)  # type: ignore[misc]
            finally:
                process.stdin.close()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                process.stdout.close()


class _JsonLines:
    """Lines of a peer that are JSON objects; libraries print others."""

    def __init__(self, lines: IO[str]) -> None:
        self._lines = lines

    def readline(self) -> str:
        for line in self._lines:
            if line.startswith("{"):
                return line
        raise RuntimeError("bare vLLM ended before it answered")
