"""Quantized weights on the mlx backend: they stay packed, and mean what checkpoints/quant.py says they mean.

Products are held to the law against the weights' own float32 values; whole models against the numpy oracle, which
dequantizes on the host and shares nothing with MLX.
"""

from __future__ import annotations

import gc
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import dgemma
from dgemma import DiffusionGemma
from dgemma.backends.mlx.compiling import compiled
from dgemma.backends.mlx.ops import MlxOps
from dgemma.backends.mlx.packed import QuantizedTensor, mix, project
from dgemma.backends.numpy.ops import NumpyOps
from dgemma.checkpoints import weights
from dgemma.checkpoints.checkpoint import Checkpoint, resolve
from dgemma.checkpoints.quant import Format, QTensor, dequantize, quantize
from dgemma.convert import convert, recipes
from dgemma.core.config import SamplerConfig
from dgemma.core.graph_passes import GraphPasses
from dgemma.core.model import denoise, encode, new_cache, step
from dgemma.core.ops import Ops
from dgemma.core.parts import Cache, Model, StepState
from dgemma.core.sampler import draws_of, start
from law import assert_close_f32, assert_low_precision
from published import floats, published
from under_test import on_device, values

NVFP4 = Format(mode="nvfp4", bits=4, group_size=16)
FORMATS = (
    *(Format(bits=bits, group_size=size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64)),
    *(Format(bits=bits, group_size=32, symmetric=True) for bits in (2, 3, 4, 5, 6, 8)),
    Format(bits=4, group_size=128),
    Format(mode="mxfp4", bits=4, group_size=32),
    Format(mode="mxfp8", bits=8, group_size=32),
    NVFP4,
)
PROMPT, CANVAS = list(range(20, 45)), list(range(60, 76))


def held(weight: QTensor, dtype: Any = "float32") -> QuantizedTensor:
    """What `pack` makes of a stored tensor; it must not be a dense array."""
    packed = MlxOps(dtype).pack(weight)
    assert isinstance(packed, QuantizedTensor)
    return packed


def with_factor(weight: np.ndarray, *, rows: bool) -> QTensor:
    """nvfp4 with a global scale that is one number, or one for each row, no two alike."""
    q = quantize(weight, NVFP4)
    factor = np.float32(3.7e-3) * np.linspace(1, 2, q.words[..., 0].size, dtype=np.float32)
    scale: Any = factor.reshape(*weight.shape[:-1], 1) if rows else np.float32(3.7e-3)
    return QTensor(words=q.words, scales=q.scales, global_scale=scale, format=NVFP4)


def tensors(*shape: int) -> list[QTensor]:
    """A weight in every format there is."""
    weight = values(1, *shape, scale=0.02)
    return [*(quantize(weight, kind) for kind in FORMATS), *(with_factor(weight, rows=rows) for rows in (False, True))]


# ---- Values and products ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unpacked_rows_are_the_definition_to_the_bit(dtype: str) -> None:
    ops = MlxOps("float32")
    for q in tensors(6, 128):
        packed = held(q, dtype)
        assert packed.shape == q.shape and packed.ndim == 2
        want, some = dequantize(q), np.array([[4, 0], [1, 4]])
        same = np.testing.assert_array_equal if q.global_scale is None else assert_close_f32
        same(ops.to_numpy(packed.dequantized()), want)  # a global scale rounds, and here after the code is multiplied
        same(ops.to_numpy(packed[mx.array(some)].dequantized()), want[some])
        same(ops.to_numpy(packed[2:5].dequantized()), want[2:5])


def test_products_are_those_of_the_unpacked_weights() -> None:
    x, shares = values(2, 3, 7, 128), values(3, 3, 7, 40)
    for q in tensors(40, 128):
        packed, want = held(q), dequantize(q).astype(np.float64)
        what = f"{q.format}, global scale {q.global_scale is not None}"
        assert_close_f32(project(mx.array(x), packed), x @ want.T, what)
        assert_close_f32(mix(mx.array(shares), packed, mx.float32), shares @ want, what)
        part = mix(mx.array(shares[..., 8:24]), packed[8:24], mx.float32)
        assert_close_f32(part, shares[..., 8:24] @ want[8:24], what)


def test_experts_multiply_by_their_own_packed_rows() -> None:
    """Enough rows for the sorted path, an expert that gets none, and one that gets a single row."""
    x, group = values(2, 41, 1, 128), np.sort(np.array([0] * 20 + [2] * 20 + [3]))
    for q in tensors(4, 24, 128):
        want = np.stack([row @ dequantize(q)[at].T for row, at in zip(x.astype(np.float64), group, strict=True)])
        assert_close_f32(held(q).grouped(mx.array(x), mx.array(group)), want, str(q.format))
    several = with_factor(values(1, 4, 24, 128), rows=True)
    assert several.global_scale is not None
    by_expert = np.repeat(np.array([1, 2, 4, 8], np.float32)[:, None, None], 24, 1)
    shared = QTensor(words=several.words, scales=several.scales, global_scale=by_expert, format=NVFP4)
    packed = held(shared)
    assert packed.factor is not None and packed.factor.shape == (4, 1)  # one number for each expert, gathered so
    want = np.stack([row @ dequantize(shared)[at].T for row, at in zip(x.astype(np.float64), group, strict=True)])
    assert_close_f32(packed.grouped(mx.array(x), mx.array(group)), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_sums_wide(dtype: Any) -> None:
    """MLX's CPU alone would sum 2,816 products in bfloat16, and miss the law by far."""
    low, exact = NumpyOps(dtype), NumpyOps("float64")
    x = values(2, 5, 2816)
    for q in (quantize(values(1, 8, 2816, scale=0.02), Format(bits=4, symmetric=True)), with_factor(x, rows=True)):
        ops = MlxOps(dtype)
        got = ops.to_numpy(ops.linear(ops.asarray(x, dtype), held(q, dtype)))
        rounded = low.linear(low.asarray(x, dtype), low.pack(q)).astype(np.float64)
        assert_low_precision(got, rounded, exact.linear(x.astype(np.float64), dequantize(q).astype(np.float64)))


def test_rows_that_metal_would_misread_are_dequantized() -> None:
    q = quantize(values(1, 6, 48), NVFP4)
    ops = MlxOps("float32")
    dense = ops.pack(q)
    assert isinstance(dense, mx.array)
    np.testing.assert_array_equal(ops.to_numpy(dense), dequantize(q))


# ---- Whole models -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return floats(tmp_path_factory.mktemp("source"))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run uncompiled: on a new machine g++ takes longer than all of these tests."""
    monkeypatch.setattr("dgemma.backends.mlx.ops.shutil.which", lambda name: None)


def graph(model: DiffusionGemma) -> tuple[Ops, Model]:
    passes = model.engine.passes
    assert isinstance(passes, GraphPasses)
    return passes.ops, passes.model


def prompted(ops: Ops, model: Model) -> Cache:
    """The cache behind the prompt."""
    cache = new_cache(ops, model.config, slots=1, capacity=len(PROMPT), scratch=len(PROMPT))
    return encode(ops, model, cache, ops.asarray(np.array([PROMPT], np.int32)))


def passes(model: DiffusionGemma) -> list[np.ndarray]:
    """Encode, denoise, and the head's four results, twice: the second pass reads the first one's soft embedding."""
    (ops, inner), results = graph(model), []
    cache = prompted(ops, inner)
    soft = ops.asarray(np.zeros((1, len(CANVAS), model.config.hidden_size), np.float32), ops.dtype)
    uniforms = ops.asarray(np.linspace(0.01, 0.99, len(CANVAS), dtype=np.float32)[None])
    for _ in range(2):
        x = denoise(ops, inner, cache, ops.asarray(np.array([CANVAS], np.int32)), soft)
        # Hot: where one token has all the mass, its rest, and the entropy with it, multiplies a logit's last digit.
        heat = ops.asarray(np.full((1, 1), 4.0, np.float32))
        *rest, soft = ops.vocab_head(x, inner.embed_tokens, model.config.softcap, heat, uniforms)
        results += [ops.to_numpy(one) for one in (ops.logits(x, inner.embed_tokens, model.config.softcap), *rest, soft)]
    return results


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("mlx", [False, True], ids=["", "mlx"])
@pytest.mark.parametrize("recipe", [*recipes.RECIPES, "modelopt"])
def test_a_folder_means_on_mlx_what_it_means_to_the_oracle(
    source: Path, tmp_path: Path, recipe: str, mlx: bool
) -> None:
    out = tmp_path / "out"
    if recipe == "modelopt":  # an nvfp4 whose experts, and their halves, each have a global scale of their own
        convert(published(tmp_path, "modelopt")[0], out, "nvfp4", mlx=mlx, requantize=mlx)
    else:
        convert(source, out, recipe, mlx=mlx)
    got, want = (dgemma.load(out, backend=name, dtype="float32") for name in ("mlx", "numpy"))
    names = ("logits", "token", "argmax", "entropy", "soft embedding")
    results = zip(passes(got), passes(want), 2 * names, strict=True)
    for mine, oracle, name in results:
        assert_close_f32(mine, oracle, name)
    previous = passes(want)[0][0]
    assert_close_f32(got.logits(PROMPT, CANVAS, previous), want.logits(PROMPT, CANVAS, previous))
    assert_packed(got, out, recipe)


def assert_packed(model: DiffusionGemma, folder: Path, recipe: str) -> None:
    """What is quantized in the folder is held with the words that the folder has, and nothing else is."""
    checkpoint = Checkpoint.open(folder)
    stored = [checkpoint.tensor(name) for name in weights.shapes(checkpoint.config)]
    quantized = [one for one in stored if isinstance(one, QTensor)]
    assert len(quantized) == {"bf16": 0, "4bit-mlx": 33}.get(recipe, 30)
    words = [np.array(one.words).tobytes() for one in packed_parts(graph(model)[1])]
    assert sorted(words) == sorted(one.words.tobytes() for one in quantized)


def packed_parts(part: Any) -> list[QuantizedTensor]:
    """Every packed weight of a model."""
    if isinstance(part, QuantizedTensor):
        return [part]
    inside = part if isinstance(part, tuple) else []
    if is_dataclass(part):
        inside = [getattr(part, field.name) for field in fields(part)]
    return [found for one in inside for found in packed_parts(one)]


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("recipe", ["4bit", "8bit"])
def test_nano_writes_the_oracles_tokens(recipe: str, tmp_path: Path) -> None:
    convert(resolve("nano"), tmp_path / recipe, recipe)
    got, want = (dgemma.load(tmp_path / recipe, backend=name, dtype="float32") for name in ("mlx", "numpy"))
    assert len(packed_parts(graph(got)[1])) > 30
    for seed, board in enumerate((".3.1\n.2..\n....\n...4", "3..2..\n2..5..\n5.216.\n..1.5.\n...63.\n.6.425")):
        mine, oracle = (model.generate(board, seed=seed) for model in (got, want))
        assert (mine.token_ids, mine.stats.steps) == (oracle.token_ids, oracle.stats.steps)


# ---- Memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["4bit", "8bit", "nvfp4"])
def test_a_model_holds_its_file_and_the_biases(recipe: str, dtype: str, tmp_path: Path) -> None:
    """And loading it never holds more than one tensor besides."""
    folder, out = floats(tmp_path, hidden_size=256, intermediate_size=512, moe_intermediate_size=256), tmp_path / "out"
    convert(folder, out, recipe)
    checkpoint = Checkpoint.open(out)
    expected, largest = 0.0, 0.0
    for name in weights.shapes(checkpoint.config):
        one = checkpoint.tensor(name)
        size = one.size * (4 if dtype == "float32" else 2) if isinstance(one, np.ndarray) else one.nbytes
        if isinstance(one, QTensor) and one.format.symmetric:  # biases beside the scales, and both wide in float32
            size += one.scales.nbytes * (3 if dtype == "float32" else 1)
        expected, largest = expected + size, max(largest, size)
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = dgemma.load(out, backend="mlx", dtype=dtype)
    assert sum(one.nbytes for one in packed_parts(graph(model)[1])) > 0.9 * expected
    assert mx.get_active_memory() - before < 1.03 * expected
    assert mx.get_peak_memory() - before < 1.03 * expected + largest
    whole = sum(int(np.prod(shape)) for shape in weights.shapes(checkpoint.config).values()) * 4
    assert expected < {"4bit": 0.25, "8bit": 0.35, "nvfp4": 0.25}[recipe] * whole


def test_the_vocabulary_is_never_unpacked_as_a_whole() -> None:
    vocab, width, rows = 1 << 16, 128, 4
    table = held(quantize(values(1, vocab, width), Format(bits=8, symmetric=True)))
    ops, dense = MlxOps("float32"), vocab * width * 4
    x, heat, u = mx.ones((1, rows, width)), mx.ones((1, 1)), mx.ones((1, rows)) * 0.5
    shares = mx.full((1, rows, vocab), 1 / vocab)
    mx.eval(x, heat, u, shares)
    for run in (
        lambda: [ops.embed(table, mx.array([[5, 9, 2, 1]]), 2.0)],
        lambda: [ops.logits(x, table, 30.0)],
        lambda: [ops.mean_embedding(shares, table)],
        lambda: ops.vocab_head(x, table, 30.0, heat, u),
    ):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(*run())
        assert mx.get_peak_memory() - before < 0.3 * dense


# ---- Compiling --------------------------------------------------------------------------------------------------


def test_the_compiled_pass_over_packed_weights_is_the_plain_one(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", "4bit")
    model = dgemma.load(tmp_path / "out", backend="mlx", dtype="float32")
    (ops, inner), traces = graph(model), 0
    assert isinstance(ops, MlxOps) and ops.compiles, "no g++ here: MLX's CPU cannot compile"

    def one_pass(*arguments: Any) -> StepState:
        nonlocal traces
        traces += 1
        return step(ops, inner, *arguments)

    cache = prompted(ops, inner)
    sampler = SamplerConfig(entropy_bound=1.0, t_max=0.8, t_min=0.5, schedule_steps=3)

    def states(run: Any) -> list[StepState]:
        state, found = start(ops, ops.asarray(np.array([CANVAS], np.int32)), model.config.hidden_size), []
        for i in range(3):
            draws = draws_of(sampler, seed=3, canvas=0, step=i, length=len(CANVAS), vocab_size=model.config.vocab_size)
            state = run(cache, state, on_device(ops, draws))
            found.append(state)
        return found

    for got, want in zip(states(compiled(one_pass)), states(one_pass), strict=True):
        for name in ("canvas", "argmax", "accepted", "stable", "stop"):
            np.testing.assert_array_equal(ops.to_numpy(getattr(got, name)), ops.to_numpy(getattr(want, name)), name)
        assert_close_f32(ops.to_numpy(got.entropy), ops.to_numpy(want.entropy), "entropy")
        assert_close_f32(ops.to_numpy(got.soft), ops.to_numpy(want.soft), "soft embedding")
    assert traces == 1 + 3
