"""Classes of tokens, reduced while the head works through its scores (`head.py`): one number a class leaves it.

The blocks of `backends/classes.py` are folded in the head's own loop, where scores and masses lie in the cache; what is
scattered into classes afterwards is a sixteenth of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...core.parts import NOTHING
from ..classes import LANES, Blocks, blocks_of

Tensor = torch.Tensor

KEPT = 8
"""Layouts kept: of as many requests' classes at a time."""


class Layout(NamedTuple):
    """Blocks on a device."""

    columns: list[Tensor]  # of each tile: int32 [LANES · blocks], lane by lane
    empty: list[Tensor]  # of each tile: which of these repeat another
    bounds: list[int]
    owner: Tensor  # int64 [N]
    tokens: Tensor  # int32 [N, LANES]
    rank: Tensor  # uint8 [LANES, 1]: the first lane's is highest
    classes: int

    @classmethod
    def of(cls, classes: Tensor, count: int, tile: int) -> Layout:
        blocks = blocks_of(classes.cpu().numpy(), count, tile)
        found = [_tile(blocks, i, tile, classes.device) for i in range(len(blocks.bounds) - 1)]
        tokens, owner = (torch.from_numpy(x).to(classes.device) for x in (blocks.tokens, blocks.owner))
        columns, empty = ([one[i] for one in found] for i in (0, 1))
        rank = torch.arange(LANES, 0, -1, dtype=torch.uint8, device=classes.device)[:, None]
        return cls(columns, empty, blocks.bounds.tolist(), owner.long(), tokens, rank, count)


def _tile(blocks: Blocks, index: int, tile: int, device: torch.device) -> tuple[Tensor, Tensor]:
    mine = slice(*blocks.bounds[index : index + 2])
    columns = torch.from_numpy(blocks.tokens[mine].T.flatten() - index * tile)
    empty = torch.from_numpy(~blocks.real[mine].T.flatten()).nonzero()[:, 0]
    return columns.to(device, torch.int32), empty.to(device)


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
        self._top, self._mass, self._moment = (like.new_empty(shape) for _ in range(3))
        self._lane = like.new_empty(shape, dtype=torch.uint8)  # `LANES` minus the first that has the largest score

    def add(self, tile: int, start: int, scores: Tensor, mass: Tensor, moment: Tensor) -> None:
        """Take some rows of a tile, from row `start` on: [r, tile] each, `moment` mass · log mass."""
        layout, rows = self._layout, slice(start, start + len(scores))
        mine = slice(*layout.bounds[tile : tile + 2])
        if mine.start == mine.stop:
            return

        columns = layout.columns[tile]
        if self._room.numel() < len(scores) * len(columns):  # memory fresh from the kernel costs more than what is done
            self._room = scores.new_empty(len(scores) * len(columns))
        room = self._room[: len(scores) * len(columns)].view(len(scores), -1)

        def picked(x: Tensor) -> Tensor:
            return torch.index_select(x, 1, columns, out=room)

        def summed(x: Tensor) -> Tensor:
            return picked(x).index_fill_(1, layout.empty[tile], 0.0).unflatten(1, (LANES, -1)).sum(1)

        lanes = picked(scores).unflatten(1, (LANES, -1))
        self._top[rows, mine] = top = lanes.amax(1)
        # Which lane it stands in, here and not later: one line of memory for every token of every block that is asked.
        self._lane[rows, mine] = ((lanes == top[:, None]) * layout.rank).amax(1)
        self._mass[rows, mine] = summed(mass)
        self._moment[rows, mine] = summed(moment)

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
        lane = (LANES - self._lane.gather(1, first).long()).clamp_(max=LANES - 1)  # where scores are NaN, any
        return self._layout.tokens[first.flatten(), lane.flatten()].view(best.shape)
