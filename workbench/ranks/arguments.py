"""Arguments of the group operations: what is right, and what each call announces to its peers; raises before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.ranks.wire import check_dense, dtype_name

__all__ = [
    "REDUCE_OPS",
    "accumulator",
    "combine",
    "gatherable",
    "member",
    "members",
    "parts",
    "ragged",
    "reduced_dtype",
    "reducible",
    "same_everywhere",
]

REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}
_COMPLEX = (torch.complex64, torch.complex128)
# What gloo can reduce: torch's ProcessGroupGloo.cpp, GENERATE_ALL_TYPES; complex sums go as pairs of reals.
_REDUCIBLE = (
    torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, *_COMPLEX,
)  # fmt: skip


def members(ranks: Sequence[int], world_size: int) -> tuple[int, ...]:
    """The ranks of a new group as ints, in the order given."""
    chosen = tuple(int(rank) for rank in ranks)
    if not chosen:
        raise ValueError("a group needs at least one rank, got none")
    outside = [rank for rank in chosen if not 0 <= rank < world_size]
    if outside:
        raise ValueError(f"ranks {outside} are outside the world of {world_size}: choose from 0..{world_size - 1}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"ranks {list(chosen)} name a rank twice: name each once")
    return chosen


def member(what: str, place: int, size: int) -> int:
    """Check a `src` or `dst`: a rank within the group."""
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < size:
        raise ValueError(f"{what}={place!r} is outside the group of {size}: {what} is a rank within the group, 0..{size - 1}")
    return place


def gatherable(op: str, tensor: Tensor, dim: int, *, dst: int | None = None, size: int = 0) -> tuple[str, int]:
    """What all_gather or gather announces."""
    to = "" if dst is None else f" to {member('dst', dst, size)}"
    return f"{op}{to} {_shown(tensor)} dim {_dim(op, tensor, dim)}", 0


def parts(tensor: Tensor, dim: int, sizes: Sequence[int] | None, size: int) -> list[int]:
    """Rows along `dim` that each member gets of a reduce_scatter."""
    rows = tensor.shape[_dim("reduce_scatter", tensor, dim)]
    if sizes is None:
        if rows % size:
            raise ValueError(
                f"reduce_scatter: {rows} rows along dim {dim} do not divide among {size} members: pass sizes to reduce_scatterv, or pad"
            )
        return [rows // size] * size
    if sum(_sizes("reduce_scatterv", sizes, size)) != rows:
        raise ValueError(f"reduce_scatterv: sizes {list(sizes)} add up to {sum(sizes)}, but dim {dim} has {rows} rows: make them equal")
    return list(sizes)


def ragged(tensors: Sequence[Tensor], dim: int, sizes: Sequence[int] | None, place: int, size: int) -> tuple[str, int]:
    """What all_gatherv announces: everything but the rows, and the rows as its number."""
    if not tensors:
        raise ValueError("all_gatherv: got an empty list: pass at least one tensor")
    dims = [_dim("all_gatherv", tensor, dim) for tensor in tensors]
    counts = [tensor.shape[at] for tensor, at in zip(tensors, dims, strict=True)]
    if len(set(counts)) > 1:
        raise ValueError(f"all_gatherv: the tensors have {counts} rows along dim {dim}: those of one call need equally many")
    if sizes is not None and _sizes("all_gatherv", sizes, size)[place] != counts[0]:
        raise ValueError(
            f"all_gatherv: sizes {list(sizes)} give member {place} {sizes[place]} rows, but its tensor has {counts[0]} along dim {dim}: "
            "pass the true sizes, or none"
        )
    shapes = [[*tensor.shape[: dim % tensor.dim()], -1, *tensor.shape[dim % tensor.dim() + 1 :]] for tensor in tensors]
    shown = ", ".join(f"{dtype_name(tensor.dtype)} {shape}" for tensor, shape in zip(tensors, shapes, strict=True))
    return f"all_gatherv {shown} sizes {'any' if sizes is None else list(sizes)}".replace("-1", "*"), counts[0]


def same_everywhere(op: str, tensor: Tensor, src: int, size: int) -> tuple[str, int]:
    """What broadcast announces."""
    member("src", src, size)
    return f"{op} from {src} {_shown(tensor)}", 0


def reducible(op: str, tensor: Tensor, reduce_op: str, inplace: bool) -> tuple[str, int]:
    """What all_reduce announces."""
    shown = _shown(tensor)
    if reduce_op not in REDUCE_OPS:
        raise ValueError(f"{op}(op={reduce_op!r}): op must be one of {', '.join(map(repr, REDUCE_OPS))}")
    if tensor.dtype not in _REDUCIBLE:
        raise ValueError(f"{op}: gloo cannot reduce {dtype_name(tensor.dtype)}: convert with .to(torch.int32) or .float() first")
    if tensor.dtype in _COMPLEX and reduce_op not in ("sum", "mean"):
        raise ValueError(f"{op}(op={reduce_op!r}): gloo only adds complex numbers, got {shown}: use 'sum' or 'mean'")
    if inplace and reduced_dtype(tensor.dtype, reduce_op) != tensor.dtype:
        raise ValueError(f"{op}(op='mean', inplace=True): a mean of {dtype_name(tensor.dtype)} is float32: leave inplace out")
    return f"{op} {reduce_op} {shown}", 0


def accumulator(dtype: torch.dtype, op: str) -> torch.dtype:
    """The dtype that the sum behind a mean is formed in, so that it does not overflow; others keep their own."""
    if op != "mean":
        return dtype
    if dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return dtype if dtype.is_floating_point or dtype.is_complex else torch.int64


def reduced_dtype(dtype: torch.dtype, op: str) -> torch.dtype:
    """The dtype of a reduction's result: a mean of integers is float32."""
    return torch.float32 if op == "mean" and not (dtype.is_floating_point or dtype.is_complex) else dtype


def combine(stacked: Tensor, op: str) -> Tensor:
    """Reduce tensors [num, ...] of one process along their first dim as all_reduce does among ranks."""
    if op == "max":
        return stacked.amax(0)
    if op == "min":
        return stacked.amin(0)
    if op == "product":
        return stacked.prod(0)
    total = stacked.sum(0)
    return total / len(stacked) if op == "mean" else total


def _dim(op: str, tensor: Tensor, dim: int) -> int:
    check_dense(tensor)
    if isinstance(dim, bool) or not isinstance(dim, int) or not -tensor.dim() <= dim < tensor.dim():
        hint = "a 0-dim tensor has none: pass x.reshape(1)" if tensor.dim() == 0 else f"choose one of {-tensor.dim()}..{tensor.dim() - 1}"
        raise ValueError(f"{op}: invalid dim {dim!r} for a tensor of shape {list(tensor.shape)}: {hint}")
    return dim % tensor.dim()


def _sizes(op: str, sizes: Sequence[int], size: int) -> list[int]:
    counts = list(sizes) if isinstance(sizes, Sequence) and not isinstance(sizes, str) else [sizes]
    if len(counts) != size or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in counts):
        raise ValueError(f"{op}: sizes {counts} must be {size} numbers of at least 0, one for each member")
    return counts


def _shown(tensor: Tensor) -> str:
    """ "float32 [2, 3]"; refuses what cannot travel."""
    check_dense(tensor)
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
