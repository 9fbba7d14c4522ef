"""Wrong DiffusionGemmas: each differs from the right one by one detail that some runtime or hasty reader gets wrong.

A parity test that passes with any of them would be no test of that detail. Two details are missing because no output
can show them, but by a norm's epsilon: that the router renormalises (a factor per token, which the norm after the
experts removes), and the soft embedding's scale (its pre_norm removes it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import hf
from dgemma.backends.numpy.ops import NumpyOps
from dgemma.core import model as graph
from dgemma.core import reference
from dgemma.core.ops import Ops
from dgemma.core.parts import KV, Array, Layer, Model, Rope, Span

Mutation = Callable[[pytest.MonkeyPatch, Ops, Model], tuple[Ops, Model]]
MUTATIONS: dict[str, Mutation] = {}


def _mutation(function: Mutation) -> Mutation:
    MUTATIONS[function.__name__.replace("_", " ")] = function
    return function


def _layers(model: Model, change: Callable[[Layer], Layer]) -> Model:
    return replace(model, layers=tuple(change(layer) for layer in model.layers))


def _kind(model: Model, kind: str, **changes: Any) -> Model:
    """Change the attention settings of one layer kind, in the configuration and in the layers."""

    def config(old: Any) -> Any:
        return replace(old, **changes) if old.kind == kind else old

    model = replace(model, config=replace(model.config, layers=tuple(map(config, model.config.layers))))
    return _layers(
        model, lambda one: replace(one, self_attn=replace(one.self_attn, config=config(one.self_attn.config)))
    )


# ---- Scalars and norms ------------------------------------------------------------------------------------------


@_mutation
def layer_scalars_swapped(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    return ops, _layers(
        model, lambda one: replace(one, encoder_scalar=one.decoder_scalar, decoder_scalar=one.encoder_scalar)
    )


@_mutation
def encoder_takes_the_decoder_scalar(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    return ops, _layers(model, lambda one: replace(one, encoder_scalar=one.decoder_scalar))


@_mutation
def norm_weight_plus_one(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    return ops, replace(model, norm=replace(model.norm, weight=1.0 + model.norm.weight))


@_mutation
def values_without_norm(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    class Wrong(NumpyOps):
        def rms_norm(self, x: Array, weight: Array | None, eps: float) -> Array:
            return x if weight is None and x.ndim == 4 else super().rms_norm(x, weight, eps)

    return Wrong(ops.dtype), model


@_mutation
def feedforward_norms_exchanged(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    return ops, _layers(
        model,
        lambda one: replace(
            one,
            pre_feedforward_layernorm=one.pre_feedforward_layernorm_2,
            pre_feedforward_layernorm_2=one.pre_feedforward_layernorm,
        ),
    )


# ---- Self-conditioning ------------------------------------------------------------------------------------------


@_mutation
def no_post_norm(patch: pytest.MonkeyPatch, ops: Ops, model: Model) -> tuple[Ops, Model]:
    last, right = model.self_conditioning.post_norm, graph.norm
    patch.setattr(graph, "norm", lambda ops, x, weights: x if weights is last else right(ops, x, weights))
    return ops, model


@_mutation
def self_conditioning_ignored(patch: pytest.MonkeyPatch, ops: Ops, model: Model) -> tuple[Ops, Model]:
    right = graph._conditioned

    def wrong(ops: Ops, model: Model, canvas: Array, soft: Array, held: Array | None) -> Array:
        return right(ops, model, canvas, soft * 0.0, held)

    patch.setattr(graph, "_conditioned", wrong)
    return ops, model


@_mutation
def commit_through_self_conditioning(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    class Wrong(NumpyOps):
        def embed(self, table: Array, tokens: Array, scale: float) -> Array:
            return self.rms_norm(super().embed(table, tokens, scale), None, 1e-6)

    return Wrong(ops.dtype), model


# ---- Attention --------------------------------------------------------------------------------------------------


@_mutation
def window_one_longer(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    window = next(one.window for one in model.config.layers if one.window is not None)
    return ops, _kind(model, "sliding_attention", window=window + 1)


@_mutation
def window_one_shorter(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    window = next(one.window for one in model.config.layers if one.window is not None)
    return ops, _kind(model, "sliding_attention", window=window - 1)


@_mutation
def window_counted_per_canvas_token(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    class Wrong(NumpyOps):
        def attention(self, q: Array, k: Array, v: Array, context: KV, span: Span) -> Array:
            if span.causal or span.window is None:
                return super().attention(q, k, v, context, span)
            windows = [max(span.window - i, 1) for i in range(q.shape[2])]
            rows = [super(Wrong, self).attention(q, k, v, context, replace(span, window=one)) for one in windows]
            return np.concatenate([row[:, i : i + 1] for i, row in enumerate(rows)], 1)

    return Wrong(ops.dtype), model


@_mutation
def denoise_causal(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    class Wrong(NumpyOps):
        def attention(self, q: Array, k: Array, v: Array, context: KV, span: Span) -> Array:
            return super().attention(q, k, v, context, replace(span, causal=True))

    return Wrong(ops.dtype), model


@_mutation
def encode_bidirectional(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    class Wrong(NumpyOps):
        def attention(self, q: Array, k: Array, v: Array, context: KV, span: Span) -> Array:
            return super().attention(q, k, v, context, replace(span, causal=False))

    return Wrong(ops.dtype), model


@_mutation
def attention_scaled(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    class Wrong(NumpyOps):
        def attention(self, q: Array, k: Array, v: Array, context: KV, span: Span) -> Array:
            return super().attention(q * q.shape[-1] ** -0.5, k, v, context, span)

    return Wrong(ops.dtype), model


@_mutation
def full_layer_value_after_the_key_norm(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    class Wrong(NumpyOps):
        def qkv_norm_rope(self, x: Array, attention: Any, rope: Rope) -> tuple[Array, Array, Array]:
            q, k, v = super().qkv_norm_rope(x, attention, rope)
            if attention.v_proj is None:
                v = self.rms_norm(v * attention.k_norm, None, attention.eps)
            return q, k, v

    return Wrong(ops.dtype), model


@_mutation
def full_layer_rope_over_the_whole_head(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    full = next(one for one in model.config.layers if one.kind == "full_attention")
    return ops, _kind(model, "full_attention", rotary_dims=full.head_dim)


@_mutation
def full_layer_rope_denominator_of_its_part(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    full = next(one for one in model.config.layers if one.kind == "full_attention")
    # θ^(−2i/part) = (θ^(head/part))^(−2i/head)
    return ops, _kind(model, "full_attention", rope_theta=full.rope_theta ** (full.head_dim / full.rotary_dims))


@_mutation
def one_rope_base_for_both_kinds(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    return ops, _kind(model, "sliding_attention", rope_theta=1e6)


@_mutation
def rope_pairs_interleaved(patch: pytest.MonkeyPatch, ops: Ops, model: Model) -> tuple[Ops, Model]:
    def rotate(ops: Ops, x: Array, rope: Rope) -> Array:
        a, b = x[..., 0::2], x[..., 1::2]
        return np.stack([a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin], -1).reshape(x.shape)

    patch.setattr(reference, "rotate", rotate)
    return ops, model


@_mutation
def canvas_positions_from_zero(patch: pytest.MonkeyPatch, ops: Ops, model: Model) -> tuple[Ops, Model]:
    right, ropes = graph.denoise, graph._ropes

    def denoise(*arguments: Any) -> Array:  # the last call of a question: what it patches may stay
        patch.setattr(graph, "_ropes", lambda ops, config, offset, length: ropes(ops, config, offset * 0, length))
        return right(*arguments)

    patch.setattr(hf, "denoise", denoise)
    return ops, model


# ---- Experts and head -------------------------------------------------------------------------------------------


@_mutation
def routed_by_the_normed_input(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    class Wrong(NumpyOps):
        def moe(self, h: Array, r: Array, router: Any, experts: Any) -> Array:
            return super().moe(h, h, router, experts)

    return Wrong(ops.dtype), model


@_mutation
def router_without_its_scale(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    return ops, _layers(
        model, lambda one: replace(one, router=replace(one.router, scale=np.ones_like(one.router.scale)))
    )


@_mutation
def router_input_not_divided_by_root_width(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    root = model.config.hidden_size**0.5
    return ops, _layers(model, lambda one: replace(one, router=replace(one.router, scale=one.router.scale * root)))


@_mutation
def no_per_expert_scale(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    return ops, _layers(
        model,
        lambda one: replace(one, router=replace(one.router, per_expert_scale=np.ones(one.router.experts, np.float32))),
    )


@_mutation
def expert_halves_exchanged(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    def swap(one: Layer) -> Layer:
        gate, up = np.split(one.experts.gate_up_proj, 2, 1)
        return replace(one, experts=replace(one.experts, gate_up_proj=np.concatenate([up, gate], 1)))

    return ops, _layers(model, swap)


@_mutation
def gelu_by_erf(patch: pytest.MonkeyPatch, ops: Ops, model: Model) -> tuple[Ops, Model]:
    erf = np.vectorize(math.erf, otypes=[np.float32])
    patch.setattr(reference, "gelu", lambda ops, x: 0.5 * x * (1.0 + erf(x / math.sqrt(2.0))))
    return ops, model


@_mutation
def no_softcap(_: Any, ops: Ops, model: Model) -> tuple[Ops, Model]:
    return ops, replace(model, config=replace(model.config, softcap=1e6))


@_mutation
def final_norm_skipped(patch: pytest.MonkeyPatch, ops: Ops, model: Model) -> tuple[Ops, Model]:
    last, right = model.norm, graph.norm
    patch.setattr(graph, "norm", lambda ops, x, weights: x if weights is last else right(ops, x, weights))
    return ops, model
