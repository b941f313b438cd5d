"""For every test: nothing is fetched, nothing is kept in the user's folders, and nothing of it is left afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import leaks
import pytest

os.environ.update(HF_HUB_OFFLINE="1", MPLBACKEND="Agg", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
FOLDER = leaks.own_temporary_folder()  # before any test module is imported: children get it by TMPDIR
os.environ["WORKBENCH_HOME"] = os.path.join(FOLDER, "home")
os.mkdir(os.environ["WORKBENCH_HOME"])
leaks.adopt_orphans()


# a shell's background job (`make test &`) inherits an ignored SIGINT, and so would every program that a test starts and interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Fail a test that leaves processes, shared memory or temporary files; a fork server may stay."""
    before = leaks.Belongings.now()
    yield
    leaks.close_figures()
    left = leaks.left_since(before)
    assert not left, "left behind: " + "; ".join(left)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_at_the_end() -> Iterator[None]:
    """The same over the whole session, for what lives longer than one test."""
    before = leaks.Belongings.now()
    yield
    left = leaks.left_since(before)
    assert not left, "left behind by the session: " + "; ".join(left)
