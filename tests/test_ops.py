"""First rung of the ladder: every fused op of every backend against the oracle, NumPy in float64.

Inputs are numbers that bfloat16 holds exactly, so that the float64 oracle, the rounding oracle and the backend all
start from the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma.backends.numpy.ops import NumpyOps
from dgemma.core.config import AttentionConfig
from dgemma.core.ops import Ops
from dgemma.core.parts import KV, Attention, Experts, Mlp, Rope, Router, Span
from law import assert_close_f32, assert_low_precision
from under_test import BACKENDS, make_ops, values

Run = Callable[[Ops], Any]


def hold(ops: Ops, run: Run, what: str) -> None:
    """Run one computation with the backend and with the oracles, and hold every result to the law."""

    def results(one: Ops) -> list[np.ndarray]:
        out = run(one)
        return [one.to_numpy(x) for x in (out if isinstance(out, tuple) else (out,))]

    got, exact = results(ops), results(NumpyOps("float64"))
    rounded = results(NumpyOps(ops.dtype)) if ops.dtype != "float32" else got
    for i, (a, b, c) in enumerate(zip(got, rounded, exact, strict=True)):
        label = f"{ops.name} {ops.dtype} {what}, result {i}"
        if ops.dtype == "float32":
            assert_close_f32(a, c, label)
        else:
            assert_low_precision(a, b, c, label)


# ---- Dense layers -----------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 8), (2, 7, 24), (3, 33, 40)]
WIDE_SHAPE = (2, 33, 96)
"""For bfloat16: twice the oracle's error is a bound on a norm, and only a norm over many numbers is steady."""


def dense(run_for: Callable[[Ops, np.ndarray], Any], what: str, ops: Ops, shapes: Sequence[tuple[int, ...]]) -> None:
    for shape in shapes:
        x = values(len(shape) + shape[-1], *shape)
        hold(ops, lambda one, x=x: run_for(one, x), f"{what} {shape}")


def run_embed(ops: Ops, x: np.ndarray) -> Any:
    tokens = np.random.default_rng(0).integers(0, 50, x.shape[:2])
    tokens[0, 0], tokens[-1, -1] = 0, 49
    return ops.embed(ops.asarray(values(1, 50, x.shape[-1]), ops.dtype), ops.asarray(tokens, "int32"), 1.5)


def run_linear(ops: Ops, x: np.ndarray) -> Any:
    return ops.linear(ops.asarray(x, ops.dtype), ops.asarray(values(2, 13, x.shape[-1]), ops.dtype))


def run_rms_norm(ops: Ops, x: np.ndarray) -> Any:
    weight = ops.asarray(values(3, x.shape[-1], shift=1.0), ops.dtype)
    x = ops.asarray(x, ops.dtype)
    return ops.rms_norm(x, weight, 1e-6), ops.rms_norm(x, None, 1e-6), ops.rms_norm(x * 0.0, weight, 1e-6)


def run_geglu(ops: Ops, x: np.ndarray) -> Any:
    gate, up = (ops.asarray(values(i, 19, x.shape[-1], scale=0.5), ops.dtype) for i in (6, 7))
    down = ops.asarray(np.zeros((x.shape[-1], 19), np.float32), ops.dtype)
    return ops.geglu(ops.asarray(x, ops.dtype), Mlp(gate_proj=gate, up_proj=up, down_proj=down))


def run_logits(ops: Ops, x: np.ndarray) -> Any:
    return ops.logits(ops.asarray(x, ops.dtype), ops.asarray(values(8, 67, x.shape[-1], scale=3.0), ops.dtype), 30.0)


DENSE = {
    "embed": run_embed, "linear": run_linear, "rms_norm": run_rms_norm, "geglu": run_geglu,
    "logits": run_logits,
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_dense_op(ops: Ops, name: str) -> None:
    dense(DENSE[name], name, ops, SHAPES)


@pytest.mark.parametrize("name", DENSE)
def test_dense_op_bf16(ops_bf16: Ops, name: str) -> None:
    dense(DENSE[name], name, ops_bf16, [WIDE_SHAPE])


# ---- Projection, norms and rotation -----------------------------------------------------------------------------


def run_qkv(
    batch: int, length: int, *, heads: int, kv_heads: int, head_dim: int, full: bool, offset: int | None
) -> Run:
    width = 24
    config = AttentionConfig(
        kind="full_attention" if full else "sliding_attention", heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        window=None if full else 8, rope_theta=1e4, rotary_dims=head_dim // 4 if full else head_dim,
    )  # fmt: skip
    frequencies = config.inverse_frequencies()
    starts = np.arange(batch) * 5 if offset is None else np.full(batch, offset)
    angles = (starts[:, None, None, None] + np.arange(length)[:, None]) * np.array(frequencies)
    cos, sin = (f(angles).astype(ml_dtypes.bfloat16).astype(np.float32) for f in (np.cos, np.sin))

    def run(ops: Ops) -> Any:
        def weight(seed: int, *shape: int, **how: float) -> Any:
            return ops.asarray(values(seed, *shape, **how), ops.dtype)

        attention = Attention(
            config=config,
            eps=1e-6,
            q_proj=weight(1, heads * head_dim, width),
            k_proj=weight(2, kv_heads * head_dim, width),
            v_proj=None if full else weight(3, kv_heads * head_dim, width),
            o_proj=weight(4, width, heads * head_dim),
            q_norm=weight(5, head_dim, shift=1.0, scale=0.3),
            k_norm=weight(6, head_dim, shift=1.0, scale=0.3),
        )
        rope = Rope(ops.asarray(cos, ops.dtype), ops.asarray(sin, ops.dtype))
        return ops.qkv_norm_rope(ops.asarray(values(7, batch, length, width), ops.dtype), attention, rope)

    return run


QKV: dict[str, dict[str, Any]] = {
    "sliding": dict(batch=2, length=5, heads=4, kv_heads=2, head_dim=8, full=False, offset=3),
    "full": dict(batch=2, length=5, heads=4, kv_heads=1, head_dim=16, full=True, offset=1000),
    "one token, no sharing": dict(batch=1, length=1, heads=3, kv_heads=3, head_dim=8, full=True, offset=0),
    "ragged": dict(batch=3, length=7, heads=6, kv_heads=2, head_dim=4, full=False, offset=None),
}


@pytest.mark.parametrize("case", QKV)
def test_qkv_norm_rope(ops: Ops, case: str) -> None:
    hold(ops, run_qkv(**QKV[case]), f"qkv_norm_rope {case}")


@pytest.mark.parametrize("case", QKV)
def test_qkv_norm_rope_bf16(ops_bf16: Ops, case: str) -> None:
    hold(ops_bf16, run_qkv(**QKV[case] | {"batch": 3, "length": 33}), f"qkv_norm_rope {case}")


# ---- Experts ----------------------------------------------------------------------------------------------------


def run_moe(choices: np.ndarray, batch: int, *, experts: int, width: int, inner: int) -> Run:
    """A mixture whose routing is known: row n takes the experts `choices[n]`, by a margin that no rounding closes."""
    rows, k = choices.shape
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0][:experts]
    strength = 1.0 + 0.25 * np.arange(k, 0, -1)
    residual = np.einsum("k,nkd->nd", strength, directions[choices]) + values(1, rows, width, scale=0.01)

    def exact(x: np.ndarray) -> np.ndarray:
        return x.astype(ml_dtypes.bfloat16).astype(np.float32).reshape(*x.shape)

    def run(ops: Ops) -> Any:
        router = Router(
            experts=experts,
            experts_per_token=k,
            eps=1e-6,
            proj=ops.asarray(exact(4.0 * directions), ops.dtype),
            scale=ops.asarray(values(2, width, shift=1.0, scale=0.05), ops.dtype),
            per_expert_scale=ops.asarray(values(3, experts, shift=1.0, scale=0.3), ops.dtype),
        )
        weights = Experts(
            gate_up_proj=ops.asarray(values(4, experts, 2 * inner, width, scale=0.5), ops.dtype),
            down_proj=ops.asarray(values(5, experts, width, inner, scale=0.5), ops.dtype),
        )
        shape = (batch, rows // batch, width)
        h, r = values(6, *shape), exact(residual).reshape(shape)
        return ops.moe(ops.asarray(h, ops.dtype), ops.asarray(r, ops.dtype), router, weights)

    return run


def spread(rows: int, experts: int, k: int, seed: int = 0) -> np.ndarray:
    """Return int [rows, k], distinct experts for each row."""
    draw = np.random.default_rng(seed)
    return np.stack([draw.permutation(experts)[:k] for _ in range(rows)])


def test_moe_of_every_routing(ops: Ops) -> None:
    cases = {
        "one row, top-1": (spread(1, 4, 1), 1, 4),
        "top-1": (spread(14, 5, 1), 2, 5),
        "top-3": (spread(33, 8, 3), 3, 8),
        "all experts": (spread(5, 6, 6), 1, 6),
        "all rows to one expert": (np.full((9, 1), 3), 1, 4),
        "all rows to the first": (np.full((9, 1), 0), 1, 4),
        "all rows to the last two": (np.tile([[7, 6]], (12, 1)), 2, 8),
        "most experts empty": (spread(6, 3, 2) * 5, 1, 16),
    }
    for name, (choices, batch, experts) in cases.items():
        hold(ops, run_moe(choices, batch, experts=experts, width=24, inner=7), f"moe {name}")


# Not one hidden unit alone: it may lie where GELU's formula, in float32, takes 1 from nearly 1.
@given(rows=st.integers(1, 40), experts=st.integers(1, 12), k=st.integers(1, 12), inner=st.integers(3, 11))
def test_moe_of_any_shape(rows: int, experts: int, k: int, inner: int) -> None:
    choices = spread(rows, experts, min(k, experts), seed=rows)
    for backend in BACKENDS:
        run = run_moe(choices, 1, experts=experts, width=16, inner=inner)
        hold(make_ops(backend, "float32"), run, f"moe {rows} rows, {experts} experts, top-{k}, inner {inner}")


@pytest.mark.parametrize("k", [1, 4])
def test_moe_bf16(ops_bf16: Ops, k: int) -> None:
    hold(ops_bf16, run_moe(spread(66, 8, k), 2, experts=8, width=48, inner=40), f"moe top-{k}")


# ---- Attention and its cache ------------------------------------------------------------------------------------


def plain_attention(
    q: np.ndarray, keys: np.ndarray, own_values: np.ndarray, at: int, *, window: int | None, causal: bool
) -> np.ndarray:
    """Attention over one sequence's whole history, by position: q [H, L, A], keys [K, at + L, A] → [L, H·A].

    Causal: a key at or before the query and less than the window behind it. Denoising: all of the canvas, and of the
    cache the last window − 1 tokens, whatever the query's place in the canvas.
    """
    heads, length, width = q.shape
    keys, own_values = (np.repeat(x, heads // x.shape[0], 0).astype(np.float64) for x in (keys, own_values))
    place = np.arange(at + length)
    query = np.arange(at, at + length)[:, None] if causal else np.full((length, 1), at)
    seen = query - place < (window or math.inf)
    if causal:
        seen &= place <= query
    scores = np.where(seen, q.astype(np.float64) @ keys.swapaxes(-1, -2), -np.inf)
    odds = np.exp(scores - scores.max(-1, keepdims=True))
    out = odds / odds.sum(-1, keepdims=True) @ own_values
    return out.transpose(1, 0, 2).reshape(length, heads * width)


def span(ops: Ops, length: np.ndarray, window: int | None, slots: np.ndarray | None, *, causal: bool) -> Span:
    """The span that the graph would give: `length` tokens so far, int [B]."""
    held = length if window is None else np.minimum(length, window - 1)
    where = None if slots is None else ops.asarray(slots, "int32")
    return Span(held=ops.asarray(held, "int32"), slots=where, window=window, causal=causal)


def empty(ops: Ops, slots: int, kv_heads: int, entries: int, width: int) -> KV:
    """A layer's cache whose scratch holds numbers that show where they are read."""
    return KV(*(ops.asarray(np.full((slots, kv_heads, entries, width), 77.0, np.float32), ops.dtype) for _ in range(2)))


def filled(
    ops: Ops, chunks: Sequence[int | np.ndarray], keys: np.ndarray, own: np.ndarray, window: int | None, room: int,
    slots: np.ndarray | None = None,
) -> tuple[KV, np.ndarray]:  # fmt: skip
    """Write a history into a new cache, chunk by chunk; a chunk is one length for all rows, or one for each."""
    batch, kv_heads, total, width = keys.shape
    held = total if window is None else min(total, window - 1)
    longest = max([room, *(int(np.max(n)) for n in chunks)])
    context = empty(ops, batch if slots is None else int(slots.max()) + 2, kv_heads, held + longest, width)
    done = np.zeros(batch, int)
    for n in chunks:
        fresh = np.zeros(batch, int) + n
        k, v = (np.full((batch, kv_heads, int(fresh.max()), width), 9.0, np.float32) for _ in range(2))
        for b in range(batch):
            k[b, :, : fresh[b]] = keys[b, :, done[b] : done[b] + fresh[b]]
            v[b, :, : fresh[b]] = own[b, :, done[b] : done[b] + fresh[b]]
        where = span(ops, done, window, slots, causal=True)
        count = n if isinstance(n, int) else ops.asarray(fresh, "int32")
        context = ops.cache_write(context, ops.asarray(k, ops.dtype), ops.asarray(v, ops.dtype), where, count)
        done = done + fresh
    return context, done


SLOTS = np.array([3, 1, 4, 0])
"""Of the rows of a pass, in this order; slots 2 and 5 are others'."""


def attend(
    ops: Ops, chunks: Sequence[int | np.ndarray], *, window: int | None, causal: bool, length: int = 5,
    heads: int = 4, kv_heads: int = 2, width: int = 8, batch: int = 2, slots: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Fill a cache, attend, and return the backend's result and the plain one, both [B, L, H·A]."""
    done = sum((np.zeros(batch, int) + n for n in chunks), np.zeros(batch, int))
    total = int(done.max())
    old_k, old_v = values(1, batch, kv_heads, total, width), values(2, batch, kv_heads, total, width)
    q, k, v = values(3, batch, heads, length, width), *(values(i, batch, kv_heads, length, width) for i in (4, 5))
    context, tokens = filled(ops, chunks, old_k, old_v, window, length, slots)
    arrays = (ops.asarray(x, ops.dtype) for x in (q, k, v))
    got = ops.to_numpy(ops.attention(*arrays, context, span(ops, tokens, window, slots, causal=causal)))
    want = [
        plain_attention(
            q[b], np.concatenate([old_k[b, :, : done[b]], k[b]], 1), np.concatenate([old_v[b, :, : done[b]], v[b]], 1),
            int(done[b]), window=window, causal=causal,
        )
        for b in range(batch)
    ]  # fmt: skip
    return got, np.stack(want)


WINDOW = 9
HISTORIES: dict[str, list[Any]] = {
    "nothing cached": [],
    "one token": [1],
    **{f"window {n:+d}": [WINDOW + n] for n in (-2, -1, 0, 1, 2)},
    "two windows and more, at once": [2 * WINDOW + 3],
    "two windows and more, in chunks": [4, WINDOW + 2, 1, 5],
    "window reached in chunks": [WINDOW - 2, 1, 1, 1],
    "ragged": [np.array([3, 7]), np.array([6, 1])],
    "ragged, one row empty": [np.array([0, 4])],
    "ragged around the window": [np.array([WINDOW - 1, WINDOW]), np.array([1, 1]), np.array([12, 0])],
}


@pytest.mark.parametrize("causal", [False, True], ids=["denoise", "encode"])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
@pytest.mark.parametrize("history", HISTORIES)
def test_attention(ops: Ops, history: str, window: int | None, causal: bool) -> None:
    for slots in (None, SLOTS[:2]):
        for length in (1, 5, WINDOW + 4):
            got, want = attend(ops, HISTORIES[history], window=window, causal=causal, length=length, slots=slots)
            assert_close_f32(got, want, f"{ops.name} attention of {length} queries in slots {slots}")


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 6), (6, 1), (6, 3)])
def test_attention_of_shared_heads(ops: Ops, heads: int, kv_heads: int) -> None:
    got, want = attend(ops, [11], window=None, causal=False, heads=heads, kv_heads=kv_heads, width=6, batch=1)
    assert_close_f32(got, want, f"{ops.name} attention")


@given(
    chunks=st.lists(st.lists(st.integers(0, 2 * WINDOW), min_size=3, max_size=3).filter(any), max_size=4),
    window=st.one_of(st.none(), st.integers(2, 12)),
    causal=st.booleans(),
    length=st.integers(1, 14),
    slots=st.permutations(range(5)),
)
def test_attention_of_any_history(
    chunks: list[list[int]], window: int | None, causal: bool, length: int, slots: list[int]
) -> None:
    """Rows of different lengths, in any slots."""
    case: dict[str, Any] = dict(window=window, causal=causal, length=length, batch=3, slots=np.array(slots[:3]))
    for backend in BACKENDS:
        got, want = attend(make_ops(backend, "float32"), [np.array(one) for one in chunks], **case)
        assert_close_f32(got, want, f"{backend} attention")


@pytest.mark.parametrize("causal", [False, True], ids=["denoise", "encode"])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
@pytest.mark.parametrize("history", ["nothing cached", "two windows and more, in chunks", "ragged"])
def test_attention_bf16(ops_bf16: Ops, history: str, window: int | None, causal: bool) -> None:
    case: dict[str, Any] = dict(window=window, causal=causal, length=33, width=16, slots=SLOTS[:2])
    got, want = attend(ops_bf16, HISTORIES[history], **case)
    rounded, _ = attend(NumpyOps("bfloat16"), HISTORIES[history], **case)
    assert_low_precision(got, rounded, want, f"{ops_bf16.name} attention")


@pytest.mark.parametrize("outside", [0, 1], ids=["the newest that is out of sight", "the oldest in sight"])
def test_the_window_ends_where_it_should(ops: Ops, outside: int) -> None:
    """At 1024 tokens and a window of 1024, a canvas sees the last 1023: token 0 must not matter, token 1 must."""
    window, tokens = 1024, 1024
    keys, own = values(1, 1, 1, tokens, 4), values(2, 1, 1, tokens, 4)
    q, k, v = (ops.asarray(values(i, 1, 2 if i == 3 else 1, 3, 4), ops.dtype) for i in (3, 4, 5))

    def result(own: np.ndarray) -> np.ndarray:
        context, length = filled(ops, [1000, 24], keys, own, window, 3)
        return ops.to_numpy(ops.attention(q, k, v, context, span(ops, length, window, None, causal=False)))

    changed = own.copy()
    changed[:, :, outside] += 100.0
    assert np.array_equal(result(own), result(changed)) == (outside == 0)


@pytest.mark.parametrize("slots", [None, SLOTS[:2]], ids=["in order", "spread"])
def test_attention_leaves_the_cache_bit_identical(ops: Ops, slots: np.ndarray | None) -> None:
    """The valid entries of the rows' slots, and everything in the others."""
    mine = [0, 1] if slots is None else slots.tolist()
    for window in (None, WINDOW):
        for causal in (False, True):
            keys, own = values(1, 2, 2, 13, 8), values(2, 2, 2, 13, 8)
            context, length = filled(ops, [7, np.array([6, 2])], keys, own, window, 5, slots)
            where = span(ops, length, window, slots, causal=causal)
            before = [ops.to_numpy(x).copy() for x in context]
            arrays = [ops.asarray(values(i, 2, heads, 5, 8), ops.dtype) for i, heads in ((3, 4), (4, 2), (5, 2))]
            ops.to_numpy(ops.attention(*arrays, context, where))
            for old, new in zip(before, map(ops.to_numpy, context), strict=True):
                for slot, held in zip(mine, ops.to_numpy(where.held).tolist(), strict=True):
                    np.testing.assert_array_equal(old[slot, :, :held], new[slot, :, :held])
                others = [slot for slot in range(len(old)) if slot not in mine]
                np.testing.assert_array_equal(old[others], new[others])


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
@pytest.mark.parametrize("chunks", [[4, 7], [np.array([3, 0, 12]), np.array([9, 1, 4])], [2 * WINDOW]], ids=str)
def test_cache_write_in_slots(ops: Ops, chunks: list[Any], window: int | None) -> None:
    """The newest entries of each row stand end to end at the front of its slot, and no other slot changes."""
    slots, batch = SLOTS[:3], 3
    done = sum((np.zeros(batch, int) + n for n in chunks), np.zeros(batch, int))
    total = int(done.max())
    keys, own = values(1, batch, 2, total, 4), values(2, batch, 2, total, 4)
    context, length = filled(ops, chunks, keys, own, window, 5, slots)
    np.testing.assert_array_equal(length, done)
    for x, written in zip(context, (keys, own), strict=True):
        x = ops.to_numpy(x)
        for row, slot in enumerate(slots):
            held = int(done[row]) if window is None else min(int(done[row]), window - 1)
            np.testing.assert_array_equal(x[slot, :, :held], written[row, :, done[row] - held : done[row]])
        others = [slot for slot in range(len(x)) if slot not in slots]
        assert (x[others] == 77.0).all(), "a slot that no row has was written"
