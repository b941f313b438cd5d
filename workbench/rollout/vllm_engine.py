"""vLLM in this process as an `Engine`: real sleep on CPUs too, weights replaced in place, one seed a sample.

The only module that imports vllm, beside the worker class that vLLM itself loads by name (`vllm_worker`). Nothing is imported before
an engine is made. Knows vLLM. Does not know ranks, prompts' origins beyond their numbers, or other processes.
"""

from __future__ import annotations

import atexit
import difflib
import logging
import os
import shutil
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from workbench import models
from workbench.errors import EngineError
from workbench.postponing import interrupts_postponed
from workbench.records import FinishReason, Prompt, Sampling
from workbench.rollout.batch import Completion
from workbench.rollout.checkpoint import Checkpoint
from workbench.rollout.engine import PhaseTimes
from workbench.rollout.guard import last_lines, log_to, new_folder, output_to, process_state_kept
from workbench.rollout.local_engine import LocalEngine
from workbench.rollout.own_world import OwnWorld
from workbench.rollout.reader import PromptReader
from workbench.rollout.requests import Request, prompt_hash
from workbench.rollout.sleep import TAGS, default_backup_dir, tidy

__all__ = ["VLLM_VERSIONS", "VLLMEngine", "default_kv_cache_bytes", "reload_checkpoint"]

VLLM_VERSIONS = {"cpu": "0.32", "cuda": "0.24"}  # of the locks; 0.24 was run on a CPU only. `_device_options` is all that differs
_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}
_OURS = {  # options that are parameters here ("" for none), or that sleep rests on
    "model": "model",
    "tensor_parallel_size": "tp",
    "dtype": "dtype",
    "kv_cache_memory_bytes": "kv_cache_bytes",
    "seed": "seed",
    "max_model_len": "max_model_len",
    "worker_cls": "",
    "distributed_executor_backend": "",
    "enable_sleep_mode": "",
    "pipeline_parallel_size": "",
    "data_parallel_size": "",
    "additional_config": "",
}
_TOO_SMALL = ("No available memory for the cache blocks", "larger than the available KV cache")  # how vLLM says it
_QUIET = {"VLLM_CONFIGURE_LOGGING": "0", "VLLM_NO_USAGE_STATS": "1"}
_live: weakref.WeakSet[VLLMEngine] = weakref.WeakSet()  # the last one takes vLLM's groups down


@atexit.register
def _close_all() -> None:
    for engine in list(_live):
        engine.close()


def default_kv_cache_bytes(num_engines: int = 1, *, device: str = "cpu") -> int:
    """KV cache of one engine when nobody says: min(1 GiB, 10 % of what is free) / engines, bytes."""
    return int(min(2**30, 0.1 * _free_bytes(device)) / num_engines)


def _free_bytes(device: str) -> int:
    return int(torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available)


class VLLMEngine(LocalEngine):
    """One vLLM in this process.

    With tp > 1 every member of `process_group` makes one at the same time, holds its share of the weights, and must then make the same
    calls in the same order: each generates the same completions of the same prompts.

    Args:
        model: "tiny", a folder or a hub name.
        tp: members of the tensor-parallel group.
        process_group: a torch ProcessGroup or a `Group` of tp ranks; None takes the whole world when tp > 1.
        dtype: None is float32 on a CPU, so that engines agree to the token, and the model's own on a GPU.
        kv_cache_bytes: of this process; None takes `default_kv_cache_bytes` for one engine a rank.
        max_model_len: prompt and completion together, tokens; None is the model's own limit.
        seed: vLLM's own seed. Samples never depend on it: each has its own, drawn afresh when `Sampling.seed` is None.
        log_path: where vLLM's log goes; None keeps it in a private folder until `close`.
        backup_dir: a folder on a disk for the weights at sleep level 1; None takes a temporary folder that is no tmpfs.
        engine_options: anything else that vLLM's engine takes.
        device: "auto", "cpu" or "cuda"; a vLLM build knows one of the two.

    Raises:
        EngineError: the model, an option or the memory does not fit (told before vLLM starts), or vLLM did not start (its log is named).
    """

    _world: OwnWorld

    def __init__(
        self,
        model: str | os.PathLike[str] = "tiny",
        *,
        tp: int = 1,
        process_group: Any = None,
        dtype: str | None = None,
        kv_cache_bytes: int | None = None,
        max_model_len: int | None = None,
        seed: int = 0,
        log_path: str | os.PathLike[str] | None = None,
        backup_dir: str | os.PathLike[str] | None = None,
        engine_options: Mapping[str, Any] | None = None,
        device: str = "auto",
    ) -> None:
        super().__init__(str(models.path(model)))
        self._llm: Any = None
        self._tp = tp
        group = _group_of(process_group, tp)
        self._backup_dir = Path(backup_dir or default_backup_dir())
        self._folder = new_folder("engine")  # for the log and vLLM's sockets, which it leaves behind
        self._log_path, self._keeps_folder = Path(log_path or self._folder / "vllm.log"), False
        try:
            with output_to(self._log_path), process_state_kept(_QUIET):
                self._device = _device(device)
                self._log = log_to("vllm", self._log_path)
            _check_options(engine_options or {})
            self._checkpoint = Checkpoint.read(self._model)
            dtype = dtype or ("float32" if self._device == "cpu" else "auto")
            kv_bytes = _check_memory(self._checkpoint, kv_cache_bytes, dtype, tp, self._device)
            options = {
                "model": self._model,
                "tensor_parallel_size": tp,
                "dtype": dtype,
                "kv_cache_memory_bytes": kv_bytes,
                "max_model_len": max_model_len,
                "seed": seed,
                "enforce_eager": True,
                "use_tqdm_on_load": False,
                **_device_options(self._device, tp, self._backup_dir),
                **(engine_options or {}),
            }
            self._start(options, group)
        except BaseException:
            self.close()
            raise

    def _start(self, options: dict[str, Any], group: Any) -> None:
        if any(engine._tp > 1 or self._tp > 1 for engine in _live):
            raise EngineError("this process already has an engine, and one of the two is tensor parallel\nclose the other one first")
        with ExitStack() as stack:
            # output_to is outermost: the random states and threads are back before anything is printed again
            stack.enter_context(output_to(self._log_path))
            # vLLM's groups are globals of the process, so engines side by side share the world that they were made in
            shared = next((engine._world for engine in _live), None)
            self._world = shared or OwnWorld(group, backend="gloo" if self._device == "cpu" else "cpu:gloo,cuda:nccl")
            stack.enter_context(process_state_kept(_environment(self._world, self._folder)))
            stack.enter_context(self._world.entered())
            try:
                from vllm import LLM, envs

                getattr(envs, "disable_envs_cache", lambda: None)()  # it holds what an earlier engine of this process was given
                self._llm = LLM(**options)
                _forget_exit_hook(self._llm.llm_engine.engine_core)
                self._rpc(_prepare_sleep)
            except Exception as error:
                self._keeps_folder = self._log_path.parent == self._folder  # the error names it
                is_small = any(words in str(error) for words in _TOO_SMALL)
                hint = f"the KV cache has {options['kv_cache_memory_bytes']:,} bytes: pass a larger kv_cache_bytes=\n" if is_small else ""
                raise EngineError(
                    f"vLLM did not start with model {self._model!r}: {type(error).__name__}: {error}\n"
                    f"{hint}its log is {self._log_path}; it ends with\n{last_lines(self._log_path)}"
                ) from error
        limit = int(self._llm.llm_engine.model_config.max_model_len)
        self._reader = PromptReader(self._llm.get_tokenizer(), self._model, limit)
        self._bytes = dict(zip(TAGS, self._rpc(_held_bytes), strict=True))
        if self._tp > 1:
            self._entropy = self._world.seed  # the members of a group draw the same
        self._is_started = True
        _live.add(self)
        tidy()

    def _complete(
        self, requests: Sequence[Request], ids: Sequence[list[int] | None], sampling: Sampling, lengths: list[int]
    ) -> list[Completion]:
        inputs = [_input(request.prompt, ids[request.prompt_index]) for request in requests]
        with self._whole_steps(requests):
            outputs = self._run(inputs, _sampling_params(requests, sampling))
        for request, output in zip(requests, outputs, strict=True):
            lengths[request.prompt_index] = len(output.prompt_token_ids)
        return [_completion(r, o, ids[r.prompt_index], sampling.logprobs) for r, o in zip(requests, outputs, strict=True)]

    @contextmanager
    def _whole_steps(self, requests: Sequence[Request]) -> Iterator[None]:
        """No step is cut, and each request is told as it ends.

        A step that is cut leaves vLLM's batch half changed, and the next generate fails. vLLM numbers requests upwards, and its loop takes
        what has ended from `step`.
        """
        engine, first = self._llm.llm_engine, self._llm.request_counter.counter
        step = engine.step

        def whole_step() -> Any:
            with interrupts_postponed():
                outputs = step()
                for output in outputs:
                    if output.finished:
                        done = output.outputs[0]
                        finish = _FINISH.get(done.finish_reason, FinishReason.ERROR)
                        self._tell(requests[int(output.request_id) - first], len(done.token_ids), finish)
            return outputs

        engine.step = whole_step  # on this engine alone, for the length of the block
        try:
            yield
        finally:
            del engine.step

    def _run(self, inputs: list[dict[str, Any]], params: list[Any]) -> list[Any]:
        try:
            with self._entered():
                return list(self._llm.generate(inputs, params, use_tqdm=False))
        except BaseException as error:
            self._abort_rest(error)
            if isinstance(error, Exception):
                raise EngineError(f"vLLM failed in generate: {type(error).__name__}: {error}\nits log is {self._log_path}") from error
            raise

    def _abort_rest(self, error: BaseException) -> None:
        """Requests left behind would make the next generate wait for ever; a group's members are no longer in step at all."""
        if self._tp > 1:
            self._death = f"generate ended in {type(error).__name__} on this member, so its group is out of step"
            return
        engine = self._llm.llm_engine
        try:
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            self._rpc(_forget_step)
        except Exception as second:
            self._death = f"requests could not be aborted after {type(error).__name__}: {second}"

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """vLLM's collectives look their groups up in the default world; alone it makes none.

        On a CPU its few compiled helpers run as they are: compiling each for each batch size takes 2 to 5 s and a C++ compiler. And its
        sampler draws from the process's generator even when every request has its own, so that one is put back.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            if self._tp > 1:
                stack.enter_context(self._world.entered())
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", category=FutureWarning)  # vLLM calls collectives by their old names
            if self._device == "cpu":
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def _sleep(self, level: int, tags: Sequence[str]) -> PhaseTimes:
        return self._timed(lambda: self._llm.sleep(level=level), tags, tidy_first=False)

    def _wake_up(self, tags: Sequence[str]) -> PhaseTimes:
        return self._timed(lambda: self._wake(tags), tags, tidy_first=True)

    def _wake(self, tags: Sequence[str]) -> None:
        self._llm.wake_up(list(tags) or ["scheduling"])
        if "weights" in tags and not self._is_kept and self._device != "cpu":
            self._rpc(reload_checkpoint)

    def _timed(self, call: Callable[[], Any], tags: Sequence[str], *, tidy_first: bool) -> PhaseTimes:
        """Run a sleep or wake. On a CPU the worker tells its parts; on a GPU vLLM moves both at once, and all counts as weights."""
        tidy_s = _tidy(self._device) if tidy_first else 0.0
        start = time.monotonic()
        with self._entered():
            call()
        spent_s = time.monotonic() - start
        tidy_s += 0.0 if tidy_first else _tidy(self._device)
        if tags and self._device == "cpu":
            phase: PhaseTimes = self._rpc(_last_phase)
            return replace(phase, tidy_s=phase.tidy_s + tidy_s)
        weights, kv_cache = (self._bytes[tag] if tag in tags else 0 for tag in TAGS)
        return PhaseTimes(level=0, weights_s=spent_s, kv_cache_s=0.0, tidy_s=tidy_s, weights_bytes=weights, kv_cache_bytes=kv_cache)

    def _load(self, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
        with self._entered():
            self._rpc(_load_tensors, named_tensors)
            self._reset_caches()

    def _reset_caches(self) -> None:
        """What was computed with other weights must not be reused."""
        engine = self._llm.llm_engine
        if not engine.reset_prefix_cache():
            raise EngineError("vLLM did not reset its prefix cache")
        engine.reset_mm_cache()
        if hasattr(engine, "reset_encoder_cache"):
            engine.reset_encoder_cache()

    def _used_bytes(self) -> int:
        if getattr(self, "_device", "cpu") != "cuda":
            return super()._used_bytes()
        free, total = torch.cuda.mem_get_info()
        return total - free

    def close(self) -> None:
        """Give everything back, files included; may be called twice."""
        _live.discard(self)
        if world := self.__dict__.pop("_world", None):
            with output_to(self._log_path), process_state_kept({}), world.entered():
                if self._llm is not None:
                    self._rpc(_close_sleep)
                    _shut_core(self._llm.llm_engine.engine_core.engine_core)
                self._llm = None
                if not _live:
                    _take_groups_down()
            if not _live:
                world.close()
        if log := self.__dict__.pop("_log", None):
            logging.getLogger("vllm").removeHandler(log)
            log.close()
        if not self._keeps_folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._is_started = False
        tidy()

    def _rpc(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._llm.collective_rpc(function, args=args)[0]


def _group_of(process_group: Any, tp: int) -> Any:
    """The torch ProcessGroup of a tensor-parallel engine, None for one alone."""
    import torch.distributed as dist

    if tp == 1:
        return None
    group = getattr(process_group, "process_group", process_group)
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    size = group.size() if group is not None else 1
    if size != tp:
        raise EngineError(
            f"tp={tp} needs a group of {tp} ranks; this one has {size}\npass process_group= a group of {tp} ranks, made on each of them"
        )
    return group


def _device(wanted: str) -> str:
    """The device of the vLLM that is installed."""
    from vllm.platforms import current_platform

    found = str(current_platform.device_type)
    if wanted == "auto" and found in VLLM_VERSIONS:
        return found
    if wanted != found:
        raise EngineError(f"device={wanted!r}: the installed vLLM runs on {found!r}\npass device='auto', or install the other build")
    return found


def _check_options(options: Mapping[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    known = {f.name for f in fields(EngineArgs)} - set(_OURS)
    for name in options:
        if name in _OURS:
            hint = f"pass {_OURS[name]}= instead" if _OURS[name] else "the engine sets it itself"
            raise EngineError(f"engine_options has {name!r}\n{hint}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise EngineError(f"engine_options has {name!r}, which vLLM does not know\nnearest names: {', '.join(near) or 'none'}")


def _check_memory(checkpoint: Checkpoint, kv_cache_bytes: int | None, dtype: str, tp: int, device: str) -> int:
    """Bytes of KV cache, after a look at whether it and the weights fit."""
    import torch.distributed as dist

    num_engines = dist.get_world_size() if dist.is_initialized() else 1
    kv_bytes = default_kv_cache_bytes(num_engines, device=device) if kv_cache_bytes is None else int(kv_cache_bytes)
    item_bytes = {"float32": 4, "float16": 2, "bfloat16": 2, "half": 2, "float": 4}.get(dtype)
    weights, free = checkpoint.num_bytes(item_bytes) // tp, _free_bytes(device)
    if kv_bytes <= 0 or weights + kv_bytes > free:
        mib = [f"{x / 2**20:.0f} MiB" for x in (weights, kv_bytes, free)]
        raise EngineError(
            f"the engine does not fit in the memory of this {'GPU' if device == 'cuda' else 'machine'}\n"
            f"weights {mib[0]} and KV cache {mib[1]} are needed; {mib[2]} are free\n"
            "pass kv_cache_bytes=, a smaller model, or free memory first"
        )
    return kv_bytes


def _device_options(device: str, tp: int, backup_dir: Path) -> dict[str, Any]:
    """What differs between a CPU (our worker sleeps) and a GPU (vLLM's own sleep mode); see `VLLM_VERSIONS`."""
    executor = "external_launcher" if tp > 1 else "uni"
    if device == "cpu":
        return {
            "worker_cls": "workbench.rollout.vllm_worker.SleepingCPUWorker",
            "distributed_executor_backend": executor,
            "additional_config": {"workbench_backup_dir": str(backup_dir)},
        }
    free, total = torch.cuda.mem_get_info()  # vLLM refuses to start when less than this share is free, whatever the KV cache's size
    return {"enable_sleep_mode": True, "distributed_executor_backend": executor, "gpu_memory_utilization": round(0.95 * free / total, 3)}


def _environment(world: OwnWorld, folder: Path) -> dict[str, str | None]:
    """vLLM in this process, over loopback, in a world of its own."""
    numbers = {"RANK": world.rank, "LOCAL_RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_WORLD_SIZE": world.size}
    return {
        **_QUIET,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_RPC_BASE_PATH": str(folder),  # vLLM leaves its sockets' files behind
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": None,
        "MASTER_PORT": None,
        **{name: str(number) for name, number in numbers.items()},
    }


def _input(prompt: Prompt, ids: list[int] | None) -> dict[str, Any]:
    """What vLLM is given: token ids, so that what comes back can be compared; a prompt with images as it is."""
    if ids is not None:
        return {"prompt_token_ids": ids}
    assert isinstance(prompt, dict)
    return {"prompt": prompt["prompt"], "multi_modal_data": {"image": list(prompt["images"])}}


def _sampling_params(requests: Sequence[Request], sampling: Sampling) -> list[Any]:
    from vllm import SamplingParams

    options = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "min_tokens": sampling.min_tokens,
        "stop": list(sampling.stop),
        "ignore_eos": sampling.ignore_eos,
        "logprobs": 0 if sampling.logprobs else None,  # 0: the sampled token alone
        "flat_logprobs": sampling.logprobs,
        "skip_clone": True,  # nobody else has them
    }
    try:
        shared = SamplingParams(**options)
    except Exception as error:  # its own kind, no ValueError
        raise EngineError(f"vLLM does not take this sampling: {error}\n{sampling}") from error
    if sampling.temperature == 0.0:
        return [shared] * len(requests)
    params = [copy(shared) for _ in requests]  # its checks, once
    for request, own in zip(requests, params, strict=True):
        own.seed = request.seed
    return params


def _completion(request: Request, output: Any, sent: list[int] | None, with_logprobs: bool) -> Completion:
    """One completion, with the hash of the prompt that vLLM says it read."""
    done = output.outputs[0]
    is_same = sent is None or output.prompt_token_ids == sent
    return Completion(
        tokens=done.token_ids,
        text=done.text,
        finish=_FINISH.get(done.finish_reason, FinishReason.ERROR),
        prompt_hash=request.prompt_hash if is_same else prompt_hash(list(output.prompt_token_ids)),
        logprobs=_logprobs(done) if with_logprobs else None,
        error=None if done.finish_reason in _FINISH else f"vLLM ended it with {done.finish_reason!r}",
    )


def _logprobs(done: Any) -> list[float | None]:
    """The sampled token's logprob at each position; each position's first entry is the sampled token."""
    flat = done.logprobs
    return [flat.logprobs[start] if end > start else None for start, end in zip(flat.start_indices, flat.end_indices, strict=True)]


def _tidy(device: str) -> float:
    start = time.monotonic()
    tidy()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    return time.monotonic() - start


# What runs on the worker, given by vLLM as first argument.


def _prepare_sleep(worker: Any) -> None:
    if worker.device.type == "cpu":
        worker.prepare_sleep()


def _forget_step(worker: Any) -> None:
    """A step that was cut between its forward pass and its sampling: vLLM would refuse every later one."""
    if getattr(worker.model_runner, "execute_model_state", None) is not None:
        worker.model_runner.execute_model_state = None


def _close_sleep(worker: Any) -> None:
    if worker.device.type == "cpu":
        worker.sleeper.close()


def _last_phase(worker: Any) -> PhaseTimes:
    phase: PhaseTimes = worker.phase
    return phase


def _held_bytes(worker: Any) -> tuple[int, int]:
    """Bytes of weights and KV cache of this worker, each storage once."""
    if worker.device.type == "cpu":
        return worker.sleeper.num_bytes("weights"), worker.sleeper.num_bytes("kv_cache")
    return _storage_bytes(worker.model_runner.model.parameters()), _storage_bytes(worker.model_runner.kv_caches)


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _load_tensors(worker: Any, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    with torch.no_grad():
        worker.model_runner.model.load_weights(iter(named_tensors))


def reload_checkpoint(worker: Any) -> None:
    """Read the checkpoint again into the model's own tensors."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    loader = get_model_loader(worker.vllm_config.load_config)
    with torch.no_grad(), set_current_vllm_config(worker.vllm_config):
        loader.load_weights(worker.model_runner.model, worker.vllm_config.model_config)


def _forget_exit_hook(client: Any) -> None:
    """At the process's end vLLM would destroy groups in whatever world is the default then; `close` does it in the engine's own."""
    if finalizer := getattr(client, "_finalizer", None):
        finalizer.detach()


def _shut_core(core: Any) -> None:
    """Shut vLLM's in-process core, all but its last act: `destroy_process_group()` would forget the names of the ranks' groups."""
    from vllm.v1.engine import core as module

    upstream = getattr(module, "cleanup_dist_env_and_memory", None)
    if upstream is not None:
        module.cleanup_dist_env_and_memory = lambda *args, **kwargs: None
    try:
        core.shutdown()
    finally:
        if upstream is not None:
            module.cleanup_dist_env_and_memory = upstream


def _take_groups_down() -> None:
    """Drop vLLM's own groups, which are globals of the process."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None
