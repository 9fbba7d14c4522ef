"""The vocabulary head: a float32 [N, V] array at a time, worked through in blocks of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import NamedTuple

import mlx.core as mx

from ...core.ops import Ops
from ...core.reference import _BELOW_ONE, DRAW_BLOCK
from .classes import Layout
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
    shape, u = u.shape, u.reshape(-1, 1)
    token, argmax, entropy, soft = _in_parts(
        x, table, temperature, lambda rows, heat, at: _rows(ops, rows, table, softcap, heat, u[at])
    )
    return token.reshape(shape), argmax.reshape(shape), entropy.reshape(shape), soft.reshape(x.shape)


def class_head(
    x: Array, table: Weight, softcap: float, temperature: Array, layout: Callable[[int], Layout]
) -> tuple[Array, tuple[Array, ...]]:
    """Mean embedding, and mass, best, score and moment [B, L, C]; see `Ops.class_head`.

    `layout` gives the classes' by parts of so many tokens.
    """
    soft, *found = _in_parts(
        x, table, temperature, lambda rows, heat, _: _class_rows(rows, table, softcap, heat, layout)
    )
    return soft.reshape(x.shape), tuple(one.reshape(*x.shape[:2], -1) for one in found)


def _in_parts(
    x: Array, table: Weight, temperature: Array, head: Callable[[Array, Array, slice], tuple[Array, ...]]
) -> tuple[Array, ...]:
    """Run `head` over rows [N, D] and their temperatures [N, 1], so many at a time as have their scores in memory."""
    rows, most = x.reshape(-1, x.shape[-1]), max(1, HELD // table.shape[0])
    temperatures = mx.broadcast_to(temperature, x.shape[:2]).reshape(-1, 1)
    found: list[tuple[Array, ...]] = []
    for at in (slice(start, start + most) for start in range(0, len(rows), most)):
        part = rows[at]
        if found:  # one after the other
            part = mx.depends([part], list(found[-1]))[0]
        found.append(head(part, temperatures[at], at))
    return found[0] if len(found) == 1 else tuple(mx.concatenate(list(column)) for column in zip(*found, strict=True))


class _Weighed(NamedTuple):
    scores: Array  # float32 [N, V] <- very big
    top: Array  # [N, 1]
    sums: Array  # [N, draw blocks]
    moment: Array  # [N, 1]: Σ mass · log mass
    mean: Array  # [N, D], times the total mass
    folded: list[Array]  # of each part: what `fold` makes of it


def _weigh(
    rows: Array, table: Weight, softcap: float, temperatures: Array, fold: Callable[..., Array] | None = None
) -> _Weighed:
    """Work through the vocabulary: rows [N, D], temperatures [N, 1]. `fold` sees each part: its number, scores, mass
    and mass · log mass, [N, part] each."""
    vocab = table.shape[0]
    scores = capped(project(rows, table), softcap) / temperatures  # [N, V] <- very big
    top = scores.max(-1, keepdims=True)
    size = part_size(len(rows))
    sums, moments, means, folded = ([] for _ in range(4))
    for at in range(0, vocab, size):
        if means:  # MLX would begin all parts at once, and hold them all
            scores = mx.depends([scores], [sums[-1], moments[-1], means[-1], *folded[-1:]])[0]
        shifted = scores[:, at : at + size] - top
        mass = mx.exp(shifted)
        moment = mass * shifted
        moments.append(moment.sum(-1, keepdims=True))
        if fold is not None:
            folded.append(fold(at // size, scores[:, at : at + size], mass, moment))
        part = table[at : at + size]
        if isinstance(part, mx.array):  # costs nothing but where `pack` laid the table out for the other product
            part = mx.contiguous(part)
        means.append(mix(mass, part, rows.dtype).astype(mx.float32))
        if mass.shape[1] % DRAW_BLOCK:
            mass = mx.pad(mass, [(0, 0), (0, -mass.shape[1] % DRAW_BLOCK)])
        sums.append(mass.reshape(len(rows), -1, DRAW_BLOCK).sum(-1))
    return _Weighed(scores, top, mx.concatenate(sums, -1), reduce(add, moments), reduce(add, means), folded)


def part_size(rows: int) -> int:
    """Return how many tokens are worked on at a time for so many rows."""
    return max(1, PART // (rows * DRAW_BLOCK)) * DRAW_BLOCK


def _rows(
    ops: Ops, rows: Array, table: Weight, softcap: float, temperatures: Array, u: Array
) -> tuple[Array, Array, Array, Array]:
    """rows [N, D], temperatures and u [N, 1] → token, argmax and entropy [N, 1], soft [N, D]."""
    vocab = table.shape[0]
    scores, top, sums, moment, mean, _ = _weigh(rows, table, softcap, temperatures)
    ends = mx.cumsum(sums, -1)  # [N, draw blocks]
    total = ends[:, -1:]
    entropy = mx.log(total) - moment / total
    soft = (mean / total).astype(rows.dtype)

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


def _class_rows(
    rows: Array, table: Weight, softcap: float, temperatures: Array, layout: Callable[[int], Layout]
) -> tuple[Array, ...]:
    """rows [N, D], temperatures [N, 1] → soft [N, D], and mass, best, score and moment [N, C]."""
    mine = layout(part_size(len(rows)))
    weighed = _weigh(rows, table, softcap, temperatures, mine.fold)
    total = mx.cumsum(weighed.sums, -1)[:, -1:]
    soft = (weighed.mean / total).astype(rows.dtype)
    return soft, *mine.masses(weighed.folded, weighed.scores, weighed.top, total)
