"""The shortcut of calls that a loop makes again: from the function of torch.distributed straight to gloo.

    dist.all_reduce(x)  ->  here: the same line, dtype, shape and arguments as before?
        no   ->  torch's function -> process group -> dispatcher -> `intercept`; what came of it is kept for the next time
        yes  ->  board (with the check: wait for peers, compare) -> gloo -> ledger

Watching a call costs what it touches: where ranks share cores, each finds the caches full of others' things. So a call that was checked by
torch, described and placed once is not again, and what it needs is bound in closures. Taken by blocking calls with at most two tensors
that are not recorded or spoiled; what they leave on the board and in the ledger is what `intercept` leaves.

Knows torch's functions and process groups. Does not know tapes, faults or stops: where there are any, a call goes the other way.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.autograd.profiler as profiler
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from workbench.ranks import leaving
from workbench.ranks.board import AreaState, Post
from workbench.ranks.calls import Call, is_users
from workbench.ranks.operations import LEDGER_NAMES

if TYPE_CHECKING:
    from workbench.ranks.intercept import Interceptor

__all__ = ["Shortcut"]

_FUNCTIONS = {  # of torch.distributed -> how many tensors come first; two were renamed between releases of torch
    "barrier": 0, "all_reduce": 1, "broadcast": 1, "reduce": 1,
    "all_gather_into_tensor": 2, "all_gather_single": 2, "reduce_scatter_tensor": 2, "reduce_scatter_single": 2,
}  # fmt: skip
_METHODS = {  # of a process group, which they call -> of gloo's backend
    "barrier": "barrier", "allreduce": "allreduce", "broadcast": "broadcast", "reduce": "reduce",
    "_allgather_base": "_allgather_base", "all_gather_single": "_allgather_base",
    "_reduce_scatter_base": "_reduce_scatter_base", "reduce_scatter_single": "_reduce_scatter_base",
}  # fmt: skip
_Known: TypeAlias = tuple[Any, ...]  # where a call stands, its tensors' dtypes and shapes, its other arguments' identities
_MOST_WAYS = 1024
_CPU = torch.device("cpu")
_num_modes = torch._C._len_torch_dispatch_stack
_num_function_modes = torch._C._len_torch_function_stack
_SMALL = range(-5, 257)  # ints that Python makes once


class _Given(threading.local):
    """What torch's function gave in this thread's call: the process group, which method of gloo's is meant, the options."""

    is_wanted: bool = False
    call: tuple[Any, str, Any] | None = None


class Shortcut:
    """Of one process."""

    def __init__(self, interceptor: Interceptor) -> None:
        self._interceptor = interceptor
        self._given = _Given()
        self._ways: dict[_Known, Callable[..., None]] = {}
        self._codes: list[CodeType] = []  # of those ways; held so that their identities stay theirs

    def forget(self) -> None:
        """Groups are no more, or will be soon; gloo's backends are let go of."""
        self._ways.clear()
        self._codes.clear()

    def install(self) -> None:
        """Take over torch's functions, for good."""
        for name, of_gloo in _METHODS.items():
            if hasattr(dist.ProcessGroup, name):
                setattr(dist.ProcessGroup, name, self._keeping(of_gloo, getattr(dist.ProcessGroup, name)))
        remaps = getattr(sys.modules.get("torch.distributed._functional_collectives"), "traceable_collective_remaps", {})
        for name, num_tensors in _FUNCTIONS.items():
            onward = getattr(c10d, name, None)
            if onward is not None:
                shortened = (self._of_none, self._of_one, self._of_two)[num_tensors](onward)
                setattr(c10d, name, shortened)
                setattr(dist, name, shortened)
                if onward in remaps:  # torch.compile knows functions by identity
                    remaps[shortened] = remaps[onward]
        c10d.destroy_process_group = dist.destroy_process_group = self._forgetting(dist.destroy_process_group)

    def _keeping(self, of_gloo: str, onward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(onward)
        def wrapped(process_group: Any, *args: Any, **kwargs: Any) -> Any:
            if self._given.is_wanted:
                self._given.call = (process_group, of_gloo, args[-1] if args else kwargs.get("opts"))
            return onward(process_group, *args, **kwargs)

        return wrapped

    def _forgetting(self, destroy: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(destroy)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            self.forget()
            destroy(*args, **kwargs)

        return wrapped

    def _of_none(self, onward: Callable[..., Any]) -> Callable[..., Any]:
        """A function without tensors."""
        find, follow, must_go_on, get_frame = self._ways.get, self._follow, self._must_go_on(), sys._getframe

        @functools.wraps(onward)
        def call(*args: Any, **kwargs: Any) -> Any:
            frame = get_frame(1)
            known = (id(frame.f_code), frame.f_lasti, *map(id, args), *kwargs, *map(id, kwargs.values()))
            way = find(known)
            if way is None:
                return follow(known, frame, onward, args, kwargs, 0)
            return onward(*args, **kwargs) if must_go_on() else way()

        return call

    def _of_one(self, onward: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose first argument is a tensor; one that gradients, devices or a lazy minus sign concern is torch's to handle."""
        find, follow, must_go_on, get_frame, tensor_type = self._ways.get, self._follow, self._must_go_on(), sys._getframe, torch.Tensor

        @functools.wraps(onward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not args or type(args[0]) is not tensor_type:
                return onward(*args, **kwargs)
            tensor, *others = args
            frame = get_frame(1)
            known = (id(frame.f_code), frame.f_lasti, tensor.dtype, tensor.shape, *map(id, others), *kwargs, *map(id, kwargs.values()))
            way = find(known)
            if way is None:
                return follow(known, frame, onward, args, kwargs, 1)
            if must_go_on() or tensor.requires_grad or not tensor.is_cpu or tensor.is_neg():
                return onward(*args, **kwargs)
            return way([tensor])

        return call

    def _of_two(self, onward: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose first two arguments are tensors: what it fills, and what this rank gives."""
        find, follow, must_go_on, get_frame, tensor_type = self._ways.get, self._follow, self._must_go_on(), sys._getframe, torch.Tensor

        @functools.wraps(onward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(args) < 2 or type(args[0]) is not tensor_type or type(args[1]) is not tensor_type:
                return onward(*args, **kwargs)
            filled, tensor, *others = args
            frame = get_frame(1)
            what = (filled.dtype, filled.shape, tensor.dtype, tensor.shape)
            known = (id(frame.f_code), frame.f_lasti, *what, *map(id, others), *kwargs, *map(id, kwargs.values()))
            way = find(known)
            if way is None:
                return follow(known, frame, onward, args, kwargs, 2)
            if must_go_on() or filled.requires_grad or not filled.is_cpu or filled.is_neg():
                return onward(*args, **kwargs)
            if tensor.requires_grad or not tensor.is_cpu or tensor.is_neg():
                return onward(*args, **kwargs)
            return way(filled, tensor)

        return call

    def _must_go_on(self) -> Callable[[], bool]:
        """Whether somebody wants to see calls of torch, or collects them, now."""
        hooks, coalescing = self._interceptor.hooks, c10d._world.pg_coalesce_state

        def must_go_on() -> bool:
            return bool(hooks or coalescing or _num_modes() or _num_function_modes() or profiler._is_profiler_enabled)

        return must_go_on

    def _follow(
        self, known: _Known, frame: FrameType, onward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], num_tensors: int
    ) -> Any:
        """Make a call the long way, and keep what came of it if it was the user's own."""
        if not is_users(frame.f_code.co_filename):
            return onward(*args, **kwargs)  # a library's is told with the line of the user's, which may be another one the next time
        given = self._given
        given.is_wanted = True
        self._interceptor.take_last()
        try:
            made = onward(*args, **kwargs)
            if given.call is not None:
                self._learn(known, frame, (*args[num_tensors:], *kwargs.values()), *given.call)
        finally:
            given.is_wanted, given.call = False, None
        return made

    def _learn(self, known: _Known, frame: FrameType, others: tuple[Any, ...], process_group: Any, method: str, options: Any) -> None:
        """Keep the call that this thread has just made; `known` holds the identities of its other arguments, which must stay theirs."""
        call, group = self._interceptor.take_last(), self._interceptor.groups.find_current(process_group)
        if call is None or group is None or call.key != group.key or call.called is not None or call.line != frame.f_lineno:
            return
        if options.asyncOp or any(isinstance(one, torch.dtype) and one.is_complex for one in known):
            return  # torch gives gloo another view of complex numbers
        backends = {process_group._get_backend(device) for device in process_group._device_types}
        if _CPU not in process_group._device_types or len(backends) > 1 or not all(map(self._stays, others)):
            return  # which backend it is, or whether it is gloo at all, is torch's to say where there are GPUs
        if len(self._ways) >= _MOST_WAYS:
            self.forget()
        self._codes.append(frame.f_code)
        self._ways[known] = self._way(getattr(backends.pop(), method), options, call)

    def _stays(self, value: Any) -> bool:
        """Whether an argument's identity is its own for good, or until `forget`."""
        is_fixed = value is None or isinstance(value, (bool, dist.ReduceOp.RedOpType)) or type(value) is int and value in _SMALL
        return is_fixed or self._interceptor.groups.find_current(value) is not None

    def _way(self, make: Callable[..., Any], options: Any, call: Call) -> Callable[..., None]:
        """What makes a call again; torch's functions give nothing where their caller waits."""
        it, board, text, is_checked = self._interceptor, self._interceptor.board, call.text, self._interceptor.is_checked
        post, index = Post.of(text, call.place, call.line), LEDGER_NAMES.index(call.operation.name)
        begin, end = board.prepared(it.rank, call.key, post, index, call.num_bytes, is_awaited=is_checked)
        get_thread, main_thread, now, in_gloo = threading.get_ident, it.main_thread, time.monotonic_ns, AreaState.IN_GLOO
        is_awake, stay_awake, wait, limit = it.awake.is_wanted, it.awake.wait, it.wait_of_torch, leaving.SLICE

        def way(*tensors: Any) -> None:
            is_main, was_busy, arrived = get_thread() == main_thread, it.is_busy, None
            if is_main:
                it.is_busy = True  # as in `busy`: a signal waits
            try:
                started = now()
                if is_checked:
                    call.sequence = sequence = begin(started)
                    it.meet(call, waits=True)
                    board.move(it.rank, in_gloo)
                    arrived = now()
                    work = make(*tensors, options)
                else:
                    work = make(*tensors, options)
                    sequence = begin(started)
                if is_awake:
                    stay_awake(work.is_completed)
                try:
                    wait(work, limit)
                except RuntimeError:  # an error, or it takes long
                    it.outlast(work, text)
                end(sequence, started, arrived)
            except BaseException as error:
                board.move(it.rank, AreaState.NOWHERE)
                if isinstance(error, RuntimeError) and not (is_checked and arrived is None):
                    it.tell_freed(text, error)
                raise
            finally:
                if is_main:
                    it.be_free(was_busy)

        return way
