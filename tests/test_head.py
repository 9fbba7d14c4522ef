"""The vocabulary head of every backend against the oracle: attention over the embedding table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma.backends.numpy.ops import NumpyOps
from dgemma.core.ops import Ops
from law import assert_close_f32, assert_low_precision
from traces import LAST_UNIFORM, inverse_cdf
from under_test import BACKENDS, make_ops, values


def head(
    ops: Ops, x: np.ndarray, table: np.ndarray, u: np.ndarray, *, softcap: float = 30.0, temperature: Any = 0.7
) -> list[np.ndarray]:
    """Token, argmax, entropy and soft embedding: x [B, L, D], u [B, L], one temperature or [B, 1]."""
    heat = np.zeros((len(x), 1)) + temperature
    out = ops.vocab_head(
        ops.asarray(x, ops.dtype), ops.asarray(table, ops.dtype), softcap, ops.asarray(heat, ops.wide),
        ops.asarray(u.astype(np.float32)),
    )  # fmt: skip
    return [ops.to_numpy(one) for one in out]


def exact_odds(x: np.ndarray, table: np.ndarray, temperature: Any, softcap: float = 30.0) -> np.ndarray:
    """Probabilities in float64 [B, L, V]."""
    scores = softcap * np.tanh(x.astype(np.float64) @ table.astype(np.float64).T / softcap)
    scores = scores / (np.zeros((len(x), 1)) + temperature)[..., None]
    odds = np.exp(scores - scores.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def uniforms(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 24, shape) * 2.0**-24


def check(ops: Ops, batch: int, length: int, width: int, vocab: int, temperature: Any, scale: float) -> None:
    x, table = values(1, batch, length, width), values(2, vocab, width, scale=scale)
    u = uniforms(batch, length)
    token, argmax, entropy, soft = head(ops, x, table, u, temperature=temperature)
    want = head(NumpyOps("float64"), x, table, u, temperature=temperature)
    np.testing.assert_array_equal(argmax, want[1])
    assert_close_f32(entropy, want[2], f"{ops.name} entropy")
    assert_close_f32(soft, want[3], f"{ops.name} soft embedding")
    odds = exact_odds(x, table, temperature)
    drawn = np.take_along_axis(odds, token[..., None], -1)[..., 0]
    assert (drawn > 0).all() and (token >= 0).all() and (token < vocab).all()
    # Where u lies within rounding of a boundary either neighbour is right.
    below = np.where(np.arange(vocab) < token[..., None], odds, 0.0).sum(-1)
    assert (below <= u + 1e-5).all() and (u <= below + drawn + 1e-5).all()


@pytest.mark.parametrize("vocab", [3, 512, 1023, 1537])
@pytest.mark.parametrize("batch, length", [(1, 1), (2, 5), (1, 19)])
def test_head(ops: Ops, batch: int, length: int, vocab: int) -> None:
    check(ops, batch, length, 24, vocab, 0.7, 0.3)


def test_head_with_a_temperature_for_each_row(ops: Ops) -> None:
    check(ops, 3, 4, 16, 700, np.array([[0.4], [0.8], [2.0]]), 0.5)


def test_head_under_the_softcap(ops: Ops) -> None:
    """Scores far beyond the cap: the flat part of tanh, and a temperature that makes most mass vanish."""
    check(ops, 1, 9, 32, 900, 0.4, 4.0)


@given(length=st.integers(1, 9), vocab=st.integers(1, 1200), width=st.integers(1, 20))
def test_head_of_any_shape(length: int, vocab: int, width: int) -> None:
    for backend in BACKENDS:
        check(make_ops(backend, "float32"), 1, length, 2 * width, vocab, 0.8, 0.2)


@pytest.mark.parametrize("scale, temperature", [(0.05, 1.0), (0.3, 0.4)])
def test_draws_are_those_of_float64(ops: Ops, scale: float, temperature: float) -> None:
    """At least 99 of 100 draws are float64's own, flat distributions over many blocks included."""
    x, table, u = values(1, 1, 400, 16), values(2, 9001, 16, scale=scale), uniforms(1, 400)
    token = head(ops, x, table, u, temperature=temperature)[0]
    want = inverse_cdf(exact_odds(x, table, temperature), u)
    assert np.mean(token == want) >= 0.99


@pytest.mark.parametrize("u", [0.0, 0.5, LAST_UNIFORM])
def test_a_token_without_probability_is_never_drawn(ops: Ops, u: float) -> None:
    """At a temperature of 0.01 all but a few tokens underflow to zero."""
    x, table = values(1, 1, 64, 16), values(2, 1300, 16)
    token = head(ops, x, table, np.full((1, 64), u), temperature=0.01)[0]
    odds = exact_odds(x, table, 0.01)
    assert (np.take_along_axis(odds, token[..., None], -1) > 1e-46).all(), "float32's smallest number is 1.4e-45"


@pytest.mark.parametrize("length", [33])
def test_head_bf16(ops_bf16: Ops, length: int) -> None:
    x, table, u = values(1, 2, length, 64), values(2, 1100, 64, scale=0.2), uniforms(2, length)
    token, argmax, entropy, soft = head(ops_bf16, x, table, u)
    _, _, rounded_entropy, rounded_soft = head(NumpyOps("bfloat16"), x, table, u)
    _, _, exact_entropy, exact_soft = head(NumpyOps("float64"), x, table, u)
    assert_low_precision(entropy, rounded_entropy, exact_entropy, f"{ops_bf16.name} entropy")
    assert_low_precision(soft, rounded_soft, exact_soft, f"{ops_bf16.name} soft embedding")
    odds = exact_odds(x, table, 0.7)
    # A score of 10 moves by up to 1/32 when it is rounded: the argmax may be any of the likeliest, and no other.
    assert (np.take_along_axis(odds, argmax[..., None], -1)[..., 0] > 0.85 * odds.max(-1)).all()
    assert (np.take_along_axis(odds, token[..., None], -1) > 0).all()
