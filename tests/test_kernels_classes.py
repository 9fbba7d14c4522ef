"""What the vocabulary head's kernels make of classes of tokens, against the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dgemma.backends.cuda.kernels import head, head_classes
from dgemma.backends.cuda.kernels.head import Tiling
from dgemma.backends.numpy.ops import NumpyOps
from dgemma.checkpoints.loading import dense
from dgemma.checkpoints.quant import quantize
from dgemma.core.parts import NOTHING, Masses
from kernel_cases import bench, built, cast, meta, to_numpy
from kernel_harness import ARCHITECTURES
from law import assert_close_f32, assert_low_precision
from test_kernels_head import FORMATS, SMALL, VOCAB, WIDTH, full_table, put_table, run, uniforms
from under_test import values


def found(
    device: str, x: np.ndarray, table: Any, temperature: Any, classes: np.ndarray, count: int,
    dtype: str = "float32", sizes: Tiling = SMALL,
) -> tuple[np.ndarray, Masses]:  # fmt: skip
    with bench(device) as on:
        heat = on.put(np.zeros((len(x), 1)) + temperature, "float32")
        soft, masses = on.run(
            head.class_head, on.put(x, dtype), put_table(on, table, dtype), 30.0, heat, on.put(classes, "int32"),
            count, sizes=sizes,
        )  # fmt: skip
    return to_numpy(soft), Masses(*map(to_numpy, masses))


def oracle(
    ops: NumpyOps, x: np.ndarray, table: np.ndarray, temperature: Any, classes: np.ndarray, count: int
) -> tuple[np.ndarray, Masses]:
    heat = ops.asarray(np.zeros((len(x), 1)) + temperature, ops.wide)
    soft, masses = ops.class_head(cast(x, ops), cast(table, ops), 30.0, heat, classes, count)
    return ops.to_numpy(soft), Masses(*map(ops.to_numpy, masses))


def some_classes(vocab: int, count: int) -> np.ndarray:
    """The first holds most tokens, some are dead, the last is empty, and one has a single token where there is room."""
    draw = np.random.default_rng(vocab)
    classes = np.where(draw.random(vocab) < 0.6, 0, draw.integers(-1, max(count - 1, 1), vocab)).astype(np.int32)
    if count > 3:
        classes[classes == 1] = -1
        classes[vocab - 2] = 1
    return classes


@pytest.mark.parametrize(
    "batch, length, width, vocab, count",
    [(1, 1, 32, 1, 1), (2, 5, 24, 130, 4), (1, 19, 16, 520, 5), (1, 1, 16, 60, 40)],
)
def test_class_head(batch: int, length: int, width: int, vocab: int, count: int, device: str) -> None:
    """Rows beyond a chunk; classes of no token, and of several slices."""
    check(device, batch, length, width, vocab, count, SMALL)


def test_classes_of_many_slices(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More slices than are joined at a time, more tokens in one than are read at a time, more rows than a program's."""
    for name, size in (("SLICE", 24), ("TOKENS", 16), ("PARTS", 4), ("ROWS", 16)):
        monkeypatch.setattr(head_classes, name, size)
    check(device, 1, 19, 16, 260, 4, replace(SMALL, chunk=32))


def check(device: str, batch: int, length: int, width: int, vocab: int, count: int, sizes: Tiling) -> None:
    x, table, classes = values(1, batch, length, width), values(2, vocab, width, scale=0.3), some_classes(vocab, count)
    heat = np.linspace(0.4, 1.0, batch)[:, None]
    soft, got = found(device, x, table, heat, classes, count, sizes=sizes)
    exact, want = oracle(NumpyOps("float64"), x, table, heat, classes, count)
    np.testing.assert_array_equal(got.best, want.best)
    for name in ("mass", "score", "moment"):
        assert_close_f32(getattr(got, name), getattr(want, name), name)
    assert_close_f32(soft, exact, "mean embedding")
    assert (got.mass >= got.score).all()
    if count > 1:
        empty = got._replace(**{name: one[..., -1] for name, one in got._asdict().items()})
        assert (empty.mass == NOTHING).all() and (empty.score == NOTHING).all()
        assert not empty.moment.any() and not empty.best.any()
    np.testing.assert_array_equal(soft, run(device, x, table, heat, uniforms(batch, length), sizes=sizes)[3])


def test_scores_are_exact_where_probabilities_underflow(device: str) -> None:
    """At a temperature of 0.01 classes are hundreds of nats apart, where the exponential of a float32 is 0."""
    x, table, classes = values(1, 1, 5, 16), values(2, 600, 16, scale=0.3), some_classes(600, 4)
    _, got = found(device, x, table, 0.01, classes, 4)
    _, want = oracle(NumpyOps("float64"), x, table, 0.01, classes, 4)
    assert want.score[..., :3].min() < -103
    np.testing.assert_allclose(got.score, want.score, rtol=1e-5, atol=1e-3)  # of scores of some 2,000
    np.testing.assert_array_equal(got.best, want.best)
    assert (got.mass >= got.score).all() and np.isfinite(got.moment).all()


def test_the_likeliest_of_a_class_is_the_first_of_equals(device: str) -> None:
    """The same row of the table stands several times, within a slice and in two, and in two classes."""
    x, table = values(1, 1, 8, 16), values(2, 900, 16, scale=0.3)
    copies = [40, 41, 90, 300, 301, 850]
    table[copies] = 3.0 * x[0, 0]
    classes = np.zeros(900, np.int32)
    classes[[40, 301]] = 1
    _, got = found(device, x, table, 0.5, classes, 2)
    _, want = oracle(NumpyOps("float64"), x, table, 0.5, classes, 2)
    np.testing.assert_array_equal(got.best, want.best)
    assert got.best[0, 0].tolist() == [41, 40]


@pytest.mark.parametrize("name", [None, "8 bits, symmetric", "4 bits, affine"])
def test_class_head_bf16(name: str | None, device: str) -> None:
    table: Any = values(2, 700, 64, scale=0.2)
    if name:
        table = quantize(table, FORMATS[name])
    plain = np.asarray(dense(table, "bfloat16")).astype(np.float32)
    x, classes = values(1, 2, 9, 64), some_classes(700, 5)
    soft, got = found(device, x, table, 0.7, classes, 5, "bfloat16")
    (less, rounded), (exact, want) = (
        oracle(NumpyOps(kind), x, plain, 0.7, classes, 5) for kind in ("bfloat16", "float64")
    )
    np.testing.assert_array_equal(got.best, want.best)  # scores are float32 sums
    for field in ("mass", "score", "moment"):
        assert_low_precision(*(getattr(one, field)[..., :4] for one in (got, rounded, want)), field)
    assert_low_precision(soft, less, exact, "mean embedding")


def test_a_row_of_nan_spoils_no_other(device: str) -> None:
    x, table, classes = values(1, 1, 6, 16), values(2, 130, 16, scale=0.3), some_classes(130, 3)
    x[0, 2] = np.nan
    _, got = found(device, x, table, 0.5, classes, 3)
    assert np.isnan(got.mass[0, 2, :2]).all()
    assert ((got.best >= 0) & (got.best < 130)).all()
    others = [0, 1, 3, 4, 5]
    _, want = oracle(NumpyOps("float64"), x[:, others], table, 0.5, classes, 3)
    assert_close_f32(got.mass[:, others], want.mass, "mass")
    np.testing.assert_array_equal(got.best[:, others], want.best)


def test_tokens_are_put_in_order_of_their_class() -> None:
    classes = torch.tensor([2, -1, 0, 2, 0, -1, 2], dtype=torch.int32)
    runs = head_classes.runs_of(classes, 4)
    assert runs.order.tolist() == [1, 5, 2, 4, 0, 3, 6] and runs.edges.tolist() == [2, 4, 4, 7, 7]


@pytest.mark.parametrize("bits, arch", [*((8, arch) for arch in ARCHITECTURES), (16, "sm_90"), (4, "sm_90")])
def test_class_head_compiles_without_spills(bits: int, arch: str) -> None:
    heat, classes = meta(1, 1, dtype=torch.float32), meta(VOCAB, dtype=torch.int32)
    only = ("_score",) if bits != 8 else ("_score", "_settle", "_slice", "_join")
    results = built(
        lambda: head.class_head(meta(1, 256, WIDTH), full_table(bits), 30.0, heat, classes, 150, arch=arch), arch, only
    )
    assert arch != "sm_90" or "wgmma" in results["_score"].ptx
