"""Faults on purpose: a rank delayed, killed, paused, left out or made to corrupt data at a chosen collective.

Armed in the ranks for the length of a `with cluster.inject(...)` block. Knows one rank's calls. Does not know other ranks.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from workbench.ranks.operations import Operation

__all__ = ["Fault", "FaultHook", "arm", "check_faults", "disarm"]

ACTIONS = ("delay", "kill", "pause", "drop", "corrupt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        rank: where.
        op: at which collective ("all_reduce", "send", ...); "any" counts all.
        at: which call of it, counted from 1 since the fault was armed.
        action: "delay" waits `delay_s` before the rank arrives; "kill" is a kill -9; "pause" stops the process until the cell is stopped
            or the
            block ends; "drop" leaves the call out on this rank; "corrupt" flips one bit of what the call gave, chosen by `seed`.
        delay_s: seconds, for "delay".
    """

    rank: int
    op: str
    at: int = 1
    action: str = "delay"
    delay_s: float = 0.0
    seed: int = 0


def check_faults(faults: Sequence[Fault], world_size: int) -> None:
    """Refuse faults that could never happen, before anything is armed.

    Raises:
        ValueError: an unknown action or collective, a rank outside the world, a count below 1, a delay of nothing.
    """
    from workbench.ranks.operations import OPERATIONS

    known = sorted({operation.name for operation in OPERATIONS.values()} | {"any"})
    for fault in faults:
        if not isinstance(fault, Fault):
            raise ValueError(f"cluster.inject takes wb.Fault(...), not {fault!r}")
        checks = (
            (fault.action in ACTIONS, f"action {fault.action!r}", f"one of {', '.join(ACTIONS)}"),
            (fault.op in known, f"op {fault.op!r}", f"one of {', '.join(known)}"),
            (0 <= fault.rank < world_size, f"rank {fault.rank}", f"between 0 and {world_size - 1}"),
            (fault.at >= 1, f"at {fault.at}", "at least 1: calls are counted from 1"),
            (fault.action != "delay" or fault.delay_s > 0, f"delay_s {fault.delay_s}", "above 0 for a delay"),
        )
        for is_good, seen, needed in checks:
            if not is_good:
                raise ValueError(f"{fault}: {seen} does not fit; it must be {needed}")


class FaultHook:
    """The armed faults of one rank, called by the interceptor around every collective."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._faults = list(faults)
        self._counts: Counter[str] = Counter()
        self._corrupting: Fault | None = None

    def before(self, operation: Operation, args: tuple[Any, ...]) -> bool:
        """Act; True leaves the call out."""
        op = operation.name
        self._counts[op] += 1
        self._counts["any"] += 1
        self._corrupting = None
        for fault in self._faults:
            if fault.op in (op, "any") and fault.at == self._counts[fault.op]:
                if fault.action == "drop":
                    return True
                self._act(fault)
        return False

    def begun(self, op: str, text: str, line: int, tensors: Sequence[torch.Tensor], work: Any) -> Callable[[], None]:
        """What to do when the call has given its tensors: corrupt them, if that was asked."""
        fault, self._corrupting = self._corrupting, None
        return lambda: None if fault is None else flip_a_bit(tensors, fault.seed)

    def _act(self, fault: Fault) -> None:
        if fault.action == "delay":
            time.sleep(fault.delay_s)
        elif fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "pause":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            self._corrupting = fault


def flip_a_bit(tensors: Sequence[torch.Tensor], seed: int) -> None:
    """Flip the highest exponent or value bit but one of an element chosen by the seed: a change that is seen, and the same each time."""
    import torch

    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return
    chosen = random.Random(seed)
    tensor = filled[chosen.randrange(len(filled))]
    index = chosen.randrange(tensor.numel())
    with torch.no_grad():
        one = tensor.reshape(-1)[index : index + 1].clone()
        data = one.view(torch.uint8)
        data[-1] ^= 0x40
        tensor.view(-1)[index : index + 1] = one


def arm(faults: Sequence[Fault]) -> None:
    """Runs in every rank."""
    interceptor = _interceptor()
    mine = [fault for fault in faults if fault.rank == interceptor.rank]
    if mine:
        interceptor.hooks.insert(0, FaultHook(mine))  # before a tape's, which must hold what the rank was given


def disarm() -> None:
    """Runs in every rank: no fault is left."""
    interceptor = _interceptor()
    interceptor.hooks[:] = [hook for hook in interceptor.hooks if not isinstance(hook, FaultHook)]


def _interceptor() -> Any:
    from workbench.ranks.current import current

    process = current().process
    assert process is not None
    return process.interceptor
