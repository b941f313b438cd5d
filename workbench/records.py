"""Frozen records that cross a process border or reach a plot; numpy only, no processes, no torch.

Times are seconds on the machine's monotonic clock (`time.monotonic()`, the same in every process of one box); a `Run` subtracts its start.
"""

from __future__ import annotations

import html
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from itertools import zip_longest
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Absent",
    "ClusterSnapshot",
    "CollectiveStep",
    "CollectiveTrace",
    "Diagnosis",
    "EngineMemory",
    "EngineNow",
    "EngineStatus",
    "FinishReason",
    "FinishedCompletion",
    "GatheredPrompts",
    "Held",
    "MemorySample",
    "Prompt",
    "RankState",
    "RankStatus",
    "RolloutBatch",
    "Sampling",
    "Shown",
    "SleepReport",
    "Span",
    "Transfer",
    "Waiter",
]

_NUM_SHOWN = 4
_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxlist = 50, 8

Prompt = str | list[int] | dict[str, Any]  # text, token ids, or {"prompt": ..., "images": [...]} / {"messages": [...]}


class RankState(StrEnum):
    STARTING = "starting"
    IDLE = "idle"
    RUNNING = "running"
    DEAD = "dead"

    def is_terminal(self) -> bool:
        return self is RankState.DEAD


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """One rank as seen from outside.

    Attributes:
        cell: number of the cell that runs, None when idle.
        rss_bytes: resident memory, shared pages included.
        private_bytes: memory that would come back if the rank ended (USS).
        waits_in: the collective it waits in ("all_reduce #3 of world"), "" when none.
        waits_s: how long it has waited there, seconds.
    """

    rank: int
    pid: int
    state: RankState
    cell: int | None
    rss_bytes: int
    private_bytes: int
    waits_in: str
    waits_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A value as a rank shows it, and as much of its numbers as it takes to compare ranks.

    Attributes:
        text: its repr, cut where it is long; "" for a figure that was left open.
        summary: type, shape, dtype, bytes and range of a tensor or array, "" for other values.
        forms: MIME type -> text, or the bytes of a picture; {} where text is all there is.
        shape, dtype: of a tensor, array or number; () and "" for other values.
        numbers: its first values in C order, [at most 262,144]; None for other values.
        digest: checksum of all its values, 0 where they were too many to read.
    """

    text: str
    summary: str = ""
    forms: Mapping[str, str | bytes] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    dtype: str = ""
    numbers: NDArray[Any] | None = None
    digest: int = 0

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal where ranks show the same."""
        return self.text, self.summary, tuple(sorted(self.forms.items())), self.shape, self.dtype, self.digest


class EngineStatus(StrEnum):
    STARTING = "starting"
    AWAKE = "awake"
    WEIGHTS_ONLY = "weights_only"
    ASLEEP = "asleep"
    DEAD = "dead"

    def is_terminal(self) -> bool:
        return self is EngineStatus.DEAD


class FinishReason(IntEnum):
    """Why a completion ended, as the code that travels in `RolloutBatch.finish_codes`."""

    STOP = 0
    LENGTH = 1
    ABORT = 2
    ERROR = 3

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn, in vLLM's terms.

    Attributes:
        n: completions per prompt; `num_samples` of a rollout wins over it.
        max_tokens: longest completion, tokens.
        temperature: 0.0 is greedy.
        top_k: 0 keeps all tokens.
        stop: texts that end a completion.
        seed: base of every sample's own seed; None draws afresh each time.
        logprobs: also return the log-probability of each generated token.
    """

    n: int = 1
    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: bool = False

    def __post_init__(self) -> None:
        checks = (
            (_is_int(self.n) and self.n >= 0, "n", "an int of at least 0"),
            (_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "an int of at least 1"),
            (_is_number(self.temperature) and self.temperature >= 0.0, "temperature", "a number of at least 0.0 (0.0 is greedy)"),
            (_is_number(self.top_p) and 0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]"),
            (_is_int(self.top_k) and self.top_k >= 0, "top_k", "an int of at least 0 (0 keeps all tokens)"),
            (_is_number(self.min_p) and 0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]"),
            (_is_int(self.min_tokens) and self.min_tokens >= 0, "min_tokens", "an int of at least 0"),
            (self.seed is None or _is_int(self.seed), "seed", "an int or None"),
        )
        for is_good, name, needed in checks:
            if not is_good:
                raise ValueError(f"Sampling({name}={getattr(self, name)!r}): {name} must be {needed}")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"Sampling(min_tokens={self.min_tokens}): min_tokens must be between 0 and max_tokens, {self.max_tokens}")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """Completions, packed: completion i holds tokens[offsets[i]:offsets[i + 1]].

    Two prompts, the first with two completions of 3 and 1 tokens, the second with none:
    prompts has 2 entries, texts 2, prompt_index = [0, 0], sample_index = [0, 1], offsets = [0, 3, 4].

    Attributes:
        prompts: the prompts asked, [num_prompts], also those with no completion.
        texts: decoded completions, a list [num_completions], prompt by prompt, sample by sample.
        tokens: generated token ids, int32 [num_tokens].
        offsets: int64 [num_completions + 1].
        logprobs: log-probability of each token before temperature, float32 [num_tokens], NaN where the engine gave none; None when not
            asked.
        finish_codes: `FinishReason` of each completion, int8 [num_completions].
        weight_versions: version of the weights that wrote it, int64 [num_completions].
        prompt_index: index into `prompts`, int32 [num_completions].
        sample_index: which sample of its prompt, int32 [num_completions].
        origin_ranks: rank that the prompt came from, int32 [num_completions].
        origin_indices: index of the prompt on that rank, int32 [num_completions].
        prompt_hashes: hash of the prompt that the engine really read, uint64 [num_completions].
        num_prompt_tokens: length of each prompt in tokens, int32 [num_prompts].
        errors: why a completion failed, [num_completions], None where it did not; () when none failed.
        metadata: anything picklable beside each completion, [num_completions], or None.
    """

    prompts: tuple[Prompt, ...]
    texts: Sequence[str]
    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    logprobs: NDArray[np.float32] | None
    finish_codes: NDArray[np.int8]
    weight_versions: NDArray[np.int64]
    prompt_index: NDArray[np.int32]
    sample_index: NDArray[np.int32]
    origin_ranks: NDArray[np.int32]
    origin_indices: NDArray[np.int32]
    prompt_hashes: NDArray[np.uint64]
    num_prompt_tokens: NDArray[np.int32]
    errors: tuple[str | None, ...] = ()
    metadata: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", list(self.texts))  # a list: it is compared with columns' tolist() in notebooks

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        ends = Counter(self.finish_reasons)
        parts = [
            f"{len(self)} completions of {len(self.prompts)} prompts",
            f"{len(self.tokens):,} tokens",
            f"{ends['length']} cut at the limit",
            *(f"{ends[reason]} {told}" for reason, told in (("abort", "aborted"), ("error", "failed")) if ends[reason]),
        ]
        asked = [self.prompts[at] for at in self.prompt_index[:_NUM_SHOWN]]
        answers = zip_longest(asked, self.texts[:_NUM_SHOWN], self.errors[:_NUM_SHOWN])
        shown = [f"  {_SHORT.repr(prompt)} -> {f'failed: {error}' if error else _SHORT.repr(text)}" for prompt, text, error in answers]
        rest = [f"  ... and {len(self) - _NUM_SHOWN} more"] if len(self) > _NUM_SHOWN else []
        return "\n".join([f"RolloutBatch: {', '.join(parts)}", *shown, *rest])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Generated tokens per completion, [num_completions]."""
        return np.diff(self.offsets)

    @property
    def finish_reasons(self) -> tuple[str, ...]:
        """ "stop", "length", "abort" or "error" per completion."""
        return tuple(FinishReason(int(code)).label for code in self.finish_codes)

    def tokens_of(self, completion: int) -> NDArray[np.int32]:
        """Token ids of one completion, [length]."""
        return self.tokens[self.offsets[completion] : self.offsets[completion + 1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedCompletion:
    """A completion that has just ended, told while its rollout still runs.

    Attributes:
        prompt_index: index of the prompt on its origin rank.
        finish_reason: "stop", "length" or "abort".
        at_s: when it ended.
    """

    step: int
    origin_rank: int
    prompt_index: int
    sample_index: int
    length_tokens: int
    finish_reason: str
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GatheredPrompts:
    """All prompts of a group in rank order; rank r's own are prompts[offsets[r]:offsets[r + 1]].

    Attributes:
        prompts: [num_prompts] where they are generated; () on ranks that do not generate.
        offsets: int64 [num_ranks + 1], the same on every rank.
        num_samples: completions per prompt, int64 [num_prompts of the group], the same on every rank; None where `Sampling.n` holds.
    """

    prompts: tuple[Prompt, ...]
    offsets: NDArray[np.int64]
    num_samples: NDArray[np.int64] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One stretch of work on one rank.

    Attributes:
        span: "gather", "generate", "scatter", "sleep", "wake_up", "update_weights", "start" or "mark".
        rank: -1 for the engine's own process and for the driver.
        num_bytes: what this rank sent and received in it.
    """

    step: int
    rank: int
    span: str
    start_s: float
    end_s: float
    num_bytes: int = 0
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySample:
    """Memory of one process at one time, read from outside it.

    Attributes:
        rank: -1 for a process that is no rank.
        process: "rank", "engine" or "driver".
        pss_bytes: proportional memory: shared pages are split among those who map them, so it may be summed; 0 where it cannot be read.
        device_used_bytes: memory of this process on the GPU; 0 without one.
        phase: the span that ran ("generate", "asleep", ...), "" when none.
    """

    time_s: float
    rank: int
    pid: int
    process: str
    rss_bytes: int
    pss_bytes: int
    device_used_bytes: int
    phase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepReport:
    """One sleep and the wake after it, of one engine process.

    Attributes:
        weights_bytes: weights held before the sleep.
        kv_cache_bytes: KV cache held before the sleep.
        freed_bytes: how much the process's memory fell, seen from outside (PSS; on a GPU the device's used memory).
        regained_bytes: how much it rose on the wake; 0 while asleep.
        wake_s: NaN while asleep.
    """

    step: int
    rank: int
    level: int
    weights_bytes: int
    kv_cache_bytes: int
    freed_bytes: int
    regained_bytes: int
    sleep_s: float
    wake_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """What one engine process holds now, bytes; a tensor put to sleep counts as 0.

    Attributes:
        rank: rank it runs in, -1 for a process of its own.
        other_bytes: the rest of the process (PSS minus weights minus KV cache; on a GPU device memory likewise).
        host_backup_bytes: weights kept on disk or in host memory while asleep at level 1.
    """

    rank: int
    pid: int
    weights_bytes: int
    kv_cache_bytes: int
    other_bytes: int
    host_backup_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiter:
    """A rank that waits in a collective.

    Attributes:
        op: "all_reduce", ...; seq: number of this collective in its group, from 1; group: name of the group.
        missing: ranks it waits for.
        for_s: seconds it has waited.
        line: line of the cell, 0 where unknown; source: that line's text.
        has_limit: the wait ends by itself, after a time that the caller chose.
        ranks: members of the group.
    """

    rank: int
    op: str
    sequence: int
    group: str
    missing: tuple[int, ...]
    for_s: float
    line: int
    source: str
    is_inside_gloo: bool = False
    has_limit: bool = False
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """A rank that others wait for.

    Attributes:
        cause: "finished the cell without it", "is not in this cell", "is dead", "is computing", "waits elsewhere", ...
        where: what it does now: line and source text of the cell, "" where unknown.
        cell: number of its cell, 0 where it is in none.
        stack: its Python frames from the cell inwards, as tracebacks show them; "" where unknown.
        native: its innermost frames, native ones too, "" where nobody looked or was allowed to.
    """

    rank: int
    cause: str
    where: str
    cell: int = 0
    stack: str = ""
    native: str = ""

    @property
    def text(self) -> str:
        """What is known of it, in lines."""
        lines = [f"rank {self.rank} {self.cause}" + (f": {self.where}" if self.where else "")]
        if self.stack.count("File ") > 1:  # one frame is the line that was told already
            lines += ["Python stack:", *("  " + line for line in self.stack.splitlines())]
        if self.native:
            lines += ["native stack, innermost first:", *("  " + line for line in self.native.splitlines())]
        return "\n    ".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Who waits for whom, and why.

    Attributes:
        waiting: rank -> what it waits in.
        missing: rank -> why it is not there.
        sentence: the cause in one sentence.
        is_certain_deadlock: some of these waits can never end.
        circle: ranks that wait for each other for ever, () when the cause is another.
    """

    waiting: dict[int, Waiter] = field(default_factory=dict)
    missing: dict[int, Absent] = field(default_factory=dict)
    sentence: str = ""
    is_certain_deadlock: bool = False
    circle: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The whole diagnosis in lines."""
        lines = [self.sentence or "no rank waits in a collective"]
        for w in self.waiting.values():
            place = f", line {w.line}: {w.source}" if w.line else ""
            lines.append(f"  rank {w.rank} waits in {w.op} #{w.sequence} of group {w.group!r} since {w.for_s:.1f} s{place}")
        lines += [f"  {a.text}" for a in self.missing.values()]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows in a terminal."""
        printer.text(self.text)

    def _repr_html_(self) -> str:
        waits = "".join(
            f"<tr><td>{w.rank}</td><td>waits in {html.escape(w.op)} #{w.sequence} of {html.escape(w.group)}</td>"
            f"<td>{w.for_s:.1f} s</td><td>{_place_html(w.line, w.source)}</td></tr>"
            for w in self.waiting.values()
        )
        absent = "".join(
            f"<tr><td>{a.rank}</td><td><b>{html.escape(a.cause)}</b></td><td></td><td>{html.escape(a.where)}{_stacks_html(a)}</td></tr>"
            for a in self.missing.values()
        )
        head = "<tr><th>rank</th><th>what it does</th><th>for</th><th>where</th></tr>"
        table = f"<table>{head}{waits}{absent}</table>" if waits or absent else ""
        return f"<div>{html.escape(self.sentence or 'no rank waits in a collective')}</div>{table}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineNow:
    """One engine of a cluster at one moment.

    Attributes:
        name: what it is ("tiny, vllm, rooted").
        phase: what it does ("start", "generate", "sleep", "wake_up", "update_weights"), "" when nothing.
        pids: its processes, in rank order.
    """

    name: str
    status: str
    phase: str
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSnapshot:
    """A cluster at one moment, as a live view shows it.

    Attributes:
        cell: name of the cell that runs, "" when none; cell_s: for how long it has run.
        diagnosis: who waits for whom, once a wait has lasted 2 s; None before.
        memory: one sample of each process.
        events: marks, and sleeps, wakes and generates that have begun or ended since the snapshot before.
    """

    time_s: float
    generation: int
    cell: str
    cell_s: float
    ranks: tuple[RankStatus, ...]
    diagnosis: Diagnosis | None
    engines: tuple[EngineNow, ...]
    memory: tuple[MemorySample, ...]
    events: tuple[Span, ...]
    is_closed: bool


Held = tuple[float, ...] | str | None  # a part of a collective as a record keeps it: its values, words where they are many, or not held


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One message between two members of a group.

    Attributes:
        source, target: places in `CollectiveTrace.members`.
        part: which part of the whole travelled, a place in `CollectiveTrace.parts`.
        carried: what the target got.
        start_s: when the source sent it, from the first message on; end_s: when the target had it.
        is_reduced: the target combined it with its own, else kept it as it came.
    """

    source: int
    target: int
    part: int
    carried: Held
    num_bytes: int
    start_s: float
    end_s: float
    is_reduced: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveStep:
    """Messages that travel together, and what every member holds after them.

    Attributes:
        held: [num_members][num_parts].
    """

    title: str
    transfers: tuple[Transfer, ...]
    held: tuple[tuple[Held, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTrace:
    """A collective as it was carried out, message by message.

    Attributes:
        op: "all_reduce (sum)", "gather", "rooted rollout", ...
        members: names, in group order: "rank 0", ..., "engine".
        parts: names of the parts that the whole is cut into.
        steps: the first and the last have no transfers: what each member gives, and what it has in the end.
        results: parts that make up each member's result, [num_members].
        dtype: of the values, "" where they are none.
        max_difference: of the result from that of torch.distributed's own collective on the same input; None where there is none to
            compare with.
    """

    op: str
    members: tuple[str, ...]
    parts: tuple[str, ...]
    steps: tuple[CollectiveStep, ...]
    results: tuple[tuple[int, ...], ...]
    dtype: str = ""
    max_difference: float | None = None

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """All messages, step by step."""
        return tuple(transfer for step in self.steps for transfer in step.transfers)


def _place_html(line: int, source: str) -> str:
    return f"line {line}: <code>{html.escape(source)}</code>" if line else ""


def _stacks_html(absent: Absent) -> str:
    stacks = (("Python stack", absent.stack if absent.stack.count("File ") > 1 else ""), ("native stack", absent.native))
    return "".join(f"<details><summary>{name}</summary><pre>{html.escape(text)}</pre></details>" for name, text in stacks if text)
