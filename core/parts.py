"""The records that the graph is made of: weights, caches, spans, states, draws. No methods; what they mean is here.

Arrays are whatever the backend's framework has. Shape letters, here and in every docstring:
    B rows of a pass    L canvas or query length    N slots of a cache    S context length    D hidden width
    V vocabulary    H query heads    K key-value heads    A width of one head    E experts    F an inner width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .config import AttentionConfig, ModelConfig

Array = Any

# ---- Weights ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RmsNorm:
    weight: Array | None  # [D]
    eps: float


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
    qkv_proj: Array | None = None
    """Queries', keys' and values' rows, in this order, in one array, where a backend multiplies by all at once; the
    three are then views of it."""


@dataclass(frozen=True, kw_only=True)
class Mlp:
    gate_proj: Array  # [F, D]
    up_proj: Array  # [F, D]
    down_proj: Array  # [D, F]
    gate_up_proj: Array | None = None
    """Gate's and up's rows in one array, as `Attention.qkv_proj`."""


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


@dataclass(frozen=True, kw_only=True)
class SelfConditioning:
    pre_norm: RmsNorm
    post_norm: RmsNorm  # without a weight, and run on the first step too
    mlp: Mlp


@dataclass(frozen=True, kw_only=True)
class Model:
    """All weights. The embedding table is also the vocabulary head."""

    config: ModelConfig
    embed_tokens: Array  # [V, D]
    layers: tuple[Layer, ...]
    norm: RmsNorm
    self_conditioning: SelfConditioning


# ---- The cache, and what a pass sees of it ------------------------------------------------------------------------


class KV(NamedTuple):
    """One layer's keys and values in every slot. What stands beyond a row's valid ones is scratch and means nothing."""

    keys: Array  # [N, K, S, A]
    values: Array  # [N, K, S, A]


class Cache(NamedTuple):
    """Keys and values of every token that the rows of a pass have read so far."""

    layers: tuple[KV, ...]
    length: Array  # int32 [B], tokens read
    slots: Array | None = None
    """int32 [B], the slot that each row of the pass has; None where row b has slot b of exactly B."""


class Rope(NamedTuple):
    """Rotary position embedding of each row's run of consecutive positions, for one layer kind."""

    cos: Array  # [B, 1, L, A/2], compute dtype
    sin: Array  # [B, 1, L, A/2]


@dataclass(frozen=True, kw_only=True)
class Span:
    """What a query sees of the cache: a description, so that no backend has to build a mask it does not need.

    A row's slot holds the `held` newest tokens before the query's first position. With c causal queries, none, all L
    or, in a joined pass, those before the canvas, and `p = min(i, c)`: query i sees entry j of the cache if
    `p + held − j < window`, and query-side key j' if `p − j' < window` and either `j' ≤ i` or `i ≥ c`.
    """

    held: Array
    """int32 [B]: valid entries of each row's slot."""
    slots: Array | None
    """As `Cache.slots`."""
    window: int | None
    causal: bool
    canvas: int = 0
    """With `causal`: so many of the last queries are a canvas behind the causal ones, as if those were cached."""


# ---- The sampler --------------------------------------------------------------------------------------------------


class Draws(NamedTuple):
    """What one denoising pass is given besides the canvas, a row each: random numbers and the row's own settings."""

    temperature: Array  # float32 [B, 1]
    uniforms: Array  # float32 [B, L] in [0, 1)
    noise: Array  # int32 [B, L]: what a position that is not accepted starts the next pass as
    entropy_bound: Array  # [B, 1], nats
    confidence: Array  # [B], nats
    stability: Array  # int32 [B], passes
    greedy: Array  # bool [B, 1]: an accepted position takes the likeliest token, not the one that was drawn
    held: Array  # int32 [B, L]: the token that a position keeps, −1 where it is free


class Masses(NamedTuple):
    """What one pass makes of classes of tokens, in natural logs and at that pass's temperature.

    The distribution is that over the whole vocabulary: tokens of no class are in its total.
    """

    mass: Array  # wide [B, L, C]: log of the probability of the class; never below `score`, `NOTHING` without tokens
    best: Array  # int32 [B, L, C]: its likeliest token, the first of equals; 0 without tokens
    score: Array  # wide [B, L, C]: log of that token's probability, `NOTHING` without tokens
    moment: Array  # wide [B, L, C]: Σ p · log p over its tokens


NOTHING = -1e30
"""The log of no probability at all: finite, so that nothing becomes NaN."""


class StepState(NamedTuple):
    """What one pass hands to the next, and to whoever watches."""

    canvas: Array  # int32 [B, L] what the next pass reads
    soft: Array  # [B, L, D] mean embedding under this pass's distribution, unscaled
    argmax: Array  # int32 [B, L] what would be committed now
    stable: Array  # int32 [B] passes in a row that left the argmax canvas as it was
    accepted: Array  # bool [B, L]
    entropy: Array  # wide [B, L], nats
    stop: Array  # bool [B]
