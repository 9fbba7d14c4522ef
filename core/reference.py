"""What the default bodies in `ops.py` are built of, in primitives: the oracle that fast versions are tested on.

Everything is differentiable on a backend whose primitives are, which is how `examples/sudoku` trains on this graph.
Source of all formulas: transformers 5.23, `models/diffusion_gemma`, float32 eager path.
"""

from __future__ import annotations

import math

from .parts import Array, Rope, Span
from .primitives import Primitives

DRAW_BLOCK = 512
"""Tokens per block of the two-level draw. A flat float32 running sum over 262,144 probabilities picks the exact token
for as few as 59 % of draws; in two levels it is 99 %."""

_BELOW_ONE = 1.0 - 2.0**-23


def gelu(ops: Primitives, x: Array) -> Array:
    """GELU in its tanh form (Hendrycks & Gimpel 2016)."""
    wide = ops.cast(x, ops.wide)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return ops.cast(0.5 * wide * (1.0 + ops.unary(inner, "tanh")), ops.dtype)


def softmax(ops: Primitives, x: Array) -> Array:
    shifted = ops.unary(x - ops.reduce(x, "max", -1, True), "exp")
    return shifted / ops.reduce(shifted, "sum", -1, True)


def rotate(ops: Primitives, x: Array, rope: Rope) -> Array:
    """Rotate pairs (i, i + A/2) of x [B, H, L, A]."""
    a, b = ops.split(x, 2, -1)
    return ops.concat([a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin], -1)


def causal_queries(span: Span, length: int) -> int:
    """Return how many of so many queries are causal."""
    return length - span.canvas if span.causal else 0


def visible(ops: Primitives, span: Span, length: int, cached: int) -> Array:
    """Return the span as a mask: bool [B, 1, 1, L, cached + L]."""
    window = span.window or 1 << 30
    i = ops.reshape(ops.arange(length), (1, length, 1))
    j = ops.reshape(ops.arange(cached + length), (1, 1, cached + length))
    own = j - cached  # the query-side key that column j is, where it is one
    held = ops.reshape(span.held, (-1, 1, 1))
    causal = causal_queries(span, length)
    place = ops.where(i < causal, i, causal)  # a canvas's window ends where the canvas begins
    past = (j < held) & (place + held - j < window)
    near = ((own <= i) | (i >= causal)) & (place - own < window)
    mask = ((own < 0) & past) | ((own >= 0) & near)  # [B, L, cached + L]
    return ops.reshape(mask, (mask.shape[0], 1, 1, length, cached + length))


def slots_of(ops: Primitives, x: Array, slots: Array | None) -> Array:
    """Return the rows' own slots of a cache's array: [N, K, S, A] → [B, K, S, A]."""
    return x if slots is None else ops.take(x, slots, 0)


def put_back(ops: Primitives, x: Array, rows: Array, slots: Array | None) -> Array:
    """Return a cache's array [N, K, S, A] with the slots of a pass's rows replaced by [B, K, S, A]."""
    if slots is None:
        return rows
    number = ops.reshape(ops.arange(x.shape[0]), (x.shape[0], 1))
    match = number == ops.reshape(slots, (1, -1))  # [N, B]
    row = ops.reduce(ops.cast(match, "int32"), "argmax", -1)
    mine = ops.reshape(ops.reduce(match, "any", -1), (x.shape[0], 1, 1, 1))
    return ops.where(mine, ops.take(rows, row, 0), x)


def appended(ops: Primitives, held: Array, fresh: Array, cached: int, length: int, window: int | None) -> Array:
    """Return where each entry of a slot comes from when rows are appended, int32 [B, S]: an index into [cached + L].

    Valid entries lie end to end, the new ones behind the `held` old ones; with a window the newest `window − 1` of them
    come to the front.
    """
    total = held + fresh
    drop = total * 0
    if window is not None:
        drop = ops.where(total > window - 1, total - (window - 1), drop)
    source = ops.reshape(ops.arange(cached), (1, cached)) + ops.reshape(drop, (-1, 1))  # index among the valid ones
    gap = ops.reshape(cached - held, (-1, 1))  # unused entries between the old valid ones and the new
    source = ops.where(source < ops.reshape(held, (-1, 1)), source, source + gap)
    return ops.where(source < cached + length, source, cached + length - 1)  # beyond the valid ones: anything


def draw(ops: Primitives, mass: Array, u: Array) -> Array:
    """Sample by inverse CDF in two levels: mass wide [B, L, V] (any positive total), u [B, L] → int32 [B, L].

    Token v is drawn when u·total lies in [cumulative before v, cumulative with v); one of zero mass never is.
    """
    batch, length, vocab = mass.shape
    blocks = -(-vocab // DRAW_BLOCK)
    padding = blocks * DRAW_BLOCK - vocab
    mass = ops.concat([mass, ops.take(mass[:, :, :1] * 0.0, ops.arange(padding) * 0, 2)], -1)
    mass = ops.reshape(mass, (batch, length, blocks, DRAW_BLOCK))
    sums = ops.reduce(mass, "sum", -1)  # [B, L, blocks]
    ends = ops.cumsum(sums, -1)
    target = ops.reshape(ops.cast(u, ops.wide), (batch, length, 1)) * ends[:, :, -1:]
    block = ops.reduce(ops.cast(ends <= target, "int32"), "sum", -1, True)
    block = ops.where(block < blocks, block, blocks - 1)  # [B, L, 1]
    before = ops.take_along(ends, block, -1) - ops.take_along(sums, block, -1)
    inside = ops.take_along(mass, ops.reshape(block, (batch, length, 1, 1)), 2)
    inside = ops.cumsum(ops.reshape(inside, (batch, length, DRAW_BLOCK)), -1)
    # The two levels round apart: keep the rest strictly inside the block's own sum, on a token that has mass.
    limit = inside[:, :, -1:] * _BELOW_ONE
    rest = target - before
    rest = ops.where(rest < limit, rest, limit)
    within = ops.reduce(ops.cast(inside <= rest, "int32"), "sum", -1)
    return ops.reshape(block, (batch, length)) * DRAW_BLOCK + within
