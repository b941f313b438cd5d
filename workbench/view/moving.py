"""What moving widgets share: a thread that sends what is new from the kernel to the page, and the picture that stays.

    thread --(look, 5 Hz)--> news --(custom message)--> page            also while a cell blocks the main thread
    page opened again        <--- scene: everything so far, made when it is asked for

Nothing here waits for the page: what it sends reaches a kernel only between cells. ipykernel's sockets may be written to from any thread
(each write is handed to its one sending thread); traits are left alone by the thread, since the page may set them at the same time.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import traitlets
from anywidget import AnyWidget
from IPython.display import display, update_display

from workbench.view.style import static_face

__all__ = ["MovingWidget", "read_scripts"]

INTERVAL_S = 0.2
_REST_S = 1.0  # between two looks when no page shows it
_BLOCKED_AFTER_S = 0.4  # a main thread that has not answered for so long is in a cell


def read_scripts(*names: str) -> str:
    """Files beside this one as one ES module: what they share comes first, and the last one exports."""
    return "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names)


class MovingWidget(AnyWidget):  # type: ignore[misc]  # anywidget has no types here
    """A subclass gives `news`, `everything`, `picture` and, if its page asks for things, `asked`.

    Attributes:
        scene: everything that a page needs to begin with.
        num_seen: views that can be seen now, told by the page; -1 while it has told nothing.
    """

    scene = traitlets.Dict().tag(sync=True, to_json=lambda _, widget: widget.everything())
    num_seen = traitlets.Int(-1).tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._display_id = ""
        self._is_ending = False  # what is sent now is the last
        self._is_over = False
        self._main = _Pulse()
        super().__init__(**traits)
        self.on_msg(self._on_message)
        self.observe(lambda _: self.start(), "num_seen")

    # -- what a subclass gives ----------------------------------------------------------------------------------------------------------

    def news(self) -> dict[str, Any] | None:
        """What has changed since the last call, None when nothing has; called by one thread at a time."""
        raise NotImplementedError

    def everything(self) -> dict[str, Any]:
        """What a page needs to begin with, from any thread."""
        raise NotImplementedError

    def picture(self) -> tuple[bytes, str]:
        """The static face: a PNG of how it looks now, and the same in words."""
        raise NotImplementedError

    def asked(self, content: dict[str, Any]) -> None:
        """Something was pressed on the page."""

    # -- moving -------------------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to move; showing it does that. Again, or after `close`: nothing happens."""
        if self._thread is None and not self._is_over:
            self._main = _Pulse.here()
            self._thread = threading.Thread(target=self._move, name="workbench-view", daemon=True)
            self._thread.start()

    def _move(self) -> None:
        while not self._stopping.wait(_REST_S if self.num_seen == 0 else INTERVAL_S):
            if not self.step():
                return
            if self._is_ending:
                return self.close()

    def step(self) -> bool:
        """Send what is new now; whether there may be more."""
        with self._lock:
            if self._is_over:
                return False
            try:
                news = self.news()
            except Exception as error:  # shown nowhere else: it would end the thread in silence
                self.send({"news": {"told": f"this view stopped: {type(error).__name__}: {error}", "is_closed": True}})
                self._is_over = True
                return False
            if news is not None:
                self.send({"news": news})
            return True

    @property
    def can_act(self) -> bool:
        """Whether the main thread takes what the page sends: between cells and beside awaiting ones."""
        return self._main.is_free()

    def _on_message(self, _widget: Any, content: Any, _buffers: Any) -> None:
        if isinstance(content, dict):
            self.asked(content)

    def close(self) -> None:
        """Stop moving and leave the last picture; may be called twice."""
        with self._lock:
            if self._is_over:
                return
            self._is_ending = True
            self.step()
            self._is_over = True
        self._stopping.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)
        self._leave_picture()

    def __del__(self) -> None:
        """At the interpreter's end there is no picture to leave."""

    # -- showing ------------------------------------------------------------------------------------------------------------------------

    def show(self, *, with_picture: bool = True) -> None:
        """Display it here and begin to move; the picture takes some 0.2 s, and can be left to the end."""
        self.start()
        self._display_id = self._display_id or f"workbench-{uuid.uuid4().hex}"
        data, metadata = self._repr_mimebundle_() if with_picture else self._widget_bundle()
        display(data, metadata=metadata, raw=True, display_id=self._display_id)

    def _ipython_display_(self) -> None:
        self.show()

    def _leave_picture(self) -> None:
        """The picture in place of the widget: pages made of a saved notebook would look for the widget first, and find nothing."""
        if self._display_id:
            data, metadata = static_face(*self.picture())
            update_display(data, metadata=metadata, raw=True, display_id=self._display_id)

    def _widget_bundle(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        bundle = super()._repr_mimebundle_(**options)
        return bundle if isinstance(bundle, tuple) else (bundle or {}, {})

    def _repr_mimebundle_(self, **options: Any) -> Any:
        data, metadata = self._widget_bundle(**options)
        face, sizes = static_face(*self.picture())
        return data | face, metadata | sizes


class _Pulse:
    """Feels whether an event loop turns: asks it for a sign, and looks whether one came."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop
        self._asked_s = 0.0  # of the question that is open, 0.0 when none is

    @classmethod
    def here(cls) -> _Pulse:
        """Of the loop that this thread runs in; without one it is never free."""
        try:
            return cls(asyncio.get_running_loop())
        except RuntimeError:
            return cls()

    def is_free(self) -> bool:
        if self._loop is None or self._loop.is_closed():
            return False
        asked_s = self._asked_s
        if not asked_s:
            self._asked_s = time.monotonic()
            self._loop.call_soon_threadsafe(self._answer)
            return True
        return time.monotonic() - asked_s < _BLOCKED_AFTER_S

    def _answer(self) -> None:
        self._asked_s = 0.0
