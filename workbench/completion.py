"""Completion, `?` and hints for names that live on ranks, and for the lines of the magics, in any IPython.

    a %%ranks cell      x.sh<tab> -> x.shape, asked of the ranks, beside whatever cell runs
    its first line      options, ranks, axes of the layout in use
    any cell            x? where only ranks know x

Knows IPython's completer and inspector. Does not know processes: it asks the cluster.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher
from IPython.core.interactiveshell import InteractiveShell

from workbench.plan.folding import fold_lines
from workbench.ranks.cluster import Cluster
from workbench.ranks.messages import Inquiry
from workbench.ranks.page import page_of_lines
from workbench.ranks.result import text_of_lines
from workbench.records import RankState

__all__ = ["RankNames", "split_question"]

OPTIONS = {"%launch": ("--layout", "--seed", "--record"), "%%ranks": ("--timeout", "--bg", "--out", "--quiet"), "%ranks": ()}
_AXES = ("tp", "pp", "dp", "pcp", "dcp")
_MOST_CHOICES = 16
_PATH = re.compile(r"[^\W\d]\w*(?:\.\w+)*\.?\Z")
_QUESTION = re.compile(r"(?P<before>\?{1,2})?(?P<path>[^\W\d]\w*(?:\.\w+)*)(?P<behind>\?{1,2})?\Z")


class RankNames:
    """The hooks of one shell; `install` and `remove` them."""

    def __init__(self, shell: InteractiveShell, verbs: tuple[str, ...]) -> None:
        self._shell = shell
        self._verbs = verbs
        self._inspect_mime: Callable[..., Any] = shell.object_inspect_mime
        self._inspect: Callable[..., Any] = shell._inspect
        # before all others: where it is right about a name, the seconds of a first static analysis are saved
        self._matcher = context_matcher(identifier="workbench", priority=1_000)(lambda context: self.match(context))

    def install(self) -> None:
        if self._shell.Completer is not None:
            self._shell.Completer.custom_matchers.append(self._matcher)
        self._shell.object_inspect_mime = self.inspect_mime
        self._shell._inspect = self.inspect

    def remove(self) -> None:
        if self._shell.Completer is not None and self._matcher in self._shell.Completer.custom_matchers:
            self._shell.Completer.custom_matchers.remove(self._matcher)
        self._shell.object_inspect_mime = self._inspect_mime
        self._shell._inspect = self._inspect

    @property
    def cluster(self) -> Cluster | None:
        """The one that the magics use, None where there is none to ask."""
        cluster = self._shell.user_ns.get("cluster")
        return cluster if isinstance(cluster, Cluster) and not cluster.is_closed else None

    # -- completion ---------------------------------------------------------------------------------------------------------------------

    def match(self, context: CompletionContext) -> SimpleMatcherResult:
        """What IPython's completer calls for every key that completes."""
        line = context.text_until_cursor.lstrip()
        magic = next((name for name in OPTIONS if line.startswith(f"{name} ")), None)
        if magic is not None:
            word = re.split(r"[\s]", line)[-1]
            return _result([one for one in self._choices(magic, line.split()) if one.startswith(word)], word, is_alone=True)
        first = context.full_text.lstrip().partition("\n")[0]
        path = _PATH.search(context.text_until_cursor)
        if context.cursor_line == 0 or not first.startswith("%%ranks") or path is None:
            return _result([], "", is_alone=False)
        return self._names(path[0], first)

    def _choices(self, magic: str, words: list[str]) -> list[str]:
        """What may stand where the cursor is on a magic's line."""
        cluster = self.cluster
        if magic == "%ranks":
            dead = [str(one.rank) for one in cluster.status() if one.state is RankState.DEAD] if cluster is not None else []
            return dead if words[1:2] == ["respawn"] else list(self._verbs)
        if magic == "%launch":
            return [f"{axis}=" for axis in _AXES] if words[-1] == "--layout" or words[-2:-1] == ["--layout"] else list(OPTIONS[magic])
        return [*self._selectors(cluster), *OPTIONS[magic]] if cluster is not None else list(OPTIONS[magic])

    def _selectors(self, cluster: Cluster) -> list[str]:
        layout = cluster.layout
        degrees = {axis: max(layout.index_in_group(rank, axis) for rank in range(cluster.world_size)) + 1 for axis in layout.axes}
        by_axis = [f"{axis}={index}" for axis, degree in degrees.items() if degree > 1 for index in range(min(degree, _MOST_CHOICES))]
        return ["all", *map(str, range(min(cluster.world_size, _MOST_CHOICES))), *by_axis]

    def _names(self, path: str, first_line: str) -> SimpleMatcherResult:
        cluster = self.cluster
        if cluster is None:
            return _result([], "", is_alone=False)
        try:
            chosen = [word for word in shlex.split(first_line)[1:2] if not word.startswith("-")]
            answers = cluster.ask(Inquiry.COMPLETE, path, chosen[0] if chosen else None)
        except ValueError:  # a line that is not yet whole
            return _result([], "", is_alone=False)
        names = list(dict.fromkeys(name for lines in answers.values() for name in lines))
        behind = path.rpartition(".")[2]
        return _result([name.rpartition(".")[2] for name in names], behind, is_alone="." in path and bool(names))

    # -- `?` ----------------------------------------------------------------------------------------------------------------------------

    def describe(self, path: str, detail_level: int = 0) -> tuple[str, str] | None:
        """Text and page of what a name is on the ranks that know it; None where none does."""
        cluster = self.cluster
        if cluster is None or not all(part.isidentifier() for part in path.split(".")):
            return None
        answers = cluster.ask(Inquiry.SOURCE if detail_level else Inquiry.DESCRIBE, path)
        known = {rank: lines for rank, lines in answers.items() if lines}
        if not known:
            return None
        return "\n".join(text_of_lines(fold_lines(known))), page_of_lines(known, most=1_000)

    def inspect_mime(self, name: str, detail_level: int = 0, omit_sections: Any = ()) -> dict[str, str]:
        """Shift-Tab in a notebook: IPython's own answer, else the ranks'."""
        try:
            found: dict[str, str] = self._inspect_mime(name, detail_level=detail_level, omit_sections=omit_sections)
            return found
        except KeyError:
            told = self.describe(name, detail_level)
            if told is None:
                raise
            return {"text/plain": told[0], "text/html": told[1]}

    def inspect(self, method: str, name: str, namespaces: Any = None, **options: Any) -> Any:
        """`name?` in any cell."""
        is_known = self._shell._object_find(name, namespaces).found
        told = None if is_known else self.describe(name, options.get("detail_level", 0))
        if told is None:
            return self._inspect(method, name, namespaces, **options)
        print(told[0])
        return None


def _result(names: list[str], fragment: str, *, is_alone: bool) -> SimpleMatcherResult:
    completions = [SimpleCompletion(text=name, type="instance") for name in names]
    return SimpleMatcherResult(completions=completions, matched_fragment=fragment, suppress=is_alone, ordered=True)


def split_question(cell: str) -> tuple[str, str, int]:
    """A cell whose last line is `name?`, as (the lines before, name, 1 for `??`); name is "" where it is no question."""
    before, _, last = cell.rstrip().rpartition("\n")
    match = _QUESTION.match(last.strip())
    marks = (match["before"] or match["behind"] or "") if match else ""
    return (before, match["path"], len(marks) - 1) if match and marks else (cell, "", 0)
