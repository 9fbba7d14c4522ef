"""The vocabulary head: a float32 [N, V] array at a time, worked through in blocks of the vocabulary."""

from __future__ import annotations

import mlx.core as mx

from ...core.ops import Ops
from ...core.reference import _BELOW_ONE, DRAW_BLOCK
from .packed import Weight, mix, project

Array = mx.array

PART = 1 << 21
"""Scores worked on at a time: 8 MB of float32.

MLX allocates ahead of what it runs, on the CPU by up to a hundred operations, so parts that follow each other still
stand in memory together for a while: four arrays of scores at 8 million, under two at 67 million (256 × 262,144).
"""

HELD = 1 << 26
"""Scores held at a time, 256 × 262,144; rows beyond that follow."""


def capped(raw: Array, softcap: float) -> Array:
    """Return softcap · tanh(raw / softcap) in float32."""
    return mx.tanh(raw.astype(mx.float32) / softcap) * softcap


def vocab_head(
    ops: Ops, x: Array, table: Weight, softcap: float, temperature: Array, u: Array
) -> tuple[Array, Array, Array, Array]:
    """Sampled token, argmax, entropy and mean embedding; see `Ops.vocab_head`.

    The same sums as its default body and `reference.draw`, in the same order, but for the total.
    """
    shape, most = u.shape, max(1, HELD // table.shape[0])
    rows, u = x.reshape(-1, x.shape[-1]), u.reshape(-1, 1)
    temperatures = mx.broadcast_to(temperature, shape).reshape(-1, 1)
    found: list[tuple[Array, ...]] = []
    for at in range(0, len(rows), most):
        part = rows[at : at + most]
        if found:  # one after the other
            part = mx.depends([part], list(found[-1]))[0]
        found.append(_rows(ops, part, table, softcap, temperatures[at : at + most], u[at : at + most]))
    parts = found[0] if len(found) == 1 else tuple(mx.concatenate(list(column)) for column in zip(*found, strict=True))
    token, argmax, entropy, soft = parts
    return token.reshape(shape), argmax.reshape(shape), entropy.reshape(shape), soft.reshape(x.shape)


def _rows(
    ops: Ops, rows: Array, table: Weight, softcap: float, temperatures: Array, u: Array
) -> tuple[Array, Array, Array, Array]:
    """rows [N, D], temperatures and u [N, 1] → token, argmax and entropy [N, 1], soft [N, D]."""
    vocab = table.shape[0]
    scores = capped(project(rows, table), softcap) / temperatures  # [N, V] <- very big
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
        means.append(mix(mass, part, rows.dtype).astype(mx.float32))
        if mass.shape[1] % DRAW_BLOCK:
            mass = mx.pad(mass, [(0, 0), (0, -mass.shape[1] % DRAW_BLOCK)])
        sums.append(mass.reshape(len(rows), -1, DRAW_BLOCK).sum(-1))
    ends = mx.cumsum(sums := mx.concatenate(sums, -1), -1)  # [N, draw blocks]
    total = ends[:, -1:]
    entropy = mx.log(total) - sum(moments) / total
    soft = (sum(means) / total).astype(rows.dtype)

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
    return token, mx.argmax(scores, -1, keepdims=True).astype(mx.int32), entropy, soft
