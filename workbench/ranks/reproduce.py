"""A saved session run again: its cells on a new cluster, and what each rank gives compared with what it gave then.

    file -> cells, one after another -> new cluster with the same names; its history against the file's -> Reproduction

Knows sessions and clusters. Does not know tapes: peers run for real here, all of them.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.environment import describe_environment
from workbench.errors import RankError, SessionError, WorkbenchError
from workbench.ranks.channel import unpack
from workbench.ranks.cluster import Cluster
from workbench.ranks.history import Made, plain
from workbench.ranks.launch import launch
from workbench.ranks.session import Entry, Output, Session, read_session

__all__ = ["Difference", "Reproduction", "compare", "main", "reproduce"]

_DIFFERS = 3  # exit code
_SHORTEST_S = 0.2
_MACHINE = ("num_usable_cores", "system")
_SHOWN_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """An output that is not what it was.

    Attributes:
        cell: its place in the session, from 1; source: what it ran, shortened.
        what: "result", "stdout", "outcome" or "end".
        then, now: both as text, with their hashes where the values have them.
    """

    cell: int
    source: str
    rank: int
    what: str
    then: str
    now: str

    def __str__(self) -> str:
        who = "the driver" if self.rank < 0 else f"rank {self.rank}"
        return f"cell {self.cell} ({self.source}), {who}: {self.what} differs\n  then {self.then}\n  now  {self.now}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """What came out of running a session again.

    Attributes:
        num_outputs: outputs compared; `num_hashed` of them by the hash of the value, the others by their text.
        differences: in the order of the session.
        environment: versions, variables and properties of the machine that differ, a line each.
        notes: what could not be run or compared, and why.
    """

    path: Path
    num_cells: int
    num_outputs: int
    num_hashed: int
    differences: tuple[Difference, ...]
    environment: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        return not self.differences

    @property
    def first(self) -> Difference | None:
        """The first output that differs."""
        return self.differences[0] if self.differences else None

    def __str__(self) -> str:
        head = f"{self.num_cells} cells run again; {self.num_outputs} outputs compared, {self.num_hashed} of them bit for bit"
        lines = [f"{head}: all equal" if self.is_equal else f"{head}: {len(self.differences)} differ, the first one in"]
        lines += [str(self.first)] if self.first else []
        lines += [f"other than then: {line}" for line in self.environment]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def reproduce(path: str | Path, *, trust: bool = False) -> Cluster:
    """Run a session's cells again on a new cluster: its names are rebuilt, and `cluster.report` says what differs.

    To reproduce a session is to run its code. One that this user saved on this machine is run; another one only with `trust`: read it first
    (`workbench reproduce --show PATH`). Cells that were interrupted run for as long as they did then. Engines are started again, and
    rollouts and what was asked of an engine's handle (generate, sleep, wake_up, update_weights, close) are run on them, in their order;
    completions that were drawn without a seed are only counted.

    Args:
        path: what `cluster.save_session` was given.

    Returns:
        The new cluster; closing it is the caller's. The report is printed too.

    Raises:
        SessionError: no session, damaged, of another version, or not this user's.
        LaunchError: ranks did not start.
    """
    session = read_session(path, trust=trust)
    cluster = _launch(session, Path(path))
    try:
        runner = _Runner(cluster, session)
        runner.run()
    except BaseException:
        cluster.close()
        raise
    now = cluster.history.told()
    pairs = [(entry, now[place]) for _, entry, place in runner.places]
    differences, num_outputs, num_hashed, unhashed = compare(pairs, [cell for cell, *_ in runner.places])
    cluster.report = Reproduction(
        path=Path(path),
        num_cells=len(pairs),
        num_outputs=num_outputs,
        num_hashed=num_hashed,
        differences=tuple(differences),
        environment=tuple(_differing(session.environment)),
        notes=(*session.notes, *runner.notes, *unhashed),
    )
    print(cluster.report)
    return cluster


def _launch(session: Session, path: Path) -> Cluster:
    try:
        return launch(**session.launch)
    except (TypeError, ValueError) as error:
        raise SessionError(
            f"{path} cannot be launched as it says: {error}\nit says {dict(session.launch)}\nsave it again: cluster.save_session(path)"
        ) from error


def compare(pairs: Sequence[tuple[Entry, Entry]], cells: Sequence[int] | None = None) -> tuple[list[Difference], int, int, list[str]]:
    """Compare entries then and now.

    Args:
        cells: place of each pair in the session, from 1; None numbers the pairs.

    Returns:
        The differences, how many outputs were compared, how many of them by hash, and why others were not.
    """
    differences: list[Difference] = []
    num_outputs = num_hashed = 0
    reasons: dict[str, list[int]] = {}
    for cell, (then, now) in zip(cells or range(1, len(pairs) + 1), pairs, strict=True):
        if then.stop == "interrupt":
            continue
        source = textwrap.shorten(then.text.partition("\n")[0], 60) or then.task
        if then.stop != now.stop:
            ends = [_end(entry) for entry in (then, now)]
            differences.append(Difference(cell=cell, source=source, rank=_first_rank(then, now), what="end", then=ends[0], now=ends[1]))
            continue
        by_rank = {output.rank: output for output in now.outputs}
        for output in then.outputs:
            if output.rank not in by_rank or "freed" in (output.outcome, by_rank[output.rank].outcome):
                continue  # which ranks of a failed cell are freed, and which end by themselves, is a matter of time
            num_outputs += 1
            num_hashed += bool(output.digest)
            if output.reason:
                reasons.setdefault(output.reason, []).append(cell)
            found = _differs(output, by_rank[output.rank])
            if found:
                differences.append(Difference(cell=cell, source=source, rank=output.rank, what=found[0], then=found[1], now=found[2]))
    unhashed = [f"cell {cells[0]}: a result was compared by its text only: {reason}" for reason, cells in reasons.items()]
    return differences, num_outputs, num_hashed, unhashed


def _differs(then: Output, now: Output) -> tuple[str, str, str] | None:
    """What differs, with both values; None where nothing does."""
    if then.outcome != now.outcome:
        return "outcome", f"{then.outcome} {then.text}", f"{now.outcome} {now.text}"
    if then.digest or now.digest:
        if then.digest != now.digest:
            return "result", f"{then.text} (hash {then.digest or 'none'})", f"{now.text} (hash {now.digest or 'none'})"
    elif plain(then.text) != plain(now.text):
        return "result", then.text, now.text
    if then.stdout_digest != now.stdout_digest:
        return "stdout", repr(then.stdout), repr(now.stdout)
    return None


def _end(entry: Entry) -> str:
    raised = next((output.text for output in entry.outputs if output.outcome in ("raised", "died")), "")
    return f"it ended by {entry.stop} {raised}".rstrip() if entry.stop else "it ended well"


def _first_rank(then: Entry, now: Entry) -> int:
    ranks = [output.rank for output in (*then.outputs, *now.outputs) if output.outcome in ("raised", "died")]
    return ranks[0] if ranks else (then.ranks or (-1,))[0]


def _differing(then: Mapping[str, Any]) -> list[str]:
    """Versions, variables and properties of the machine that are not those of the session."""
    now = describe_environment()
    lines = []
    for part, names in (("versions", None), ("machine", _MACHINE), ("environment", None)):
        old, new = dict(then.get(part, {})), dict(now.get(part, {}))
        for name in sorted(set(old) | set(new)):
            if (names is None or name in names) and old.get(name) != new.get(name):
                lines.append(f"{name} {old.get(name, 'not set')} then, {new.get(name, 'not set')} now")
    return lines


class _Runner:
    """Runs entries; `places` holds those that ran: place in the session (from 1), entry, place in the new cluster's history."""

    def __init__(self, cluster: Cluster, session: Session) -> None:
        self._cluster = cluster
        self._session = session
        self._made: dict[int, Any] = {}
        self._faults: list[AbstractContextManager[None]] = []
        self.places: list[tuple[int, Entry, int]] = []
        self.notes: list[str] = []

    def run(self) -> None:
        for number, entry in enumerate(self._session.entries):
            place = len(self._cluster.history.entries)
            try:
                self._perform(number, entry)
            except RankError:
                pass  # it stands in the history, and is compared there
            except Exception as error:  # of the session's own code: classes that are not here, an engine that does not start
                if len(self._cluster.history.entries) == place:
                    self.notes.append(f"cell {number + 1} could not be run: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            if len(self._cluster.history.entries) > place:
                self.places.append((number + 1, entry, place))
        while self._faults:
            self._end_faults()

    def _perform(self, number: int, entry: Entry) -> None:
        cluster = self._cluster
        if entry.unkept:
            raise WorkbenchError(f"{entry.text or entry.task} was not kept: {entry.unkept}")
        value: Any = unpack(self._session.values[entry.value]) if entry.value else None
        limit_s = max(_SHORTEST_S, entry.seconds) if entry.stop == "interrupt" else entry.timeout_s
        ranks = list(entry.ranks)
        verbs: dict[str, Callable[[], Any]] = {
            "source": lambda: cluster.execute(entry.text, ranks, timeout_s=limit_s),
            "call": lambda: self._call(value, ranks, limit_s),
            "push": lambda: cluster.push(value, ranks),
            "pull": lambda: cluster.pull(entry.text, ranks),
            "driver": lambda: self._made.update({number: self._on_driver(entry, value)}),
            "method": lambda: self._on_made(entry, value),
            "kill": lambda: cluster.kill(ranks[0]),
            "respawn": lambda: cluster.respawn(ranks[0]),
            "restart": cluster.restart,
            "inject": lambda: self._begin_faults(value),
            "end inject": self._end_faults,
        }
        verbs[entry.task]()

    def _begin_faults(self, faults: Any) -> None:
        armed = self._cluster.inject(*faults)
        armed.__enter__()
        self._faults.append(armed)

    def _end_faults(self) -> None:
        self._faults.pop().__exit__(None, None, None)

    def _call(self, value: Any, ranks: list[int], limit_s: float | None) -> None:
        from workbench.ranks.forming import use_layout

        function, args, kwargs = value
        if function is use_layout:
            self._cluster.use(*args)
        else:
            self._cluster.run(function, *args, ranks=ranks, timeout_s=limit_s, **kwargs)

    def _on_driver(self, entry: Entry, value: Any) -> Any:
        function, args, kwargs = value
        named = {name: self._back(entry, item) for name, item in kwargs.items()}
        return function(self._cluster, *(self._back(entry, item) for item in args), **named)

    def _on_made(self, entry: Entry, value: Any) -> None:
        """A call on an engine, say; how far one had come that was interrupted cannot be repeated."""
        made, args, kwargs = value
        if entry.stop == "interrupt":
            raise WorkbenchError(f"{entry.text} was interrupted then")
        getattr(self._back(entry, made), entry.text.rpartition(".")[2])(*args, **kwargs)

    def _back(self, entry: Entry, value: Any) -> Any:
        """What stands in the place of a reference now."""
        if not isinstance(value, Made):
            return value
        if value.number not in self._made:
            maker = self._session.entries[value.number].text
            raise WorkbenchError(f"{entry.text} needs what cell {value.number + 1} ({maker}) gives, and that could not be run")
        return self._made[value.number]


def _show(session: Session) -> None:
    """Print what a session would run."""
    print(f"saved {session.saved_at}, {session.launch['world_size']} ranks, seed {session.launch['seed']}, {session.layout}")
    for number, entry in enumerate(session.entries, start=1):
        print(f"cell {number}, {entry.task}" + (f" on ranks {list(entry.ranks)}" if entry.ranks else ""))
        lines = [_printable(line) for line in entry.text.splitlines()]
        print(*(f"    {line}" for line in lines[:_SHOWN_LINES]), *(["    ..."] if len(lines) > _SHOWN_LINES else []), sep="\n")
    print(f"{len(session.values)} pickles of functions, arguments and pushed names: they run code too, and are not shown")


def _printable(line: str) -> str:
    """A line of foreign source without what could make a terminal hide it."""
    return "".join(sign if sign.isprintable() or sign == "\t" else repr(sign)[1:-1] for sign in line)


def main(argv: Sequence[str]) -> int:
    """`workbench reproduce PATH [--show] [--trust]`: exit code 0 all equal, 3 something differs, 1 it could not be run."""
    parser = argparse.ArgumentParser(
        prog="workbench reproduce",
        description="Run a saved session again and say which output differs first. Exit code: 0 all equal, 3 something differs, 1 not run.",
    )
    parser.add_argument("path", help="what cluster.save_session was given")
    parser.add_argument("--show", action="store_true", help="print its cells and run nothing")
    parser.add_argument(
        "--trust", action="store_true", help="run one that another user or another machine has saved: it runs its code as you"
    )
    arguments = parser.parse_args(argv)
    if arguments.show:
        _show(read_session(arguments.path, trust=True))
        return 0
    with reproduce(arguments.path, trust=arguments.trust) as cluster:
        sys.stdout.flush()
        assert cluster.report is not None
        return 0 if cluster.report.is_equal else _DIFFERS
