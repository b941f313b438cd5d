"""What driver and rank say to each other, as typed records.

driver -> rank   RunCell  Free  Look  Question  Rebuild  Abandon
rank -> driver   Ready  GroupFormed  CellDone  Seen  Answer  Parted  Rebuilt  Mark
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from workbench.plan.layout import Layout
from workbench.ranks.digest import Digest

__all__ = [
    "ANY_SOURCE",
    "Abandon",
    "Answer",
    "CellDone",
    "CellError",
    "Free",
    "GroupFormed",
    "Inquiry",
    "Look",
    "Mark",
    "Outcome",
    "Parted",
    "Question",
    "Ready",
    "Rebuild",
    "Rebuilt",
    "RunCell",
    "Seen",
    "Task",
]


ANY_SOURCE = "any to "  # begins the name of the channel on which one rank counts its receives from anybody


class Inquiry(StrEnum):
    """What may be asked about a rank's names."""

    COMPLETE = "complete"  # "x.sh" -> "x.shape", ...
    DESCRIBE = "describe"  # type, shape, text, signature, documentation
    SOURCE = "source"  # that, and the source
    HAS = "has"  # whether a name is bound


class Task(StrEnum):
    """What a cell is made of."""

    SOURCE = "source"  # text, run in the rank's namespace
    CALL = "call"  # value: (function, args, kwargs)
    PUSH = "push"  # value: names to bind
    PULL = "pull"  # text: an expression
    HOUSE = "house"  # as CALL, for the workbench's own: never on a tape


class Outcome(StrEnum):
    """How a rank's part of a cell ended."""

    OK = "ok"
    RAISED = "raised"
    FREED = "freed"  # stopped by the driver: KeyboardInterrupt, or freed from a collective

    @property
    def is_ok(self) -> bool:
        return self is Outcome.OK


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCell:
    """Run one cell; `cell` numbers it within the cluster, `members` are the ranks that take part."""

    cell: int
    task: Task
    text: str = ""
    members: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CellError:
    """An exception of a rank as text: it may be of a class that only the rank knows.

    Attributes:
        names: short reprs of the names of the frame that failed.
    """

    kind: str
    message: str
    traceback: str
    at_s: float
    is_mismatch: bool = False
    names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CellDone:
    """A rank finished its part; a value, if any, travels beside it; `digest` is of that value, or of a cell's last expression."""

    cell: int
    outcome: Outcome
    result_text: str = ""
    error: CellError | None = None
    started_s: float = 0.0
    ended_s: float = 0.0
    is_group_broken: bool = False
    digest: Digest = field(default_factory=Digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Free:
    """Shut the gloo connections of this generation: a wait inside gloo then raises."""

    cell: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Say what the main thread does, `with_names` also what its frames hold; answered also while it computes or waits."""

    ticket: int
    with_names: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Where a rank's main thread is: line and source of the user's code (0 and the file in the workbench's, 0 and "" when idle), and stack.

    Attributes:
        num_threads: other Python threads of the user's; they may call collectives too.
        frames: (place, names as short reprs) of the user's own frames, outermost first, where they were asked for.
    """

    ticket: int
    line: int
    source: str
    stack: str
    num_threads: int = 0
    frames: tuple[tuple[str, dict[str, str]], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Something about the rank's names; answered also while it computes or waits."""

    ticket: int
    inquiry: Inquiry
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a rank says to a question; no lines where there is nothing to say."""

    ticket: int
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """Leave the process group and form the next generation, with the groups of this layout: a stop may have left ranks with others."""

    generation: int
    layout: Layout | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parted:
    """The rank has left its old groups, and begins to form this generation with its peers."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """Stop forming this generation: a rank that belongs to it has died."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    generation: int
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The rank's world group stands (generation 0), or why it does not."""

    pid: int
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFormed:
    """A group whose collectives will show on the board under `key`.

    Attributes:
        outlives_generations: it does not belong to the world's process group: a place of a stateless group.
    """

    key: int
    name: str
    ranks: tuple[int, ...]
    outlives_generations: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A label for the memory timeline, put there by a rank."""

    label: str
    at_s: float
