"""`mx.compile` for the graph's own structures.

MLX compiles functions of arrays in plain lists. Here named tuples are flattened on the way in and rebuilt on the way
out. Numbers, such as the length of a cache, come as arrays: a Python number would be a constant of the graph, and every
committed canvas would trace it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .. import trees


def flatten(tree: Any, leaves: list[mx.array]) -> Any:
    """Append a tree's arrays to `leaves`; return the pattern of the rest."""

    def take(x: Any) -> str | None:
        if not isinstance(x, mx.array):
            return None
        leaves.append(x)
        return "array"

    return trees.flatten(tree, take)


def rebuild(pattern: Any, leaves: Sequence[mx.array]) -> Any:
    """Undo `flatten`."""
    return trees.rebuild(pattern, {"array": iter(leaves)})


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
