"""Which rows go to which expert, decided and sorted on the device: nothing is read back, all sizes are known before.

Shapes: r [N, D] bf16, proj [E, D] bf16 → weights float32 [N, k], index int32 [N, k], and a `Schedule`.
Cost at N = 256, D = 2816, E = 128, k = 8: 0.55 GFLOP in three bf16 products, 2.2 MB; the floor is three launches.
Tolerance: scores have float32's accuracy (a rounded score can pick another expert), so sets of experts equal the
float64 oracle's but for ties within 1e-6 of the largest score, and weights keep to the law for float32.

    scores     partial scores over a slice of D: r·scale is cut into three bf16 parts, which together hold float32's 24
               bits, and each is multiplied by proj exactly. The norm has no weight, so its factor is a row's own and is
               applied to the sum.
    choose     adds the slices up, takes the k largest (of equals the first), softmax over them (which is the softmax
               over all, renormalised), times per_expert_scale
    schedule   a stable counting sort. One program for each expert counts all pairs and ranks its own: no atomics, the
               same order on every run
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A launch's options, and constants where numbers are meant, are beyond Triton's type hints.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .configs import card
from .unpack import activations, wait_turn

Tensor = torch.Tensor

_SLICE = 256  # of D, for one program of `scores`


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """(row, choice) pairs sorted by expert, and the tiles that cover them."""

    order: Tensor
    """int32 [N·k]: the pairs, row·k + choice, expert by expert and within one in order."""
    tiles: Tensor
    """int32 [3, T]: each tile's expert, its first place in `order`, and the one after its last. T is the most that N·k
    pairs can need; tiles that are left over are empty, and last."""
    tile_rows: int
    """Places in a tile at most."""

    @property
    def count(self) -> int:
        return self.tiles.shape[1]


def most_tiles(pairs: int, experts: int, tile_rows: int) -> int:
    """Return how many tiles any assignment of so many pairs can need: every expert hit once, the rest in full tiles."""
    hit = min(pairs, experts)
    return hit + (pairs - hit) // tile_rows


def route(
    r: Tensor, proj: Tensor, scale: Tensor, per_expert_scale: Tensor, k: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Choose experts: r [N, D], proj [E, D], scale [D], per_expert_scale [E] → float32 [N, k], int32 [N, k].

    Raises:
        DgemmaError: r is not bfloat16 [N, D].
    """
    r = activations(r)
    rows, width = r.shape
    experts = proj.shape[0]
    slices = triton.cdiv(width, _SLICE)
    partial = torch.empty((slices, rows, experts), dtype=torch.float32, device=r.device)
    squares = torch.empty((slices, rows), dtype=torch.float32, device=r.device)
    weights = torch.empty((rows, k), dtype=torch.float32, device=r.device)
    index = torch.empty((rows, k), dtype=torch.int32, device=r.device)
    early = card(r.device).early
    if rows:
        padded = max(16, triton.next_power_of_2(experts))
        scores_kernel[(triton.cdiv(rows, 16), slices)](
            r, proj, scale, partial, squares, rows, width**-0.5, WIDTH=width, EXPERTS=experts, PADDED=padded, ROWS=16,
            SLICE=_SLICE, BLOCK=64, EARLY=early, num_warps=4, num_stages=3, launch_pdl=early,
        )  # fmt: skip
        choose_kernel[(triton.cdiv(rows, 2),)](
            partial, squares, per_expert_scale, weights, index, rows, eps, SLICES=slices, WIDTH=width,
            EXPERTS=experts, PADDED=padded, K=k, SLOTS=triton.next_power_of_2(k), ROWS=2, EARLY=early,
            num_warps=2, launch_pdl=early,
        )  # fmt: skip
    return weights, index


def schedule(index: Tensor, experts: int, tile_rows: int) -> Schedule:
    """Sort pairs by expert: index int32 [N, k] → `Schedule` with tiles of at most `tile_rows`."""
    index = index.contiguous()
    pairs = index.numel()
    count = most_tiles(pairs, experts, tile_rows)
    order = torch.empty(pairs, dtype=torch.int32, device=index.device)
    tiles = torch.empty((3, count), dtype=torch.int32, device=index.device)
    early = card(index.device).early
    if pairs:
        schedule_kernel[(experts,)](
            index, order, tiles, pairs, count, EXPERTS=experts, BINS=max(2, triton.next_power_of_2(experts)),
            TILE=tile_rows, BLOCK=min(2048, max(16, triton.next_power_of_2(pairs))), EARLY=early, num_warps=8,
            launch_pdl=early,
        )  # fmt: skip
    return Schedule(order=order, tiles=tiles, tile_rows=tile_rows)


@triton.jit
def scores_kernel(
    r, proj, scale, partial, squares, count, root,
    WIDTH: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, SLICE: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Partial scores [slices, N, E] of r · scale · root, and partial sums of r's squares [slices, N]."""
    wait_turn(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    expert = tl.arange(0, PADDED)
    live = row < count
    real = expert < EXPERTS
    acc = tl.zeros((ROWS, PADDED), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for at in tl.range(0, SLICE, BLOCK):
        d = part * SLICE + at + tl.arange(0, BLOCK)
        inside = d < WIDTH
        x = tl.load(r + row[:, None].to(tl.int64) * WIDTH + d[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        w = tl.load(proj + expert[:, None] * WIDTH + d[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        x = x.to(tl.float32)
        square += tl.sum(x * x, 1)
        x = x * (tl.load(scale + d, mask=inside, other=0.0).to(tl.float32) * root)[None, :]
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        w = tl.trans(w.to(tl.bfloat16))
        acc = tl.dot(high, w, tl.dot(middle, w, tl.dot(low, w, acc)))
    rows = part.to(tl.int64) * count + row
    tl.store(partial + rows[:, None] * EXPERTS + expert[None, :], acc, mask=live[:, None] & real[None, :])
    tl.store(squares + rows, square, mask=live)


@triton.jit
def choose_kernel(
    partial, squares, per_expert_scale, weights, index, count, eps,
    SLICES: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Weights and experts of each row, from the partial scores."""
    wait_turn(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, PADDED)
    live = row < count
    real = expert < EXPERTS
    score = tl.zeros((ROWS, PADDED), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for part in tl.static_range(SLICES):
        rows = part * count + row
        mask = live[:, None] & real[None, :]
        score += tl.load(partial + rows[:, None].to(tl.int64) * EXPERTS + expert[None, :], mask=mask, other=0.0)
        square += tl.load(squares + rows, mask=live, other=0.0)
    score = score * tl.rsqrt(square / WIDTH + eps)[:, None]
    score = tl.where(real[None, :], score, float("-inf"))
    top = tl.max(score, 1)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros((ROWS, SLOTS), tl.int32)
    mass = tl.zeros((ROWS, SLOTS), tl.float32)
    for j in tl.static_range(K):
        best, at = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        at = tl.minimum(at, EXPERTS - 1)  # of a row of NaN any index may come, and an expert it has to be
        here = slot[None, :] == j
        chosen = tl.where(here, at[:, None], chosen)
        mass = tl.where(here, tl.exp(best - top)[:, None], mass)
        score = tl.where(expert[None, :] == at[:, None], float("-inf"), score)
    mask = live[:, None] & (slot < K)[None, :]
    own = tl.load(per_expert_scale + chosen, mask=mask, other=0.0).to(tl.float32)
    place = row[:, None] * K + slot[None, :]
    tl.store(weights + place, mass / tl.sum(mass, 1)[:, None] * own, mask=mask)
    tl.store(index + place, chosen, mask=mask)


@triton.jit
def schedule_kernel(
    index, order, tiles, pairs, count,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program for each expert: ranks the expert's pairs, and writes them and the expert's tiles."""
    wait_turn(EARLY)
    own = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    expert = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for first in tl.range(0, pairs, BLOCK):
        pair = first + place
        chosen = tl.load(index + pair, mask=pair < pairs, other=0)
        counts += tl.histogram(chosen, BINS, mask=pair < pairs)
    start = tl.sum(tl.where(expert < own, counts, 0))
    mine = tl.sum(tl.where(expert == own, counts, 0))
    needed = (counts + TILE - 1) // TILE
    tile = tl.sum(tl.where(expert < own, needed, 0))

    rank = start
    for first in tl.range(0, pairs, BLOCK):
        pair = first + place
        hit = tl.load(index + pair, mask=pair < pairs, other=-1) == own
        tl.store(order + rank + tl.cumsum(hit.to(tl.int32)) - 1, pair, mask=hit)
        rank += tl.sum(hit.to(tl.int32))

    for first in tl.range(0, (mine + TILE - 1) // TILE, BLOCK):
        t = first + place
        real = t < (mine + TILE - 1) // TILE
        tl.store(tiles + tile + t, own + 0 * t, mask=real)
        tl.store(tiles + count + tile + t, start + t * TILE, mask=real)
        tl.store(tiles + 2 * count + tile + t, tl.minimum(start + t * TILE + TILE, start + mine), mask=real)
    if own == EXPERTS - 1:
        for first in tl.range(tl.sum(needed), count, BLOCK):
            t = first + place
            for line in tl.static_range(3):
                tl.store(tiles + line * count + t, 0 * t, mask=t < count)
