"""An interrupt in the middle of a block that must be whole: heard at its end, or after a while."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from workbench.postponing import interrupts_postponed


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


def test_a_long_block_is_cut_after_a_while():
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupts_postponed(0.1):
        interrupt()
        time.sleep(30)
    assert 0.05 < time.monotonic() - started < 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_presses_again_is_not_heard_earlier():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_postponed(60.0):
        for _ in range(3):
            interrupt()
            time.sleep(0.01)
        done.append("whole")
    assert done == ["whole"]
    time.sleep(0.05)  # none is left over


def test_of_blocks_within_blocks_the_outermost_is_whole():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_postponed():
        with interrupts_postponed():
            interrupt()
        done.append("whole")
    assert done == ["whole"]


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
