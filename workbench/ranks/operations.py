"""The collectives of torch's c10d library: where each keeps its group, and what peers must agree on, as text.

Source: the operator schemas registered by torch 2.13 (`torch.ops.c10d.*.default._schema`); trailing arguments at their default are not
    passed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d

__all__ = [
    "GROUP_OPERATIONS",
    "LEDGER_NAMES",
    "NEW_GROUP",
    "OPERATIONS",
    "ROLLOUT_OPERATIONS",
    "Operation",
    "describing",
    "inputs_of",
    "misread",
    "num_bytes",
    "remember_reduce_ops",
    "tensors_in",
    "with_peer",
]

_last = threading.local()  # the reduce op of this thread's call: the operator itself carries it in a form that cannot be read


@dataclass(frozen=True, slots=True)
class Operation:
    """One c10d operator.

    Attributes:
        name: what users call it ("all_reduce").
        group_at, async_at: positions of the process group and of `async_op` in its arguments (-1: it has none).
        describe: arguments -> what must be equal on all members.
        is_point_to_point: concerns two ranks, not all members.
    """

    name: str
    group_at: int
    async_at: int
    describe: Callable[[tuple[Any, ...]], str]
    is_point_to_point: bool = False

    def is_async(self, args: tuple[Any, ...]) -> bool:
        return self.async_at < 0 or len(args) <= self.async_at or bool(args[self.async_at])


def with_peer(operation: Operation, args: tuple[Any, ...]) -> str:
    """What it is, as `describe` says, and for a message which rank is at its other end."""
    text = operation.describe(args)
    if operation.name == "recv_any":
        return f"{text} from any"
    if not operation.is_point_to_point:
        return text
    peer = c10d.get_process_group_ranks(c10d.ProcessGroup.unbox(args[operation.group_at]))[args[2]]
    return f"{text} {'to' if operation.name == 'send' else 'from'} rank {peer}"


def num_bytes(args: tuple[Any, ...]) -> int:
    """Bytes of the first tensors of a call: what this rank gives or gets."""
    value = args[0]
    if type(value) is list and len(value) == 1 and type(value[0]) is torch.Tensor:
        return int(value[0].nbytes)
    return sum([t.nbytes for t in tensors_in(value)])


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of an argument, however nested, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def inputs_of(operation: Operation, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors whose values this rank gives to a call; [] where it only receives."""
    if operation.name == "barrier" or operation.name.startswith("recv"):
        return []
    if operation.name == "broadcast" and c10d.ProcessGroup.unbox(args[operation.group_at]).rank() != args[2]:
        return []
    return tensors_in(args[1] if operation.group_at == 2 else args[0])


def _shapes(value: Any) -> str:
    if type(value) is list and len(value) == 1 and type(value[0]) is torch.Tensor:
        return _shape(value[0].dtype, value[0].shape)
    return " ".join([_shape(t.dtype, t.shape) for t in tensors_in(value)])


@functools.lru_cache(maxsize=4096)
def _shape(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{_DTYPE_NAMES[dtype]}{list(shape)}"


def _laid_out(value: Any) -> str:
    """Shapes, and strides where they are not the usual ones: gloo goes through storage in its order, so they must be equal too."""
    if type(value) is list and len(value) == 1 and type(value[0]) is torch.Tensor and value[0].is_contiguous():
        return _shapes(value)  # as in most calls, of which each microsecond counts
    strides = [list(t.stride()) for t in tensors_in(value) if not t.is_contiguous() and t.layout is torch.strided]
    return f"{_shapes(value)} strides {' '.join(map(str, strides))}" if strides else _shapes(value)


_FLAT = {
    "all_reduce": (0,),
    "all_reduce_coalesced": (0,),
    "broadcast": (0,),
    "reduce": (0,),
}  # arguments whose elements gloo counts by storage
_CONTIGUOUS = {"scatter": (0, 1), "reduce_scatter": (0,)}  # those that it takes for contiguous


def misread(operation: Operation, args: tuple[Any, ...]) -> str:
    """A tensor in memory that gloo would take for another without saying so, and write beside it; "" where there is none."""
    flat, contiguous = _FLAT.get(operation.name, ()), _CONTIGUOUS.get(operation.name, ())
    for at in (*flat, *contiguous):
        for tensor in tensors_in(args[at]):
            if tensor.is_contiguous() or tensor.layout is not torch.strided or not tensor.is_cpu:
                continue
            if at in contiguous or not _is_dense(tensor):
                return f"{_shape(tensor.dtype, tensor.shape)} with strides {list(tensor.stride())}"
    return ""


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill one piece of storage, in whatever order, each once."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _dtypes(value: Any) -> str:
    return " ".join(sorted({_DTYPE_NAMES[t.dtype] for t in tensors_in(value)}))


class _DtypeNames(dict[torch.dtype, str]):
    def __missing__(self, dtype: torch.dtype) -> str:
        name = self[dtype] = str(dtype).removeprefix("torch.")
        return name


_DTYPE_NAMES = _DtypeNames()
_REDUCE_NAMES = {hash(op): name.lower() for name, op in c10d.ReduceOp.RedOpType.__members__.items()}
_REDUCING = (  # methods of a process group that take a reduce op; some were renamed between releases of torch
    "allreduce", "allreduce_coalesced", "reduce", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced",
)  # fmt: skip


def remember_reduce_ops() -> None:
    """Have torch's process groups leave the reduce op of a call where `_reduce_op` finds it."""
    for name in _REDUCING:
        if hasattr(c10d.ProcessGroup, name):
            setattr(c10d.ProcessGroup, name, _remembering(getattr(c10d.ProcessGroup, name)))


def _remembering(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = [getattr(value, "reduceOp", value) for value in (*args[1:], *kwargs.values())]
        _last.reduce_op = next((op for op in given if isinstance(op, (c10d.ReduceOp, c10d.ReduceOp.RedOpType))), c10d.ReduceOp.SUM)
        try:
            return call(*args, **kwargs)
        finally:
            _last.reduce_op = None  # a later call from C++ has none of its own

    return wrapped


def describing(operation: Operation) -> Callable[[tuple[Any, ...]], str]:
    """What describes calls with the reduce op of this thread's."""
    reduce_op = getattr(_last, "reduce_op", None)

    def describe(args: tuple[Any, ...]) -> str:
        before, _last.reduce_op = getattr(_last, "reduce_op", None), reduce_op
        try:
            return operation.describe(args)
        finally:
            _last.reduce_op = before

    return describe


def _reduce_op() -> str:
    """ "sum", "max", ...; "?" for a call from C++ (DDP), which is always compared as such."""
    op = getattr(_last, "reduce_op", None)
    return "?" if op is None else _REDUCE_NAMES[hash(op)]


def _all_reduce(args: tuple[Any, ...]) -> str:
    return f"all_reduce({_laid_out(args[0])}, op={_reduce_op()})"


def _of_inputs(name: str) -> Callable[[tuple[Any, ...]], str]:
    return lambda args: f"{name}({_shapes(args[1])})"


def _rooted_inputs(name: str, at: int) -> Callable[[tuple[Any, ...]], str]:
    return lambda args: f"{name}({_shapes(args[at])}, root={args[3]})"


OPERATIONS: dict[str, Operation] = {
    "allreduce_": Operation("all_reduce", 1, 4, _all_reduce),
    "allreduce_coalesced_": Operation(
        "all_reduce_coalesced", 1, 3, lambda a: f"all_reduce_coalesced({_laid_out(a[0])}, op={_reduce_op()})"
    ),
    "broadcast_": Operation("broadcast", 1, 4, lambda a: f"broadcast({_laid_out(a[0])}, root={a[2]})"),
    "reduce_": Operation("reduce", 1, 5, lambda a: f"reduce({_laid_out(a[0])}, op={_reduce_op()}, root={a[3]})"),
    "allgather_": Operation("all_gather", 2, 3, _of_inputs("all_gather")),
    "_allgather_base_": Operation("all_gather_into_tensor", 2, 3, _of_inputs("all_gather_into_tensor")),
    "allgather_coalesced_": Operation("all_gather_coalesced", 2, 3, _of_inputs("all_gather_coalesced")),
    "allgather_into_tensor_coalesced_": Operation("all_gather_into_tensor_coalesced", 2, 3, _of_inputs("all_gather_into_tensor_coalesced")),
    "gather_": Operation("gather", 2, 4, _rooted_inputs("gather", 1)),
    "scatter_": Operation("scatter", 2, 4, _rooted_inputs("scatter", 0)),
    "reduce_scatter_": Operation("reduce_scatter", 2, 4, lambda a: f"reduce_scatter({_shapes(a[0])}, op={_reduce_op()})"),
    "_reduce_scatter_base_": Operation(
        "reduce_scatter_tensor", 2, 4, lambda a: f"reduce_scatter_tensor({_shapes(a[0])}, op={_reduce_op()})"
    ),
    "reduce_scatter_tensor_coalesced_": Operation(
        "reduce_scatter_tensor_coalesced", 2, 4, lambda a: f"reduce_scatter_tensor_coalesced({_shapes(a[0])}, op={_reduce_op()})"
    ),
    "alltoall_": Operation("all_to_all", 2, 3, lambda a: f"all_to_all({_dtypes(a[1])})"),
    "alltoall_base_": Operation("all_to_all_single", 2, 5, lambda a: f"all_to_all_single({_dtypes(a[1])})"),
    "barrier": Operation("barrier", 1, 3, lambda a: "barrier()"),
    "send": Operation("send", 1, -1, lambda a: f"send({_shapes(a[0])})", is_point_to_point=True),
    "recv_any_source_": Operation("recv_any", 1, -1, lambda a: f"recv_any({_shapes(a[0])})", is_point_to_point=True),
    "recv_": Operation("recv", 1, -1, lambda a: f"recv({_shapes(a[0])})", is_point_to_point=True),
}

GROUP_OPERATIONS = (
    "all_gather_object", "all_gatherv", "broadcast_object", "broadcast_object_list", "broadcast_tensor_dict", "combine",
    "create_mq_broadcaster", "create_single_reader_mq_broadcasters", "dispatch", "gather_object", "reduce_metrics", "reduce_scatterv",
)  # fmt: skip
ROLLOUT_OPERATIONS = (
    "GroupedRollout.gather_prompts", "GroupedRollout.scatter_completions",
    "RootedRollout.gather_prompts", "RootedRollout.scatter_completions",
)  # fmt: skip
# a row of the ledger holds an index of these
LEDGER_NAMES = (*(operation.name for operation in OPERATIONS.values()), *GROUP_OPERATIONS, *ROLLOUT_OPERATIONS)

NEW_GROUP = Operation("new_group", -1, -1, lambda a: "new_group()")  # no operator of torch, but a call that all ranks make together
