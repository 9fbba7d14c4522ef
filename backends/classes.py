"""Classes of tokens laid out as blocks, so that a class is reduced without a scatter: for heads, in NumPy.

    tokens      sorted by tile, class and number, and cut into blocks of `lanes`, each of one tile and one class
    fold        a tile's scores are picked in this order, lane by lane, and folded over the lanes: one number a block
    classes     there are few blocks, one in so many tokens and one for each class of a tile, and these are scattered

A block that is not full repeats its first token, which changes no maximum; its mass there is to be taken as zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LANES = 16
"""Tokens of a block, where nothing else is said."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """N blocks, those of a tile together, in a tile by rising class, in a class by rising token."""

    tokens: np.ndarray
    """int32 [N, lanes], rising; the first again where a block is not full."""
    real: np.ndarray
    """bool [N, lanes]: whether a token stands there for the first time."""
    owner: np.ndarray
    """int32 [N]: each block's class."""
    bounds: np.ndarray
    """int64 [tiles + 1]: where each tile's blocks begin, and the end."""


def blocks_of(classes: np.ndarray, count: int, tile: int | None = None, lanes: int = LANES) -> Blocks:
    """Lay out classes int32 [V] of 0 … count − 1, −1 for tokens of none, by tiles of so many tokens; None is one."""
    tile = tile or max(len(classes), 1)
    tiles = -(-len(classes) // tile)
    live = np.flatnonzero(classes >= 0)
    group = live // tile * count + classes[live]
    live = live[np.argsort(group, kind="stable")].astype(np.int32)
    sizes = np.bincount(group, minlength=tiles * count)
    needed = -(-sizes // lanes)
    owner = np.repeat(np.arange(tiles * count), needed)
    ends = np.cumsum(needed)
    done = (np.arange(len(owner)) - (ends - needed)[owner])[:, None] * lanes  # of the group's tokens, before the block
    real = done + np.arange(lanes) < sizes[owner][:, None]
    first = (np.cumsum(sizes) - sizes)[owner][:, None] + done
    tokens = live[np.where(real, first + np.arange(lanes), first)]
    bounds = np.concatenate([[0], ends.reshape(tiles, count)[:, -1]]) if count else np.zeros(tiles + 1, np.int64)
    return Blocks(
        tokens=tokens.reshape(-1, lanes), real=real, owner=(owner % max(count, 1)).astype(np.int32), bounds=bounds
    )


def filled(classes: np.ndarray, count: int, tile: int, lanes: int) -> np.ndarray:
    """Return which tokens, bool [V], the full blocks of so many lanes hold: of each tile and class the first ones."""
    blocks = blocks_of(classes, count, tile, lanes)
    found = np.zeros(len(classes), bool)
    found[blocks.tokens[blocks.real.all(1)]] = True
    return found
