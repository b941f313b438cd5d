"""The shortcut of calls that a loop makes again: from the function of torch.distributed straight to gloo.

    dist.all_reduce(x)  ->  here: the same line, dtypes and arguments as before?
        no   ->  torch's function -> process group -> dispatcher -> `intercept`; what came of it is kept for the next time
        yes  ->  board (with the check: wait for peers, compare) -> gloo -> ledger; described anew where a shape is

Watching a call costs what it touches: where ranks share cores, each finds the caches full of others' things. So a call that was checked by
torch, described and placed once is not again, and what it needs is bound in closures. Taken by calls that are not recorded or spoiled; what
they leave on the board, in the ledger and among those in flight is what `intercept` leaves.

Knows torch's functions and process groups. Does not know tapes, faults or stops: where there are any, a call goes the other way.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.autograd.profiler as profiler
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from workbench.ranks import leaving
from workbench.ranks.board import AreaState, Post
from workbench.ranks.called import called_now
from workbench.ranks.calls import Call, is_users
from workbench.ranks.operations import LEDGER_NAMES, describing, num_bytes

if TYPE_CHECKING:
    from workbench.ranks.intercept import Interceptor

__all__ = ["Shortcut"]

_OF_ONE = ("all_reduce", "broadcast", "reduce")  # functions of torch.distributed whose first argument is their only tensor
_OF_MORE = (  # those of more tensors, of lists of them, or of none; two were renamed between releases of torch
    "barrier", "all_gather", "all_gather_into_tensor", "all_gather_single", "gather", "scatter", "all_to_all_single",
    "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single",
)  # fmt: skip
_METHODS = {  # of a process group, which they call -> of gloo's backend
    "barrier": "barrier", "allreduce": "allreduce", "broadcast": "broadcast", "reduce": "reduce", "allgather": "allgather",
    "_allgather_base": "_allgather_base", "all_gather_single": "_allgather_base", "gather": "gather", "scatter": "scatter",
    "alltoall_base": "alltoall_base", "all_to_all_single": "alltoall_base", "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "_reduce_scatter_base", "reduce_scatter_single": "_reduce_scatter_base",
}  # fmt: skip
_Known: TypeAlias = tuple[Any, ...]  # where a call stands, its tensors' dtypes, its other arguments' identities
_Shapes: TypeAlias = torch.Size | tuple[torch.Size, ...]
_Described: TypeAlias = tuple[Post, int, Any]  # what is posted, its bytes, and its Call where peers or whoever waits later must see it
_Way: TypeAlias = Callable[[_Described, list[torch.Tensor]], Any]
_MOST_KINDS = 1024
_MOST_SHAPES = 64  # of a kind
_CPU = torch.device("cpu")
_num_modes = torch._C._len_torch_dispatch_stack
_num_function_modes = torch._C._len_torch_function_stack
_SMALL = range(-5, 257)  # ints that Python makes once


class _Given(threading.local):
    """What this thread's call of a torch function came to.

    Attributes:
        asked: of which process group, by which method of gloo's, with which arguments, the options last.
        made: what `intercept` made of it, the operator's arguments, and what describes such a call.
    """

    is_wanted: bool = False
    asked: tuple[Any, str, tuple[Any, ...]] | None = None
    made: tuple[Call, tuple[Any, ...], Callable[[tuple[Any, ...]], str]] | None = None


class _Kind(NamedTuple):
    """Calls that differ in nothing but their tensors' shapes and values.

    Attributes:
        way: makes such a call, described, with its tensors.
        described: those of shapes that were seen.
        describe: such a call of other shapes, which is kept.
    """

    way: _Way
    described: dict[_Shapes, _Described]
    describe: Callable[[_Shapes, list[torch.Tensor]], _Described]


class Shortcut:
    """Of one process."""

    def __init__(self, interceptor: Interceptor) -> None:
        self._interceptor = interceptor
        self._given = _Given()
        self._kinds: dict[_Known, _Kind] = {}
        self._codes: list[CodeType] = []  # of those kinds; held so that their identities stay theirs

    def forget(self) -> None:
        """Groups are no more, or will be soon; gloo's backends are let go of."""
        self._kinds.clear()
        self._codes.clear()

    def see(self, call: Call, args: tuple[Any, ...]) -> None:
        """A collective of this thread's went the long way, and its caller waits for it, or will; `args` are the operator's."""
        if self._given.is_wanted:
            self._given.made = call, args, describing(call.operation)

    def install(self) -> None:
        """Take over torch's functions, for good."""
        for name, of_gloo in _METHODS.items():
            if hasattr(dist.ProcessGroup, name):
                setattr(dist.ProcessGroup, name, self._keeping(of_gloo, getattr(dist.ProcessGroup, name)))
        remaps = getattr(sys.modules.get("torch.distributed._functional_collectives"), "traceable_collective_remaps", {})
        for name in (*_OF_ONE, *_OF_MORE):
            onward = getattr(c10d, name, None)
            if onward is not None:
                shortened = self._of_one(onward) if name in _OF_ONE else self._of_more(onward)
                setattr(c10d, name, shortened)
                setattr(dist, name, shortened)
                if onward in remaps:  # torch.compile knows functions by identity
                    remaps[shortened] = remaps[onward]
        c10d.destroy_process_group = dist.destroy_process_group = self._forgetting(dist.destroy_process_group)

    def _keeping(self, of_gloo: str, onward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(onward)
        def wrapped(process_group: Any, *args: Any, **kwargs: Any) -> Any:
            if self._given.is_wanted:
                self._given.asked = (process_group, of_gloo, (*args, *kwargs.values()))
            return onward(process_group, *args, **kwargs)

        return wrapped

    def _forgetting(self, destroy: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(destroy)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            self.forget()
            destroy(*args, **kwargs)

        return wrapped

    def _of_one(self, onward: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose first argument is a tensor; what gradients, devices, strides or a lazy minus sign concern goes on."""
        find, look_further, must_go_on, get_frame = self._kinds.get, self._look_further, self._must_go_on(), sys._getframe
        tensor_type, follow = torch.Tensor, self._follow

        @functools.wraps(onward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not args or type(args[0]) is not tensor_type:
                return onward(*args, **kwargs)
            tensor, *others = args
            frame = get_frame(1)
            known = (id(frame.f_code), frame.f_lasti, tensor.dtype, *map(id, others), *kwargs, *map(id, kwargs.values()))
            kind = find(known)
            if kind is None:
                kind, known, user = look_further(known, frame)
                if kind is None:
                    return follow(known, frame, user, onward, args, kwargs, [tensor])
            if must_go_on() or tensor.requires_grad or not tensor.is_cpu or tensor.is_neg() or not tensor.is_contiguous():
                return onward(*args, **kwargs)
            (way, described, describe), shape = kind, tensor.shape
            return way(described.get(shape) or describe(shape, [tensor]), [tensor])

        return call

    def _of_more(self, onward: Callable[..., Any]) -> Callable[..., Any]:
        """A function of any number of tensors, which may come by name or in lists."""
        find, look_further, must_go_on, get_frame = self._kinds.get, self._look_further, self._must_go_on(), sys._getframe
        tensor_type, follow = torch.Tensor, self._follow

        @functools.wraps(onward)
        def call(*args: Any, **kwargs: Any) -> Any:
            frame = get_frame(1)
            what: list[Any] = [id(frame.f_code), frame.f_lasti, *kwargs]
            tensors, shapes = [], []
            for value in (*args, *kwargs.values()) if kwargs else args:
                if type(value) is list:
                    what.append(len(value))
                else:
                    value = (value,)
                for one in value:
                    if type(one) is tensor_type:
                        tensors.append(one)
                        shapes.append(one.shape)
                        what.append(one.dtype)
                    else:
                        what.append(id(one))
            known = tuple(what)
            kind = find(known)
            if kind is None:
                kind, known, user = look_further(known, frame)
                if kind is None:
                    return follow(known, frame, user, onward, args, kwargs, tensors)
            if must_go_on():
                return onward(*args, **kwargs)
            for one in tensors:
                if one.requires_grad or not one.is_cpu or one.is_neg() or not one.is_contiguous():
                    return onward(*args, **kwargs)
            (way, described, describe), of_shapes = kind, tuple(shapes)
            return way(described.get(of_shapes) or describe(of_shapes, tensors), tensors)

        return call

    def _must_go_on(self) -> Callable[[], bool]:
        """Whether somebody wants to see calls of torch, or collects them, now."""
        hooks, coalescing, it = self._interceptor.hooks, c10d._world.pg_coalesce_state, self._interceptor

        def must_go_on() -> bool:
            return bool(hooks or coalescing or _num_modes() or _num_function_modes() or profiler._is_profiler_enabled or it.is_in_hook)

        return must_go_on

    def _look_further(self, known: _Known, frame: FrameType) -> tuple[_Kind | None, _Known, FrameType | None]:
        """Of a library's call it counts from which line of the user's it comes.

        Returns:
            Its kind, if one was made before; what is known of it; the user's frame, where it may be kept.
        """
        if is_users(frame.f_code.co_filename):
            return None, known, frame
        if called_now() is not None or self._interceptor.engine_connections is not None:
            return None, known, None  # what such calls leave is kept elsewhere, or not at all
        user: FrameType | None = frame
        while user is not None and not is_users(user.f_code.co_filename):
            user = user.f_back
        if user is None:
            return None, known, None
        known = (*known, id(user.f_code), user.f_lasti)
        return self._kinds.get(known), known, user

    def _follow(
        self,
        known: _Known,
        frame: FrameType,
        user: FrameType | None,
        onward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
    ) -> Any:
        """Make a call the long way, and keep what came of it if it was made by a line of the user's."""
        if user is None:
            return onward(*args, **kwargs)
        given = self._given
        given.is_wanted = True
        try:
            result = onward(*args, **kwargs)
            if given.asked is not None and given.made is not None and given.made[0].line == user.f_lineno:
                kind = self._kind(tensors, [one for one in _each(*args, *kwargs.values()) if type(one) is not torch.Tensor])
                if kind is not None:
                    if len(self._kinds) >= _MOST_KINDS:
                        self.forget()
                    self._codes += (frame.f_code, user.f_code)
                    self._kinds[known] = kind
        finally:
            given.is_wanted, given.asked, given.made = False, None, None
        return result

    def _kind(self, tensors: list[torch.Tensor], others: list[Any]) -> _Kind | None:
        """What this thread's call is one of; None where its other arguments' identities say nothing, or gloo is given something else."""
        assert self._given.asked is not None and self._given.made is not None
        (process_group, method, (*given, options)), (call, args, describe) = self._given.asked, self._given.made
        group = self._interceptor.groups.find_current(process_group)
        if group is None or call.key != group.key or call.called is not None or not all(map(self._stays, others)):
            return None
        backends = {process_group._get_backend(device) for device in process_group._device_types}
        if _CPU not in process_group._device_types or len(backends) > 1:
            return None  # which backend it is, or whether it is gloo at all, is torch's to say where there are GPUs
        arguments, at = _placing(given, tensors), call.operation.group_at
        described = _placing([*args[:at], None, *args[at + 1 :]], tensors)  # a group must not live on for its name
        if arguments is None or described is None:
            return None

        def describe_and_count(tensors: list[torch.Tensor]) -> tuple[str, int]:
            args = described(tensors)
            return describe(args), num_bytes(args)

        describes = _around_shape(call, tensors) or describe_and_count
        way = self._way(getattr(backends.pop(), method), arguments, options, call)
        is_seen = self._interceptor.is_checked or options.asyncOp
        return _Kind(way, *_describing_once(call.as_of(call.text, call.num_bytes), describes, is_seen=is_seen))  # without what it holds

    def _stays(self, value: Any) -> bool:
        """Whether an argument's identity is its own for good, or until `forget`."""
        is_fixed = value is None or isinstance(value, (bool, dist.ReduceOp.RedOpType)) or type(value) is int and value in _SMALL
        return is_fixed or self._interceptor.groups.find_current(value) is not None

    def _way(self, make: Callable[..., Any], arguments: Callable[[list[torch.Tensor]], Sequence[Any]], options: Any, like: Call) -> _Way:
        """What makes calls of a kind; torch's functions give nothing where their caller waits."""
        it, board, is_async, is_checked = self._interceptor, self._interceptor.board, options.asyncOp, self._interceptor.is_checked
        begun = AreaState.NOWHERE if is_async else AreaState.ON_BOARD if is_checked else AreaState.IN_GLOO
        met = AreaState.NOWHERE if is_async else AreaState.IN_GLOO
        begin, end = board.prepared(it.rank, like.key, LEDGER_NAMES.index(like.operation.name), begun, is_awaited=is_checked)
        line = like.line
        get_thread, main_thread, now = threading.get_ident, it.main_thread, time.monotonic_ns
        is_awake, stay_awake, wait, limit = it.awake.is_wanted, it.awake.wait, it.wait_of_torch, leaving.SLICE

        def way(described: _Described, tensors: list[torch.Tensor]) -> Any:
            post, size, call = described
            is_main, was_busy, arrived = get_thread() == main_thread, it.is_busy, None
            if is_main:
                it.is_busy = True  # as in `busy`: a signal waits
            try:
                started = now()
                if is_checked:
                    call.sequence = sequence = begin(started, post)
                    it.meet(call, waits=not is_async)
                    board.move(it.rank, met)
                    arrived = now()
                    work = make(*arguments(tensors), options)
                else:
                    work = make(*arguments(tensors), options)
                    sequence = begin(started, post)
                if is_async:
                    it.remember(call.again(sequence, work, end(sequence, started, arrived or started, size, line)))
                    return work
                if is_awake:
                    stay_awake(work.is_completed)
                try:
                    wait(work, limit)
                except RuntimeError:  # an error, or it takes long
                    it.outlast(work, post.what)
                end(sequence, started, arrived, size, line)
            except BaseException as error:
                board.move(it.rank, AreaState.NOWHERE)
                if isinstance(error, RuntimeError) and not (is_checked and arrived is None):
                    it.tell_freed(post.what, error)
                raise
            finally:
                if is_main:
                    it.be_free(was_busy)

        return way


def _each(*values: Any) -> Iterator[Any]:
    """Arguments of a call, one by one where they come in a list."""
    for value in values:
        yield from value if type(value) is list else (value,)


def _describing_once(
    like: Call, describe: Callable[[list[torch.Tensor]], tuple[str, int]], *, is_seen: bool
) -> tuple[dict[_Shapes, _Described], Callable[[_Shapes, list[torch.Tensor]], _Described]]:
    """What describes calls like this one, and where it keeps them by their tensors' shapes.

    Args:
        is_seen: whether a Call belongs to it, which takes as long to make as all else.
    """
    described: dict[_Shapes, _Described] = {}
    _, separator, source = like.place.partition(b"\0")
    source, line = separator + source, like.line

    def describe_anew(shapes: _Shapes, tensors: list[torch.Tensor]) -> _Described:
        if len(described) >= _MOST_SHAPES:
            described.clear()
        text, size = describe(tensors)
        shown = text.encode()
        post = Post.made(shown, shown + source, line)
        found = described[shapes] = post, size, like.as_of(text, size) if is_seen else None
        return found

    return described, describe_anew


def _around_shape(call: Call, tensors: list[torch.Tensor]) -> Callable[[list[torch.Tensor]], tuple[str, int]] | None:
    """What describes calls like this one of one tensor, whose shape alone differs; None for others."""
    if call.operation.name not in _OF_ONE or not tensors[0].is_contiguous():  # else its text tells its strides too
        return None
    before, _, after = call.text.partition(str(list(tensors[0].shape)))
    return lambda tensors: (f"{before}{list(tensors[0].shape)}{after}", tensors[0].nbytes)


def _placing(given: Sequence[Any], tensors: list[torch.Tensor]) -> Callable[[list[torch.Tensor]], tuple[Any, ...]] | None:
    """What puts other tensors where these are among arguments.

    Returns:
        None where it would be a guess: one of them is there twice, or not at all, or stands beside others.
    """
    places = {id(tensor): f"tensors[{place}]" for place, tensor in enumerate(tensors)}
    held: dict[str, Any] = {}
    found = []

    def text(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(text, value))}]"
        if isinstance(value, torch.Tensor) and tensors:  # what a call without tensors gives is torch's own
            found.append(id(value))
            return places.get(id(value), "None")
        held[name := f"held_{len(held)}"] = value
        return name

    source = f"lambda tensors: ({' '.join(text(value) + ',' for value in given)})"
    return eval(source, held) if sorted(found) == sorted(map(id, tensors)) and len(places) == len(tensors) else None  # as by hand
