"""The context in which a CUDA graph is captured over groups; without CUDA it does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from workbench.ranks.group import Group

__all__ = ["GraphCaptureContext", "capture_stream", "graph_capture"]


@dataclass(frozen=True, slots=True)
class GraphCaptureContext:
    """What is captured on.

    Attributes:
        stream: a `torch.cuda.Stream`; None without CUDA.
    """

    stream: Any


@contextmanager
def capture_stream(context: GraphCaptureContext | None = None, device: torch.device | str | None = None) -> Iterator[GraphCaptureContext]:
    """Make a stream of its own the current one, after what the present one still does; capture with `torch.cuda.graph(..., stream=...)`."""
    if not torch.cuda.is_available():
        yield context or GraphCaptureContext(None)
        return
    context = context if context is not None and context.stream is not None else GraphCaptureContext(torch.cuda.Stream(device))
    present = torch.cuda.current_stream(context.stream.device)
    if present != context.stream:
        context.stream.wait_stream(present)
    with torch.cuda.stream(context.stream):
        yield context


@contextmanager
def graph_capture(*groups: Group, device: torch.device | str | None = None) -> Iterator[GraphCaptureContext]:
    """`group.graph_capture` over several groups at once, on one stream: `graph_capture(groups["tp"], groups["pp"], device="cuda:0")`."""
    with ExitStack() as stack:
        context = stack.enter_context(capture_stream(device=device))
        for group in groups:
            stack.enter_context(group.graph_capture(context))
        yield context
