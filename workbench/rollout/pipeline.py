"""gather -> generate -> scatter between the ranks of a group, each step usable by hand.

    rooted    prompts -> root -> one engine -> root cuts -> each rank its own slice
    grouped   prompts -> every member -> one engine over all members -> each keeps its own slice

Each step begins with a meeting (`Exchange.meet`), so that a bad prompt on one rank or a failing engine is the same error on every rank,
and a rank without prompts still takes part. A rank alone makes no collective.

Knows engines by their protocol. Does not know vLLM, the cluster or the driver.
"""

from __future__ import annotations

import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from workbench.errors import EngineError, WorkbenchError
from workbench.ranks.called import named_as
from workbench.records import GatheredPrompts, Prompt, RolloutBatch, Sampling, Span
from workbench.rollout.batch import select
from workbench.rollout.bisect import generate_bisected
from workbench.rollout.engine import Engine, Origin
from workbench.rollout.exchange import SIZES, Buffer, Exchange, Phase
from workbench.rollout.packing import pack_batch, pack_prompts, unpack_batch, unpack_prompts
from workbench.rollout.provenance import check_counts, check_order, check_provenance, number_origins, origins_of
from workbench.rollout.shards import check_num_samples, check_prompts

__all__ = ["SCATTER_VARIABLE", "GroupedRollout", "RootedRollout"]

SCATTER_VARIABLE = "WORKBENCH_SCATTER"
_WAYS = ("scatter", "broadcast")
_EVERYWHERE = -1  # in place of a root: every member generates
_NUM_PROMPTS, _HAS_COUNTS, _NUM_BYTES, _CONTRACT, _ROOT = range(5)  # what ranks tell when they gather
_WAY, _DIGEST = range(2)  # and when they scatter

Offsets = NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One rank's prompts, checked and packed; `counts` int64 [num_prompts]."""

    prompts: tuple[Prompt, ...] = ()
    counts: NDArray[np.int64] | None = None
    buffer: Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parcel:
    """What one rank has ready to give back: its own slice, the slices of its peers, and since when."""

    own: RolloutBatch | None = None
    buffers: Sequence[Buffer] = ()
    digest: int = 0
    started_s: float = 0.0


class _Rollout(ABC):
    """What rooted and grouped rollouts share: the meetings, the checks and the spans.

    Attributes:
        step: rollout step, part of every sample's seed and of each span; set it between rollouts, alike on every rank.
        spans: gather, generate and scatter of this rank so far; their bytes are what it sent and received.
    """

    def __init__(self, group: Any, engine: Engine | None, *, root: int, on_error: str, step: int) -> None:
        _check_choice("on_error", on_error, ("raise", "keep"))
        self.step = step
        self.spans: list[Span] = []
        self._engine = engine
        self._root = root
        self._on_error = on_error
        self._exchange = Exchange(group)
        self._latest: tuple[GatheredPrompts, tuple[Prompt, ...]] | None = None  # and this rank's own of them

    def gather_prompts(self, prompts: Sequence[Prompt], num_samples: Sequence[int] | int | None = None) -> GatheredPrompts:
        """Bring the prompts of all ranks to where they are generated; every rank of the group calls it.

        Args:
            prompts: this rank's own; may be empty.
            num_samples: completions per prompt, [num_prompts], 0 allowed; None on every rank takes `Sampling.n`.

        Raises:
            ValueError: the same on every rank: a rank gave what is no prompt, or None where another gave a list.
        """
        return self._gather(prompts, num_samples, contract=0)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, num_samples: Sequence[int] | int | None = None) -> RolloutBatch:
        """Gather, generate, scatter; every rank of the group calls it with the same sampling.

        Returns:
            Completions of this rank's own prompts, in their order.

        Raises:
            ValueError: as `gather_prompts`.
            EngineError: the same on every rank: the engine failed, or completions came back for other prompts.
        """
        gathered = self._gather(prompts, num_samples, contract=_digest(repr((sampling, self.step)).encode()))
        return self._give_back(lambda: self._complete(gathered, sampling), gathered.offsets, waits_since_s=time.monotonic())

    def scatter_completions(
        self, batch: RolloutBatch | None, offsets: Offsets | Sequence[int], metadata: Sequence[Any] | None = None
    ) -> RolloutBatch:
        """Give each rank the completions of its own prompts; every rank of the group calls it.

        Args:
            batch: completions of all gathered prompts, in their order, where they were generated; None elsewhere.
            offsets: `GatheredPrompts.offsets`; with the array of the latest gather, completions are checked against the prompts sent then.
            metadata: anything picklable beside each completion, [num_completions], where the batch is.

        Raises:
            ValueError: the same on every rank: batch, offsets or metadata do not fit.
            EngineError: completions came back for other prompts; shows both.
        """
        return self._give_back(lambda: self._take(batch, offsets, metadata), offsets)

    def origins(self, offsets: Offsets) -> list[Origin]:
        """Where each gathered prompt comes from: given to `Engine.generate` by hand, samples are seeded as in `generate`."""
        return list(origins_of(offsets, self._exchange.ranks))

    @property
    def _is_generating(self) -> bool:
        return self._root in (_EVERYWHERE, self._exchange.index)

    def _gather(self, prompts: Any, num_samples: Any, *, contract: int) -> GatheredPrompts:
        started_s, exchange, bytes_before = time.monotonic(), self._exchange, self._exchange.num_bytes
        asked, error = _attempt(lambda: _ask(prompts, num_samples, exchange.rank))
        asked = asked or _Asked(buffer=np.zeros(0, np.uint8))
        num_prompts = -1 if prompts is None else len(asked.prompts)
        table = exchange.meet(Phase.GATHER, num_prompts, num_samples is not None, asked.buffer.size, contract, self._root, error=error)
        _check_agreement(table, exchange.ranks)
        offsets = np.concatenate([[0], np.cumsum(table[:, _NUM_PROMPTS])])
        counts = None if asked.counts is None else self._gather_counts(asked.counts, table[:, _NUM_PROMPTS])
        buffers = self._collect(asked.buffer, table[:, _NUM_BYTES])
        parts = [asked.prompts if i == exchange.index else unpack_prompts(buffer) for i, buffer in enumerate(buffers)]
        gathered = GatheredPrompts(prompts=tuple(chain.from_iterable(parts)), offsets=offsets, num_samples=counts)
        self._latest = gathered, asked.prompts
        self._record("gather", started_s, bytes_before)
        return gathered

    def _gather_counts(self, own: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        buffers = self._exchange.all_gather_buffers(own.view(np.uint8), own.itemsize * sizes)
        return np.concatenate([np.ascontiguousarray(buffer).view(np.int64) for buffer in buffers])

    def _complete(self, gathered: GatheredPrompts, sampling: Sampling) -> RolloutBatch | None:
        """The engine's completions of all gathered prompts, checked; None where nothing is generated."""
        if not self._is_generating:
            return None
        rank, started_s = self._exchange.rank, time.monotonic()
        if self._engine is None:
            kind = type(self).__name__
            raise EngineError(f"rank {rank} generates and has no engine\nneeded: an engine on this rank\npass {kind}(group, engine)")
        origins = self.origins(gathered.offsets)
        counts = None if gathered.num_samples is None else gathered.num_samples.tolist()
        batch = self._call(self._engine, list(gathered.prompts), sampling, counts, origins)
        self._record("generate", started_s)
        check_order(batch, len(origins))
        check_counts(batch, [sampling.n] * len(origins) if counts is None else counts, origins)
        check_provenance(batch, gathered.prompts, origins)
        return batch

    def _call(
        self, engine: Engine, prompts: list[Prompt], sampling: Sampling, counts: list[int] | None, origins: list[Origin]
    ) -> RolloutBatch:
        try:
            if self._on_error == "keep":
                return generate_bisected(engine, prompts, sampling, num_samples=counts, origins=origins, step=self.step)
            return engine.generate(prompts, sampling, num_samples=counts, origins=origins, step=self.step)
        except WorkbenchError:
            raise
        except Exception as error:
            raise EngineError(
                f"the engine on rank {self._exchange.rank} failed in generate at step {self.step}: {type(error).__name__}: {error}\n"
                f"it was given {len(prompts)} prompts\n"
                'on_error="keep" gives back the prompts that it can complete, and the error with the one that it cannot'
            ) from error

    def _take(self, batch: RolloutBatch | None, offsets: Any, metadata: Sequence[Any] | None) -> RolloutBatch | None:
        """A batch made by hand, checked; None where nothing is generated."""
        if (batch is not None) != self._is_generating or (batch is None and metadata is not None):
            who = "every rank" if self._root == _EVERYWHERE else f"rank {self._exchange.ranks[self._root]}, the root,"
            raise ValueError(
                f"scatter_completions got {'no batch' if batch is None else 'a batch'} on rank {self._exchange.rank}\n"
                f"needed: batch and metadata on {who} {'' if self._root == _EVERYWHERE else 'None elsewhere'}".rstrip()
                + "\npass what the engine returned where it generated"
            )
        if batch is None:
            return None
        if metadata is not None and len(metadata) != len(batch):
            raise ValueError(f"metadata has {len(metadata)} entries for {len(batch)} completions\npass one a completion; None is allowed")
        origins = origins_of(self._check_offsets(offsets), self._exchange.ranks)
        check_order(batch, len(origins))
        batch = number_origins(batch, origins)
        sent = self._latest[0].prompts if self._is_latest(offsets) and self._latest else batch.prompts
        check_provenance(batch, sent, origins)
        return batch if metadata is None else replace(batch, metadata=tuple(metadata))

    def _give_back(self, make: Callable[[], RolloutBatch | None], offsets: Any, *, waits_since_s: float | None = None) -> RolloutBatch:
        """Tell everyone whether there is a batch, and give each rank its slice.

        Args:
            make: gives the whole batch, None where nothing is generated.
            waits_since_s: since when ranks that do not generate wait for it; None by hand.
        """
        parcel, error = _attempt(lambda: self._wrap(make(), self._check_offsets(offsets)))
        return self._hand_out(parcel or _Parcel(), error, offsets, waits_since_s)

    def _hand_out(self, parcel: _Parcel, error: Exception | None, offsets: Any, waits_since_s: float | None) -> RolloutBatch:
        """The meeting, and what follows it."""
        exchange, bytes_before = self._exchange, self._exchange.num_bytes
        way = _WAYS.index(self._way)
        table = exchange.meet(Phase.SCATTER, way, parcel.digest, 0, 0, self._root, buffers=parcel.buffers, error=error)
        _check_roots(table, exchange.ranks)
        started_s = parcel.started_s
        if not self._is_generating:
            if waits_since_s is not None:
                self._record("generate", waits_since_s)
            started_s = time.monotonic()
        mine = self._accept(self._deliver(parcel, table), offsets)
        self._record("scatter", started_s, bytes_before)
        return mine

    def _accept(self, batch: RolloutBatch, offsets: Any) -> RolloutBatch:
        """This rank's slice, checked against the prompts that it sent."""
        exchange = self._exchange
        asked = self._latest[1] if self._is_latest(offsets) and self._latest else batch.prompts
        count = int(offsets[exchange.index + 1]) - int(offsets[exchange.index])
        check_order(batch, count)
        check_provenance(batch, asked, origins_of(np.array([0, count]), (exchange.rank,)))
        return replace(batch, prompts=tuple(asked))

    def _is_latest(self, offsets: object) -> bool:
        return self._latest is not None and offsets is self._latest[0].offsets

    def _check_offsets(self, offsets: Any) -> Offsets:
        checked: Offsets = np.asarray(offsets, np.int64)
        size = self._exchange.size
        if checked.shape != (size + 1,) or checked[0] != 0 or (np.diff(checked) < 0).any():
            raise ValueError(
                f"offsets on rank {self._exchange.rank} are {checked.tolist()}\n"
                f"needed: {size + 1} numbers from 0 upwards, for {size} ranks\n"
                "pass GatheredPrompts.offsets on"
            )
        return checked

    def _record(self, name: str, started_s: float, bytes_before: int | None = None) -> None:
        moved = 0 if bytes_before is None else self._exchange.num_bytes - bytes_before
        span = Span(step=self.step, rank=self._exchange.rank, span=name, start_s=started_s, end_s=time.monotonic(), num_bytes=moved)
        self.spans.append(span)

    @property
    def _way(self) -> str:
        return _WAYS[0]

    @abstractmethod
    def _collect(self, own: Buffer, sizes: NDArray[np.int64]) -> Sequence[Buffer]:
        """The packed prompts of all ranks where they are generated, () elsewhere."""

    @abstractmethod
    def _wrap(self, batch: RolloutBatch | None, offsets: Offsets) -> _Parcel:
        """The batch cut, and packed for those to whom it is sent."""

    @abstractmethod
    def _deliver(self, parcel: _Parcel, table: NDArray[np.int64]) -> RolloutBatch:
        """This rank's slice."""


class RootedRollout(_Rollout):
    """All prompts go to one rank, whose engine completes them, and each rank gets its own slice back (TRL's "server" mode).

    Args:
        group: a `Group`, an accelerate `Accelerator` (its default world), a torch `ProcessGroup`, or None: this rank alone.
        engine: on the root; None elsewhere.
        scatter: "scatter" sends each rank its slice, "broadcast" sends everything to all; the root's choice holds. None reads the
            environment's WORKBENCH_SCATTER, else "scatter".
        root: rank within the group.
        on_error: "keep" brings a prompt that the engine cannot complete back as failed completions with their error, the others whole.
        step: see the attribute.

    Raises:
        ValueError: an argument does not fit.
    """

    _gather = named_as("RootedRollout.gather_prompts")(_Rollout._gather)
    _hand_out = named_as("RootedRollout.scatter_completions")(_Rollout._hand_out)

    def __init__(
        self, group: Any, engine: Engine | None, *, scatter: str | None = None, root: int = 0, on_error: str = "raise", step: int = 0
    ) -> None:
        super().__init__(group, engine, root=root, on_error=on_error, step=step)
        self._scatter = scatter if scatter is not None else os.environ.get(SCATTER_VARIABLE) or _WAYS[0]
        _check_choice("scatter" if scatter is not None else SCATTER_VARIABLE, self._scatter, _WAYS)
        _check_choice("root", root, tuple(range(self._exchange.size)))

    @property
    def _way(self) -> str:
        return self._scatter

    def _collect(self, own: Buffer, sizes: NDArray[np.int64]) -> Sequence[Buffer]:
        return self._exchange.gather_buffers(own, sizes, self._root) or ()

    def _wrap(self, batch: RolloutBatch | None, offsets: Offsets) -> _Parcel:
        if batch is None:
            return _Parcel()
        started_s = time.monotonic()
        slices = [select(batch, low, high) for low, high in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
        nothing = np.zeros(0, np.uint8)
        buffers = [nothing if i == self._root else pack_batch(part) for i, part in enumerate(slices)]
        return _Parcel(own=slices[self._root], buffers=buffers, started_s=started_s)

    def _deliver(self, parcel: _Parcel, table: NDArray[np.int64]) -> RolloutBatch:
        buffers = parcel.buffers if self._is_generating else None
        told = table[self._root]
        give = self._exchange.scatter_buffers if _WAYS[int(told[_WAY])] == "scatter" else self._exchange.broadcast_buffers
        own = give(buffers, told[SIZES], self._root)
        return parcel.own if parcel.own is not None else unpack_batch(own)


class GroupedRollout(_Rollout):
    """Every member completes the prompts of all members in one engine step and keeps its own slice (TRL's "colocate" mode).

    Nothing is sent back. Over a group of one it is the independent mode: an engine a rank, and no collective.

    Args:
        group: ranks that share one engine; as for `RootedRollout`.
        engine: this member's part of the engine. All members must generate the same tokens; that is checked.
        on_error, step: as for `RootedRollout`.
    """

    _gather = named_as("GroupedRollout.gather_prompts")(_Rollout._gather)
    _hand_out = named_as("GroupedRollout.scatter_completions")(_Rollout._hand_out)

    def __init__(self, group: Any, engine: Engine | None, *, on_error: str = "raise", step: int = 0) -> None:
        super().__init__(group, engine, root=_EVERYWHERE, on_error=on_error, step=step)

    def _collect(self, own: Buffer, sizes: NDArray[np.int64]) -> Sequence[Buffer]:
        return self._exchange.all_gather_buffers(own, sizes)

    def _wrap(self, batch: RolloutBatch | None, offsets: Offsets) -> _Parcel:
        assert batch is not None
        started_s, index = time.monotonic(), self._exchange.index
        own = select(batch, int(offsets[index]), int(offsets[index + 1]))
        return _Parcel(own=own, digest=_digest(batch.offsets, batch.tokens), started_s=started_s)

    def _deliver(self, parcel: _Parcel, table: NDArray[np.int64]) -> RolloutBatch:
        digests, ranks = table[:, _DIGEST], self._exchange.ranks
        other = np.flatnonzero(digests != digests[0])
        if len(other):
            raise EngineError(
                f"ranks {ranks[0]} and {ranks[int(other[0])]} share one engine and generated different tokens\n"
                f"{len(other)} of {len(ranks)} members differ from rank {ranks[0]}\n"
                "give all members the same weights, sampling and engine seed"
            )
        assert parcel.own is not None
        return parcel.own


def _ask(prompts: Any, num_samples: Any, rank: int) -> _Asked:
    """Check and pack this rank's prompts; None is told apart from a list by the meeting."""
    checked = [] if prompts is None else check_prompts(prompts, rank)
    counts = check_num_samples(num_samples, len(checked), rank)
    return _Asked(prompts=tuple(checked), counts=None if counts is None else np.array(counts, np.int64), buffer=pack_prompts(checked))


def _check_agreement(table: NDArray[np.int64], ranks: Sequence[int]) -> None:
    _check_roots(table, ranks)
    _check_none("prompts", table[:, _NUM_PROMPTS] < 0, ranks)
    has_counts = table[:, _HAS_COUNTS] != 0
    if has_counts.any():
        _check_none("num_samples", ~has_counts, ranks)
    contracts = table[:, _CONTRACT]
    other = np.flatnonzero(contracts != contracts[0])
    if len(other):
        calls = ["gather_prompts" if contracts[i] == 0 else "generate" for i in (0, other[0])]
        raise ValueError(
            f"ranks {ranks[0]} and {ranks[int(other[0])]} do not make the same call\n"
            f"seen: rank {ranks[0]} is in {calls[0]}, rank {ranks[int(other[0])]} in {calls[1]}"
            f"{', with another sampling or step' if calls[0] == calls[1] else ''}\n"
            "call the same method with the same sampling and step on every rank"
        )


def _check_none(what: str, is_none: NDArray[np.bool_], ranks: Sequence[int]) -> None:
    if is_none.any():
        absent, present = ([ranks[i] for i in np.flatnonzero(which)] for which in (is_none, ~is_none))
        raise ValueError(
            f"{what} is None on {_name(absent)}{f' and a list on {_name(present)}' if present else ''}\n"
            "needed: a list on every rank\npass an empty list where a rank has no prompts"
        )


def _check_roots(table: NDArray[np.int64], ranks: Sequence[int]) -> None:
    roots = table[:, _ROOT]
    other = np.flatnonzero(roots != roots[0])
    if len(other):
        first, second = (("grouped" if roots[i] == _EVERYWHERE else f"rooted at {roots[i]}") for i in (0, other[0]))
        raise ValueError(
            f"ranks {ranks[0]} and {ranks[int(other[0])]} run different rollouts over one group\nseen: {first}, {second}\n"
            "make the same rollout with the same root on every rank"
        )


def _check_choice(what: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"{what}={value!r}\nneeded: {' or '.join(map(repr, choices))}\nchoose one of them")


def _name(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _attempt(call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result or the error, which goes to the meeting instead of leaving the peers alone there."""
    try:
        return call(), None
    except Exception as error:
        return None, error


def _digest(*parts: bytes | NDArray[Any]) -> int:
    """A signed 64-bit digest."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return int.from_bytes(digest.digest(), "little", signed=True)
