"""A denoising pass inside a language: classes of tokens leave the device, a choice comes back.

    denoise ──▶ states ──▶ class_head ──▶ masses [B, L, C] ──▶ (host) choose ──▶ tokens ──▶ advance
                  └──────────── the rows whose class has to be looked into ──────────┘

Only positions that may be accepted and whose class does not say its token are looked into: few in any pass.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import model, reference
from .canvas import Chosen, Classes
from .ops import Ops
from .parts import Array, Cache, Draws, Masses, Model, StepState

ROWS = 32
"""Positions whose logits are in memory at once."""

KEPT = 8
"""Requests' classes of tokens that stay on the device."""

Logits = Callable[[Array, Array], Array]
"""`Ops.logits_at` over the table: states [B, L, D], places int32 [R] → wide [1, R, V]."""


def predict(
    ops: Ops, weights: Model, cache: Cache, state: StepState, draws: Draws, classes: Array, count: int
) -> tuple[Array, Array, Masses]:
    """Run a pass up to its choice: classes int32 [V] → states [B, L, D], mean embedding [B, L, D], masses [B, L, C]."""
    x = model.denoise(ops, weights, cache, state.canvas, state.soft, draws.held)
    return reduced(ops, weights, x, draws, classes, count)


def reduced(
    ops: Ops, weights: Model, x: Array, draws: Draws, classes: Array, count: int
) -> tuple[Array, Array, Masses]:
    """Return the same of states that are at hand."""
    temperature = ops.cast(draws.temperature, ops.wide)
    soft, masses = ops.class_head(x, weights.embed_tokens, weights.config.softcap, temperature, classes, count)
    return x, soft, masses


def drawn(ops: Ops, logits: Logits, x: Array, temperature: np.ndarray, classes: Array, chosen: Chosen) -> list[Array]:
    """Return the tokens, int32 [R], of `ROWS` of the positions in turn whose class has to be looked into.

    x [≥ B, L, D], temperature [B, 1], classes int32 [V], arrays of `chosen` [B, L]. Inside a class: the inverse CDF at
    `rest`, tokens in rising order.
    """
    parts = []
    open_ = np.flatnonzero(chosen.token < 0)
    hot = np.broadcast_to(temperature, chosen.token.shape).reshape(-1)
    for at in range(0, len(open_), ROWS):
        some = open_[at : at + ROWS]
        label = ops.asarray(chosen.label.reshape(-1)[some].astype(np.int32))
        scores = _scores(ops, logits, x, some, hot[some])
        scores = ops.where(ops.reshape(classes, (1, 1, -1)) == ops.reshape(label, (1, -1, 1)), scores, -np.inf)
        mass = ops.unary(scores - ops.reduce(scores, "max", -1, True), "exp")
        u = ops.asarray(chosen.rest.reshape(-1)[some][None].astype(np.float32))
        parts.append(reference.draw(ops, mass, u)[0])
    return parts


def fed_back(
    ops: Ops, logits: Logits, mean: Callable[[Array], Array], x: Array, temperature: np.ndarray, classes: Classes,
    factors: np.ndarray,
) -> Array:  # fmt: skip
    """Return the mean embedding [B, L, D] under a distribution whose classes are multiplied: factors [B, L, C + 1].

    `mean` is `Ops.mean_embedding` over the table: wide [1, R, V] → [1, R, D].
    """
    batch, length, _ = factors.shape
    column = ops.asarray(np.where(classes.of < 0, classes.count, classes.of).astype(np.int32))
    hot = np.broadcast_to(temperature, (batch, length)).reshape(-1)
    parts = []
    for at in range(0, batch * length, ROWS):
        some = np.arange(at, min(at + ROWS, batch * length))
        p = reference.softmax(ops, _scores(ops, logits, x, some, hot[some]))
        mine = ops.asarray(factors.reshape(batch * length, -1)[some][None].astype(np.float32))
        p = p * ops.cast(ops.take(mine, column, 2), ops.wide)
        parts.append(mean(p))
    return ops.reshape(ops.concat(parts, 1), (batch, length, -1))


def scored(ops: Ops, logits: Logits, x: Array, tokens: Array) -> list[Array]:
    """Return what positions, x [1, R, D], say of tokens int32 [K] at temperature 1: of each `ROWS` of them in turn the
    logs of their probabilities [R, K], entropies [R], the likeliest tokens int32 [R] and the logs of theirs [R]."""
    parts = []
    for at in range(0, x.shape[1], ROWS):
        some = ops.asarray(np.arange(at, min(at + ROWS, x.shape[1]), dtype=np.int32))
        found = logits(x, some)[0]  # [R, V] <- big
        shifted = found - ops.reduce(found, "max", -1, True)
        mass = ops.unary(shifted, "exp")
        total = ops.reduce(mass, "sum", -1, True)
        log_total = ops.unary(total, "log")
        entropy = (log_total - ops.reduce(mass * shifted, "sum", -1, True) / total)[:, 0]
        parts += [ops.take(shifted, tokens, 1) - log_total, entropy, ops.reduce(found, "argmax", -1), -log_total[:, 0]]
    return parts


def _scores(ops: Ops, logits: Logits, x: Array, some: np.ndarray, temperature: np.ndarray) -> Array:
    """Return logits over temperature of some of a pass's positions, wide [1, R, V]."""
    hot = ops.cast(ops.asarray(temperature[None, :, None].astype(np.float32)), ops.wide)
    return logits(x, ops.asarray(some.astype(np.int32))) / hot
