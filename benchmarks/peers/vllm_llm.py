"""A bare vllm.LLM in one process: python -m benchmarks.peers.vllm_llm JOB, JOB a JSON file; a line on stdin asks for one `generate`.

Prints a JSON object when it is ready and one for each request; an empty line or end of file ends it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


def main(job: dict[str, Any]) -> None:
    import torch
    from vllm import LLM, SamplingParams

    set_num_threads = torch.set_num_threads  # vLLM puts a function in its place that does nothing
    set_num_threads(job["num_threads"])
    llm = LLM(job["model"], dtype=job["dtype"], enforce_eager=True, kv_cache_memory_bytes=job["kv_cache_bytes"], seed=0)
    set_num_threads(job["num_threads"])
    tokenizer = llm.get_tokenizer()
    prompts: Any = [{"prompt_token_ids": tokenizer.encode(text)} for text in job["prompts"]]
    params = [SamplingParams(max_tokens=job["max_tokens"], temperature=job["temperature"], seed=seed) for seed in job["seeds"]]
    _say({"num_threads": torch.get_num_threads()})
    for line in sys.stdin:
        if not line.strip():
            break
        start_s = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.monotonic() - start_s
        _say({"seconds": seconds, "texts": [output.outputs[0].text for output in outputs],
              "num_tokens": sum(len(output.outputs[0].token_ids) for output in outputs)})  # fmt: skip


def _say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
