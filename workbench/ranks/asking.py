"""Questions about the names of ranks, asked by the driver beside whatever cell runs.

Knows tickets and answers. Does not know how messages travel, nor what a name is.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence

from workbench.ranks.messages import Answer, Inquiry, Question

__all__ = ["Asker"]


class Asker:
    """Sends questions and waits a little for the answers; any thread may ask."""

    def __init__(self, send: Callable[[int, Question], None]) -> None:
        """`send` hands a question to a rank, as (rank, question), without waiting."""
        self._send = send
        self._tickets = itertools.count()
        self._answers: dict[int, dict[int, tuple[str, ...]]] = {}
        self._came = threading.Condition()

    def ask(self, inquiry: Inquiry, text: str, ranks: Sequence[int], *, limit_s: float) -> dict[int, tuple[str, ...]]:
        """rank -> its lines; ranks that did not answer in time are left out: dead, or in native code that lets no thread run."""
        ticket = next(self._tickets)
        with self._came:
            answers = self._answers[ticket] = {}
        for rank in ranks:
            self._send(rank, Question(ticket=ticket, inquiry=inquiry, text=text))
        with self._came:
            self._came.wait_for(lambda: len(answers) == len(ranks), timeout=limit_s)
            return dict(sorted(self._answers.pop(ticket).items()))

    def take(self, rank: int, answer: Answer) -> None:
        """An answer has come; one that is too late is dropped."""
        with self._came:
            if answer.ticket in self._answers:
                self._answers[answer.ticket][rank] = answer.lines
                self._came.notify_all()
