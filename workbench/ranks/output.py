"""What a rank writes: Python's and native output alike, read from its descriptors 1 and 2 and kept for the cell in which it was written.

A rank flushes before it says that its cell is done, so what is in the pipe at that moment belongs to the cell. Knows pipes. Does not know
ranks."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable

__all__ = ["OutputPipe"]

_PIECE = 1 << 16
_CRASH_FRAMES = 6


class OutputPipe:
    """One stream of one rank; the driver holds the reading end, so a rank that is stuck is still heard."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.reading, False)
        self._pieces: list[bytes] = []
        self.tail = b""
        self._num_heard = 0  # pieces that a listener has got; those that came while nobody listened go to the next one
        self._streamed = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def hand_over(self) -> None:
        """Close our copy of the writing end, once the rank has its own."""
        if self.writing >= 0:
            os.close(self.writing)
            self.writing = -1

    def drain(self, on_text: Callable[[str], None] | None = None) -> bool:
        """Read all that is there, and show it as text, never half a character; False at end of file."""
        self._tell(on_text)
        while True:
            try:
                piece = os.read(self.reading, _PIECE)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not piece:
                return False
            self._pieces.append(piece)
            self.tail = (self.tail + piece)[-16384:]
            self._tell(on_text)

    def _tell(self, on_text: Callable[[str], None] | None) -> None:
        if on_text is None:
            return
        for piece in self._pieces[self._num_heard :]:
            self._num_heard += 1
            if text := self._streamed.decode(piece):
                on_text(text)

    def take(self) -> str:
        """The text since the last call."""
        if self._num_heard < len(self._pieces):
            self._streamed.reset()
        data, self._pieces, self._num_heard = b"".join(self._pieces), [], 0
        return data.decode(errors="replace")

    def last_lines(self, count: int = 5) -> str:
        """The end of it; of a crash in native code what came before, its name and the innermost frames of the thread that crashed."""
        lines = self.tail.decode(errors="replace").splitlines()
        fatal = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
        if fatal is None:
            return "\n".join(lines[-count:])
        here = next((i for i, line in enumerate(lines) if i > fatal and line.startswith("Current thread")), fatal)
        return "\n".join([*lines[max(0, fatal - count) : fatal + 1], *lines[here + 1 : here + 1 + _CRASH_FRAMES]])

    def close(self) -> None:
        self.hand_over()
        if self.reading >= 0:
            os.close(self.reading)
            self.reading = -1
