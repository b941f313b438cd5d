"""An interrupt in the middle of a step: heard at its end, after a while, or when it comes again."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from workbench.rollout.postponing import interrupts_postponed


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_it_is_heard_at_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_postponed():
        interrupt()
        time.sleep(0.01)
        done.append("whole")
    assert done == ["whole"]
    with interrupts_postponed():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("limit_s", "again_s"), [(0.1, None), (60.0, 0.1)])
def test_a_long_block_is_cut_after_a_while_or_when_it_comes_again(limit_s: float, again_s: float | None):
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupts_postponed(limit_s):
        interrupt()
        if again_s is not None:
            threading.Timer(again_s, interrupt).start()
        time.sleep(30)
    assert 0.05 < time.monotonic() - started < 5


def test_an_error_of_the_block_is_kept_beside_it():
    with pytest.raises(KeyboardInterrupt) as caught, interrupts_postponed():
        interrupt()
        raise ValueError("the step's own")
    assert isinstance(caught.value.__context__, ValueError)


def test_other_threads_are_left_alone():
    def body() -> None:
        with interrupts_postponed():
            handlers.append(signal.getsignal(signal.SIGINT))

    handlers: list[object] = []
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
