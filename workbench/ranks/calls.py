"""One collective call of a rank, as it stands on the board: which group, which number, what its peers must agree on, where it was written.

Knows groups' names and lines of source. Does not know torch's operators nor how a call is made.
"""

from __future__ import annotations

import functools
import linecache
import os
import sys
import sysconfig
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch

from workbench.ranks import sockets
from workbench.ranks.called import Called
from workbench.ranks.operations import Operation

__all__ = ["Call", "KnownGroup", "is_users", "key_of", "mismatch_text", "place_of", "user_frame"]

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib", "stdlib")})
_places: dict[tuple[int, int, str], tuple[CodeType, bytes]] = {}  # a loop: its line need not be read again; code is kept, so is its id
_MOST_PLACES = 1024
_NOT_USER_CODE = (*_LIBRARIES, os.path.dirname(torch.__file__) + os.sep, _PACKAGE, "<frozen", "<string>")
_WAITING_IN_CPP = ("torch/nn/parallel/distributed.py", "torch/distributed/utils.py")  # their Python collectives have frames of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownGroup:
    """A process group that is watched, or a channel between two of its ranks.

    Attributes:
        key: its name on the board: the same number on all members, another one in each generation.
        ranks: global ranks, in group order.
        peers: those of the others, where this rank is a member.
        connections: sockets that were opened to form it.
        outlives_generations: it does not belong to the world's process group: a place of a stateless group.
    """

    key: int
    name: str
    ranks: tuple[int, ...]
    generation: int
    peers: tuple[int, ...] = ()
    connections: frozenset[sockets.Connection] = frozenset()
    outlives_generations: bool = False


@dataclass(slots=True, kw_only=True)  # completed as it goes; it stays in this process, and a copy costs microseconds
class Call:
    """One call of this rank.

    Attributes:
        peers: ranks that must post it too before it can end.
        sources: (rank, channel) of each rank that a receive from any may hear; one of them must send.
        text: what it is, with all that members must agree on.
        line, place: where it was called, for the driver.
        work: what its caller waits for, when it is asynchronous; held so that torch's object keeps its identity until then.
        called: the operation of ours that makes this call.
        tensors: what an asynchronous call writes, which its work holds too: functional collectives wait for a tensor, not for the work.
        num_bytes: what this rank gives, or takes in a receive; known once the call is made.
        row: number of its row in the ledger, to be completed when it was waited for; -1 where there is none.
    """

    operation: Operation
    group: KnownGroup
    key: int
    peers: Sequence[int]
    text: str
    line: int
    place: bytes
    sequence: int = 0
    sources: Sequence[tuple[int, int]] = ()
    work: Any = None
    tensors: Any = None
    row: int = -1
    num_bytes: int = 0
    called: Called | None = None

    def again(self, sequence: int, work: Any, row: int) -> Call:
        """The same call, begun once more by its line; not for functional collectives, which wait for their tensors."""
        return Call(
            operation=self.operation,
            group=self.group,
            key=self.key,
            peers=self.peers,
            text=self.text,
            line=self.line,
            place=self.place,
            sequence=sequence,
            work=work,
            row=row,
            num_bytes=self.num_bytes,
        )

    def as_of(self, text: str, num_bytes: int) -> Call:
        """A call with another text by the same line, which has not begun yet."""
        _, separator, source = self.place.partition(b"\0")
        place = text.encode() + separator + source
        made = self.again(0, None, -1)  # `replace` of dataclasses takes ten times as long
        made.text, made.place, made.num_bytes = text, place, num_bytes
        return made

    @property
    def is_announcement(self) -> bool:
        """Whether it is what one of our own operations tells its members before it begins."""
        return self.called is not None and self.called.is_announcing

    @property
    def shown(self) -> str:
        """What is shown where ranks met with different operations."""
        return self.called.shown if self.called is not None and self.is_announcement else self.text


def key_of(text: str) -> int:
    """A positive 62-bit number, the same in every process."""
    data = text.encode()
    return (zlib.crc32(data) << 30 | zlib.crc32(data[::-1] + b"?") >> 2) or 1


def user_frame(depth: int) -> tuple[FrameType | None, bool]:
    """Innermost frame of user code above the caller's `depth`, and whether C++ made the call and waits for it.

    DDP does: its reductions in a backward pass, its broadcasts when the model is made and before a forward pass.
    """
    frame: FrameType | None = sys._getframe(depth + 1)
    is_waited_in_cpp = False
    innermost = True
    while frame is not None:
        is_users, is_ours = _whose(frame.f_code.co_filename)
        if innermost and not is_ours:
            is_waited_in_cpp = frame.f_code.co_name == "_engine_run_backward" or frame.f_code.co_filename.endswith(_WAITING_IN_CPP)
            innermost = False
        if is_users:
            return frame, is_waited_in_cpp
        frame = frame.f_back
    return None, is_waited_in_cpp


def is_users(file: str) -> bool:
    """Whether code of this file is the user's: no library's, nor ours."""
    return _whose(file)[0]


@functools.lru_cache(maxsize=4096)  # each cell is a file
def _whose(file: str) -> tuple[bool, bool]:
    """Whether code of this file is the user's, and whether it is the workbench's."""
    return not file.startswith(_NOT_USER_CODE), file.startswith(_PACKAGE)


def place_of(frame: FrameType | None, text: str) -> tuple[int, bytes]:
    """Line of the user's code (0: unknown), and the call and that line's text as the board keeps them."""
    if frame is None:
        return 0, text.encode()
    code, line = frame.f_code, frame.f_lineno
    known = _places.get((id(code), line, text))
    if known is not None:
        return line, known[1]
    if len(_places) >= _MOST_PLACES:
        _places.clear()
    linecache.checkcache(code.co_filename)  # a module that was edited and loaded again has new code
    place = f"{text}\0{linecache.getline(code.co_filename, line).strip()}".encode()
    _places[id(code), line, text] = code, place
    return line, place


def mismatch_text(texts: Mapping[int, str], sequence: int, group: KnownGroup) -> str:
    """What each rank called, the odd one first."""
    by_text: dict[str, list[int]] = {}
    for rank, text in texts.items():
        by_text.setdefault(text, []).append(rank)
    rarest_first = sorted(by_text.items(), key=lambda item: (len(item[1]), item[1][::-1]))
    odd_text, odd_ranks = rarest_first[0]
    lines = [
        f"ranks met in collective #{sequence} of group {group.name!r} with different operations: "
        f"{_ranks(odd_ranks)} called {odd_text}, {_ranks(rarest_first[-1][1])} called {rarest_first[-1][0]}",
        *(f"  {_ranks(ranks):<20} {text}" for text, ranks in rarest_first),
        "every rank of a group must make the same calls in the same order, with the same shape, dtype, reduce op and root",
    ]
    return "\n".join(lines)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))
