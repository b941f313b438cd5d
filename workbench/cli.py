"""`workbench`: one table of commands; each is imported when it is called, so that `workbench --help` is quick."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import workbench
from workbench.errors import WorkbenchError

__all__ = ["main"]

_CHECKOUT = Path(workbench.__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """`home` is "module:function" of a `main(argv) -> exit code`."""

    home: str
    does: str


COMMANDS = {
    "demo": Command(home="workbench.demo.terminal:main", does="a real rollout over 4 ranks, with tables and a report"),
    "lab": Command(home="workbench.cli:lab", does="JupyterLab on the notebooks, on loopback only"),
    "bench": Command(home="workbench.cli:bench", does="speed and memory, beside what people use today"),
    "doctor": Command(home="workbench.ranks.doctor:main", does="what was left behind, and whether this machine will do"),
    "replay": Command(home="workbench.ranks.replay:main", does="one recorded rank again, alone; also as a test"),
    "attach": Command(home="workbench.ranks.attach:main", does="ask a live rank from a shell"),
    "reproduce": Command(home="workbench.ranks.reproduce:main", does="a saved session again, and what differs"),
    "train-tiny": Command(home="workbench.models.recipe:main", does="train the bundled model again"),
    "model-card": Command(home="workbench.models.card:main", does="what the bundled model does, measured"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Its exit code; 1 where the workbench refused or failed, with its text on stderr. Anything unexpected keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    name = parser.parse_args(arguments[:1]).command  # the rest is the command's own
    if name is None:
        parser.print_help()
        return 2
    module, _, function = COMMANDS[name].home.partition(":")
    try:
        code: int = getattr(import_module(module), function)(arguments[1:])
        return code
    except WorkbenchError as error:
        print(f"workbench {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"workbench {name}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.does}" for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="workbench",
        usage="workbench COMMAND [OPTIONS]",
        description="A research workbench for simulated multi-rank experiments.",
        epilog="\n".join(["commands:", *lines, "", "workbench COMMAND --help tells a command's options."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"workbench {workbench.__version__}")
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def lab(argv: Sequence[str]) -> int:
    """JupyterLab on `notebooks/`; it takes this process's place, and options go on to it: `workbench lab [JUPYTERLAB OPTIONS]`."""
    folder = _of_checkout("notebooks")
    options = ["--ip=127.0.0.1", f"--ServerApp.root_dir={folder}", *(["--allow-root"] if os.getuid() == 0 else [])]
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *options, *argv])


def bench(argv: Sequence[str]) -> int:
    """The measurements of `benchmarks/`: `workbench bench [OPTIONS]`."""
    _of_checkout("benchmarks/run.py")
    sys.path.insert(0, str(_CHECKOUT))
    code: int = import_module("benchmarks.run").main(list(argv))
    return code


def _of_checkout(name: str) -> Path:
    """A file or folder beside the package, which an installed package does not have.

    Raises:
        WorkbenchError: it is not there.
    """
    path = _CHECKOUT / name
    if not path.exists():
        raise WorkbenchError(
            f"{name} is not here: {path} does not exist\nit is part of the source checkout, not of the installed package\n"
            "clone the repository and call it there"
        )
    return path


if __name__ == "__main__":
    sys.exit(main())
