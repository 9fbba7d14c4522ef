"""Classes of tokens, reduced while the head works through its scores (`head.py`): one number a class leaves it.

The blocks of `backends/classes.py` are folded in the head's own loop, where scores and masses lie in the cache: long
blocks as far as a class fills them, short ones of what is left, so that little is to be scattered into classes later.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ...core.parts import NOTHING
from ..classes import LANES, Blocks, blocks_of, filled

Tensor = torch.Tensor

KEPT = 8
"""Layouts kept: of as many requests' classes at a time."""

LONG = 128
"""Tokens of a long block. They stand side by side, those of a short one (`LANES`) lane by lane: of few long rows torch
adds each row, of many short ones all rows at once."""


class Part(NamedTuple):
    """Blocks of one length in one tile."""

    columns: slice  # of what is gathered
    mine: slice  # among all blocks
    shape: tuple[int, int]
    axis: int  # the lanes', of the rows' scores [r, *shape]


class Layout(NamedTuple):
    """Blocks on a device."""

    columns: list[Tensor]  # of each tile: int64, the scores that are gathered
    empty: list[Tensor]  # of each tile: which of these repeat another
    parts: list[list[Part]]  # of each tile
    owner: Tensor  # int64 [N]
    lanes: Tensor  # int64 [N]: how long each block is
    tokens: Tensor  # int32 [N, LONG]
    classes: int

    @classmethod
    def of(cls, classes: Tensor, count: int, tile: int) -> Layout:
        of = classes.cpu().numpy()
        long = filled(of, count, tile, LONG)
        kinds = [blocks_of(np.where(mine, of, -1), count, tile, size) for mine, size in ((long, LONG), (~long, LANES))]
        tiles = range(len(kinds[0].bounds) - 1)
        # A class's long blocks stand before its short one, and so do their tokens in the vocabulary's order.
        found = [_Piece.of(blocks, i, tile) for i in tiles for blocks in kinds]
        parts, columns, empty = [], [], []
        at = 0
        for i in tiles:
            mine = found[len(kinds) * i : len(kinds) * (i + 1)]
            parts.append(_parts(mine, at))
            at += sum(len(piece.owner) for piece in mine)
            columns.append(np.concatenate([piece.columns for piece in mine]).astype(np.int64))
            empty.append(np.concatenate([piece.repeats for piece in mine]).nonzero()[0])
        owner = np.concatenate([piece.owner for piece in found]).astype(np.int64)
        tokens = np.concatenate([piece.tokens for piece in found])
        lanes = np.repeat([piece.lanes for piece in found], [len(piece.owner) for piece in found])

        def put(x: np.ndarray) -> Tensor:
            return torch.from_numpy(x).to(classes.device)

        return cls([*map(put, columns)], [*map(put, empty)], parts, put(owner), put(lanes), put(tokens), count)


class _Piece(NamedTuple):
    """One tile's blocks of one length, in NumPy."""

    columns: np.ndarray
    repeats: np.ndarray
    owner: np.ndarray
    tokens: np.ndarray  # [n, LONG]
    lanes: int

    @classmethod
    def of(cls, blocks: Blocks, index: int, tile: int) -> _Piece:
        mine = slice(*blocks.bounds[index : index + 2])
        tokens = blocks.tokens[mine]
        lanes = tokens.shape[1]
        padded = np.pad(tokens, ((0, 0), (0, LONG - lanes)))
        both = tokens - index * tile, blocks.real[mine]
        columns, real = (x.ravel() if lanes == LONG else x.T.ravel() for x in both)
        return cls(columns, ~real, blocks.owner[mine], padded, lanes)


def _parts(pieces: list[_Piece], first: int) -> list[Part]:
    found, start = [], 0
    for piece in pieces:
        count, long = len(piece.owner), piece.lanes == LONG
        stop, last = start + len(piece.columns), first + count
        if count:
            shape = (count, LONG) if long else (LANES, count)
            found.append(Part(slice(start, stop), slice(first, last), shape, 2 if long else 1))
        start, first = stop, last
    return found


class Layouts:
    """Those used last, by the array of classes they are of."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Layout, int]] = []

    def of(self, classes: Tensor, count: int, tile: int) -> Layout:
        rest = [one for one in self._kept if not (one[0] is classes and (one[1].classes, one[2]) == (count, tile))]
        found = [one for one in self._kept if not any(one is other for other in rest)]
        one = found[0] if found else (classes, Layout.of(classes, count, tile), tile)
        self._kept = [*rest[-KEPT + 1 :], one]
        return one[1]


class Fold:
    """What becomes of a head's rows: of each block its largest score, its mass and its Σ mass · log mass, [R, N]."""

    def __init__(self, layout: Layout, like: Tensor) -> None:
        """`like` is of the head's rows, wide [R, …]."""
        self._layout, self._room = layout, like.new_empty(0)
        shape = len(like), len(layout.owner)
        self._top, self._mass, self._moment, self._rank = (like.new_empty(shape) for _ in range(4))
        # The first lane's is the highest: whose largest score is kept of equal ones.
        self._ranks = torch.arange(LONG, 0, -1, dtype=like.dtype, device=like.device)

    def add(
        self, tile: int, start: int, scores: Tensor, masses: Tensor, top: Tensor, sharpness: Tensor
    ) -> None:  # fmt: skip
        """Take some rows of a tile, from row `start` on: scores and masses [r, tile], the rows' largest score and
        sharpness [r, 1]."""
        layout, rows = self._layout, slice(start, start + len(scores))
        columns = layout.columns[tile]
        if not len(columns):
            return

        size = len(scores) * len(columns)
        if self._room.shape[-1] < size:  # memory fresh from the kernel costs more than what is done
            self._room = scores.new_empty(2, size)
        picked, mass = (room[:size].view(len(scores), -1) for room in self._room)
        torch.index_select(scores, 1, columns, out=picked)
        for part in layout.parts[tile]:
            lanes, same = _lanes(picked, part), _lanes(mass, part)
            self._top[rows, part.mine] = best = lanes.amax(part.axis)
            # Which lane it stands in, here and not later: one line of memory for every token of every block asked.
            torch.eq(lanes, best.unsqueeze(part.axis), out=same)  # as numbers: a quarter of the time that bools take
            ranks = self._ranks if part.axis == 2 else self._ranks[-LANES:, None]
            self._rank[rows, part.mine] = same.mul_(ranks).amax(part.axis)
        torch.index_select(masses, 1, columns, out=mass)
        mass.index_fill_(1, layout.empty[tile], 0.0)
        picked.sub_(top).mul_(sharpness).mul_(mass)  # mass · log mass
        for part in layout.parts[tile]:
            self._mass[rows, part.mine] = _lanes(mass, part).sum(part.axis)
            self._moment[rows, part.mine] = _lanes(picked, part).sum(part.axis)

    def classes(self, top: Tensor, sharpness: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        """Return mass, best, score and moment [R, C]; see `Masses`.

        top, the largest score, sharpness and total mass: [R, 1].
        """
        layout = self._layout
        rows, blocks = self._top.shape
        owner, shape = layout.owner.expand(rows, blocks), (rows, layout.classes)
        if not blocks:
            nothing = top.new_full(shape, NOTHING)
            return nothing, top.new_zeros(shape, dtype=torch.int32), nothing, top.new_zeros(shape)
        best = top.new_full(shape, NOTHING).scatter_reduce_(1, owner, self._top, "amax")
        mass, moment = (top.new_zeros(shape).scatter_add_(1, owner, x) for x in (self._mass, self._moment))
        lacks = best == NOTHING
        log = total.log()
        score = ((best - top) * sharpness - log).masked_fill_(lacks, NOTHING)
        moment = (moment - log * mass) / total
        token = self._token(best, owner).masked_fill_(lacks, 0)
        # Below what float32 holds a class counts as its likeliest token.
        return torch.maximum(mass.log_() - log, score), token, score, moment

    def _token(self, best: Tensor, owner: Tensor) -> Tensor:
        """Return the first token of each class that has its largest score, int32 [R, C]."""
        blocks = owner.shape[1]
        place = torch.arange(blocks, device=owner.device)
        place = place.where(self._top == best.gather(1, owner), blocks - 1)
        first = place.new_full(best.shape, blocks - 1).scatter_reduce_(1, owner, place, "amin")
        # Ranks end at 1, and where scores are NaN there is none: any token will do.
        rank = self._rank.gather(1, first).nan_to_num_(1).clamp_(min=1).long()
        lane = self._layout.lanes[first] - rank
        return self._layout.tokens[first.flatten(), lane.flatten()].view(best.shape)


def _lanes(x: Tensor, part: Part) -> Tensor:
    return x[:, part.columns].unflatten(1, part.shape)
