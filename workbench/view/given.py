"""What a view is given: another kind of thing is told in words. Knows attributes only. Does not know clusters, runs or layouts."""

from __future__ import annotations

__all__ = ["check_given"]


def check_given(view: str, value: object, has: str, *, needed: str) -> None:
    """Refuse what has no attribute `has`, by which a view knows what it can show.

    Raises:
        TypeError: it has not.
    """
    if not hasattr(value, has):
        raise TypeError(f"{view}({type(value).__name__}): nothing to show there\nneeded: {needed}")
