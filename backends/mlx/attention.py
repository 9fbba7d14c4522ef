"""Attention over a cache that is never copied, rotary embedding, and the cache's growth.

A canvas's keys cannot be written behind the cached ones in place: MLX's arrays are values, and one that the next pass
still needs is copied on write. So full layers score cache and canvas apart and share one softmax, and only sliding
layers, whose cache is bounded by the window, join the two and use the fused kernel.
"""

from __future__ import annotations

import math

import mlx.core as mx

from ...core.ops import Ops
from ...core.parts import KV, Rope, Span
from ...core.reference import causal_queries, slots_of
from .caches import stepped

Array = mx.array

SCORES = 1 << 26
"""Attention scores of one full layer held at a time; queries beyond that go in blocks."""


def rotate(x: Array, weight: Array, rope: Rope) -> Array:
    """Multiply by a weight [A] and rotate pairs (i, i + A/2): x [B, L, H, A] → [B, H, L, A].

    `mx.fast.rope` takes its angles' cosines from Metal's fast, inexact ones; here they come from the graph.
    """
    batch, length, heads, width = x.shape
    pairs = x.reshape(batch, length, heads, 2, width // 2).transpose(0, 2, 1, 3, 4)
    pairs = pairs.astype(mx.float32)  # and fused: rounded once
    weight = weight.reshape(2, width // 2)
    cos, sin = rope.cos[:, :, :, None], rope.sin[:, :, :, None]  # [B or 1, 1, L, 1, A/2]
    signed = sin * mx.array([[-1.0], [1.0]])
    # Reversing the pair is a view, so that on Metal the rotation is one kernel, and it writes the new order of axes.
    turned = pairs * weight * cos + pairs[:, :, :, ::-1] * weight[::-1] * signed
    return turned.astype(x.dtype).reshape(batch, heads, length, width)


def attention(ops: Ops, q: Array, k: Array, v: Array, context: KV, span: Span) -> Array:
    """q [B, H, L, A], k and v [B, K, L, A], context [N, K, S, A] → [B, H, L, A]."""
    batch, heads, length, _ = q.shape
    context = KV(*(slots_of(ops, x, span.slots) for x in context))
    cached = context.keys.shape[2]
    if span.window is None and cached:
        block = max(1, SCORES // (batch * heads * (cached + length)))
        parts = []
        for at in range(0, length, block):
            part = q[:, :, at : at + block]
            if parts:  # MLX would begin all blocks at once, and hold the scores of all
                part = mx.depends([part], [parts[-1]])[0]
            parts.append(_apart(part, k, v, context, visible(ops, span, at, part.shape[2], length, cached)))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, 2)
    if cached:
        k, v = (mx.concatenate([old, new], 2) for old, new in zip(context, (k, v), strict=True))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=visible(ops, span, 0, length, length, cached))


def _apart(q: Array, k: Array, v: Array, context: KV, mask: Array | None) -> Array:
    """Attention over context and own keys with one softmax; query heads that share a key head are stacked."""
    batch, heads, length, width = q.shape
    kv_heads, cached = k.shape[1], context.keys.shape[2]
    stacked = q.reshape(batch, kv_heads, -1, width)
    scores = mx.concatenate([stacked @ context.keys.swapaxes(-1, -2), stacked @ k.swapaxes(-1, -2)], -1)
    if mask is not None:
        scores = scores.reshape(batch, heads, length, -1)
        scores = mx.where(mask, scores, -math.inf).reshape(batch, kv_heads, heads // kv_heads * length, -1)
    weights = mx.softmax(scores, axis=-1, precise=True)
    out = weights[..., :cached] @ context.values + weights[..., cached:] @ v
    return out.reshape(q.shape)


def visible(ops: Ops, span: Span, first: int, queries: int, length: int, cached: int) -> Array | None:
    """Return the span as a mask, bool [B, 1, queries or 1, cached + length], or None where all is seen.

    The queries are `first` … `first + queries` of `length`.
    """
    j = ops.arange(cached + length)
    if not span.causal:
        # `held` is at most window − 1, and a canvas sees all of that.
        return ((j < span.held[:, None]) | (j >= cached))[:, None, None] if cached else None
    held = span.held[:, None, None]
    i = ops.arange(length)[first : first + queries, None]
    own = j - cached
    behind = mx.where(own < 0, held + i - j, i - own)  # how far the key lies behind the query
    seen = (behind >= 0) & ((own >= 0) | (j < held))
    if span.canvas:
        inside = i - causal_queries(span, length)  # how far the query lies behind the canvas's first
        seen |= (inside >= 0) & (own > i)
        behind = behind - mx.maximum(inside, 0)
    if span.window is not None:
        seen &= behind < span.window
    return seen[:, None]


def append(context: KV, k: Array, v: Array, span: Span, fresh: int | Array) -> KV:
    """Return a cache [B, K, S', A] of each row's valid entries and the first `fresh` of k and v [B, K, L, A].

    S' is S + L, or S + fresh where that is one number, in the steps of `caches.stepped`, and no more than the window.
    """
    if isinstance(fresh, int):
        k, v = k[:, :, :fresh], v[:, :, :fresh]
    batch, cached, length = len(k), context.keys.shape[2], k.shape[2]
    most, size = cached + length, stepped(cached + length)
    row = mx.arange(batch)
    starts, begins = mx.stack([row, span.held], 1), None
    if span.window is not None:
        size = min(size, span.window - 1)
        if most > size:
            begins = mx.stack([row, mx.maximum(span.held + fresh - size, 0)], 1)

    def join(old: Array, new: Array) -> Array:
        heads, width = new.shape[1], new.shape[3]
        padding = mx.zeros((batch, heads, max(0, size - most), width), new.dtype)
        both = mx.concatenate([part for part in (old, new, padding) if part.shape[2]], 2)
        for i in range(batch if cached else 0):
            # In place. Where a row's slot was full, its new entries stand there already.
            both = mx.slice_update(both, new[i : i + 1], starts[i], (0, 2))
        if begins is None:
            return both
        shape = (1, heads, size, width)
        kept = [mx.slice(both, begins[i], (0, 2), shape) for i in range(batch)]
        return kept[0] if batch == 1 else mx.concatenate(kept)

    return KV(join(context.keys, k), join(context.values, v))
