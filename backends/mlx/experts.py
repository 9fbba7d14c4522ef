"""Experts through MLX's gathered matrix product, over rows sorted by expert."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from .packed import QuantizedTensor, Weight

Array = mx.array


def gated(gate: Array, up: Array) -> Array:
    """Return gelu_tanh(gate) · up, computed in float32 and rounded once."""
    wide = gate.astype(mx.float32)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (0.5 * wide * (1.0 + mx.tanh(inner)) * up).astype(up.dtype)


def grouped_matmul(x: Array, w: Weight, group: Array) -> Array:
    """x [N, 1, D], w [E, F, D], group [N] integers ascending → [N, 1, F] = x · w[group]ᵀ."""
    if isinstance(w, QuantizedTensor):
        return w.grouped(x, group)
    if mx.default_device().type == mx.cpu and x.dtype != mx.float32:  # MLX's CPU has `gather_mm` in float32 only
        return grouped_matmul(x.astype(mx.float32), w.astype(mx.float32), group).astype(x.dtype)
    # Single rows and sorted groups are Metal's fast path: unsorted it is several times slower.
    return mx.gather_mm(x, w.swapaxes(1, 2), rhs_indices=group, sorted_indices=True)


def expert_mlp(
    x: Array, index: Array, weights: Array, gate_up: Weight, down: Weight, gated: Callable[[Array, Array], Array]
) -> Array:
    """Weighted sum of each row's experts.

    x [N, 1, D], index [N, k] integers, weights float32 [N, k], gate_up [E, 2F, D], down [E, D, F] → [N, 1, D].
    """
    rows, k = index.shape
    flat = index.reshape(-1)
    order = mx.argsort(flat)  # (token, choice) pairs, expert by expert
    group = flat[order]
    gate, up = mx.split(grouped_matmul(x[order // k], gate_up, group), 2, -1)
    out = grouped_matmul(gated(gate, up), down, group)
    back = out[mx.argsort(order)].reshape(rows, k, -1)  # argsort of a permutation is its inverse
    return weights.astype(x.dtype)[:, None] @ back
