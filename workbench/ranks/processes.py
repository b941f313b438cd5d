"""The processes of one cluster: how its ranks are started, where they meet, how they end.

Knows the fork server, the rendezvous store and the environment of ranks. Does not know cells.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import shutil
import signal
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from workbench.cores import num_usable_cores
from workbench.errors import LaunchError
from workbench.postponing import interrupts_postponed
from workbench.ranks.board import Board
from workbench.ranks.conductor import Conductor
from workbench.ranks.doctor import write_owner
from workbench.ranks.forkserver import FOLDER_VARIABLE, import_at_once
from workbench.ranks.link import Link
from workbench.ranks.observer import Observed
from workbench.ranks.servers import ForkServer, describe_exit

__all__ = ["LaunchOptions", "Processes"]

_START_LIMIT_S = 120.0
_CLOSE_LIMIT_S = 5.0
KEY_VARIABLE = "WORKBENCH_KEY"  # as `wire` names it, which brings torch
_BACKLOG = 4096
_DESCRIPTORS_PER_RANK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """How ranks are started.

    Attributes:
        collective_timeout_s: gloo's own last resort; stops and the deadlock rule act long before it.
        check_collectives: compare what members are about to do before each collective.
        start_method: "forkserver" (warm, 0.1 s) or "spawn" (each rank imports for itself).
        records_failures: each rank keeps a tape, of which the cell that failed is taken.
    """

    world_size: int
    seed: int
    collective_timeout_s: float
    check_collectives: bool
    start_method: str
    records_failures: bool = False


class Processes:
    """Ranks, store, board and conductor of one cluster.

    Args:
        server: forks the ranks; it may still import, which goes on while the store is made.
    """

    def __init__(self, options: LaunchOptions, server: ForkServer) -> None:
        self.options = options
        self.began_s = time.monotonic()
        self.world_size = options.world_size
        self.marks: list[tuple[float, str]] = []
        self.observed: list[Observed] = []  # engines of this cluster, for live views
        self.folder = Path(tempfile.mkdtemp(prefix="workbench-"))  # mkdtemp makes it 0700
        write_owner(self.folder, [])  # at once: from here on it is known to be ours
        self.tape_folder = self.folder / "tapes"
        if options.records_failures:
            self.tape_folder.mkdir(mode=0o700)
        self.owner_pid = os.getpid()
        self._key = secrets.token_hex(32)
        self._is_closed = False
        _allow_descriptors(options.world_size * _DESCRIPTORS_PER_RANK + 256)
        self._server = server
        write_owner(self.folder, [self._server.pid])
        self.store_port, self._store = _start_store()
        self.board = Board.create(options.world_size)
        self.links = [Link(rank) for rank in range(options.world_size)]
        self.conductor = Conductor(self.links, self.board, self.start, lambda label, at_s: self.marks.append((at_s, label)))

    def start_all(self) -> None:
        """Start every rank and wait until the world stands.

        Raises:
            LaunchError: a rank died or could not join; its own words are in the text.
        """
        for rank in range(self.world_size):
            self._launch(self.links[rank], 0)
        limit = time.monotonic() + _START_LIMIT_S
        with self.conductor.changed:
            while not self.are_ready():
                self.raise_startup_error()
                if time.monotonic() > limit:
                    late = [link.rank for link in self.links if not link.is_ready]
                    raise LaunchError(
                        f"ranks {late} of {self.world_size} did not join the world within {_START_LIMIT_S:.0f} s\nlaunch fewer ranks"
                    )
                self.conductor.changed.wait(0.05)
        self.raise_startup_error()

    def start(self, rank: int, generation: int) -> None:
        """Start a fresh process in a dead rank's place."""
        link = Link(rank)
        self.conductor.replace(rank, self.links[rank], link)
        self.links[rank] = link
        try:
            self._launch(link, generation)
        except BaseException as error:  # it will never come: its peers must not wait for it
            link.exit_status, link.startup_error = signal.SIGKILL, f"{type(error).__name__}: {error}"
            self.conductor.exited(link, link.exit_status)
            raise

    def are_ready(self) -> bool:
        return all(link.is_ready for link in self.links)

    def raise_startup_error(self) -> None:
        for link in self.links:
            if link.startup_error:
                raise LaunchError(f"rank {link.rank} of {self.world_size} could not join the world:\n{link.startup_error}")
        for link in self.links:
            if link.is_dead and not link.is_ready:
                code, name, cause = describe_exit(link.exit_status or 0)
                raise LaunchError(
                    f"rank {link.rank} of {self.world_size} died while it started: {name or f'exit code {code}'} ({cause})\n"
                    f"it said:\n{link.err.last_lines(20)}\nlaunch fewer ranks, or look at the memory of this machine"
                )

    def _launch(self, link: Link, generation: int) -> None:
        from workbench.ranks.config import RankConfig

        config = RankConfig(
            rank=link.rank,
            world_size=self.world_size,
            seed=self.options.seed,
            store_port=self.store_port,
            store_prefix="workbench",
            generation=generation,
            timeout_s=self.options.collective_timeout_s,
            is_checked=self.options.check_collectives,
            num_threads=max(1, num_usable_cores() // self.world_size),
            layout=self.conductor.layout,
            tape_folder=str(self.tape_folder) if self.options.records_failures else "",
        )
        link.start(self._server, config, self.board, self._environment(link.rank), self.conductor.exited)

    def _environment(self, rank: int) -> dict[str, str]:
        """The driver's environment, and what torch's env:// rendezvous, gloo and its flight recorder read."""
        ours = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_WORLD_SIZE": self.world_size,
            "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.store_port,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": "lo",
            "VLLM_HOST_IP": "127.0.0.1",
            "TORCH_FR_BUFFER_SIZE": os.environ.get("TORCH_FR_BUFFER_SIZE", "2000"),
            FOLDER_VARIABLE: self.folder,
            KEY_VARIABLE: self._key,  # with which our own object operations are signed
        }
        return {**os.environ, **{name: str(value) for name, value in ours.items()}}

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        """End every rank: close its channel, and kill what has not ended by then."""
        if self._is_closed or os.getpid() != self.owner_pid:  # a fork of the driver that ends takes nothing with it
            return
        with interrupts_postponed(_CLOSE_LIMIT_S):
            self._close()

    def _close(self) -> None:
        self._is_closed = True
        self.conductor.abandon()
        for link in self.links:
            link.signal(signal.SIGKILL)  # nothing of a rank is worth waiting for: its state goes with it
        limit = time.monotonic() + _CLOSE_LIMIT_S
        with self.conductor.changed:
            while not all(link.is_dead or not link.pid for link in self.links) and time.monotonic() < limit:
                self.conductor.changed.wait(0.02)
        self.conductor.close()
        self.board.close()
        self._store = None
        shutil.rmtree(self.folder, ignore_errors=True)


def _start_store() -> tuple[int, object]:
    """A TCPStore served by the driver; it listens on loopback only because it is handed a socket that already does."""
    import_at_once("torch.distributed")
    import torch.distributed as dist

    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        listener.bind(("127.0.0.1", 0))
        listener.listen(_BACKLOG)
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.fileno(), use_libuv=False
        )
        listener.detach()
    return port, store


def _allow_descriptors(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise LaunchError(
                f"{needed} open files are needed, this process may have {hard}\nraise the limit (ulimit -n), or launch fewer ranks"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
