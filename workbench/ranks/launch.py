"""`launch`: from a number of ranks to a cluster."""

from __future__ import annotations

import ast
import sys
from typing import TYPE_CHECKING, Any

from workbench.errors import LaunchError
from workbench.postponing import interrupts_postponed
from workbench.ranks.forkserver import import_at_once
from workbench.ranks.servers import server_of_ranks

if TYPE_CHECKING:
    from workbench.ranks.cluster import Cluster

__all__ = ["check_options", "launch"]

_MOST_RANKS = 512
_START_METHODS = ("forkserver", "spawn")


def launch(
    world_size: int,
    *,
    seed: int = 0,
    collective_timeout_s: float = 1800,
    check_collectives: bool = True,
    start_method: str = "forkserver",
    record: str | None = None,
) -> Cluster:
    """Start gloo ranks, a process each, the world group made.

    Args:
        seed: rank r seeds random, numpy and torch with seed + r.
        collective_timeout_s: gloo's own limit; a stop and the deadlock rule free ranks long before it.
        check_collectives: collectives wait for all members, interruptibly, and compare what each is about to do. False is for timing;
            the reductions of a DDP model are compared all the same, since C++ waits for them where nothing could stop it.
        start_method: "forkserver" forks from a warm process that has imported torch; "spawn" imports in each rank.
        record: "failures" keeps, when a cell fails, the tape of every rank for `wb.replay`; its folder is in the error and in
            `cluster.last_tape`. The tape goes on from launch, so a replay runs the session's cells again up to the one that failed.
            After 64 MiB a rank, after a cell that was stopped in its own code and after a new generation it begins anew with the names
            as they are then; what cannot be kept (process groups, DDP models, open files) is then not on it, and a replay that needs it
            says so. A rank's tape ends at 256 MiB. What collectives carry is copied to disk, and asynchronous ones are waited for at
            once: not for timing.

    Raises:
        TypeError, ValueError: bad arguments; nothing was started.
        LaunchError: a rank did not come up.
    """
    check_options(world_size, seed, collective_timeout_s, start_method)
    if record not in (None, "failures"):
        raise ValueError(f'record is {record!r}; it must be "failures" or None; cluster.record(dir) records what runs in its block')
    server = server_of_ranks(start_method)  # imports torch while this process imports the rest
    from workbench.ranks.cluster import Cluster
    from workbench.ranks.processes import LaunchOptions, Processes

    import_at_once("torch.distributed")
    _replace_the_old_one()
    options = LaunchOptions(
        world_size=world_size,
        seed=seed,
        collective_timeout_s=float(collective_timeout_s),
        check_collectives=check_collectives,
        start_method=start_method,
        records_failures=record == "failures",
    )
    processes = None
    try:
        with interrupts_postponed():
            processes = Processes(options, server)
        processes.start_all()
        with interrupts_postponed():
            return Cluster(processes)
    except BaseException:
        if processes is not None:
            processes.close()
        raise


def check_options(world_size: Any, seed: Any = 0, collective_timeout_s: Any = 1800, start_method: str = "forkserver") -> None:
    """Refuse what `launch` would refuse, before anything is started or ended."""
    if isinstance(world_size, bool) or not isinstance(world_size, int):
        raise TypeError(f"world_size is {world_size!r} ({type(world_size).__name__}); it must be an int of at least 1")
    if not 1 <= world_size <= _MOST_RANKS:
        raise ValueError(f"world_size is {world_size}; it must be between 1 and {_MOST_RANKS}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed is {seed!r}; it must be an int of at least 0")
    if not collective_timeout_s > 0:
        raise ValueError(f"collective_timeout_s is {collective_timeout_s!r}; it must be above 0")
    if start_method not in _START_METHODS:
        raise ValueError(f"start_method is {start_method!r}; it must be one of {_START_METHODS}")
    if sys.platform != "linux":
        raise LaunchError(f"ranks run on Linux x86-64 (and WSL2), not on {sys.platform}")


def _replace_the_old_one() -> None:
    """In a notebook, running the launch cell again closes the cluster bound to the name that the cell is about to bind, and says so."""
    from workbench.ranks.cluster import Cluster

    shell_of = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = shell_of() if shell_of else None
    if shell is None:
        return
    for name in _names_bound_by(_current_cell(shell)):
        old = shell.user_ns.get(name)
        if isinstance(old, Cluster) and not old.is_closed:
            old.close()
            print(f"replaced {name}: its {old.world_size} ranks were ended")


def _current_cell(shell: Any) -> str:
    parent: Any = getattr(shell, "get_parent", dict)() or {}
    code = parent.get("content", {}).get("code") if isinstance(parent, dict) else None
    return str(code or "")


def _names_bound_by(source: str) -> set[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.optional_vars] if isinstance(node, ast.withitem) else []
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names
