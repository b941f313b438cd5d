"""The driver's end of one rank: its process, its channel, its two output pipes.

Knows one rank. Does not know cells' meaning or other ranks.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from workbench.ranks.board import Board
from workbench.ranks.channel import ChannelReader, ChannelWriter
from workbench.ranks.output import OutputPipe
from workbench.ranks.servers import ForkServer, describe_exit

__all__ = ["Link"]

_ENTRY = "workbench.ranks.rank:main"


class Link:
    """A rank as the driver holds it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.pid = 0
        self.sock, self._theirs = socket.socketpair()
        self.sock.setblocking(False)
        self.writer = ChannelWriter(self.sock)
        self.reader = ChannelReader(self.sock)
        self.out = OutputPipe()
        self.err = OutputPipe()
        self.exit_status: int | None = None
        self.startup_error = ""  # why it could not join the world
        self.is_ready = False
        self.is_open = True

    @property
    def is_dead(self) -> bool:
        return self.exit_status is not None

    def start(
        self, server: ForkServer, config: Any, board: Board, environment: dict[str, str], on_exit: Callable[[Link, int], None]
    ) -> None:
        """Fork the process; its ends of the channel and pipes are then its own."""
        self.pid = server.spawn(
            _ENTRY,
            config,
            fds=[self.out.writing, self.err.writing, self._theirs.fileno(), board.fd],
            environment=environment,
            on_exit=lambda status: on_exit(self, status),
        )
        self._theirs.close()
        self.out.hand_over()
        self.err.hand_over()

    def signal(self, number: signal.Signals) -> None:
        """Signal the process, if it still lives: a pid is ours until its exit was told."""
        if self.pid and not self.is_dead:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return

    def describe_death(self) -> tuple[int, str | None, str]:
        """Exit code, signal name, and how it died in words, with its last output lines."""
        code, name, cause = describe_exit(self.exit_status or 0)
        if self.startup_error:
            lines = self.startup_error.strip().splitlines()
            return code, name, "it could not join the world: " + (lines[-1] if lines[0].startswith("Traceback") else "\n".join(lines))
        said = self.err.last_lines() or self.out.last_lines()
        said = f"\nits last output:\n{said}" if said else "\nit had written nothing"
        return code, name, f"{name or f'exit code {code}'} ({cause}){said}"

    def close(self) -> None:
        """Close our ends; the rank ends by itself when it sees that."""
        self.is_open = False
        self.sock.close()
        self._theirs.close()
        self.out.close()
        self.err.close()
