"""`%load_ext workbench`: cells on ranks, in any IPython: JupyterLab, Notebook, VS Code, nbclient, papermill, a terminal.

    %launch 4 [--layout tp=2,pp=2] [--seed S] [--record failures]      binds `cluster`
    %%ranks [selector] [--timeout S] [--bg] [--out NAME] [--quiet]
    %ranks status | diagnose | interrupt | restart | respawn K | ledger | close

They use the variable `cluster`, however it was made. Knows IPython and the public names of a cluster. Does not know processes.
"""

from __future__ import annotations

import functools
import os
import shlex
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from typing import Any, NoReturn, TypeVar, cast

from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class
from IPython.display import display

from workbench.completion import RankNames, split_question
from workbench.errors import LayoutError, WorkbenchError, page_text
from workbench.home import home
from workbench.plan.layout import Layout
from workbench.plan.selector import name_ranks
from workbench.ranks.cluster import Cluster
from workbench.ranks.handle import CellHandle, CellResult
from workbench.ranks.launch import check_options, launch
from workbench.ranks.messages import Inquiry
from workbench.ranks.progress import is_notebook
from workbench.ranks.stream import Stream, output_file
from workbench.ranks.surface import TICK_S, Panel, Surface, surface_here
from workbench.records import RankStatus

__all__ = ["RankMagics", "load_ipython_extension", "unload_ipython_extension"]

_VERBS = {
    "status": "a table of the ranks",
    "diagnose": "who waits for whom, now",
    "interrupt": "stop a cell that runs in the background",
    "restart": "fresh ranks in place of all",
    "respawn": "bring a dead rank back: respawn 2",
    "ledger": "a row a collective and rank",
    "close": "end the ranks",
}
_STOP_LIMIT_S = 15.0
_DEGREES = ("dp", "pp", "pcp", "tp", "dcp")

Method = TypeVar("Method", bound=Callable[..., Any])


class BadLine(UsageError, ValueError):  # type: ignore[misc]  # IPython has no types
    """What the line of a magic asks cannot be."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the text alone, as for its own usage errors."""
        return [f"UsageError: {self}"]


class _Parser(ArgumentParser):
    """Arguments of a magic; a mistake is IPython's UsageError, not the end of the kernel."""

    def error(self, message: str) -> NoReturn:
        raise BadLine(f"{message}\n{self.format_usage().strip()}")


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
    (["--record"], {"choices": ["failures"], "default": None}),
)
_CELL = _parser(
    "%%ranks",
    (["selector"], {"nargs": "*"}),
    (["--timeout"], {"type": float, "default": None}),
    (["--bg"], {"action": "store_true"}),
    (["--out"], {"default": None}),
    (["--quiet"], {"action": "store_true"}),
)


def _without_stack(method: Method) -> Method:
    """Have IPython show the text of our own errors alone: the stack above them is the workbench's, and no help to anybody."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except (WorkbenchError, KeyboardInterrupt) as error:
            text = page_text(error)
            if not hasattr(error, "_render_traceback_"):
                setattr(error, "_render_traceback_", lambda: [text])  # noqa: B010  no attribute of exceptions: IPython's own protocol
            raise

    return cast(Method, call)


@magics_class
class RankMagics(Magics):  # type: ignore[misc]  # IPython has no types
    """The magics; one instance a shell."""

    @line_magic  # type: ignore[untyped-decorator]  # as above
    @_without_stack
    def launch(self, line: str) -> None:
        """Start N gloo ranks, a process each, and bind them to the variable `cluster`.

        %launch N [--layout tp=2,pp=2] [--seed S] [--record failures]

        --layout   axes and degrees: the groups are formed, and selectors such as tp=0 work
        --seed     rank r seeds random, numpy and torch with S + r (default 0)
        --record   failures: keep the tape of a cell that fails, for wb.replay

        A cluster that is bound already is closed first. Afterwards: %%ranks runs a cell on the ranks, %ranks asks and steers them.
        """
        arguments = _LAUNCH.parse_args(_words(line))
        try:
            check_options(arguments.world_size, arguments.seed)
        except ValueError as error:
            raise BadLine(str(error)) from None
        layout = _layout(arguments.layout, arguments.world_size) if arguments.layout else None
        old = self.shell.user_ns.get("cluster")
        if isinstance(old, Cluster) and not old.is_closed:
            old.close()
            print(f"replaced cluster: its {old.world_size} ranks were ended")
        cluster = launch(arguments.world_size, seed=arguments.seed, record=arguments.record)
        if layout is not None:
            cluster.use(layout)
        self.shell.user_ns["cluster"] = cluster
        print(f"cluster: {_count(cluster.world_size)} ready" + (f", layout {arguments.layout}" if layout is not None else ""))

    @line_cell_magic  # type: ignore[untyped-decorator]  # as above
    @_without_stack
    def ranks(self, line: str, cell: str | None = None) -> Any:
        """Run a cell on ranks, or ask and steer them; both use the variable `cluster`, however it was made.

        %%ranks [selector] [--timeout S] [--bg] [--out NAME] [--quiet]
            selector    0,2-3 or tp=0 or dp=1,pp=0 (axes of the layout in use); all ranks where it is left out
            --timeout   end the cell after S seconds and say who waits for whom
            --bg        go on at once; the cell's handle is NAME (or `cell`): .result(), .done(), .cancel()
            --out       keep what the ranks gave: NAME[rank].stdout, .result_text, ...
            --quiet     show nothing

        %ranks status | diagnose | interrupt | restart | respawn K | ledger | close

        A cell sees rank, world_size, group, groups, torch, dist, wb and whatever earlier cells left on its rank. Its last expression is
        shown per rank, equal ones once. `name?` as a cell's last line tells what a name is on the ranks.
        """
        if cell is None:
            return self._steer(_words(line))
        arguments = _CELL.parse_args(_words(line))
        selector = " ".join(arguments.selector) or None  # "0, 2" and "dp=1, pp=0" are written with a space too
        cluster = _cluster_of(self.shell)
        cell, asked, detail_level = split_question(cell)
        if asked:
            return self._run_and_describe(line, cell, asked, detail_level)
        stream = Stream(lambda: output_file(home() / "output", _file_name(handle)))
        try:
            handle = cluster.execute(cell, selector, timeout_s=arguments.timeout, block=False, on_output=stream.take)
        except SyntaxError as error:
            error.is_of_cell = True  # type: ignore[attr-defined]  # see _show_error
            raise
        except ValueError as error:
            raise BadLine(str(error)) from None
        if arguments.bg:
            self._leave(handle, stream, name=arguments.out or "cell", is_quiet=arguments.quiet)
            return None
        result = _watch(cluster, handle, stream, None if arguments.quiet else surface_here())
        if arguments.out:
            self.shell.user_ns[arguments.out] = result
        return None

    def _run_and_describe(self, line: str, cell: str, name: str, detail_level: int) -> None:
        """A cell whose last line is `name?`."""
        if cell.strip():
            self.ranks(line, cell)
        found = RankNames(self.shell, ()).describe(name, detail_level)
        if found is None:
            raise BadLine(
                f"{name}? : no rank knows {name}\nan earlier %%ranks cell must bind it; cluster.push binds values of the notebook"
            )
        text, page = found
        display({"text/html": page, "text/plain": text}, raw=True)

    def _leave(self, handle: CellHandle, stream: Stream, *, name: str, is_quiet: bool) -> None:
        """Let a cell run beside the notebook; its panel goes on, a terminal stays free for what is typed next."""
        self.shell.user_ns[name] = handle
        if is_quiet or not is_notebook():
            print(f"{handle!r}; its handle is `{name}`: .result(), .done(), .cancel()")
            return
        panel = Panel()
        panel.update(stream, f"{handle.status}; its handle is `{name}`: .result(), .done(), .cancel()")
        threading.Thread(target=_follow, args=(handle, stream, panel, copy_context()), name="workbench-follow", daemon=True).start()

    def _steer(self, words: list[str]) -> Any:
        verb = words[0] if words else "status"
        if verb not in _VERBS:
            raise BadLine(f"%ranks {verb}: the verb must be one of {', '.join(_VERBS)}; a cell for the ranks begins with %%ranks")
        if verb == "close" and not isinstance(self.shell.user_ns.get("cluster"), Cluster):
            return None
        cluster = _cluster_of(self.shell)
        calls: dict[str, Callable[[], Any]] = {
            "status": lambda: _show_status(cluster),
            "diagnose": lambda: _show(found := cluster.diagnose(), str(found)),
            "interrupt": lambda: _interrupt(cluster),
            "restart": lambda: _restart(cluster),
            "respawn": lambda: _respawn(cluster, words),
            "ledger": cluster.ledger,
            "close": lambda: _close(cluster),
        }
        return calls[verb]()


def _cluster_of(shell: InteractiveShell) -> Cluster:
    """The cluster bound to `cluster`.

    Raises:
        BadLine: there is none.
    """
    cluster = shell.user_ns.get("cluster")
    if isinstance(cluster, Cluster):
        return cluster
    has = f"it is a {type(cluster).__name__}" if cluster is not None else "it is not bound"
    raise BadLine(f"there is no cluster: the variable `cluster` is needed, and {has}\n%launch 4 makes one")


def _file_name(handle: CellHandle) -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-cell-{handle.number}"


# -- a cell while it runs ------------------------------------------------------------------------------------------------------------------


def _watch(cluster: Cluster, handle: CellHandle, stream: Stream, surface: Surface | None) -> CellResult:
    """Show a cell until it ends; an interrupt stops it on the ranks first."""
    try:
        _show_until_done(handle, stream, surface)
    except KeyboardInterrupt:
        took_s = _stop(handle)
        _finish(handle, stream, surface)
        found = cluster.last_diagnosis
        told = f"{handle.name} was stopped; ranks free after {took_s:.1f} s, names kept"
        raise KeyboardInterrupt(f"{told}\n{found.text if found is not None else ''}".rstrip()) from None
    _finish(handle, stream, surface)
    result: CellResult = handle.result()
    return result


def _stop(handle: CellHandle) -> float:
    """Stop a cell, and wait for its end; a second interrupt has stuck ranks killed. Returns seconds."""
    started = time.monotonic()
    handle.cancel()
    while time.monotonic() - started < _STOP_LIMIT_S:
        try:
            if handle.wait(0.05):
                break
        except KeyboardInterrupt:
            handle.cancel()
    return time.monotonic() - started


def _show_until_done(handle: CellHandle, stream: Stream, surface: Surface | None) -> None:
    started = time.monotonic()
    while not handle.wait(TICK_S if time.monotonic() - started > TICK_S else 0.02):
        if surface is not None and time.monotonic() - started > surface.patience_s:
            surface.update(stream, handle.status)


def _finish(handle: CellHandle, stream: Stream, surface: Surface | None) -> None:
    if surface is not None:
        surface.finish(stream, handle.outputs())
    stream.close()


def _follow(handle: CellHandle, stream: Stream, panel: Panel, as_cell: Context) -> None:
    """Move the panel of a cell in the background; what went wrong stands in it, for nobody waits for the cell.

    Every message names the request it belongs to. VS Code takes a page only from requests that ran a cell, so a completion asked for in
    the meantime must not be it: pages go out in the context of their cell. nbclient takes a page from the cell that runs now alone, so the
    last one goes out once more as such.
    """
    while not handle.wait(TICK_S):
        as_cell.run(panel.update, stream, handle.status)
    outputs = handle.outputs()
    try:
        handle.result()
    except WorkbenchError as error:
        panel.foot = page_text(error)
    as_cell.run(panel.finish, stream, outputs)
    panel.repeat()


# -- verbs ---------------------------------------------------------------------------------------------------------------------------------


def _show_status(cluster: Cluster) -> None:
    table = "\n".join(_row(one) for one in ([] if cluster.is_closed else cluster.status()))
    _show(cluster, f"{cluster!r}\n{table}".rstrip())


def _show(value: Any, text: str) -> None:
    display({"text/html": value._repr_html_(), "text/plain": text}, raw=True)


def _row(one: RankStatus) -> str:
    cell = f", cell {one.cell}" if one.cell is not None else ""
    waits = f", waits in {one.waits_in}" if one.waits_in else ""
    return f"rank {one.rank}: {one.state}, pid {one.pid}, {one.rss_bytes / 2**20:.0f} MiB{cell}{waits}"


def _interrupt(cluster: Cluster) -> None:
    was_running = any(one.cell is not None for one in cluster.status())
    cluster.interrupt()
    print("the cell was told to stop; its handle's result() says how it ended" if was_running else "no cell runs; nothing to interrupt")


def _restart(cluster: Cluster) -> None:
    cluster.restart()
    print(f"cluster: {_count(cluster.world_size)} ready, fresh; what they held is gone")


def _respawn(cluster: Cluster, words: Sequence[str]) -> None:
    if len(words) != 2 or not words[1].isdigit():
        raise BadLine("%ranks respawn needs the number of a dead rank: %ranks respawn 2")
    try:
        cluster.respawn(int(words[1]))
    except ValueError as error:
        raise BadLine(str(error)) from None
    print(f"rank {words[1]} is back, empty; the others keep their names")


def _close(cluster: Cluster) -> None:
    was_closed = cluster.is_closed
    cluster.close()
    print("cluster: was closed already" if was_closed else f"cluster: closed, {cluster.world_size} ranks ended")


def _count(world_size: int) -> str:
    return "1 rank is" if world_size == 1 else f"{world_size} ranks are"


# -- lines ---------------------------------------------------------------------------------------------------------------------------------


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise BadLine(f"{line!r} cannot be read: {error}") from None


def _layout(text: str, world_size: int) -> Layout:
    """The layout that "tp=2,pp=2" means."""
    degrees: dict[str, int] = {}
    for part in text.split(","):
        axis, _, degree = part.partition("=")
        if axis.strip() not in _DEGREES:
            raise BadLine(f"--layout {text}: {axis.strip()!r} is no axis; axes are {', '.join(_DEGREES)}")
        if not degree.strip().isdigit():
            raise BadLine(f"--layout {text}: {part!r} is no degree; write axis=number, as in tp=2,pp=2")
        degrees[axis.strip()] = int(degree)
    try:
        return Layout(world_size=world_size, **degrees)
    except LayoutError as error:
        raise BadLine(f"--layout {text}: {error}") from None


def _show_error(shell: InteractiveShell, kind: type[BaseException], error: BaseException, trace: Any, tb_offset: int | None = None) -> None:
    """Show a SyntaxError of a cell for ranks without our stack; a NameError as usual, and say when the name lives on ranks."""
    if getattr(error, "is_of_cell", False):
        shell.showsyntaxerror()
        return
    shell.showtraceback((kind, error, trace), tb_offset=tb_offset, running_compiled_code=True)
    if isinstance(error, NameError):
        _point_to_ranks(shell, error)


def _point_to_ranks(shell: InteractiveShell, error: NameError) -> None:
    cluster = shell.user_ns.get("cluster")
    name = getattr(error, "name", None)
    if not isinstance(cluster, Cluster) or cluster.is_closed or not name:
        return
    ranks = [rank for rank, lines in cluster.ask(Inquiry.HAS, name).items() if lines]
    if ranks:
        print(f"{name} lives on {name_ranks(ranks)}: use a %%ranks cell, or cluster.pull({name!r})")


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Called by `%load_ext workbench`."""
    unload_ipython_extension(shell)
    shell.register_magics(RankMagics)
    shell.set_custom_exc((NameError, SyntaxError), _show_error)
    shell.workbench_names = RankNames(shell, tuple(_VERBS))
    shell.workbench_names.install()


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Called by `%unload_ext workbench`: the hooks are taken back; magics stay, as IPython's own extensions leave theirs."""
    names = getattr(shell, "workbench_names", None)
    if names is not None:
        names.remove()
        shell.workbench_names = None
        shell.set_custom_exc((), None)
