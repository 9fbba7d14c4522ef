"""The vocabulary head's kernels against the oracle: scores, draw, entropy, argmax and mean embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dgemma.backends.cuda.kernels import head
from dgemma.backends.cuda.kernels.head import Tiling, vocab_head
from dgemma.backends.numpy.ops import NumpyOps
from dgemma.backends.torch.packed import QuantizedTensor
from dgemma.checkpoints.loading import dense
from dgemma.checkpoints.quant import Format, QTensor, quantize
from dgemma.core.errors import DgemmaError
from kernel_cases import Bench, bench, built, cast, meta, to_numpy
from kernel_harness import ARCHITECTURES
from kernel_weights import meta_weight
from law import assert_close_f32, assert_low_precision
from traces import LAST_UNIFORM, inverse_cdf
from under_test import values

SMALL = Tiling(
    rows=16, tokens=128, depth=32, warps=4, stages=1, mean_rows=16, mean_width=32, mean_depth=64, mean_warps=4,
    mean_stages=1, programs=6, chunk=16,
)  # fmt: skip
FORMATS = {
    "8 bits, symmetric": Format(bits=8, group_size=32, symmetric=True),
    "4 bits, symmetric": Format(bits=4, group_size=32, symmetric=True),
    "8 bits, affine": Format(bits=8, group_size=64),
    "4 bits, affine": Format(bits=4, group_size=64),
    "8 bits, groups of 128": Format(bits=8, group_size=128),
}


def uniforms(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1 << 24, shape) * 2.0**-24


def exact_odds(x: np.ndarray, table: np.ndarray, temperature: Any) -> np.ndarray:
    """Probabilities in float64 [B, L, V]."""
    scores = 30.0 * np.tanh(x.astype(np.float64) @ table.astype(np.float64).T / 30.0)
    scores = scores / (np.zeros((len(x), 1)) + temperature)[..., None]
    odds = np.exp(scores - scores.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def run(
    device: str, x: np.ndarray, table: np.ndarray | QTensor, temperature: Any, u: np.ndarray,
    dtype: str = "float32", sizes: Tiling = SMALL,
) -> list[np.ndarray]:  # fmt: skip
    with bench(device) as on:
        heat = np.zeros((len(x), 1)) + temperature
        out = on.run(
            vocab_head, on.put(x, dtype), put_table(on, table, dtype), 30.0, on.put(heat, "float32"),
            on.put(u, "float32"), sizes=sizes,
        )  # fmt: skip
    return [to_numpy(one) for one in out]


def put_table(on: Bench, table: np.ndarray | QTensor, dtype: str) -> Any:
    if not isinstance(table, QTensor):
        return on.put(table, dtype)
    stored = QuantizedTensor.from_host(table)
    parts = {name: getattr(stored, name) for name in ("words", "scales", "biases")}
    return replace(stored, **{k: v if v is None else on.guard.like(v) for k, v in parts.items()})


def oracle(ops: NumpyOps, x: np.ndarray, table: np.ndarray, temperature: Any, u: np.ndarray) -> list[np.ndarray]:
    heat = ops.asarray(np.zeros((len(x), 1)) + temperature, ops.wide)
    out = ops.vocab_head(cast(x, ops), cast(table, ops), 30.0, heat, ops.asarray(u.astype(np.float32)))
    return [ops.to_numpy(one) for one in out]


def check_draw(odds: np.ndarray, token: np.ndarray, u: np.ndarray, slack: float) -> None:
    """The token has mass, and u lies in its part of the unit interval, or within `slack` of it."""
    drawn = np.take_along_axis(odds, token[..., None], -1)[..., 0]
    below = np.where(np.arange(odds.shape[-1]) < token[..., None], odds, 0.0).sum(-1)
    assert (drawn > 0).all()
    assert (below <= u + slack).all() and (u <= below + drawn + slack).all()


def check(device: str, batch: int, length: int, width: int, vocab: int, temperature: Any, scale: float) -> None:
    x, table, u = values(1, batch, length, width), values(2, vocab, width, scale=scale), uniforms(batch, length)
    token, argmax, entropy, soft = run(device, x, table, temperature, u)
    want = oracle(NumpyOps("float64"), x, table, temperature, u)
    np.testing.assert_array_equal(argmax, want[1])
    assert_close_f32(entropy, want[2], "entropy")
    assert_close_f32(soft, want[3], "mean embedding")
    assert (token >= 0).all() and (token < vocab).all()
    check_draw(exact_odds(x, table, temperature), token, u, 1e-5)


@pytest.mark.parametrize("vocab", [1, 127, 512, 1537])
@pytest.mark.parametrize("batch, length, width", [(1, 1, 32), (2, 5, 24), (1, 19, 48)])
def test_head(batch: int, length: int, width: int, vocab: int, device: str) -> None:
    """Rows beyond one chunk, vocabularies beside a block, widths beside a turn of the loop."""
    check(device, batch, length, width, vocab, 0.7, 0.3)


def test_head_with_a_temperature_for_each_row(device: str) -> None:
    check(device, 3, 7, 16, 700, np.array([[0.4], [0.8], [2.0]]), 0.5)


def test_head_under_the_softcap(device: str) -> None:
    """Scores far beyond the cap: the flat part of tanh, and a temperature that makes most mass vanish."""
    check(device, 1, 9, 32, 900, 0.4, 4.0)


def test_scores_near_zero(device: str) -> None:
    """The small range of tanh, where 1 − 2 / (1 + e^2y) cancels."""
    check(device, 1, 5, 16, 600, 0.5, 0.004)


def test_scores_thousands_of_powers_of_two_apart(device: str) -> None:
    """At a temperature of 0.001 nearly all tiles are beyond float32 of the first."""
    x, table, u = values(1, 1, 5, 16), values(2, 600, 16, scale=0.2), uniforms(1, 5)
    token, argmax, entropy, soft = run(device, x, table, 0.001, u)
    want = oracle(NumpyOps("float64"), x, table, 0.001, u)
    for got, exact in ((token, want[0]), (argmax, want[1])):
        np.testing.assert_array_equal(got, exact)
    assert (entropy >= 0).all() and (entropy < 1e-6).all()
    assert_close_f32(soft, want[3], "mean embedding")


def test_the_argmax_is_the_first_of_equals(device: str) -> None:
    """The same token's row stands twice in a tile, and in others; the likeliest is the first copy."""
    x, table = values(1, 1, 8, 16), values(2, 700, 16, scale=0.3)
    table[[40, 41, 90, 300, 301, 650]] = 3.0 * x[0, 0]
    table[[129, 600]] = -table[40]
    argmax = run(device, x, table, 0.5, uniforms(1, 8))[1]
    np.testing.assert_array_equal(argmax, oracle(NumpyOps("float64"), x, table, 0.5, uniforms(1, 8))[1])
    assert argmax[0, 0] == 40


def test_draws_are_those_of_float64(device: str) -> None:
    x, table, u = values(1, 1, 64, 16), values(2, 3001, 16, scale=0.05), uniforms(1, 64)
    token = run(device, x, table, 1.0, u, sizes=replace(SMALL, rows=64, mean_rows=64, chunk=64))[0]
    assert np.mean(token == inverse_cdf(exact_odds(x, table, 1.0), u)) >= 0.98, "one near tie in 64"


@pytest.mark.parametrize("u", [0.0, 0.5, LAST_UNIFORM])
def test_a_token_without_probability_is_never_drawn(u: float, device: str) -> None:
    """At a temperature of 0.01 all but a few tokens underflow to zero, whole blocks among them."""
    x, table = values(1, 1, 24, 16), values(2, 1300, 16)
    x[0, :4] = 0.0  # and rows where every token is as likely as any other
    token = run(device, x, table, 0.01, np.full((1, 24), u))[0]
    odds = exact_odds(x, table, 0.01)
    assert (np.take_along_axis(odds, token[..., None], -1) > 1e-46).all(), "float32's smallest number is 1.4e-45"
    if u != 0.5:
        assert (token[0, :4] == (0 if u == 0.0 else 1299)).all()


def test_tiles_are_skipped_and_nothing_is_lost(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is sure of a token in one tile of twelve, the other rows of tokens in two more."""
    table = values(2, 1500, 32, scale=0.2)
    x = np.stack([12.0 * table[n] / np.linalg.norm(table[n]) ** 2 for n in (5, 700, 701, 1400)])[None] * 1.6
    x = cast(x.astype(np.float32), NumpyOps("float32"))
    listed: list[int] = []
    plain = head.mean_embedding

    def watched(masses: Any, ceilings: Any, wanted: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        listed.append(int(wanted.sum()))
        plain(masses, ceilings, wanted, *args, **kwargs)

    monkeypatch.setattr(head, "mean_embedding", watched)
    soft = run(device, x, table, 0.3, uniforms(1, 4))[3]
    assert_close_f32(soft, oracle(NumpyOps("float64"), x, table, 0.3, uniforms(1, 4))[3], "mean embedding")
    assert 3 <= listed[0] < 12, f"{listed[0]} of 12 tiles were read"


@pytest.mark.parametrize("name", [None, *FORMATS])
def test_head_bf16(name: str | None, device: str) -> None:
    """The table plain or packed: the oracle has its values, rounded once as the definition rounds them."""
    width = 128 if name and FORMATS[name].group_size == 128 else 64
    table: Any = values(2, 1100, width, scale=0.2 * (64 / width) ** 0.5)
    if name:
        table = quantize(table, FORMATS[name])
    plain = np.asarray(dense(table, "bfloat16")).astype(np.float32)
    x, u = values(1, 2, 20, width), uniforms(2, 20)
    sizes = replace(SMALL, rows=32, mean_rows=32, depth=64, mean_width=64, chunk=32)
    token, argmax, entropy, soft = run(device, x, table, 0.7, u, "bfloat16", sizes)
    rounded, exact = (oracle(NumpyOps(kind), x, plain, 0.7, u) for kind in ("bfloat16", "float64"))
    assert_low_precision(entropy, rounded[2], exact[2], "entropy")
    assert_low_precision(soft, rounded[3], exact[3], "mean embedding")
    odds = exact_odds(x, plain, 0.7)
    # Scores are float32 sums here: the argmax is float64's, and a draw is off by no more than a stored mass's rounding.
    np.testing.assert_array_equal(argmax, exact[1])
    check_draw(odds, token, u, 2.0**-9 * odds.max())


def test_other_formats_are_refused() -> None:
    table = QuantizedTensor.from_host(quantize(values(1, 8, 64), Format(mode="mxfp8", bits=8, group_size=32)))
    x, heat, u = torch.zeros(1, 1, 64, dtype=torch.bfloat16), torch.ones(1, 1), torch.zeros(1, 1)
    with pytest.raises(DgemmaError, match="reads no 8-bit mxfp8 table"):
        vocab_head(x, table, 30.0, heat, u)


def test_rows_of_nan_name_a_token_and_spoil_no_other(device: str) -> None:
    x, table = values(1, 1, 6, 16), values(2, 130, 16, scale=0.3)
    x[0, 2] = np.nan
    token, argmax, entropy, soft = run(device, x, table, 0.5, uniforms(1, 6))
    assert ((token >= 0) & (token < 130) & (argmax >= 0) & (argmax < 130)).all()
    others = [0, 1, 3, 4, 5]
    want = oracle(NumpyOps("float64"), x[:, others], table, 0.5, uniforms(1, 6)[:, others])
    assert np.isnan(entropy[0, 2]) and np.isnan(soft[0, 2]).all()
    np.testing.assert_array_equal(argmax[:, others], want[1])
    assert_close_f32(soft[:, others], want[3], "mean embedding")


VOCAB, WIDTH = 262144, 2816


def full_table(bits: int) -> Any:
    """The 26B's, without contents."""
    if bits == 16:
        return meta(VOCAB, WIDTH)
    return QuantizedTensor(
        words=meta(VOCAB, WIDTH * bits // 32, dtype=torch.int32), scales=meta(VOCAB, WIDTH // 32), biases=None,
        global_scale=None, format=Format(bits=bits, group_size=32, symmetric=True),
    )  # fmt: skip


@pytest.mark.parametrize(
    "bits, arch", [*((8, arch) for arch in ARCHITECTURES), (16, "sm_80"), (16, "sm_90"), (4, "sm_90")]
)
def test_head_compiles_without_spills(bits: int, arch: str) -> None:
    table, x, wide = full_table(bits), meta(1, 256, WIDTH), meta(1, 256, dtype=torch.float32)
    only = ("_score", "_mean") if bits < 16 else None
    results = built(lambda: vocab_head(x, table, 30.0, meta(1, 1, dtype=torch.float32), wide, arch=arch), arch, only)
    if arch == "sm_90":
        assert all("wgmma" in results[name].ptx for name in ("_score", "_mean"))


@pytest.mark.parametrize("arch", ["sm_89", "sm_90"])
def test_a_table_in_groups_of_128_fits_shared_memory(arch: str) -> None:
    """A turn is half a group: with whole ones it took 128 KB of the 99 there are on sm_89, and 240 of 227 on sm_90."""
    table, u = meta_weight("affine8", 262144, 2816), meta(1, 256, dtype=torch.float32)
    scales = meta(262144, 2816 // 128)
    table = replace(table, scales=scales, biases=scales, format=Format(bits=8, group_size=128))
    heat = meta(1, 1, dtype=torch.float32)
    assert built(lambda: vocab_head(meta(1, 256, 2816), table, 30.0, heat, u, arch=arch), arch, ("_score", "_mean"))


def test_temperatures_may_be_one_number_for_all_rows(device: str) -> None:
    """`expand` repeats a number without memory behind it."""
    x, table, u = values(1, 3, 2, 16), values(2, 70, 16, scale=0.3), uniforms(3, 2)
    with bench(device) as on:
        given, heat = (on.put(one, "float32") for one in (x, np.full((1, 1), 0.6)))
        results = [
            on.run(vocab_head, given, on.put(table, "float32"), 30.0, one, on.put(u, "float32"), sizes=SMALL)
            for one in (heat, heat.expand(3, 1))
        ]
    assert all(map(torch.equal, *results))


def test_a_table_with_one_group_to_a_row_compiles() -> None:
    """What small models have: Triton 3.6 lays out no operand for a program that is wider than such a row."""
    table = QuantizedTensor(
        words=meta(272, 8, dtype=torch.int32), scales=meta(272, 1), biases=None, global_scale=None,
        format=Format(bits=8, group_size=32, symmetric=True),
    )  # fmt: skip
    heat, u = meta(1, 1, dtype=torch.float32), meta(1, 8, dtype=torch.float32)
    assert built(lambda: vocab_head(meta(1, 8, 32), table, 30.0, heat, u), "sm_90", ("_score", "_mean"))
