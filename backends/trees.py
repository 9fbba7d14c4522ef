"""Trees of arrays, as the graph's functions take and return them, for backends that compile or capture functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def flatten(tree: Any, take: Callable[[Any], str | None]) -> Any:
    """Hand a tree's leaves to `take` and return what is left of it, hashable: `rebuild`'s pattern.

    Args:
        tree: leaves, None, tuples and named tuples of them.
        take: returns the name of what it takes a leaf for, and None for what is no leaf.

    Raises:
        TypeError: something that is neither.
    """
    if (name := take(tree)) is not None:
        return name
    if isinstance(tree, tuple):
        return (type(tree), *(flatten(child, take) for child in tree))
    if tree is None:
        return None
    raise TypeError(f"a compiled function takes arrays and tuples of them, not {type(tree).__name__}")


def rebuild(pattern: Any, leaves: Mapping[str, Iterator[Any]]) -> Any:
    """Undo `flatten`, with the next leaf of each name in turn."""
    if pattern is None:
        return None
    if isinstance(pattern, str):
        return next(leaves[pattern])
    kind, *children = pattern
    values = [rebuild(child, leaves) for child in children]
    return tuple(values) if kind is tuple else kind(*values)
