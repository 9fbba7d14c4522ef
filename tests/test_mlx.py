"""What only the mlx backend does: compiling, a cache that grows, experts, the head in blocks, weights from a file.

Its ops and its logits climb the same ladder as every backend's (test_ops, test_parity, test_properties). On Linux all
of this runs on MLX's CPU; what Metal does differently is not tested anywhere.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

import dgemma
import hf
from dgemma.backends.mlx import attention as attending
from dgemma.backends.mlx import head, mlx_backend
from dgemma.backends.mlx.compiling import compiled
from dgemma.backends.mlx.ops import MlxOps
from dgemma.backends.numpy.ops import NumpyOps
from dgemma.core import reference
from dgemma.core.config import SamplerConfig
from dgemma.core.errors import DgemmaError
from dgemma.core.model import Cache, Model, encode, new_cache, step
from dgemma.core.ops import KV, Span
from dgemma.core.random import step_noise
from dgemma.core.sampler import StepState, start
from law import assert_close_f32
from tiny import tiny_checkpoint
from under_test import values

SHAPE = "top4"  # window 8
CANVAS = 16


@cache
def loaded() -> tuple[MlxOps, Model]:
    ops = MlxOps("float32")
    return ops, hf.load(ops, hf.shared(SHAPE))


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(6, hf.SHAPES[SHAPE]["vocab_size"], length).astype(np.int32)


def primitives(*arrays: mx.array) -> list[str]:
    """Names of all that MLX would run for arrays that are not evaluated yet."""
    file = io.StringIO()
    mx.export_to_dot(file, *arrays)
    return re.findall(r'label ="(\w+)", shape=rectangle', file.getvalue())


# ---- Compiling --------------------------------------------------------------------------------------------------


def states(ops: MlxOps, model: Model, run: object, length: int, steps: int = 3) -> Iterator[StepState]:
    """The states of a canvas behind a prompt of some length."""
    held = hf.encoded(ops, model, [prompt(length)])
    ops.synchronize(*(array for layer in held.layers for array in layer))
    held = Cache(held.layers, ops.extent(length))
    vocab = model.config.vocab_size
    state = start(ops, ops.asarray(prompt(CANVAS, 1)[None]), model.config.hidden_size)
    for i in range(steps):
        uniforms, noise = step_noise(seed=3, canvas=0, step=i + 1, length=CANVAS, vocab_size=vocab)
        heat = ops.asarray(np.full((1, 1), 0.8 - 0.1 * i, np.float32))
        state = run(held, state, heat, ops.asarray(uniforms[None]), ops.asarray(noise[None]))  # type: ignore[operator]
        yield state


def test_the_compiled_loop_is_the_plain_loop_and_traced_once_per_bucket() -> None:
    ops, model = loaded()
    assert ops.compiles, "no g++ here: MLX's CPU cannot compile"
    traces = 0

    def one_pass(*arguments: object) -> StepState:
        nonlocal traces
        traces += 1
        return step(ops, model, SamplerConfig(entropy_bound=1.0), *arguments)  # type: ignore[arg-type]

    run = ops.compile(one_pass)
    for length in (30, 31, 57):  # one bucket
        for got, want in zip(states(ops, model, run, length), states(ops, model, one_pass, length), strict=True):
            for name in ("canvas", "argmax", "accepted", "stable", "stop"):
                np.testing.assert_array_equal(ops.to_numpy(getattr(got, name)), ops.to_numpy(getattr(want, name)), name)
            assert_close_f32(ops.to_numpy(got.entropy), ops.to_numpy(want.entropy), "entropy")
            assert_close_f32(ops.to_numpy(got.soft), ops.to_numpy(want.soft), "soft embedding")
    assert traces == 1 + 3 * 3  # the compiled pass once; the plain one each time


def test_a_pass_of_the_compiled_graph_is_mostly_fused() -> None:
    """A pass that is compiled runs less than two thirds of what it would run plain."""
    ops, model = loaded()

    def one_pass(*arguments: object) -> StepState:
        return step(ops, model, SamplerConfig(), *arguments)  # type: ignore[arg-type]

    counts = [len(primitives(*next(states(ops, model, run, 20)))) for run in (ops.compile(one_pass), one_pass)]
    assert counts[0] < 2 / 3 * counts[1], counts


def test_compile_takes_trees_and_integers_and_names_what_it_cannot_take() -> None:
    traces = 0

    def add(context: KV, length: mx.array, nothing: None) -> tuple[KV, mx.array]:
        nonlocal traces
        traces += 1
        assert nothing is None
        return KV(context.keys + length, context.values * 2), length

    run = compiled(add)
    for length in (3, 4):
        context, back = run(KV(mx.ones((2,)), mx.ones((2,))), length, None)
        assert isinstance(context, KV)
        assert context.keys.tolist() == [1 + length] * 2 and context.values.tolist() == [2, 2]
        assert back.tolist() == [length]
    assert traces == 1
    run(KV(mx.ones((3,)), mx.ones((3,))), 1, None)
    assert traces == 2
    with pytest.raises(TypeError, match="not str"):
        run(KV(mx.ones((3,)), mx.ones((3,))), "1", None)


def test_without_a_compiler_functions_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma.backends.mlx.ops.shutil.which", lambda name: None)
    ops = MlxOps("float32")
    if not ops.on_cpu:
        pytest.skip("Metal compiles by itself")
    assert not ops.compiles and ops.extent(3) == 3
    assert ops.compile(primitives) is primitives


# ---- The cache --------------------------------------------------------------------------------------------------


def test_the_cache_grows_in_buckets_and_keeps_every_row() -> None:
    """Bucket sizes change seldom, waste less than 64 rows or a quarter, and lose no row."""
    ops = MlxOps("float32")
    for window in (None, 100):
        held, rows, kept = reference.new_cache(ops, 1, 2, 4), 0, np.zeros((1, 2, 0, 4), np.float32)
        sizes = set()
        for i in range(30):
            new = values(i, 1, 2, 17, 4)
            shown = rows if window is None else min(rows, window - 1)
            span = Span(rows=shown, window=window, causal=True)
            held = ops.cache_write(held, ops.asarray(new), ops.asarray(-new), span, 16)  # one row is not fresh
            rows, kept = rows + 16, np.concatenate([kept, new[:, :, :16]], 2)
            size = held.keys.shape[2]
            kept = kept if window is None else kept[:, :, -(window - 1) :]
            np.testing.assert_array_equal(ops.to_numpy(held.keys)[:, :, : kept.shape[2]], kept)
            np.testing.assert_array_equal(ops.to_numpy(held.values)[:, :, : kept.shape[2]], -kept)
            assert size < kept.shape[2] + max(64, kept.shape[2] / 4 + 1)
            sizes.add(size)
        assert len(sizes) <= 8  # of 30 writes
        if window is not None:
            assert max(sizes) == window - 1


def test_full_layers_copy_no_context() -> None:
    """No array as long as the whole cache is made of its rows: the peak is that of the scores."""
    ops = MlxOps("float32")
    cached, width = 20_000, 64
    keys = mx.random.normal((1, 1, cached, width))
    context, q, k = KV(keys, keys * 1.0), mx.ones((1, 1, 4, width)), mx.ones((1, 1, 4, width))
    for rows in (cached - 7, mx.array([cached - 7], mx.int32)):
        mx.eval(*context, q, k)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(ops.attention(q, k, k, context, Span(rows=rows, window=None, causal=False)))
        assert mx.get_peak_memory() - before < keys.nbytes / 2


@pytest.mark.parametrize("causal", [True, False])
def test_queries_in_blocks_give_what_they_give_at_once(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = MlxOps("float32")
    q, k, v = (ops.asarray(values(i, 2, heads, 11, 8)) for i, heads in enumerate((4, 2, 2)))
    context = KV(*(ops.asarray(values(i, 2, 2, 30, 8)) for i in (5, 6)))
    for rows in (26, mx.array([30, 3], mx.int32)):
        span = Span(rows=rows, window=None, causal=causal)
        whole = ops.to_numpy(ops.attention(q, k, v, context, span))
        monkeypatch.setattr(attending, "SCORES", 4 * 41 * 3)  # three queries at a time
        np.testing.assert_allclose(ops.to_numpy(ops.attention(q, k, v, context, span)), whole, rtol=1e-5, atol=1e-6)
        monkeypatch.undo()


# ---- The head ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [5, 512, 2048, 5000])
def test_the_draw_is_the_reference_draw(vocab: int) -> None:
    """Every token equals the one that `reference.draw` picks in float32 on the same logits."""
    ops, rows = MlxOps("float32"), 400
    x, table = ops.asarray(values(1, 1, rows, 16)), ops.asarray(values(2, vocab, 16, scale=2.0))
    u = np.random.default_rng(0).random((1, rows), np.float32)
    u[0, :3] = 0.0, 1.0 - 2.0**-24, 0.5
    heat = ops.asarray(np.full((1, 1), 0.7, np.float32))
    got = ops.vocab_head(x, table, 30.0, heat, ops.asarray(u))
    want = reference.vocab_head(ops, x, table, 30.0, heat, ops.asarray(u))
    np.testing.assert_array_equal(ops.to_numpy(got[0]), ops.to_numpy(want[0]))
    np.testing.assert_array_equal(ops.to_numpy(got[1]), ops.to_numpy(want[1]))
    for a, b in zip(got[2:], want[2:], strict=True):
        assert_close_f32(ops.to_numpy(a), ops.to_numpy(b))
    assert ops.to_numpy(got[0]).max() < vocab


def test_the_head_holds_one_array_of_logits_and_little_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "PART", 1 << 17)  # 32 parts, as 256 positions of 262,144 words have
    ops, rows, vocab, width = MlxOps("float32", compile=False), 64, 65_536, 8
    x, table = mx.random.normal((1, rows, width)), mx.random.normal((vocab, width))
    heat, u = mx.ones((1, 1)), mx.ones((1, rows)) * 0.5
    mx.eval(x, table, heat, u)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(*ops.vocab_head(x, table, 30.0, heat, u))
    assert (mx.get_peak_memory() - before) / (rows * vocab * 4) < 3.0  # see PART for why it is not nearly 1


# ---- Weights, devices and dtypes --------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pack_reads_a_memory_map_of_any_width(stored: type, dtype: str, tmp_path: Path) -> None:
    want = values(0, 3, 5, 8).astype(stored)
    want.tofile(tmp_path / "weights")
    mapped = np.memmap(tmp_path / "weights", np.uint8, "r").view(stored).reshape(want.shape)
    ops = MlxOps(dtype)  # type: ignore[arg-type]
    got = ops.pack(mapped)
    assert got.shape == want.shape
    exact = NumpyOps(dtype).asarray(want, dtype)  # type: ignore[arg-type]
    np.testing.assert_array_equal(ops.to_numpy(got).astype(np.float64), exact.astype(np.float64))


def test_devices_and_dtypes_that_mlx_has_not_are_refused_by_name() -> None:
    with pytest.raises(DgemmaError, match=r"'cuda:0'.*auto, cpu, gpu"):
        mlx_backend("cuda:0", "float32")
    with pytest.raises(DgemmaError, match="float64"):
        MlxOps("float64")
    if not mx.is_available(mx.gpu):
        with pytest.raises(DgemmaError, match="no GPU"):
            mlx_backend("gpu", "float32")
        assert mlx_backend("auto", "float32").memory() is None


def test_encode_and_new_cache_hold_a_batch_of_one_length() -> None:
    """Rows of one batch and one length take the path of plain integers."""
    ops, model = loaded()
    ids = np.stack([prompt(13, 5), prompt(13, 6)])
    both = encode(ops, model, new_cache(ops, model.config, batch=2, capacity=13, chunk=16), ops.asarray(ids))
    for row in range(2):
        alone = encode(
            ops, model, new_cache(ops, model.config, batch=1, capacity=13, chunk=16), ops.asarray(ids[row : row + 1])
        )
        for a, b in zip(both.layers, alone.layers, strict=True):
            valid = min(13, b.keys.shape[2])
            assert_close_f32(ops.to_numpy(a.keys)[row, :, :valid], ops.to_numpy(b.keys)[0, :, :valid], "keys")


def test_any_settings_are_one_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entropy bound, confidence and stability go in as arrays: nothing is traced again, so no library is left."""
    model = dgemma.load(tiny_checkpoint(tmp_path), backend="mlx")
    assert model.ops.compiles  # type: ignore[attr-defined]
    plain = dgemma.load(model.path, backend="torch")
    traces = []
    advance = type(model.ops).advance

    def counted(self: MlxOps, *arguments: Any) -> Any:
        traces.append(1)
        return advance(self, *arguments)

    monkeypatch.setattr(type(model.ops), "advance", counted)
    model.generate([5, 6, 7], 16, steps=2)
    before = len(traces)
    for i in range(12):
        settings: dict[str, Any] = {"entropy_bound": 0.01 * i, "confidence": 0.3 + 0.01 * i, "stability": i % 3}
        got = model.generate([5, 6, 7], 16, i, 4, **settings)
        assert got.token_ids == plain.generate([5, 6, 7], 16, i, 4, **settings).token_ids
    assert len(traces) == before == 1
