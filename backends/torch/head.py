"""The vocabulary head: one buffer of scores, and everything a denoising pass needs from it.

The vocabulary is worked through in tiles, large enough for the matrix products, and each tile in blocks of rows that
fit a core's own cache, in two passes:

    first    logits = x · tileᵀ, soft cap, the maximum of every 512            → the row's maximum
    second   mass = exp((score − maximum) / T), sums, entropy, soft += mass · tile

At most `ROWS` rows have their scores in memory at once, whatever the batch. Off the CPU the whole vocabulary is one
tile and all rows are one block. A quantized table is dequantized twice, block by block (`blocks.py`): its values are
never in memory together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...core.reference import _BELOW_ONE, DRAW_BLOCK
from . import blocks
from .blocks import Weight
from .classes import Fold, Layouts
from .packed import Workspace

Tensor = torch.Tensor

TILE = 8192
"""Tokens per tile on the CPU."""

ROWS = 512
"""Rows whose scores are in memory at once on the CPU: 0.5 GB of float32 for a vocabulary of 262,144."""

BLOCK = 1 << 18
"""Scores worked on at a time on the CPU: 1 MB of float32."""

_NOTHING = -1e30
"""Score of the columns that fill the last block: its mass is 0, and 0 · score is not NaN, as with infinity."""


class VocabHead:
    """Keeps its buffers between passes: memory fresh from the kernel is cleared page by page, which costs more time
    than most of the arithmetic here."""

    def __init__(self, workspace: Workspace) -> None:
        self._kept: _Buffers | None = None
        self._workspace = workspace
        self._layouts = Layouts()

    def __call__(
        self, x: Tensor, table: Weight, softcap: float, temperature: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sampled token, argmax, entropy and mean embedding; see `Ops.vocab_head`."""
        shape, u = x.shape[:2], u.reshape(-1, 1).to(temperature.dtype)
        found = [
            self._rows(part, sharpness, u[rows], table, softcap)
            for rows, part, sharpness in _parts(x, softcap, temperature)
        ]
        token, argmax, entropy, soft = (torch.cat(column) for column in zip(*found, strict=True))
        return token.view(shape), argmax.int().view(shape), entropy.view(shape), soft.view(*shape, -1)

    def classes(
        self, x: Tensor, table: Weight, softcap: float, temperature: Tensor, classes: Tensor, count: int
    ) -> tuple[Tensor, ...]:
        """Mean embedding, mass, best, score and moment; see `Ops.class_head`."""
        found = [
            self._class_rows(part, sharpness, table, softcap, classes, count)
            for _, part, sharpness in _parts(x, softcap, temperature)
        ]
        return tuple(torch.cat(column).view(*x.shape[:2], -1) for column in zip(*found, strict=True))

    @staticmethod
    def keeps(x: Tensor) -> bool:
        """Whether the scores of all of x [B, L, D] stay here until the next call."""
        return x.device.type == "cpu" and x.shape[0] * x.shape[1] <= ROWS

    def scores(self, places: Tensor, vocab: int) -> Tensor:
        """Copy the scores of some rows of the last call, wide [R, V]: logits over the soft cap."""
        assert self._kept is not None
        return self._kept.scores[:, places].transpose(0, 1).flatten(1)[:, :vocab]

    def _rows(
        self, x: Tensor, sharpness: Tensor, u: Tensor, table: Weight, softcap: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of rows: x [R, D], sharpness and u [R, 1] → three [R], and [R, D]."""
        buffers = self._buffers(x, table.shape[0], u.dtype)
        peak = _score(buffers, x, table, softcap, self._workspace)
        top = peak.amax(-1, keepdim=True)
        sums, entropy, soft = _weigh(buffers, table, top, sharpness, self._workspace)
        token = _draw(buffers.scores, sums, top, sharpness, u)
        block = peak.argmax(-1)  # the first of equals, and so is the one inside it
        argmax = block * DRAW_BLOCK + _pick(buffers.scores, block).argmax(-1)
        return token, argmax, entropy, soft

    def _class_rows(
        self, x: Tensor, sharpness: Tensor, table: Weight, softcap: float, classes: Tensor, count: int
    ) -> tuple[Tensor, ...]:
        """Of rows: [R, D], and four [R, C]."""
        buffers = self._buffers(x, table.shape[0], sharpness.dtype)
        top = _score(buffers, x, table, softcap, self._workspace).amax(-1, keepdim=True)
        fold = Fold(self._layouts.of(classes, count, buffers.scores.shape[2]), sharpness)
        sums, _, soft = _weigh(buffers, table, top, sharpness, self._workspace, fold)
        return soft, *fold.classes(top, sharpness, sums.sum(-1, keepdim=True))

    def _buffers(self, x: Tensor, vocab: int, wide: torch.dtype) -> _Buffers:
        if x.device.type != "cpu":
            return _Buffers.allocate(x, vocab, _whole_blocks(vocab), len(x), wide)
        if self._kept is None or not self._kept.fit(x, vocab):
            tile = min(TILE, _whole_blocks(vocab))
            self._kept = _Buffers.allocate(x, vocab, tile, max(1, BLOCK // tile), wide)
        return self._kept.first(len(x))


def _parts(x: Tensor, softcap: float, temperature: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield rows of a batch that have their scores in memory at once, with x [R, D] and softcap / T [R, 1]."""
    sharpness = (softcap / temperature).expand(x.shape[:2]).reshape(-1, 1)
    x = x.reshape(-1, x.shape[-1])
    size = ROWS if x.device.type == "cpu" else len(x)
    for rows in (slice(at, at + size) for at in range(0, len(x), size)):
        yield rows, x[rows], sharpness[rows]


class _Buffers(NamedTuple):
    scores: Tensor  # wide [tiles, R, tile] <- very big
    mass: Tensor  # compute dtype [R, tile]
    shifted: Tensor  # wide [rows of a block, tile]
    wide_mass: Tensor  # wide [rows of a block, tile]

    @classmethod
    def allocate(cls, x: Tensor, vocab: int, tile: int, block: int, wide: torch.dtype) -> _Buffers:
        rows = x.shape[0]
        scores = x.new_empty(-(-vocab // tile), rows, tile, dtype=wide)
        shifted, wide_mass = (x.new_empty(min(block, rows), tile, dtype=wide) for _ in range(2))
        return cls(scores, x.new_empty(rows, tile), shifted, wide_mass)

    def fit(self, x: Tensor, vocab: int) -> bool:
        """Whether they are of this vocabulary and width, and have room for the rows."""
        tiles, rows, tile = self.scores.shape
        wanted = (tile * (tiles - 1) < vocab <= tile * tiles, rows >= x.shape[0], self.mass.dtype == x.dtype)
        return all(wanted)

    def first(self, rows: int) -> _Buffers:
        return self._replace(scores=self.scores[:, :rows], mass=self.mass[:rows])


def _whole_blocks(vocab: int) -> int:
    return -(-vocab // DRAW_BLOCK) * DRAW_BLOCK


def _score(buffers: _Buffers, x: Tensor, table: Weight, softcap: float, workspace: Workspace) -> Tensor:
    """Fill `buffers.scores` with tanh(x · tableᵀ / softcap); return the maximum of every 512, [R, blocks]."""
    exact = buffers.mass.dtype == buffers.scores.dtype
    block = buffers.shifted.shape[0]
    peaks = []
    for part, tile in zip(_tiles(table, buffers.scores.shape[2]), buffers.scores, strict=True):
        size = part.shape[0]
        whole = size == tile.shape[1]
        out = None if not whole else tile if exact else buffers.mass
        logits = blocks.linear(x, part, workspace, scale=1 / softcap, out=out)
        tops = []
        for scores, raw in zip(tile.split(block), logits.split(block), strict=True):
            if out is not tile:
                scores[:, :size] = raw
            scores.tanh_()
            scores[:, size:] = _NOTHING
            tops.append(scores.unflatten(1, (-1, DRAW_BLOCK)).amax(-1))
        peaks.append(torch.cat(tops))
    return torch.cat(peaks, 1)


def _tiles(table: Weight, size: int) -> Iterator[Weight]:
    return (table[start : start + size] for start in range(0, table.shape[0], size))


def _weigh(
    buffers: _Buffers, table: Weight, top: Tensor, sharpness: Tensor, workspace: Workspace, fold: Fold | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mass of every 512 [R, blocks], the entropy [R] and the mean embedding [R, D].

    `fold` sees scores on the way.
    """
    exact = buffers.mass.dtype == buffers.scores.dtype
    block = buffers.shifted.shape[0]
    soft = top.new_zeros(top.shape[0], table.shape[1])
    moments, sums = [], []  # moment: Σ mass · log mass
    for i, (part, tile) in enumerate(zip(_tiles(table, buffers.scores.shape[2]), buffers.scores, strict=True)):
        pieces = zip(*(x.split(block) for x in (tile, top, sharpness, buffers.mass)), strict=True)
        for at, (scores, peak, sharp, stored) in enumerate(pieces):
            shifted = torch.sub(scores, peak, out=buffers.shifted[: len(scores)]).mul_(sharp)
            mass = torch.exp(shifted, out=stored if exact else buffers.wide_mass[: len(scores)])
            sums.append(mass.unflatten(1, (-1, DRAW_BLOCK)).sum(-1))
            if not exact:
                stored.copy_(mass)
            moments.append(shifted.mul_(mass).sum(-1, keepdim=True))
            if fold is not None:
                fold.add(i, at * block, scores, mass, peak, sharp)
        mass = buffers.mass[:, : part.shape[0]]
        blocks.mix(mass, part, workspace, into=soft)
    tiles = len(buffers.scores)
    # Sums of one tile follow each other: those of a block of rows in all tiles belong side by side.
    per_tile = len(sums) // tiles
    ends = torch.cat([torch.cat(sums[i::per_tile], 1) for i in range(per_tile)])
    moment = torch.cat(moments).view(tiles, -1, 1).sum(0)
    total = ends.sum(-1, keepdim=True)
    entropy = total.log() - moment / total
    return ends, entropy[:, 0], soft.div_(total).to(buffers.mass.dtype)


def _pick(scores: Tensor, block: Tensor) -> Tensor:
    """Pick one block of 512 for each row: scores [tiles, R, tile], block [R] → [R, 512]."""
    tiles, rows, tile = scores.shape
    per_tile = tile // DRAW_BLOCK
    parts = scores.view(tiles, rows, per_tile, DRAW_BLOCK)
    return parts[block // per_tile, torch.arange(rows, device=scores.device), block % per_tile]


def _draw(scores: Tensor, sums: Tensor, top: Tensor, sharpness: Tensor, u: Tensor) -> Tensor:
    """`reference.draw` from the blocks' sums [R, blocks]: only the block that is hit is looked into."""
    ends = sums.cumsum(-1)
    target = u * ends[:, -1:]
    block = (ends <= target).sum(-1, keepdim=True).clamp_(max=sums.shape[1] - 1)
    before = ends.gather(1, block) - sums.gather(1, block)
    inside = (_pick(scores, block[:, 0]) - top).mul_(sharpness).exp_().cumsum(-1)
    # The two levels round apart: keep the rest strictly inside the block's own sum, on a token that has mass.
    rest = torch.minimum(target - before, inside[:, -1:] * _BELOW_ONE)
    return (block[:, 0] * DRAW_BLOCK + (inside <= rest).sum(-1)).int()
