"""DiffusionGemma's graph: one stack of layers, run in two modes over the same weights.

    encode   causal; reads tokens and writes their keys and values to the cache
    denoise  bidirectional; a canvas that sees itself and the cache, which it never writes

and in both at once: a finished canvas is read, and the next one, behind it, takes its first step.

Source: transformers 5.23, `models/diffusion_gemma` (float32, DynamicCache). What each op means is in `reference.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from .config import AttentionConfig, ModelConfig
from .ops import KV, Array, Ops, Passes, Rope, Span
from .sampler import Sampling, StepState


@dataclass(frozen=True, kw_only=True)
class RmsNorm:
    weight: Array | None  # [D]
    eps: float

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, ops: Ops, x: Array, residual: Array) -> Array:
        return ops.norm_add(x, residual, self.weight, self.eps)


@dataclass(frozen=True, kw_only=True)
class Attention:
    config: AttentionConfig
    eps: float
    q_proj: Array  # [H·A, D]
    k_proj: Array  # [K·A, D]
    v_proj: Array | None  # [K·A, D]; None on full layers, where the value is the key projection
    o_proj: Array  # [D, H·A]
    q_norm: Array  # [A]
    k_norm: Array  # [A]


@dataclass(frozen=True, kw_only=True)
class Mlp:
    gate_proj: Array  # [F, D]
    up_proj: Array  # [F, D]
    down_proj: Array  # [D, F]

    def __call__(self, ops: Ops, x: Array) -> Array:
        return ops.linear(ops.geglu(x, self.gate_proj, self.up_proj), self.down_proj)


@dataclass(frozen=True, kw_only=True)
class Router:
    experts: int
    experts_per_token: int
    eps: float
    proj: Array  # [E, D]
    scale: Array  # [D]
    per_expert_scale: Array  # [E]


@dataclass(frozen=True, kw_only=True)
class Experts:
    gate_up_proj: Array  # [E, 2F, D], gate half first
    down_proj: Array  # [E, D, F]


@dataclass(frozen=True, kw_only=True)
class Layer:
    self_attn: Attention
    mlp: Mlp
    router: Router
    experts: Experts
    input_layernorm: RmsNorm
    post_attention_layernorm: RmsNorm
    pre_feedforward_layernorm: RmsNorm
    pre_feedforward_layernorm_2: RmsNorm
    post_feedforward_layernorm: RmsNorm
    post_feedforward_layernorm_1: RmsNorm
    post_feedforward_layernorm_2: RmsNorm
    encoder_scalar: Array  # [1]
    decoder_scalar: Array  # [1]

    def __call__(self, ops: Ops, x: Array, rope: Rope, context: KV, span: Span) -> tuple[Array, Array, Array]:
        """x [B, L, D] → x [B, L, D], and this layer's keys and values [B, K, L, A]."""
        q, k, v = ops.qkv_norm_rope(self.input_layernorm(ops, x), self.self_attn, rope)
        attended = ops.linear(ops.attention(q, k, v, context, span), self.self_attn.o_proj)
        r = self.post_attention_layernorm.add(ops, attended, x)
        dense = self.mlp(ops, self.pre_feedforward_layernorm(ops, r))
        # The router reads the raw residual; only the experts read the normed one.
        sparse = ops.moe(self.pre_feedforward_layernorm_2(ops, r), r, self.router, self.experts)
        mixed = self.post_feedforward_layernorm_1(ops, dense) + self.post_feedforward_layernorm_2(ops, sparse)
        scalar = self.encoder_scalar if span.causal else self.decoder_scalar
        if span.canvas:
            length = x.shape[1]
            reads = ops.reshape(ops.arange(length) < span.causal_rows(length), (length, 1))
            scalar = ops.where(reads, self.encoder_scalar, self.decoder_scalar)  # [L, 1]
        return self.post_feedforward_layernorm.add(ops, mixed, r) * scalar, k, v


@dataclass(frozen=True, kw_only=True)
class SelfConditioning:
    pre_norm: RmsNorm
    post_norm: RmsNorm  # without a weight, and run on the first step too
    mlp: Mlp

    def __call__(self, ops: Ops, x: Array, soft: Array) -> Array:
        return self.post_norm(ops, x + self.mlp(ops, self.pre_norm(ops, soft)))


@dataclass(frozen=True, kw_only=True)
class Model:
    """All weights. The embedding table is also the vocabulary head."""

    config: ModelConfig
    embed_tokens: Array  # [V, D]
    layers: tuple[Layer, ...]
    norm: RmsNorm
    self_conditioning: SelfConditioning


class Cache(NamedTuple):
    """Keys and values of every token read so far."""

    layers: tuple[KV, ...]
    length: int | Array  # tokens: int, or int32 [B]


def new_cache(ops: Ops, config: ModelConfig, *, batch: int, capacity: int, chunk: int) -> Cache:
    """Return an empty cache.

    `capacity` tokens are held, plus scratch for one `chunk` (of the prompt, or a canvas, whichever is longer).
    Sliding layers hold no more than their window.
    """
    layers = []
    for layer in config.layers:
        rows = capacity if layer.window is None else min(capacity, layer.window - 1)
        layers.append(ops.new_cache(batch, layer.kv_heads, layer.head_dim, rows + chunk))
    return Cache(tuple(layers), 0)


def encode(ops: Ops, model: Model, cache: Cache, tokens: Array, fresh: int | Array | None = None) -> Cache:
    """Read tokens int32 [B, L] into the cache; in a ragged batch only the first `fresh` int32 [B] of each row count."""
    if isinstance(ops, Passes) and fresh is None:
        return ops.encode(cache, tokens)
    return _read(ops, model, cache, tokens, fresh, states=False)[0]


def encode_hidden(
    ops: Ops, model: Model, cache: Cache, tokens: Array, fresh: int | Array | None = None
) -> tuple[Cache, Array]:
    """`encode`, and the normed states [B, L, D] that predict each next token (training and scoring read them)."""
    cache, x = _read(ops, model, cache, tokens, fresh, states=True)
    return cache, model.norm(ops, x)


def _read(
    ops: Ops, model: Model, cache: Cache, tokens: Array, fresh: int | Array | None, *, states: bool
) -> tuple[Cache, Array]:
    count: int | Array = tokens.shape[1] if fresh is None else fresh
    ropes = _ropes(ops, model.config, cache.length, tokens.shape[1])
    spans = _spans(ops, model.config, cache.length, causal=True)
    x = ops.embed(model.embed_tokens, tokens, model.config.hidden_size**0.5)
    whole = len(model.layers) if states else len(model.layers) - 1
    x, caches = ops.layers(model.layers[:whole], x, ropes, cache.layers[:whole], spans, count)
    for layer, context in zip(model.layers[whole:], cache.layers[whole:], strict=True):
        # Of the last layer nobody reads more than the cache.
        kind = layer.self_attn.config.kind
        _, k, v = ops.qkv_norm_rope(layer.input_layernorm(ops, x), layer.self_attn, ropes[kind])
        caches += (ops.cache_write(context, k, v, spans[kind], count),)
    return Cache(caches, cache.length + count), x


def denoise(ops: Ops, model: Model, cache: Cache, canvas: Array, soft: Array) -> Array:
    """Run one bidirectional pass: canvas int32 [B, L], soft [B, L, D] → normed states [B, L, D].

    `soft` is the mean embedding under the previous step's distribution, unscaled; zeros on the first step.
    """
    if isinstance(ops, Passes):
        return ops.denoise(cache, canvas, soft)
    ropes = _ropes(ops, model.config, cache.length, canvas.shape[1])
    spans = _spans(ops, model.config, cache.length, causal=False)
    x, _ = ops.layers(model.layers, _conditioned(ops, model, canvas, soft), ropes, cache.layers, spans, None)
    return model.norm(ops, x)


def _conditioned(ops: Ops, model: Model, canvas: Array, soft: Array) -> Array:
    """Return what a denoising pass begins with: the canvas's embeddings and what the step before made of it."""
    scale = model.config.hidden_size**0.5
    return model.self_conditioning(ops, ops.embed(model.embed_tokens, canvas, scale), soft * ops.rounded(scale))


def encode_and_denoise(
    ops: Ops, model: Model, cache: Cache, tokens: Array, canvas: Array, soft: Array
) -> tuple[Cache, Array]:
    """`encode` of tokens int32 [B, C] and `denoise` of the canvas behind them, with each weight read once.

    Everything but attention takes rows one by one, so the rows of both go through a layer together; what a canvas sees
    of the tokens are their keys in the same layer. The cache needs room for C + L rows behind its valid ones.
    """
    if isinstance(ops, Passes):
        cache = ops.encode(cache, tokens)
        return cache, ops.denoise(cache, canvas, soft)
    count, length = tokens.shape[1], canvas.shape[1]
    ropes = _ropes(ops, model.config, cache.length, count + length)
    spans = _spans(ops, model.config, cache.length, causal=True)
    joined = {kind: replace(span, canvas=length) for kind, span in spans.items()}
    read = ops.embed(model.embed_tokens, tokens, model.config.hidden_size**0.5)
    x = ops.concat([read, _conditioned(ops, model, canvas, soft)], 1)  # [B, C + L, D]
    x, caches = ops.layers(model.layers, x, ropes, cache.layers, joined, count)
    return Cache(caches, cache.length + count), model.norm(ops, x[:, count:])


def step(
    ops: Ops, model: Model, sampler: Sampling, cache: Cache, state: StepState,
    temperature: Array, uniforms: Array, noise: Array,
) -> StepState:  # fmt: skip
    """One denoising pass with head, acceptance, renoising and stop test inside; nothing is read back.

    temperature float32 [B, 1], uniforms float32 [B, L], noise int32 [B, L] (see `random.step_noise`).
    """
    if isinstance(ops, Passes):
        return ops.step(sampler, cache, state, temperature, uniforms, noise)
    x = denoise(ops, model, cache, state.canvas, state.soft)
    return _predict(ops, model, sampler, x, state, temperature, uniforms, noise)


def encode_and_step(
    ops: Ops, model: Model, sampler: Sampling, cache: Cache, tokens: Array, state: StepState,
    temperature: Array, uniforms: Array, noise: Array,
) -> tuple[Cache, StepState]:  # fmt: skip
    """`encode` of a finished canvas, int32 [B, L], and the next one's first `step`, in one pass over the weights."""
    if isinstance(ops, Passes):
        cache = ops.encode(cache, tokens)
        return cache, ops.step(sampler, cache, state, temperature, uniforms, noise)
    cache, x = encode_and_denoise(ops, model, cache, tokens, state.canvas, state.soft)
    return cache, _predict(ops, model, sampler, x, state, temperature, uniforms, noise)


def _predict(
    ops: Ops, model: Model, sampler: Sampling, x: Array, state: StepState,
    temperature: Array, uniforms: Array, noise: Array,
) -> StepState:  # fmt: skip
    """Turn a denoising pass's states [B, L, D] into the next state of the canvas."""
    token, argmax, entropy, soft = ops.vocab_head(
        x, model.embed_tokens, model.config.softcap, ops.cast(temperature, ops.wide), uniforms
    )
    return ops.advance(sampler, state, token, argmax, entropy, soft, noise)


def _spans(ops: Ops, config: ModelConfig, length: int | Array, *, causal: bool) -> dict[str, Span]:
    """What each layer kind sees behind `length` tokens."""
    spans = {}
    for kind, layer in _kinds(config).items():
        rows = length
        if layer.window is not None:
            held = layer.window - 1
            rows = min(length, held) if isinstance(length, int) else ops.where(length < held, length, held)
        spans[kind] = Span(rows=rows, window=layer.window, causal=causal)
    return spans


def _kinds(config: ModelConfig) -> dict[str, AttentionConfig]:
    return {layer.kind: layer for layer in config.layers}


def _ropes(ops: Ops, config: ModelConfig, offset: int | Array, length: int) -> dict[str, Rope]:
    """Cosines and sines of positions offset … offset + length − 1, for each layer kind."""
    steps = ops.reshape(ops.arange(length), (1, 1, length, 1))
    start = offset if isinstance(offset, int) else ops.reshape(offset, (-1, 1, 1, 1))
    # The angle is a float32 product everywhere, the float64 oracle included: at position 16,000 its rounding is 5e-4
    # radians, and a backend that did better would disagree with every other one.
    positions = ops.cast(steps + start, "float32")
    ropes = {}
    for name, kind in _kinds(config).items():
        frequencies = kind.inverse_frequencies()
        rates = ops.reshape(ops.asarray(frequencies, "float32"), (1, 1, 1, len(frequencies)))
        angles = ops.cast(positions * rates, ops.wide)
        cos, sin = (ops.cast(ops.unary(angles, how), ops.dtype) for how in ("cos", "sin"))
        ropes[name] = Rope(cos, sin, offset, frequencies)
    return ropes
