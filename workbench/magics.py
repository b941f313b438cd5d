"""`%load_ext workbench`: cells on ranks, in any IPython: JupyterLab, Notebook, VS Code, nbclient, papermill, a terminal.

    %launch 4 [--layout tp=2,pp=2] [--seed S]              binds `cluster`
    %%ranks [selector] [--timeout S] [--bg] [--out NAME] [--quiet]
    %ranks status | diagnose | interrupt | restart | respawn K | ledger | close

They use the variable `cluster`, however it was made. Knows IPython and the public names of a cluster. Does not know processes.
"""

from __future__ import annotations

import shlex
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class
from IPython.display import display

from workbench.errors import WorkbenchError
from workbench.plan.layout import Layout
from workbench.ranks.cluster import Cluster
from workbench.ranks.handle import CellHandle, CellResult, name_ranks
from workbench.ranks.launch import launch

__all__ = ["RankMagics", "load_ipython_extension"]

_STREAM_AFTER_S = 1.0  # a shorter cell prints once, folded, at its end
_FOLD_S = 0.2  # lines that arrive within this time are folded when ranks wrote the same
_VERBS = ("status", "diagnose", "interrupt", "restart", "respawn", "ledger", "close")


class _Parser(ArgumentParser):
    """Arguments of a magic; a mistake is IPython's UsageError, not the end of the kernel."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n{self.format_usage().strip()}")


def _parser(name: str, *arguments: tuple[Sequence[str], dict[str, Any]]) -> _Parser:
    parser = _Parser(prog=name, add_help=False)
    for names, options in arguments:
        parser.add_argument(*names, **options)
    return parser


_LAUNCH = _parser(
    "%launch",
    (["world_size"], {"type": int}),
    (["--layout"], {"default": None}),
    (["--seed"], {"type": int, "default": 0}),
)
_CELL = _parser(
    "%%ranks",
    (["selector"], {"nargs": "?", "default": None}),
    (["--timeout"], {"type": float, "default": None}),
    (["--bg"], {"action": "store_true"}),
    (["--out"], {"default": None}),
    (["--quiet"], {"action": "store_true"}),
)


class Stream:
    """Output of ranks as it arrives: held back for a second, then shown line by line, equal lines of several ranks as one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: list[tuple[int, str]] = []
        self._rest: dict[tuple[int, str], str] = {}
        self.has_begun = False

    def take(self, rank: int, name: str, text: str) -> None:
        """Keep whole lines; called from the conductor's thread, which must never print."""
        with self._lock:
            *lines, rest = (self._rest.get((rank, name), "") + text).split("\n")
            self._rest[rank, name] = rest
            self._lines += [(rank, line.rpartition("\r")[2]) for line in lines]

    def show(self, *, is_last: bool = False) -> None:
        """Print what has come, from the cell's own thread."""
        with self._lock:
            lines, self._lines = self._lines, []
            if is_last:
                lines += [(rank, text) for (rank, _), text in self._rest.items() if text]
                self._rest = {}
        self.has_begun = self.has_begun or bool(lines)
        for ranks, line in _fold(lines):
            print(f"[{name_ranks(ranks)}] {line}")


def _fold(lines: Sequence[tuple[int, str]]) -> list[tuple[tuple[int, ...], str]]:
    """Equal lines of different ranks as one, in the order in which they first came; a rank's own repeated lines stay."""
    folded: list[tuple[list[int], str]] = []
    for rank, line in lines:
        for ranks, text in folded:
            if text == line and rank not in ranks:
                ranks.append(rank)
                break
        else:
            folded.append(([rank], line))
    return [(tuple(sorted(ranks)), line) for ranks, line in folded]


@magics_class
class RankMagics(Magics):  # type: ignore[misc]  # IPython has no types
    """The magics; one instance a shell."""

    @line_magic  # type: ignore[untyped-decorator]
    def launch(self, line: str) -> None:
        """%launch N [--layout tp=2,pp=2] [--seed S]: start N gloo ranks and bind `cluster`."""
        arguments = _LAUNCH.parse_args(shlex.split(line))
        layout = _layout(arguments.layout, arguments.world_size) if arguments.layout else None
        old = self.shell.user_ns.get("cluster")
        if isinstance(old, Cluster) and not old.is_closed:
            old.close()
            print(f"replaced cluster: its {old.world_size} ranks were ended")
        cluster = launch(arguments.world_size, seed=arguments.seed)
        if layout is not None:
            cluster.use(layout)
        self.shell.user_ns["cluster"] = cluster
        print(f"cluster: {cluster.world_size} ranks are ready" + (f", layout {arguments.layout}" if layout is not None else ""))

    @line_cell_magic  # type: ignore[untyped-decorator]
    def ranks(self, line: str, cell: str | None = None) -> Any:
        """%%ranks [selector] [--timeout S] [--bg] [--out NAME] [--quiet]: run the cell on ranks; %ranks VERB: ask or steer them."""
        if cell is None:
            return self._steer(shlex.split(line))
        arguments = _CELL.parse_args(shlex.split(line))
        cluster = self._cluster()
        if arguments.bg:
            handle = cluster.execute(cell, arguments.selector, timeout_s=arguments.timeout, block=False)
            self.shell.user_ns[arguments.out or "cell"] = handle
            print(f"{handle!r}; its handle is `{arguments.out or 'cell'}`: .result(), .done(), .cancel()")
            return None
        stream = Stream()
        handle = cluster.execute(cell, arguments.selector, timeout_s=arguments.timeout, block=False, on_output=stream.take)
        result = self._watch(cluster, handle, stream, is_quiet=arguments.quiet)
        if arguments.out:
            self.shell.user_ns[arguments.out] = result
        return None

    def _watch(self, cluster: Cluster, handle: CellHandle, stream: Stream, *, is_quiet: bool) -> CellResult:
        started = time.monotonic()
        try:
            while not handle.wait(_FOLD_S if stream.has_begun else 0.02):
                if not is_quiet and time.monotonic() - started > _STREAM_AFTER_S:
                    stream.show()
        except KeyboardInterrupt:
            cluster.interrupt()
            handle.wait(15.0)
            stream.show(is_last=True)
            found = cluster.last_diagnosis
            print(f"interrupted; names are kept\n{found.text if found else ''}")
            raise
        try:
            result: CellResult = handle.result()
        except WorkbenchError:
            stream.show(is_last=True)
            raise
        if not is_quiet:
            self._finish(result, stream)
        return result

    def _finish(self, result: CellResult, stream: Stream) -> None:
        if not stream.has_begun:
            if text := str(result):
                print(text)
            return
        stream.show(is_last=True)
        for ranks, text in _fold([(rank, output.result_text) for rank, output in result.items() if output.result_text]):
            print(f"[{name_ranks(ranks)}] {text}")

    def _steer(self, words: list[str]) -> Any:
        verb = words[0] if words else "status"
        if verb not in _VERBS:
            raise UsageError(f"%ranks {verb}: the verb must be one of {', '.join(_VERBS)}; a cell for the ranks begins with %%ranks")
        if verb == "close" and not isinstance(self.shell.user_ns.get("cluster"), Cluster):
            return None
        cluster = self._cluster()
        calls: dict[str, Callable[[], Any]] = {
            "status": lambda: display(cluster),
            "diagnose": lambda: print(cluster.diagnose()),
            "interrupt": cluster.interrupt,
            "restart": cluster.restart,
            "respawn": lambda: cluster.respawn(_rank_of(words)),
            "ledger": cluster.ledger,
            "close": cluster.close,
        }
        return calls[verb]()

    def _cluster(self) -> Cluster:
        cluster = self.shell.user_ns.get("cluster")
        if not isinstance(cluster, Cluster):
            raise UsageError("there is no cluster: the variable `cluster` is not bound to one; %launch 4 makes it")
        return cluster


def _rank_of(words: Sequence[str]) -> int:
    if len(words) != 2 or not words[1].isdigit():
        raise UsageError("%ranks respawn needs the number of a dead rank: %ranks respawn 2")
    return int(words[1])


def _layout(text: str, world_size: int) -> Layout:
    """The layout that "tp=2,pp=2" means."""
    degrees: dict[str, int] = {}
    for part in text.split(","):
        axis, _, degree = part.partition("=")
        if not degree.strip().isdigit():
            raise UsageError(f"--layout {text}: {part!r} is no degree; write axis=number, as in tp=2,pp=2")
        degrees[axis.strip()] = int(degree)
    try:
        return Layout(world_size=world_size, **degrees)
    except TypeError as error:
        raise UsageError(f"--layout {text}: {error}; axes are dp, pp, pcp, tp, dcp") from error


def _point_to_ranks(
    shell: InteractiveShell, kind: type[BaseException], error: BaseException, trace: Any, tb_offset: int | None = None
) -> None:
    """Show a NameError of an ordinary cell as usual, and say when the name lives on ranks."""
    shell.showtraceback((kind, error, trace), tb_offset=tb_offset)
    cluster = shell.user_ns.get("cluster")
    name = getattr(error, "name", None)
    if not isinstance(cluster, Cluster) or cluster.is_closed or not name:
        return
    try:
        found = cluster.run(_has_name, name, timeout_s=2.0)
    except WorkbenchError:
        return
    ranks = [rank for rank, has in enumerate(found) if has]
    if ranks:
        print(f"{name} lives on {name_ranks(ranks)}: use a %%ranks cell, or cluster.pull({name!r})")


def _has_name(name: str) -> bool:
    import __main__

    return name in vars(__main__)


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Called by `%load_ext workbench`."""
    shell.register_magics(RankMagics)
    shell.set_custom_exc((NameError,), _point_to_ranks)
