"""Classes of tokens, reduced part by part while the head works through its scores (`head.py`).

Blocks of one class (`backends/classes.py`) are folded in the parts; what is left, a sixteenth of the scores, goes into
classes at once: sums by a product with ones and zeros, whose order is fixed, maxima by a scatter, which has none.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ...core.parts import NOTHING
from ..classes import LANES, blocks_of

Array = mx.array

KEPT = 8
"""Layouts kept: of as many requests' classes at a time."""


class Layout(NamedTuple):
    """Blocks on the device."""

    columns: list[Array]  # of each part: int32 [1, LANES · blocks], lane by lane
    real: list[Array]  # of each part: float32 [1, LANES, blocks], 0 where one repeats another
    owner: Array  # int32 [N]
    member: Array  # float32 [N, C]: which class a block is of
    tokens: Array  # int32 [N, LANES]
    classes: int

    @classmethod
    def of(cls, classes: np.ndarray, count: int, part: int) -> Layout:
        blocks = blocks_of(classes, count, part)
        columns, real = [], []
        for i, mine in enumerate(map(slice, blocks.bounds[:-1].tolist(), blocks.bounds[1:].tolist())):
            columns.append(mx.array(blocks.tokens[mine].T.reshape(1, -1) - i * part))
            real.append(mx.array(blocks.real[mine].T[None].astype(np.float32)))
        member = mx.array((blocks.owner[:, None] == np.arange(count)).astype(np.float32))
        return cls(columns, real, mx.array(blocks.owner), member, mx.array(blocks.tokens), count)

    def fold(self, part: int, scores: Array, mass: Array, moment: Array) -> Array:
        """Return of each block its largest score, mass and Σ mass · log mass: [r, part] each → [3, r, blocks]."""
        rows, columns, real = len(scores), self.columns[part], self.real[part]

        def picked(x: Array) -> Array:
            found = mx.take_along_axis(x, mx.broadcast_to(columns, (rows, columns.shape[1])), 1)
            return found.reshape(rows, LANES, -1)

        sums = [(picked(x) * real).sum(1) for x in (mass, moment)]
        return mx.stack([picked(scores).max(1), *sums])

    def masses(self, folded: list[Array], scores: Array, top: Array, total: Array) -> tuple[Array, ...]:
        """Return mass, best, score and moment [N, C]; see `Masses`. scores [N, V]; top and total [N, 1]."""
        rows, shape = len(scores), (len(scores), self.classes)
        if not len(self.owner):
            nothing = mx.full(shape, NOTHING)
            return nothing, mx.zeros(shape, mx.int32), nothing, mx.zeros(shape)
        tops, masses, moments = mx.concatenate(folded, -1)
        best = mx.full(shape, NOTHING).at[:, self.owner].maximum(tops)
        mass, moment = (x @ self.member for x in (masses, moments))
        lacks, log = best == NOTHING, mx.log(total)
        score = mx.where(lacks, NOTHING, best - top - log)
        # The first block that has the largest score, and the first token of it that has.
        blocks = len(self.owner)
        place = mx.where(tops == best[:, self.owner], mx.arange(blocks, dtype=mx.int32), blocks - 1)
        first = mx.full(shape, blocks - 1, mx.int32).at[:, self.owner].minimum(place)
        tokens = self.tokens[first]  # [N, C, LANES]
        values = mx.take_along_axis(scores, tokens.reshape(rows, -1), 1).reshape(tokens.shape)
        token = mx.take_along_axis(tokens, mx.argmax(values, -1, keepdims=True), -1)[..., 0]
        moment = (moment - log * mass) / total
        # Below what float32 holds a class counts as its likeliest token.
        return mx.maximum(mx.log(mass) - log, score), mx.where(lacks, 0, token), score, moment


class Layouts:
    """Those used last, by the array of classes they are of."""

    def __init__(self) -> None:
        self._kept: list[tuple[Array, int, int, Layout]] = []

    def of(self, classes: Array, count: int, part: int) -> Layout:
        rest = [one for one in self._kept if not (one[0] is classes and one[1:3] == (count, part))]
        found = [one for one in self._kept if not any(one is other for other in rest)]
        one = found[0] if found else (classes, count, part, Layout.of(np.array(classes), count, part))
        self._kept = [*rest[-KEPT + 1 :], one]
        return one[3]
