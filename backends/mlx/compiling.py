"""`mx.compile` for the graph's own structures.

MLX compiles functions of arrays in plain lists. Here named tuples are flattened on the way in and rebuilt on the way
out, and an integer, such as the length of the cache, travels as an int32 array: as a Python number it would be a
constant of the graph, and every committed canvas would trace it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx


def flatten(tree: Any, leaves: list[mx.array]) -> Any:
    """Append a tree's arrays to `leaves` and return what is left of it, hashable: `rebuild`'s pattern."""
    if isinstance(tree, mx.array):
        leaves.append(tree)
        return "array"
    if isinstance(tree, int) and not isinstance(tree, bool):
        leaves.append(mx.array([tree], mx.int32))
        return "array"
    if isinstance(tree, tuple):
        return (type(tree), *(flatten(child, leaves) for child in tree))
    if tree is None:
        return None
    raise TypeError(f"a compiled function takes arrays, integers and tuples of them, not {type(tree).__name__}")


def rebuild(pattern: Any, leaves: Sequence[mx.array]) -> Any:
    """Undo `flatten`; integers come back as int32 [1]."""
    rest = iter(leaves)

    def build(part: Any) -> Any:
        if part is None:
            return None
        if part == "array":
            return next(rest)
        kind, *children = part
        values = [build(child) for child in children]
        return tuple(values) if kind is tuple else kind(*values)

    return build(pattern)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a pure function of trees; MLX traces it once for every pattern and set of shapes."""
    traced: dict[Any, Callable[..., Any]] = {}
    patterns: dict[Any, Any] = {}  # of the results

    def run(*arguments: Any) -> Any:
        leaves: list[mx.array] = []
        pattern = flatten(arguments, leaves)
        if pattern not in traced:

            def flat(*arrays: mx.array) -> list[mx.array]:
                results: list[mx.array] = []
                patterns[pattern] = flatten(function(*rebuild(pattern, arrays)), results)
                return results

            traced[pattern] = mx.compile(flat)
        results = traced[pattern](*leaves)
        return rebuild(patterns[pattern], results)

    return run
