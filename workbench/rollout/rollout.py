"""`rollout`: gather -> generate -> scatter between the ranks, the engine asleep in between; the driver only watches.

    shards -> [wake_up] -> every rank: its prompts -> RootedRollout or GroupedRollout -> its batch -> [sleep]   (a step)
    batches, spans, memory, sleeps -> Run

Knows clusters, engine handles and the pipeline. Does not know figures or files.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from workbench import models
from workbench.environment import describe_environment, fingerprint_model
from workbench.errors import EngineError
from workbench.ranks.history import as_one_call
from workbench.ranks.memory import MemorySampler
from workbench.records import RolloutBatch, Sampling, Span
from workbench.rollout.client import Address, EngineClient
from workbench.rollout.following import Live, followed
from workbench.rollout.handle import EngineHandle, check_sampling
from workbench.rollout.shards import Shard, shard_prompts
from workbench.rollout.start import check_mode, start_engine
from workbench.run import Run
from workbench.store.kept import keep_run

if TYPE_CHECKING:
    from workbench.ranks.cluster import Cluster

__all__ = ["rollout"]

_kept: weakref.WeakKeyDictionary[Cluster, EngineHandle] = weakref.WeakKeyDictionary()  # at most one idle engine a cluster, asleep
_WAYS = (None, "scatter", "broadcast")
_ON_ERROR = ("raise", "keep")
_OF_SAMPLING = {field.name for field in fields(Sampling)} - {"seed"}  # an engine has a seed too


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOrder:
    """What every rank is told for one step; `addresses` says where each finds its engine (-1: rank 0's, for all)."""

    step: int
    shards: tuple[Shard, ...]
    sampling: Sampling
    mode: str
    tp: int
    scatter: str | None
    on_error: str
    addresses: Mapping[int, Address]


@as_one_call
def rollout(
    cluster: Cluster,
    prompts: Any,
    *,
    engine: EngineHandle | None = None,
    model: Any = "tiny",
    mode: str = "rooted",
    tp: int = 1,
    backend: str = "vllm",
    kv_cache_bytes: int | None = None,
    sampling: Sampling | None = None,
    num_samples: Any = None,
    scatter: str | None = None,
    sleep_level: int | None = 1,
    num_steps: int = 1,
    on_error: str = "raise",
    keep: bool = True,
    live: Live = False,
    **engine_options: Any,
) -> Run:
    """Run real rollouts over the ranks.

    Args:
        prompts: a list a rank (may be empty), a flat list (cut in contiguous blocks), a function that each rank runs, or the name of a
            variable on the ranks. Afterwards each rank holds its slice as `batch`.
        engine: a handle of `start_engine`; without one an engine is started by `model`, `mode`, `tp`, ... and kept asleep for the next
            rollout with equal options.
        num_samples: completions per prompt; wins over `sampling.n`.
        scatter: "scatter" or "broadcast"; None reads WORKBENCH_SCATTER, else "scatter".
        sleep_level: how deep the engine sleeps after each step; None keeps it awake.
        on_error: "keep" brings a prompt that fails back as a failed completion.
        keep: also keep the run among the last 20 of `wb.runs()`.
        live: show lengths and memory while it runs: a widget in a notebook, a line elsewhere; a function gets the `LiveRun` instead.

    Returns:
        The records of the run.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing was sent.
        EngineError: the engine refused, failed or died; the ranks live on.
        RankError: a rank failed.
    """
    sampling = Sampling() if sampling is None else sampling
    options = {"num_steps": num_steps, "sleep_level": sleep_level, "scatter": scatter, "on_error": on_error}
    _check(engine, sampling, engine_options, **options)
    if engine is None:
        check_mode(mode, tp, backend, cluster.world_size)
    shards = shard_prompts(prompts, cluster.world_size, num_samples=num_samples)
    started = time.monotonic()
    start_spans: list[Span] = []
    engine_options |= {"model": model, "mode": mode, "tp": tp, "backend": backend, "kv_cache_bytes": kv_cache_bytes}
    engine = engine or _own_engine(cluster, shards, start_spans, **engine_options)
    recorder = _Recorder(cluster, engine, started, start_spans)
    with followed(live, engine, recorder.sampler, num_steps=num_steps, start_s=started) as live_run:
        for live_run.step in range(num_steps):
            recorder.step(_order(engine, live_run.step, shards, sampling, scatter, on_error), sleep_level)
        run = live_run.run = recorder.run(_manifest(cluster, engine, sampling, options))
    if keep:
        keep_run(run)
    return run


def _order(engine: EngineHandle, step: int, shards: tuple[Shard, ...], sampling: Sampling, scatter: str | None, on_error: str) -> StepOrder:
    return StepOrder(
        step=step,
        shards=shards,
        sampling=sampling,
        mode=engine.spec.mode,
        tp=engine.spec.tp,
        scatter=scatter,
        on_error=on_error,
        addresses=engine.addresses(),
    )


def _check(
    engine: EngineHandle | None,
    sampling: Any,
    engine_options: Mapping[str, Any],
    *,
    num_steps: Any,
    sleep_level: Any,
    scatter: Any,
    on_error: Any,
) -> None:
    _check_engine(engine, sampling, engine_options)
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps is {num_steps!r}; it must be an int of at least 1")
    for name, value, allowed in (
        ("sleep_level", sleep_level, (None, 0, 1, 2)),
        ("scatter", scatter, _WAYS),
        ("on_error", on_error, _ON_ERROR),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def _check_engine(engine: EngineHandle | None, sampling: Any, engine_options: Mapping[str, Any]) -> None:
    check_sampling(sampling)
    misplaced = sorted(_OF_SAMPLING & engine_options.keys())
    if misplaced:
        given = ", ".join(f"{name}={engine_options[name]!r}" for name in misplaced)
        raise TypeError(f"{misplaced[0]} is part of the sampling; pass sampling=wb.Sampling({given})")
    if engine is not None:
        engine.check_alive()
        if engine_options:
            raise TypeError(f"rollout has no option {sorted(engine_options)[0]!r}; options of a new engine do not go with engine=")


def _check_names(cluster: Cluster, shards: Sequence[Shard]) -> None:
    """Refuse names that the ranks do not have before an engine is started for them."""
    if not isinstance(shards[0].prompts, str) and not any(isinstance(shard.num_samples, str) for shard in shards):
        return
    for problem in cluster.run(_problem_with_names, shards):
        if problem:
            raise ValueError(problem)


def _problem_with_names(shards: Sequence[Shard]) -> str:
    """Run on a rank; an error raised there would show the workbench's own frames."""
    import sys

    from workbench.ranks.current import current

    try:
        shards[current().rank].check_names(vars(sys.modules["__main__"]))
    except ValueError as error:
        return str(error)
    return ""


def _own_engine(cluster: Cluster, shards: Sequence[Shard], spans: list[Span], **options: Any) -> EngineHandle:
    """The engine kept from an earlier rollout when it was asked for in the same words, else a new one."""
    _check_names(cluster, shards)
    kept = _kept.get(cluster)
    wanted = repr(sorted(options.items(), key=lambda item: item[0]))
    if kept is not None:
        if kept.status != "dead" and kept.wanted == wanted:
            return kept
        kept.close()
        del _kept[cluster]
    start = time.monotonic()
    handle = start_engine(cluster, **options)
    spans.append(Span(step=-1, rank=-1, span="start", start_s=start, end_s=time.monotonic()))
    handle.wanted = wanted
    _kept[cluster] = handle
    return handle


class _Recorder:
    """Runs steps and collects what they leave."""

    def __init__(self, cluster: Cluster, engine: EngineHandle, started: float, spans: list[Span]) -> None:
        self.cluster = cluster
        self.engine = engine
        self.started = started
        self.batches: dict[int, dict[int, RolloutBatch]] = {}
        self.spans = spans
        engine.take_records()
        self.sampler = MemorySampler()
        self.sampler.watch(os.getpid(), "driver")
        for rank in range(cluster.world_size):
            self.sampler.watch(cluster.pid(rank), "rank", rank=rank)
        for rank, pid in engine.ranks_and_pids():
            self.sampler.watch(pid, "engine", rank=rank)
        self.sampler.start()

    def step(self, order: StepOrder, sleep_level: int | None) -> None:
        """One step: wake, gather -> generate -> scatter on the ranks, sleep; the engine sleeps also after a failure."""
        self.engine.at_step(order.step)
        try:
            if self.engine.is_sleeping:
                self._change("wake_up", self.engine.wake_up)
            self.sampler.phase = "generate"
            with self.engine.in_phase("generate"):
                outcomes = self.cluster.run(run_step, order)
            for outcome in outcomes:
                if outcome.error:
                    raise (ValueError if outcome.is_value_error else EngineError)(outcome.error)
                self.spans += outcome.spans
            self.batches[order.step] = {rank: outcome.batch for rank, outcome in enumerate(outcomes) if outcome.batch is not None}
        except BaseException:
            self.sampler.stop()
            raise
        finally:
            if sleep_level is not None and self.engine.status == "awake":
                self._change("sleep", partial(self.engine.sleep, sleep_level))
            self.sampler.phase = "asleep" if self.engine.is_sleeping else ""

    def _change(self, phase: str, change: Callable[[], object]) -> None:
        """Sleep or wake, with a sample right before and after: an engine may sleep for less than the sampler's interval."""
        self.sampler.sample()
        self.sampler.phase = phase
        change()
        self.sampler.phase = "asleep" if self.engine.is_sleeping else ""
        self.sampler.sample()

    def run(self, manifest: dict[str, Any]) -> Run:
        self.sampler.stop()
        spans, sleeps = self.engine.take_records()
        marks = [
            Span(step=-1, rank=-1, span="mark", start_s=at_s, end_s=at_s, label=label)
            for at_s, label in self.cluster.marks
            if at_s >= self.started
        ]
        return Run(
            batches=self.batches,
            spans=[*self.spans, *spans],
            memory=self.sampler.samples,
            sleeps=sleeps,
            marks=marks,
            manifest=manifest,
            start_s=self.started,
        )


def _manifest(cluster: Cluster, engine: EngineHandle, sampling: Sampling, options: dict[str, Any]) -> dict[str, Any]:
    spec = engine.spec
    return {
        **describe_environment(),
        "world_size": cluster.world_size,
        "layout": repr(cluster.layout),
        "model": spec.model,
        "mode": spec.mode,
        "backend": spec.backend,
        "model_hash": fingerprint_model(models.path(spec.model)),
        "engine": asdict(spec),
        "sampling": asdict(sampling),
        "options": options,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What one rank tells the driver after a step: a copy of its batch, its spans, or why the step failed on all ranks."""

    batch: RolloutBatch | None = None
    spans: tuple[Span, ...] = ()
    error: str = ""
    is_value_error: bool = False


def run_step(order: StepOrder) -> StepOutcome:
    """One rank's part of a step; runs in the rank."""
    import sys

    from workbench.ranks.current import current
    from workbench.rollout.pipeline import GroupedRollout, RootedRollout

    me = current()
    names = vars(sys.modules["__main__"])
    try:
        prompts, counts = _read(order, me.rank, names)
        engine = _client(order, me.rank)
        group = me.group if me.world_size > 1 else None
        pipeline: Any
        if order.mode == "rooted":
            pipeline = RootedRollout(group, engine, scatter=order.scatter, on_error=order.on_error, step=order.step)
        else:
            pipeline = GroupedRollout(_engine_group(order.tp), engine, on_error=order.on_error, step=order.step)
        batch = pipeline.generate(prompts, order.sampling, counts)
    except (EngineError, ValueError) as error:
        return StepOutcome(error=str(error), is_value_error=not isinstance(error, EngineError))
    names["batch"] = batch
    spans = list(pipeline.spans)
    if order.mode == "rooted" and engine is not None:  # the one engine of all ranks has a row of its own
        start_s, end_s = engine.generated_s
        spans.append(Span(step=order.step, rank=-1, span="generate", start_s=start_s, end_s=end_s))
    return StepOutcome(batch=batch, spans=tuple(spans))


def _read(order: StepOrder, rank: int, names: dict[str, Any]) -> tuple[Any, Any]:
    """This rank's prompts; what cannot be read is left to the pipeline to tell, so that every rank hears of it."""
    shard = order.shards[rank]
    try:
        return shard.read(names)
    except ValueError as error:
        return _Unreadable(error), None


class _Unreadable(Sequence[Any]):
    """Stands for prompts that could not be read: the pipeline's own check meets the error and carries it to all ranks."""

    def __init__(self, error: ValueError) -> None:
        self._error = error

    def __len__(self) -> int:
        raise self._error

    def __getitem__(self, index: Any) -> Any:
        raise self._error


_clients: dict[str, EngineClient] = {}  # in a rank: connections live between steps


def _client(order: StepOrder, rank: int) -> EngineClient | None:
    address = order.addresses.get(rank) or (order.addresses.get(-1) if rank == 0 else None)
    if address is None:
        return None
    if address.path not in _clients or _clients[address.path].status == "dead":
        for old in _clients.values():
            old.disconnect()
        _clients.clear()
        _clients[address.path] = EngineClient.connect(address)
    return _clients[address.path]


_engine_groups: dict[tuple[int, int], Any] = {}  # in a rank: (generation, tp) -> group


def _engine_group(tp: int) -> Any:
    """The group of the tp consecutive ranks that share an engine; None where each has its own."""
    if tp == 1:
        return None
    from workbench.ranks.current import current
    from workbench.ranks.group import Group

    me = current()
    key = (me.generation, tp)
    if key not in _engine_groups:
        made = [Group.create(range(first, first + tp), "engine") for first in range(0, me.world_size, tp)]
        _engine_groups.clear()
        _engine_groups[key] = made[me.rank // tp]
    return _engine_groups[key]
