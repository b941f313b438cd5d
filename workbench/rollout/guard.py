"""What starting an engine does to its process (environment, random state, threads, output), kept away from the rest of it.

Knows the process. Does not know engines.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from workbench.ranks.doctor import own_folder

__all__ = ["last_lines", "log_to", "new_folder", "output_to", "process_state_kept"]


def new_folder(kind: str) -> Path:
    """A new 0700 folder for files of an engine; a kill leaves nothing in a cluster's process, and elsewhere what the doctor finds."""
    return own_folder(kind)


@contextmanager
def process_state_kept(environment: Mapping[str, str | None]) -> Iterator[None]:
    """Run with these environment variables (None unsets); afterwards environment, random states and torch's threads are as before.

    vLLM sets a dozen variables, seeds every generator and replaces `torch.set_num_threads` by a function that does nothing.
    """
    variables = dict(os.environ)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    try:
        yield
    finally:
        for name in set(os.environ) - set(variables):
            del os.environ[name]
        os.environ.update(variables)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send what is printed through descriptors 1 and 2 to a file.

    `sys.stdout` and `sys.stderr` stay the same objects: libraries that are imported meanwhile keep them in their log handlers.
    """
    with path.open("a") as file:
        _flush()
        kept = [os.dup(1), os.dup(2)]
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield
        finally:
            _flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # a notebook's stream may be closed
            stream.flush()


def log_to(name: str, path: Path) -> logging.Handler:
    """Send a library's log to a file and no longer to the screen; remove the handler to end it."""
    logger = logging.getLogger(name)
    for handler in list(logger.handlers):
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            logger.removeHandler(handler)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # without any handler Python prints warnings to stderr
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    return handler


def last_lines(path: Path, count: int = 8) -> str:
    """The end of a log, "" when there is none."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-count:])
    except OSError:
        return ""
