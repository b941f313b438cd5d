"""Checks of sizes and degrees, with what would fit in the text."""

from __future__ import annotations

from math import prod

from workbench.errors import LayoutError

__all__ = ["check_degrees", "check_divides", "check_size", "divisors"]


def check_size(title: str, name: str, size: object) -> None:
    """A size is an int of at least 1."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise LayoutError(f"{title}: {name} must be an int\ngot {name}={size!r}\npass a whole number of at least 1")
    if size < 1:
        raise LayoutError(f"{title}: {name} must be at least 1\ngot {name}={size}\npass 1 for an axis that is not used")


def check_divides(title: str, world_size: int, **degrees: int) -> None:
    """The world is a multiple of all degrees together."""
    product = prod(degrees.values())
    if world_size % product:
        named = {name: size for name, size in degrees.items() if size > 1}
        shown = " * ".join(f"{name}={size}" for name, size in named.items()) + (f" = {product}" if len(named) > 1 else "")
        raise LayoutError(
            f"{title}: the world does not divide\ngot world_size={world_size}, which is no multiple of {shown}\n"
            f"with this world, {' * '.join(named)} must be one of {', '.join(map(str, divisors(world_size)))}"
        )


def check_degrees(title: str, world_size: int, **degrees: int) -> int:
    """The product of degrees that divide the world together."""
    for name, size in degrees.items():
        check_size(title, name, size)
    check_divides(title, world_size, **degrees)
    return prod(degrees.values())


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
