"""One cell's code in a rank: compiled, run, its last expression kept, its errors told with the user's own lines.

Knows source and a namespace. Does not know channels or peers.
"""

from __future__ import annotations

import ast
import linecache
import reprlib
import sys
import time
import traceback
from types import FrameType, ModuleType, TracebackType

from workbench.errors import CollectiveMismatch, WorkbenchError
from workbench.ranks.messages import CellError

__all__ = ["file_of", "frames_of", "names_of", "run_source", "tell"]

_PACKAGE = __file__.rpartition("/ranks/")[0] + "/"
_HAND_ON = tuple(f"{_PACKAGE}ranks/{name}.py" for name in ("futures", "intercept", "known_groups", "leaving", "operations", "shortcut"))
_MOST_NAMES = 40
_AROUND = 2  # lines before and behind the one that failed
_LONGEST_NAME = 200  # characters of a repr in RankFailed.locals


def file_of(cell: int) -> str:
    """The file name under which a cell's lines appear in tracebacks."""
    return f"<cell {cell}>"


def run_source(source: str, module: ModuleType, cell: int) -> object:
    """Run a cell in a module's namespace.

    Returns:
        The value of its last expression, None where the cell ends with a statement or a semicolon.
    """
    name = file_of(cell)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    tree = ast.parse(source, filename=name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), module.__dict__)
    if not isinstance(last, ast.Expr):
        return None
    value = eval(compile(ast.Expression(last.value), name, "eval"), module.__dict__)
    return None if source.rstrip().endswith(";") else value


_HINTS = {  # what torch says of a script that was pasted into a cell
    "initialize the default process group twice": "the ranks of a cluster are in their process group already: leave init_process_group out",
    "Default process group has not been initialized": (
        "a cell destroyed the process group of the ranks: cluster.restart() makes fresh ranks; leave destroy_process_group() out"
    ),
}


def tell(error: BaseException) -> CellError:
    """An exception as text, without the workbench's own frames around the user's."""
    return CellError(
        kind=type(error).__name__,
        message=_message(error),
        traceback=_traceback(error),
        at_s=time.monotonic(),
        is_mismatch=isinstance(error, CollectiveMismatch),
        names=_names_where(error.__traceback__),
    )


def _traceback(error: BaseException) -> str:
    """Its stack and those of its causes; frames of a cell with the lines around the one that is marked."""
    told = traceback.TracebackException(type(error), error, _users_part(error.__traceback__))
    if isinstance(error, WorkbenchError):
        told.stack = _down_to_the_call(told.stack)
    one: traceback.TracebackException | None = told
    while one is not None:
        one.stack = _Frames(_without_who_hands_on(one.stack, one.exc_type))
        one = one.__cause__ or one.__context__
    text = "".join(told.format()).rstrip()
    if isinstance(error, WorkbenchError):  # its text of several lines stands above the traceback already
        first, _, rest = _message(error).rstrip().partition("\n")
        text = text.removesuffix(f"\n{rest}") if rest else text
    return text


def _down_to_the_call(stack: traceback.StackSummary) -> traceback.StackSummary:
    """A stack without the libraries' frames at its end: the workbench refused what the user's own last line called."""
    own = [at for at, frame in enumerate(stack) if not frame.filename.startswith((_PACKAGE, sys.prefix, sys.base_prefix))]
    return traceback.StackSummary.from_list(stack[: own[-1] + 1]) if own else stack


def _without_who_hands_on(stack: traceback.StackSummary, kind: type[BaseException] | None) -> traceback.StackSummary:
    """A stack without those of our frames that stand between the user's call of torch and torch's own, or gloo's."""
    is_of_cpp = kind is not None and issubclass(kind, RuntimeError)
    last = len(stack) if is_of_cpp else max((at for at, frame in enumerate(stack) if not frame.filename.startswith(_PACKAGE)), default=-1)
    return traceback.StackSummary.from_list(
        [frame for at, frame in enumerate(stack) if at > last or not frame.filename.startswith(_HAND_ON)]
    )


class _Frames(traceback.StackSummary):
    """As Python's own, but that a cell's frame shows more than its line: a cell is not at hand as a file is."""

    def format_frame_summary(self, frame: traceback.FrameSummary) -> str:
        head, *rest = super().format_frame_summary(frame).splitlines(keepends=True)
        lines = linecache.getlines(frame.filename)
        at = frame.lineno or 0
        is_cells = frame.filename.startswith("<cell ") and 0 < at <= len(lines)
        if not is_cells or not rest or rest[0].strip() != lines[at - 1].strip():
            return "".join([head, *rest])
        indent = len(lines[at - 1]) - len(lines[at - 1].lstrip())
        first, last = max(1, at - _AROUND), min(len(lines), at + _AROUND)
        width = len(str(last))
        shown = [_line(lines[n - 1], f"  {'---->' if n == at else '     '} {n:>{width}}") for n in range(first, last + 1)]
        carets = [" " * (9 + width + indent) + line[4:] for line in rest[1:]]
        return "".join([head, *shown[: at - first + 1], *carets, *shown[at - first + 1 :]])


def _line(text: str, label: str) -> str:
    return f"{label} {text}".rstrip() + "\n"


def _message(error: BaseException) -> str:
    try:
        text = str(error)
        hint = next((hint for seen, hint in _HINTS.items() if isinstance(error, ValueError) and seen in text), "")
        return f"{text}\n{hint}" if hint else text
    except Exception as broken:
        return f"(its text cannot be made: {broken!r})"


def _names_where(found: TracebackType | None) -> dict[str, str]:
    """Names of the frame that failed, the innermost of the user's own code (a library's frame says little), as short reprs."""
    mine = None
    step = found
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if not name.startswith((_PACKAGE, sys.prefix, sys.base_prefix)):
            mine = step.tb_frame
        step = step.tb_next
    return names_of(mine) if mine is not None else {}


def names_of(frame: FrameType) -> dict[str, str]:
    """Names of a frame as short reprs, the last 40, without modules."""
    shown = {name: value for name, value in frame.f_locals.items() if not name.startswith("__") and not isinstance(value, ModuleType)}
    return {name: _short_repr(value) for name, value in list(shown.items())[-_MOST_NAMES:]}


def frames_of(innermost: FrameType | None) -> tuple[tuple[str, dict[str, str]], ...]:
    """(place, names) of the user's own frames of a stack, outermost first."""
    found = []
    frame = innermost
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith((_PACKAGE, sys.prefix, sys.base_prefix, "<frozen", "<string>")):
            found.append((f"{code.co_filename}, line {frame.f_lineno}, in {code.co_name}", names_of(frame)))
        frame = frame.f_back
    return tuple(found[::-1])


def _short_repr(value: object) -> str:
    try:
        text = reprlib.repr(value) if isinstance(value, (list, tuple, dict, set, str, bytes)) else repr(value)
    except Exception as broken:
        return f"<its repr failed: {broken!r}>"
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."


def _users_part(found: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame that is not the workbench's, or all of it where none is."""
    step = found
    while step is not None and step.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        step = step.tb_next
    return step or found
