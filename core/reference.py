"""Default bodies of the fused ops, in primitives: what each op means, and the oracle that fast versions are tested on.

Every body is differentiable on a backend whose primitives are, which is how `examples/sudoku` trains on this graph.
Source of all formulas: transformers 5.23, `models/diffusion_gemma`, float32 eager path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import Attention, Experts, Layer, Router
    from .ops import KV, Array, Ops, Rope, Span

DRAW_BLOCK = 512
"""Tokens per block of the two-level draw. A flat float32 running sum over 262,144 probabilities picks the exact token
for as few as 59 % of draws; in two levels it is 99 %."""

_BELOW_ONE = 1.0 - 2.0**-23


def embed(ops: Ops, table: Array, tokens: Array, scale: float) -> Array:
    return ops.take(table, tokens, 0) * ops.rounded(scale)


def linear(ops: Ops, x: Array, weight: Array) -> Array:
    return ops.matmul(x, ops.transpose(weight, (1, 0)))


def rms_norm(ops: Ops, x: Array, weight: Array | None, eps: float) -> Array:
    wide = ops.cast(x, ops.wide)
    normed = wide * ops.unary(ops.reduce(wide * wide, "mean", -1, True) + eps, "rsqrt")
    if weight is not None:
        normed = normed * ops.cast(weight, ops.wide)
    return ops.cast(normed, ops.dtype)


def norm_add(ops: Ops, x: Array, residual: Array, weight: Array, eps: float) -> Array:
    return residual + ops.rms_norm(x, weight, eps)


def gelu(ops: Ops, x: Array) -> Array:
    """GELU in its tanh form (Hendrycks & Gimpel 2016)."""
    wide = ops.cast(x, ops.wide)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return ops.cast(0.5 * wide * (1.0 + ops.unary(inner, "tanh")), ops.dtype)


def geglu(ops: Ops, x: Array, gate: Array, up: Array) -> Array:
    return gelu(ops, ops.linear(x, gate)) * ops.linear(x, up)


def softmax(ops: Ops, x: Array) -> Array:
    shifted = ops.unary(x - ops.reduce(x, "max", -1, True), "exp")
    return shifted / ops.reduce(shifted, "sum", -1, True)


def rotate(ops: Ops, x: Array, rope: Rope) -> Array:
    """Rotate pairs (i, i + A/2) of x [B, H, L, A]."""
    a, b = ops.split(x, 2, -1)
    return ops.concat([a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin], -1)


def qkv_norm_rope(ops: Ops, x: Array, attention: Attention, rope: Rope) -> tuple[Array, Array, Array]:
    config, eps = attention.config, attention.eps

    def heads(y: Array, count: int) -> Array:
        y = ops.reshape(y, (x.shape[0], x.shape[1], count, config.head_dim))
        return ops.transpose(y, (0, 2, 1, 3))  # [B, count, L, A]

    q = heads(ops.linear(x, attention.q_proj), config.heads)
    k = heads(ops.linear(x, attention.k_proj), config.kv_heads)
    # A full layer has no v_proj: its value is the key projection before the key's norm.
    v = k if attention.v_proj is None else heads(ops.linear(x, attention.v_proj), config.kv_heads)
    q = rotate(ops, ops.rms_norm(q, attention.q_norm, eps), rope)
    k = rotate(ops, ops.rms_norm(k, attention.k_norm, eps), rope)
    return q, k, ops.rms_norm(v, None, eps)


def route(ops: Ops, r: Array, router: Router) -> tuple[Array, Array]:
    """Choose experts: r [N, D] → weights wide [N, k] and expert indices int32 [N, k]."""
    scale = ops.cast(router.scale, ops.dtype) * ops.rounded(r.shape[-1] ** -0.5)
    scores = ops.linear(ops.rms_norm(r, None, router.eps) * scale, router.proj)
    top, index = ops.top_k(softmax(ops, ops.cast(scores, ops.wide)), router.experts_per_token)
    top = top / ops.reduce(top, "sum", -1, True)
    return top * ops.cast(ops.take(router.per_expert_scale, index, 0), ops.wide), index


def moe(ops: Ops, h: Array, r: Array, router: Router, experts: Experts) -> Array:
    batch, length, width = h.shape
    rows, k = batch * length, router.experts_per_token
    weights, index = route(ops, ops.reshape(r, (rows, width)), router)
    flat = ops.reshape(index, (rows * k,))
    order = ops.argsort(flat)  # (token, choice) pairs, expert by expert
    ids = ops.reshape(ops.arange(router.experts), (router.experts, 1))
    counts = ops.reduce(ops.cast(ids == ops.reshape(flat, (1, rows * k)), "int32"), "sum", -1)
    x = ops.take(ops.reshape(h, (rows, width)), order // k, 0)
    gate, up = ops.split(ops.grouped_matmul(x, experts.gate_up_proj, counts), 2, -1)
    out = ops.grouped_matmul(gelu(ops, gate) * up, experts.down_proj, counts)
    back = ops.take(out, ops.argsort(order), 0)  # argsort of a permutation is its inverse
    back = ops.reshape(ops.cast(back, ops.wide), (rows, k, width)) * ops.reshape(weights, (rows, k, 1))
    return ops.cast(ops.reshape(ops.reduce(back, "sum", 1), (batch, length, width)), ops.dtype)


def attention(ops: Ops, q: Array, k: Array, v: Array, context: KV, span: Span) -> Array:
    batch, heads, length, width = q.shape
    kv_heads, cached = k.shape[1], context.keys.shape[2]
    keys = ops.concat([context.keys, k], 2)  # [B, K, S+L, A]
    values = ops.concat([context.values, v], 2)
    q = ops.reshape(q, (batch, kv_heads, heads // kv_heads * length, width))  # query heads share a key-value head
    scores = ops.cast(ops.matmul(q, ops.transpose(keys, (0, 1, 3, 2))), ops.wide)
    scores = ops.reshape(scores, (batch, kv_heads, heads // kv_heads, length, cached + length))
    scores = ops.where(visible(ops, span, batch, length, cached), scores, -math.inf)
    weights = ops.reshape(ops.cast(softmax(ops, scores), ops.dtype), (batch, kv_heads, -1, cached + length))
    out = ops.reshape(ops.matmul(weights, values), (batch, heads, length, width))
    return ops.reshape(ops.transpose(out, (0, 2, 1, 3)), (batch, length, heads * width))


def visible(ops: Ops, span: Span, batch: int, length: int, cached: int) -> Array:
    """Return the span as a mask: bool [B or 1, 1, 1, L, cached + L]."""
    window = span.window or 1 << 30
    i = ops.reshape(ops.arange(length), (1, length, 1))
    j = ops.reshape(ops.arange(cached + length), (1, 1, cached + length))
    own = j - cached  # the query-side key that column j is, where it is one
    rows = span.rows if isinstance(span.rows, int) else ops.reshape(span.rows, (-1, 1, 1))
    causal = span.causal_rows(length)
    place = ops.where(i < causal, i, causal)  # a canvas's window ends where the canvas begins
    past = (j < rows) & (place + rows - j < window)
    near = ((own <= i) | (i >= causal)) & (place - own < window)
    mask = ((own < 0) & past) | ((own >= 0) & near)  # [B or 1, L, cached + L]
    return ops.reshape(mask, (mask.shape[0], 1, 1, length, cached + length))


def new_cache(ops: Ops, batch: int, kv_heads: int, head_dim: int) -> KV:
    from .ops import KV

    empty = ops.reshape(ops.asarray([], ops.dtype), (batch, kv_heads, 0, head_dim))
    return KV(empty, empty)


def cache_write(ops: Ops, context: KV, k: Array, v: Array, span: Span, fresh: int | Array) -> KV:
    """Grow the cache, or, ragged, lay every sequence's valid rows end to end; then crop to the window."""
    from .ops import KV

    if isinstance(span.rows, int) and isinstance(fresh, int):
        total = span.rows + fresh
        kept = total if span.window is None else min(total, span.window - 1)

        def plain(old: Array, new: Array) -> Array:
            joined = ops.concat([old[:, :, : span.rows], new[:, :, :fresh]], 2)
            return joined[:, :, total - kept :]

        return KV(plain(context.keys, k), plain(context.values, v))

    batch, cached, length = k.shape[0], context.keys.shape[2], k.shape[2]
    zero = ops.asarray([0] * batch, "int32")
    rows, fresh = zero + span.rows, zero + fresh
    size = cached + length if span.window is None else min(cached + length, span.window - 1)
    total = rows + fresh
    drop = ops.where(total > size, total - size, zero)
    source = ops.reshape(ops.arange(size), (1, size)) + ops.reshape(drop, (batch, 1))  # index among the valid rows
    gap = ops.reshape(cached - rows, (batch, 1))  # unused rows between the old valid ones and the new
    source = ops.where(source < ops.reshape(rows, (batch, 1)), source, source + gap)
    source = ops.where(source < cached + length, source, cached + length - 1)  # beyond the valid rows: anything
    source = ops.reshape(source, (batch, 1, size, 1))

    def ragged(old: Array, new: Array) -> Array:
        return ops.take_along(ops.concat([old, new], 2), source, 2)

    return KV(ragged(context.keys, k), ragged(context.values, v))


def layers(
    ops: Ops, layers: Sequence[Layer], x: Array, ropes: Mapping[str, Rope], contexts: Sequence[KV],
    spans: Mapping[str, Span], fresh: int | Array | None,
) -> tuple[Array, tuple[KV, ...]]:  # fmt: skip
    caches = []
    for layer, context in zip(layers, contexts, strict=True):
        kind = layer.self_attn.config.kind
        x, k, v = layer(ops, x, ropes[kind], context, spans[kind])
        caches.append(context if fresh is None else ops.cache_write(context, k, v, spans[kind], fresh))
    return x, tuple(caches)


def logits(ops: Ops, x: Array, table: Array, softcap: float) -> Array:
    return ops.unary(ops.cast(ops.linear(x, table), ops.wide) / softcap, "tanh") * softcap


def mean_embedding(ops: Ops, probabilities: Array, table: Array) -> Array:
    return ops.matmul(ops.cast(probabilities, ops.dtype), table)


def draw(ops: Ops, mass: Array, u: Array) -> Array:
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


def vocab_head(
    ops: Ops, x: Array, table: Array, softcap: float, temperature: Array, u: Array
) -> tuple[Array, Array, Array, Array]:
    scores = ops.logits(x, table, softcap) / ops.reshape(temperature, (-1, 1, 1))  # [B, L, V] <- very big
    shifted = scores - ops.reduce(scores, "max", -1, True)
    mass = ops.unary(shifted, "exp")
    total = ops.reduce(mass, "sum", -1, True)
    entropy = ops.unary(total, "log") - ops.reduce(mass * shifted, "sum", -1, True) / total
    soft = ops.mean_embedding(mass / total, table)
    token, argmax = draw(ops, mass, u), ops.reduce(scores, "argmax", -1)
    return token, argmax, ops.reshape(entropy, entropy.shape[:2]), soft
