"""The vocabulary head: one float32 [L, V] array, worked through in blocks of the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from ...core.reference import _BELOW_ONE, DRAW_BLOCK
from .packed import Weight, mix, project

if TYPE_CHECKING:
    from ...core.ops import Ops

Array = mx.array

PART = 1 << 21
"""Scores worked on at a time: 8 MB of float32.

MLX allocates ahead of what it runs, on the CPU by up to a hundred operations, so parts that follow each other still
stand in memory together for a while: four arrays of scores at 8 million, under two at 67 million (256 × 262,144).
"""


def capped(raw: Array, softcap: float) -> Array:
    """Return softcap · tanh(raw / softcap) in float32."""
    return mx.tanh(raw.astype(mx.float32) / softcap) * softcap


def vocab_head(
    ops: Ops, x: Array, table: Weight, softcap: float, temperature: Array, u: Array
) -> tuple[Array, Array, Array, Array]:
    """Sampled token, argmax, entropy and mean embedding; see `Ops.vocab_head`.

    The same sums as `reference.vocab_head` and `reference.draw`, in the same order, but for the total.
    """
    vocab, shape = table.shape[0], u.shape
    rows, u = x.reshape(-1, x.shape[-1]), u.reshape(-1, 1)
    heat = mx.broadcast_to(temperature, shape).reshape(-1, 1)
    scores = capped(project(rows, table), softcap) / heat  # [N, V] <- very big
    top = scores.max(-1, keepdims=True)
    size = max(1, PART // (len(rows) * DRAW_BLOCK)) * DRAW_BLOCK
    sums, moments, means = [], [], []
    for at in range(0, vocab, size):
        if means:  # MLX would begin all parts at once, and hold them all
            scores = mx.depends([scores], [sums[-1], moments[-1], means[-1]])[0]
        shifted = scores[:, at : at + size] - top
        mass = mx.exp(shifted)
        moments.append((mass * shifted).sum(-1, keepdims=True))
        part = table[at : at + size]
        if isinstance(part, mx.array):  # costs nothing but where `pack` laid the table out for the other product
            part = mx.contiguous(part)
        means.append(mix(mass, part, x.dtype).astype(mx.float32))
        if mass.shape[1] % DRAW_BLOCK:
            mass = mx.pad(mass, [(0, 0), (0, -mass.shape[1] % DRAW_BLOCK)])
        sums.append(mass.reshape(len(rows), -1, DRAW_BLOCK).sum(-1))
    ends = mx.cumsum(sums := mx.concatenate(sums, -1), -1)  # [N, draw blocks]
    total = ends[:, -1:]
    entropy = mx.log(total) - sum(moments) / total
    soft = (sum(means) / total).astype(x.dtype)

    # The draw, in two levels.
    target = u * total
    block = mx.minimum((ends <= target).astype(mx.int32).sum(-1, keepdims=True), ends.shape[1] - 1)
    before = mx.take_along_axis(ends, block, -1) - mx.take_along_axis(sums, block, -1)
    column = block * DRAW_BLOCK + ops.arange(DRAW_BLOCK)  # [N, draw block]
    chosen = mx.take_along_axis(scores, mx.minimum(column, vocab - 1), -1)
    inside = mx.cumsum(mx.where(column < vocab, mx.exp(chosen - top), 0.0), -1)
    # The two levels round apart: keep the rest strictly inside the block's own sum, on a token that has mass.
    rest = mx.minimum(target - before, inside[:, -1:] * _BELOW_ONE)
    token = block * DRAW_BLOCK + (inside <= rest).astype(mx.int32).sum(-1, keepdims=True)
    argmax = mx.argmax(scores, -1).astype(mx.int32)
    return token.reshape(shape), argmax.reshape(shape), entropy.reshape(shape), soft.reshape(x.shape)
