"""DiffusionGemma's graph: one stack of layers, run in two modes over the same weights.

    encode   causal; reads tokens and writes their keys and values to the cache
    denoise  bidirectional; a canvas that sees itself and the cache, which it never writes

and in both at once: a finished canvas is read, and the next one, behind it, takes its first step. Every row of a pass
is a sequence of its own, with its own length of cache.

Source: transformers 5.23, `models/diffusion_gemma` (float32, DynamicCache). What each op means is in `ops.py`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .config import AttentionConfig, ModelConfig
from .ops import Ops
from .parts import KV, Array, Cache, Draws, Layer, Mlp, Model, RmsNorm, Rope, Span, StepState
from .primitives import NUMPY_DTYPES
from .reference import causal_queries


def norm(ops: Ops, x: Array, weights: RmsNorm) -> Array:
    return ops.rms_norm(x, weights.weight, weights.eps)


def dense(ops: Ops, x: Array, mlp: Mlp) -> Array:
    return ops.linear(ops.geglu(x, mlp), mlp.down_proj)


def layer(ops: Ops, weights: Layer, x: Array, rope: Rope, context: KV, span: Span) -> tuple[Array, Array, Array]:
    """x [B, L, D] → x [B, L, D], and this layer's keys and values [B, K, L, A]."""
    q, k, v = ops.qkv_norm_rope(norm(ops, x, weights.input_layernorm), weights.self_attn, rope)
    attended = ops.linear(ops.attention(q, k, v, context, span), weights.self_attn.o_proj)
    r = x + norm(ops, attended, weights.post_attention_layernorm)
    mixed = dense(ops, norm(ops, r, weights.pre_feedforward_layernorm), weights.mlp)
    # The router reads the raw residual; only the experts read the normed one.
    sparse = ops.moe(norm(ops, r, weights.pre_feedforward_layernorm_2), r, weights.router, weights.experts)
    mixed = norm(ops, mixed, weights.post_feedforward_layernorm_1)
    mixed = mixed + norm(ops, sparse, weights.post_feedforward_layernorm_2)
    scalar = weights.encoder_scalar if span.causal else weights.decoder_scalar
    if span.canvas:
        length = x.shape[1]
        reads = ops.reshape(ops.arange(length) < causal_queries(span, length), (length, 1))
        scalar = ops.where(reads, weights.encoder_scalar, weights.decoder_scalar)  # [L, 1]
    return (r + norm(ops, mixed, weights.post_feedforward_layernorm)) * scalar, k, v


def new_cache(ops: Ops, config: ModelConfig, *, slots: int, capacity: int, scratch: int) -> Cache:
    """Return an empty cache whose row b has slot b.

    A slot holds `capacity` tokens, plus `scratch` for those of one pass: a chunk of the prompt or a canvas, whichever
    is longer. Sliding layers hold no more than their window.
    """

    def empty(rows: int, attention: AttentionConfig) -> Array:
        return ops.asarray(
            np.zeros((slots, attention.kv_heads, rows, attention.head_dim), NUMPY_DTYPES[ops.dtype]), ops.dtype
        )

    layers = []
    for one in config.layers:
        rows = scratch + (capacity if one.window is None else min(capacity, one.window - 1))
        layers.append(KV(empty(rows, one), empty(rows, one)))
    return Cache(tuple(layers), ops.asarray(np.zeros(slots, np.int32)))


def encode(ops: Ops, model: Model, cache: Cache, tokens: Array, fresh: Array | None = None) -> Cache:
    """Read tokens int32 [B, L] into the cache; with `fresh`, int32 [B], only so many of each row count."""
    count = tokens.shape[1] if fresh is None else fresh
    x, ropes, spans = _reading(ops, model, cache, tokens)
    x, caches = ops.layers(layer, model.layers[:-1], x, ropes, cache.layers[:-1], spans, count)
    # Of the last layer nobody reads more than the cache.
    last = model.layers[-1]
    kind = last.self_attn.config.kind
    _, k, v = ops.qkv_norm_rope(norm(ops, x, last.input_layernorm), last.self_attn, ropes[kind])
    written = ops.cache_write(cache.layers[-1], k, v, spans[kind], count)
    return Cache((*caches, written), cache.length + count, cache.slots)


def encode_hidden(
    ops: Ops, model: Model, cache: Cache, tokens: Array, fresh: Array | None = None
) -> tuple[Cache, Array]:
    """`encode`, and the normed states [B, L, D] that predict each next token (training and scoring read them)."""
    count = tokens.shape[1] if fresh is None else fresh
    x, ropes, spans = _reading(ops, model, cache, tokens)
    x, caches = ops.layers(layer, model.layers, x, ropes, cache.layers, spans, count)
    return Cache(caches, cache.length + count, cache.slots), norm(ops, x, model.norm)


def _reading(ops: Ops, model: Model, cache: Cache, tokens: Array) -> tuple[Array, dict[str, Rope], dict[str, Span]]:
    """Return what a causal pass over tokens begins with: their embeddings, their places, what they see."""
    ropes = _ropes(ops, model.config, cache.length, tokens.shape[1])
    spans = _spans(ops, model.config, cache, causal=True)
    return ops.embed(model.embed_tokens, tokens, model.config.hidden_size**0.5), ropes, spans


def denoise(ops: Ops, model: Model, cache: Cache, canvas: Array, soft: Array, held: Array | None = None) -> Array:
    """Run one bidirectional pass: canvas int32 [B, L], soft [B, L, D] → normed states [B, L, D].

    `soft` is the mean embedding under the previous step's distribution, unscaled; zeros on the first step. Where tokens
    are held, int32 [B, L], −1 elsewhere, that distribution is the token.
    """
    ropes = _ropes(ops, model.config, cache.length, canvas.shape[1])
    spans = _spans(ops, model.config, cache, causal=False)
    x = _conditioned(ops, model, canvas, soft, held)
    x, _ = ops.layers(layer, model.layers, x, ropes, cache.layers, spans, None)
    return norm(ops, x, model.norm)


def _conditioned(ops: Ops, model: Model, canvas: Array, soft: Array, held: Array | None) -> Array:
    """Return what a denoising pass begins with: the canvas's embeddings and what the step before made of it."""
    scale, part = model.config.hidden_size**0.5, model.self_conditioning
    if held is not None:
        free = held < 0
        own = ops.embed(model.embed_tokens, ops.where(free, 0, held), 1.0)
        soft = ops.where(ops.reshape(free, (*held.shape, 1)), soft, own)
    x = ops.embed(model.embed_tokens, canvas, scale)
    hint = dense(ops, norm(ops, soft * ops.rounded(scale), part.pre_norm), part.mlp)
    return norm(ops, x + hint, part.post_norm)


def encode_and_denoise(
    ops: Ops, model: Model, cache: Cache, tokens: Array, canvas: Array, soft: Array, held: Array | None = None
) -> tuple[Cache, Array]:
    """`encode` of tokens int32 [B, C] and `denoise` of the canvas behind them, with each weight read once.

    Everything but attention takes positions one by one, so those of both go through a layer together; what a canvas
    sees of the tokens are their keys in the same layer. Each slot needs room for C + L entries behind its valid ones.
    """
    count, length = tokens.shape[1], canvas.shape[1]
    ropes = _ropes(ops, model.config, cache.length, count + length)
    spans = _spans(ops, model.config, cache, causal=True)
    both = {kind: replace(span, canvas=length) for kind, span in spans.items()}
    read = ops.embed(model.embed_tokens, tokens, model.config.hidden_size**0.5)
    x = ops.concat([read, _conditioned(ops, model, canvas, soft, held)], 1)  # [B, C + L, D]
    x, caches = ops.layers(layer, model.layers, x, ropes, cache.layers, both, count)
    return Cache(caches, cache.length + count, cache.slots), norm(ops, x[:, count:], model.norm)


def step(ops: Ops, model: Model, cache: Cache, state: StepState, draws: Draws) -> StepState:
    """One denoising pass with head, acceptance, renoising and stop test inside; nothing is read back."""
    x = denoise(ops, model, cache, state.canvas, state.soft, draws.held)
    return _predict(ops, model, x, state, draws)


def encode_and_step(
    ops: Ops, model: Model, cache: Cache, tokens: Array, state: StepState, draws: Draws
) -> tuple[Cache, StepState]:
    """`encode` of a finished canvas, int32 [B, L], and the next one's first `step`, in one pass over the weights."""
    cache, x = encode_and_denoise(ops, model, cache, tokens, state.canvas, state.soft, draws.held)
    return cache, _predict(ops, model, x, state, draws)


def _predict(ops: Ops, model: Model, x: Array, state: StepState, draws: Draws) -> StepState:
    """Turn a denoising pass's states [B, L, D] into the next state of the canvas."""
    temperature = ops.cast(draws.temperature, ops.wide)
    predicted = ops.vocab_head(x, model.embed_tokens, model.config.softcap, temperature, draws.uniforms)
    return ops.advance(draws, state, *predicted)


def _spans(ops: Ops, config: ModelConfig, cache: Cache, *, causal: bool) -> dict[str, Span]:
    """What each layer kind sees behind the tokens that were read."""
    spans = {}
    for kind, attention in _kinds(config).items():
        held = cache.length
        if attention.window is not None:
            most = attention.window - 1
            held = ops.where(held < most, held, most)
        spans[kind] = Span(held=held, slots=cache.slots, window=attention.window, causal=causal)
    return spans


def _kinds(config: ModelConfig) -> dict[str, AttentionConfig]:
    return {one.kind: one for one in config.layers}


def _ropes(ops: Ops, config: ModelConfig, offset: Array, length: int) -> dict[str, Rope]:
    """Cosines and sines of each row's positions offset … offset + length − 1, for each layer kind."""
    steps = ops.reshape(ops.arange(length), (1, 1, length, 1))
    # The angle is a float32 product everywhere, the float64 oracle included: at position 16,000 its rounding is 5e-4
    # radians, and a backend that did better would disagree with every other one.
    positions = ops.cast(steps + ops.reshape(offset, (-1, 1, 1, 1)), "float32")
    ropes = {}
    for kind, attention in _kinds(config).items():
        frequencies = attention.inverse_frequencies()  # radians a position
        rates = ops.reshape(ops.asarray(frequencies, "float32"), (1, 1, 1, len(frequencies)))
        angles = ops.cast(positions * rates, ops.wide)
        ropes[kind] = Rope(*(ops.cast(ops.unary(angles, how), ops.dtype) for how in ("cos", "sin")))
    return ropes
