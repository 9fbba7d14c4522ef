"""Classes of tokens, reduced in every backend's head, against the definition in float64; the draw inside a class."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma.backends.classes import LANES, blocks_of, filled
from dgemma.backends.numpy.ops import NumpyOps
from dgemma.checkpoints.quant import Format, quantize
from dgemma.core import within
from dgemma.core.canvas import Chosen
from dgemma.core.ops import Ops
from dgemma.core.parts import NOTHING, Masses
from law import assert_close_f32, assert_low_precision
from test_head import exact_odds, uniforms
from traces import inverse_cdf
from under_test import BACKENDS, make_ops, values

Reduced = tuple[np.ndarray, Masses]


def reduced(
    ops: Ops, x: np.ndarray, table: Any, classes: np.ndarray, count: int, *, temperature: Any = 0.7,
    body: Any = None,
) -> Reduced:  # fmt: skip
    """Mean embedding and masses: x [B, L, D], one temperature or [B, 1]; `body` is the op where it is not the ops'."""
    table = ops.asarray(table, ops.dtype) if isinstance(table, np.ndarray) else table
    heat = ops.asarray(np.zeros((len(x), 1)) + temperature, ops.wide)
    given_ = ops.asarray(x, ops.dtype), table, 30.0, heat, ops.asarray(classes.astype(np.int32)), count
    soft, masses = body(ops, *given_) if body else ops.class_head(*given_)
    return ops.to_numpy(soft), Masses(*map(ops.to_numpy, masses))


def defined(x: np.ndarray, table: np.ndarray, classes: np.ndarray, count: int, **how: Any) -> Reduced:
    """The definition in float64."""
    return reduced(NumpyOps("float64"), x, table, classes, count, body=Ops.class_head, **how)


def uneven(seed: int, vocab: int, count: int) -> np.ndarray:
    """Classes of very different sizes, two of them without tokens where there are more, and tokens of none."""
    draw = np.random.default_rng(seed)
    odds = 0.6 ** np.arange(count) + 0.01
    odds[1:-1:3] *= count < 6
    found = draw.choice(count, vocab, p=odds / odds.sum())
    return np.where(draw.random(vocab) < 0.2, -1, found).astype(np.int32)


LOWEST = -80.0
"""Sums of numbers near the end of float32's normal ones, at −87, lose what is below it: MLX has none of those."""


def check(got: Reduced, want: Reduced, what: str) -> None:
    assert_close_f32(got[0], want[0], f"{what} mean embedding")
    empty = want[1].score == NOTHING
    for name, one, exact in zip(Masses._fields, got[1], want[1], strict=True):
        if name == "best":
            assert one.dtype == np.int32
            np.testing.assert_array_equal(one, exact, what)
        elif name == "moment":
            assert_close_f32(one, exact, f"{what} {name}")
        else:
            np.testing.assert_array_equal(one[empty], np.float32(NOTHING), what)
            if (
                name == "mass"
            ):  # one bit at last, of float32's smallest numbers; then no more than its likeliest token's
                low = (exact < LOWEST) & ~empty
                assert (one >= want[1].score - 1e-3)[low].all() and (one <= exact + 0.7)[low].all(), what
                one, exact = np.where(low, 0.0, one), np.where(low, 0.0, exact)
            # Beside the probabilities' logs: of the only class there is the log is 0, but for rounding.
            assert_close_f32(np.where(empty, 1.0, one - 1), np.where(empty, 1.0, exact - 1), f"{what} {name}")
    assert (got[1].mass >= got[1].score).all(), what


@pytest.mark.parametrize("count", [1, 3, 31, 150])
@pytest.mark.parametrize("vocab", [5, 512, 1537, 9001])
def test_classes(ops: Ops, vocab: int, count: int) -> None:
    if vocab == 9001 and ops.name == "torch" and type(ops).__name__ == "PlainTorch" and count > 31:
        count = 31  # the definition on torch: one class after the other
    x, table, classes = values(1, 2, 7, 24), values(2, vocab, 24, scale=0.3), uneven(3, vocab, count)
    heat = np.array([[0.4], [0.8]])
    check(
        reduced(ops, x, table, classes, count, temperature=heat),
        defined(x, table, classes, count, temperature=heat), ops.name,
    )  # fmt: skip


@given(
    length=st.integers(1, 9), vocab=st.integers(1, 1200), width=st.integers(1, 12), count=st.integers(1, 40),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_classes_of_any_shape(length: int, vocab: int, width: int, count: int, seed: int) -> None:
    x, table, classes = values(1, 1, length, width), values(2, vocab, width, scale=0.4), uneven(seed, vocab, count)
    want = defined(x, table, classes, count)
    for backend in BACKENDS:
        check(reduced(make_ops(backend, "float32"), x, table, classes, count), want, backend)


def test_classes_under_the_softcap(ops: Ops) -> None:
    """Spans of 150 nats, where float32's exponential is zero for most tokens: scores stay exact."""
    x, table, classes = values(1, 1, 9, 32), values(2, 900, 32, scale=4.0), uneven(3, 900, 30)
    got, want = (of(x, table, classes, 30, temperature=0.4) for of in (lambda *a, **k: reduced(ops, *a, **k), defined))
    assert want[1].score[want[1].score > NOTHING].min() < -104, "the case is too mild"
    check(got, want, ops.name)


def test_the_best_is_the_first_of_equals(ops: Ops) -> None:
    """Every token twice or more, in one block, in neighbouring ones and in other tiles."""
    vocab = 20_000
    rows = values(2, 40, 16)
    table, classes = rows[np.arange(vocab) % 40], (np.arange(vocab) // 7 % 5).astype(np.int32)
    x = values(1, 1, 11, 16)
    best = reduced(ops, x, table, classes, 5)[1].best
    tops = np.argmax(
        np.where(classes == np.arange(5)[:, None], (x[0] @ rows.T)[:, None, np.arange(vocab) % 40], -99), -1
    )
    np.testing.assert_array_equal(best[0], tops)


def test_without_any_live_token(ops: Ops) -> None:
    x, table = values(1, 1, 3, 8), values(2, 600, 8)
    _, masses = reduced(ops, x, table, np.full(600, -1, np.int32), 3)
    assert (masses.mass == np.float32(NOTHING)).all() and (masses.score == np.float32(NOTHING)).all()
    assert not masses.best.any() and not masses.moment.any()


def test_the_mean_embedding_is_the_other_heads(ops: Ops) -> None:
    """Bit for bit: what is fed back does not depend on who looks."""
    for vocab, length in ((700, 5), (9001, 33)):
        x, table = values(1, 2, length, 16), values(2, vocab, 16, scale=0.3)
        soft, _ = reduced(ops, x, table, uneven(3, vocab, 9), 9)
        heat, u = ops.asarray(np.full((2, 1), 0.7), ops.wide), ops.asarray(np.zeros((2, length), np.float32))
        *_, want = ops.vocab_head(ops.asarray(x, ops.dtype), ops.asarray(table, ops.dtype), 30.0, heat, u)
        np.testing.assert_array_equal(soft, ops.to_numpy(want))


def test_rows_over_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than have their scores in memory at once, tiles and blocks that divide nothing evenly."""
    from dgemma.backends.mlx import head as mlx_head
    from dgemma.backends.torch import head

    for name, value in (("ROWS", 7), ("TILE", 1024), ("BLOCK", 3 * 1024)):
        monkeypatch.setattr(head, name, value)
    monkeypatch.setattr(mlx_head, "HELD", 7 * 2600)
    monkeypatch.setattr(mlx_head, "PART", 7 * 512)
    x, table, classes = values(1, 3, 6, 16), values(2, 2600, 16, scale=0.3), uneven(3, 2600, 12)
    heat = np.array([[0.4], [0.8], [2.0]])
    want = defined(x, table, classes, 12, temperature=heat)
    for backend in ("inference", "mlx"):
        ops = make_ops(backend, "float32")
        check(reduced(ops, x, table, classes, 12, temperature=heat), want, backend)
        of = ops.asarray(classes)
        hot = ops.asarray(heat, ops.wide)
        first, again = (ops.class_head(ops.asarray(x), ops.asarray(table), 30.0, hot, of, 12)[1].mass for _ in range(2))
        np.testing.assert_array_equal(ops.to_numpy(first), ops.to_numpy(again))


@pytest.mark.parametrize("kind", [
    Format(bits=4), Format(bits=8, group_size=64, symmetric=True), Format(mode="mxfp4"),
    Format(mode="nvfp4", group_size=16),
], ids=lambda kind: f"{kind.mode}{kind.bits}")  # fmt: skip
def test_quantized_tables(ops: Ops, kind: Format) -> None:
    from dgemma.checkpoints import quant

    packed = quantize(values(2, 1100, 128, scale=0.2), kind)
    dense = np.asarray(quant.dequantize(packed, "float32"))
    x, classes = values(1, 1, 5, 128), uneven(3, 1100, 20)
    check(reduced(ops, x, ops.pack(packed), classes, 20), defined(x, dense, classes, 20), f"{ops.name} {kind.mode}")


def test_classes_bf16(ops_bf16: Ops) -> None:
    x, table, classes = values(1, 2, 33, 64), values(2, 1100, 64, scale=0.2), uneven(3, 1100, 20)
    got = reduced(ops_bf16, x, table, classes, 20)
    rounded = reduced(NumpyOps("bfloat16"), x, table, classes, 20, body=Ops.class_head)
    exact = defined(x, table, classes, 20)
    live = exact[1].score > NOTHING
    assert_low_precision(got[0], rounded[0], exact[0], "mean embedding")
    for name in ("mass", "score", "moment"):
        one, own, true = (getattr(of[1], name)[live] for of in (got, rounded, exact))
        assert_low_precision(one, own, true, name)


def test_blocks_hold_every_live_token_once_and_in_order() -> None:
    sizes = ((1, 1, None), (5000, 7, 512), (4097, 150, 1024), (300, 3, None))
    for (vocab, count, tile), lanes in itertools.product(sizes, (LANES, 128)):
        classes = uneven(vocab, vocab, count)
        blocks = blocks_of(classes, count, tile, lanes)
        np.testing.assert_array_equal(np.sort(blocks.tokens[blocks.real]), np.flatnonzero(classes >= 0))
        assert blocks.tokens.shape[1:] == (lanes,) and (np.diff(blocks.tokens, axis=1)[blocks.real[:, 1:]] > 0).all()
        np.testing.assert_array_equal(classes[blocks.tokens], np.repeat(blocks.owner[:, None], lanes, 1))
        of_tile = np.repeat(np.arange(len(blocks.bounds) - 1), np.diff(blocks.bounds))
        np.testing.assert_array_equal(blocks.tokens // (tile or vocab), np.repeat(of_tile[:, None], lanes, 1))
        whole = filled(classes, count, tile or vocab, lanes)
        np.testing.assert_array_equal(np.flatnonzero(whole), np.sort(blocks.tokens[blocks.real.all(1)].ravel()))


# ---- The draw inside a class --------------------------------------------------------------------------------------


def drawn(
    ops: Ops, x: np.ndarray, table: np.ndarray, classes: np.ndarray, label: np.ndarray, rest: np.ndarray,
    temperature: Any = 0.7, *, after_its_head: bool = False, token: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Tokens int32 [R], of positions in turn: x [B, L, D], label and rest [B, L]."""
    weights: Any = SimpleNamespace(
        embed_tokens=ops.asarray(table, ops.dtype), config=SimpleNamespace(vocab_size=len(table), softcap=30.0)
    )
    states, of, heat = ops.asarray(x, ops.dtype), ops.asarray(classes), np.full((len(x), 1), temperature, np.float32)
    if after_its_head:
        ops.class_head(states, weights.embed_tokens, 30.0, ops.asarray(heat, ops.wide), of, int(classes.max()) + 1)
    open_ = np.full(label.shape, -1, np.int32) if token is None else token
    chosen = Chosen(open_, label, rest.astype(np.float32), open_, np.zeros(label.shape, np.float32))
    found = within.drawn(
        ops, lambda x, places: ops.logits_at(x, places, weights.embed_tokens, 30.0), states, heat, of, chosen
    )
    return np.concatenate([ops.to_numpy(one) for one in found])


@pytest.mark.parametrize("vocab, scale", [(300, 0.2), (9001, 0.5), (2000, 3.0)])
@pytest.mark.parametrize("after_its_head", [False, True])
def test_draws_inside_a_class_are_the_inverse_cdf(
    ops: Ops, vocab: int, scale: float, after_its_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(within, "ROWS", 37)
    x, table, classes = values(1, 2, 100, 16), values(2, vocab, 16, scale=scale), uneven(3, vocab, 4)
    label = np.random.default_rng(0).choice([0, 3], (2, 100)).astype(np.int32)
    rest = uniforms(2, 100)
    token = drawn(ops, x, table, classes, label, rest, after_its_head=after_its_head)
    odds = exact_odds(x, table, 0.7) * (classes == label[..., None])
    assert (classes[token] == label.reshape(-1)).all()
    assert np.mean(token == inverse_cdf(odds / odds.sum(-1, keepdims=True), rest).reshape(-1)) >= 0.99


def test_draws_inside_a_class_are_equal_everywhere() -> None:
    """Uniforms away from the borders, at most half of their tokens' share: one answer, whatever the rounding."""
    vocab = 3000
    x, table, classes = values(1, 1, 64, 16), values(2, vocab, 16, scale=0.4), uneven(3, vocab, 3)
    label = (np.arange(64) % 2 * 2).astype(np.int32)[None]
    odds = exact_odds(x, table, 0.7) * (classes == label[..., None])
    upto = np.cumsum(odds / odds.sum(-1, keepdims=True), -1)
    wanted = np.array([[row.searchsorted(u) for row, u in zip(upto[0], uniforms(1, 64)[0], strict=True)]])
    ends = np.take_along_axis(upto, wanted[..., None], -1)[..., 0]
    starts = ends - np.take_along_axis(odds / odds.sum(-1, keepdims=True), wanted[..., None], -1)[..., 0]
    for backend in BACKENDS:
        ops = make_ops(backend, "float32")
        for after in (False, True):
            got = drawn(ops, x, table, classes, label, (starts + ends) / 2, after_its_head=after)
            np.testing.assert_array_equal(got, wanted[0], backend)


def test_draws_inside_a_class_have_its_distribution(ops: Ops) -> None:
    """Chi-squared of 4,000 draws from one distribution, twelve tokens of a class among a hundred."""
    classes = np.where(np.arange(100) % 8 == 3, 1, 0).astype(np.int32)
    x, table = np.repeat(values(1, 1, 1, 16), 4000, 1), values(2, 100, 16, scale=0.3)
    token = drawn(ops, x, table, classes, np.ones((1, 4000), np.int32), uniforms(1, 4000, seed=7), after_its_head=True)
    odds = exact_odds(x[:, :1], table, 0.7)[0, 0] * (classes == 1)
    mine = np.flatnonzero(classes == 1)
    expected = (odds / odds.sum())[mine] * 4000
    seen = np.bincount(token, minlength=100)
    assert seen[mine].sum() == 4000 and len(mine) == 13
    assert ((seen[mine] - expected) ** 2 / expected).sum() < 32.9, "the 99.9th percentile for 12 degrees of freedom"


def test_draws_where_the_class_is_all_but_impossible(ops: Ops) -> None:
    """A class a hundred nats below the likeliest token: its own distribution is as fine as any."""
    x, table = values(1, 1, 50, 32), values(2, 400, 32, scale=0.2)
    x[..., 0], table[:, 0] = 4.0, np.where(np.arange(400) < 200, 8.0, -8.0)
    classes = (np.arange(400) >= 200).astype(np.int32)
    label, rest = np.ones((1, 50), np.int32), uniforms(1, 50)
    token = drawn(ops, x, table, classes, label, rest, 0.4, after_its_head=True)
    scores = (30 * np.tanh(x[0].astype(np.float64) @ table[200:].T.astype(np.float64) / 30)) / 0.4
    odds = np.exp(scores - scores.max(-1, keepdims=True))
    want = 200 + inverse_cdf((odds / odds.sum(-1, keepdims=True))[None], rest)[0]
    assert np.mean(token == want) >= 0.95 and (token >= 200).all()


def test_only_open_positions_are_drawn(ops: Ops) -> None:
    x, table, classes = values(1, 2, 6, 16), values(2, 300, 16), uneven(3, 300, 2)
    token = np.array([[5, -1, 7, 8, -1, 9], [1, 2, 3, 4, 5, -1]], np.int32)
    label, rest = np.zeros((2, 6), np.int32), uniforms(2, 6)
    got = drawn(ops, x, table, classes, label, rest, token=token)
    every = drawn(ops, x, table, classes, label, rest)
    np.testing.assert_array_equal(got, every[(token < 0).reshape(-1)])
