"""What only the mlx backend does: compiling, a cache that grows, experts, the head in blocks, weights from a file.

Its ops and its logits climb the same ladder as every backend's (test_ops, test_parity, test_properties). On Linux all
of this runs on MLX's CPU; what Metal does differently is not tested anywhere.
"""

from __future__ import annotations

import gc
import io
import re
import threading
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
from dgemma.backends.mlx import device_of, head
from dgemma.backends.mlx.caches import RowCaches, stepped
from dgemma.backends.mlx.compiling import compiled
from dgemma.backends.mlx.ops import MlxOps
from dgemma.backends.mlx.passes import MlxPasses
from dgemma.backends.numpy.ops import NumpyOps
from dgemma.core.config import SamplerConfig
from dgemma.core.engine import Engine, Request
from dgemma.core.errors import DgemmaError
from dgemma.core.events import Commit, Event
from dgemma.core.model import encode, step
from dgemma.core.ops import Ops
from dgemma.core.parts import KV, Cache, Model, Span, StepState
from dgemma.core.sampler import draws_of, start
from law import assert_close_f32
from tiny import tiny_checkpoint
from under_test import on_device, values

SHAPE = "top4"  # window 8
CANVAS = 16


@cache
def loaded() -> tuple[MlxOps, Model]:
    ops = MlxOps("float32", compile=True)
    return ops, hf.load(ops, hf.shared(SHAPE))


def lengths(*held: int) -> mx.array:
    return mx.array(held, mx.int32)


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(6, hf.SHAPES[SHAPE]["vocab_size"], length).astype(np.int32)


def primitives(*arrays: mx.array) -> list[str]:
    """Names of all that MLX would run for arrays that are not evaluated yet."""
    file = io.StringIO()
    mx.export_to_dot(file, *arrays)
    return re.findall(r'label ="(\w+)", shape=rectangle', file.getvalue())


# ---- Compiling --------------------------------------------------------------------------------------------------


def read(ops: MlxOps, model: Model, *rows: np.ndarray) -> Cache:
    """Rows' caches as `MlxPasses` shows them to a denoising pass."""
    caches, slots = RowCaches(model.config, mx.float32), range(len(rows))
    for slot, tokens in zip(slots, rows, strict=True):
        after = encode(ops, model, Cache(caches.valid([slot], 0), lengths(0)), ops.asarray(tokens[None]))
        caches.put(slot, after.layers, 0, len(tokens))
    layers = caches.batch(slots, max(map(len, rows)))
    mx.eval(layers)
    return Cache(layers, lengths(*map(len, rows)))


def states(ops: MlxOps, model: Model, run: Any, length: int, steps: int = 3) -> Iterator[StepState]:
    """The states of a canvas behind a prompt of some length."""
    held = read(ops, model, prompt(length))
    vocab = model.config.vocab_size
    state = start(ops, ops.asarray(prompt(CANVAS, 1)[None]), model.config.hidden_size)
    sampler = SamplerConfig(entropy_bound=1.0, t_max=0.8, t_min=0.5, schedule_steps=steps)
    for i in range(steps):
        draws = draws_of(sampler, seed=3, canvas=0, step=i, length=CANVAS, vocab_size=vocab)
        state = run(held, state, on_device(ops, draws))
        yield state


def test_the_compiled_loop_is_the_plain_loop_and_traced_once_per_bucket() -> None:
    ops, model = loaded()
    assert ops.compiles, "no g++ here: MLX's CPU cannot compile"
    traces = 0

    def one_pass(*arguments: Any) -> StepState:
        nonlocal traces
        traces += 1
        return step(ops, model, *arguments)

    run = compiled(one_pass)
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

    def one_pass(*arguments: Any) -> StepState:
        return step(ops, model, *arguments)

    counts = [len(primitives(*next(states(ops, model, run, 20)))) for run in (compiled(one_pass), one_pass)]
    assert counts[0] < 2 / 3 * counts[1], counts


def test_compile_takes_trees_of_arrays_and_names_what_it_cannot_take() -> None:
    traces = 0

    def add(context: KV, length: mx.array, nothing: None) -> tuple[KV, mx.array]:
        nonlocal traces
        traces += 1
        assert nothing is None
        return KV(context.keys + length, context.values * 2), length

    run = compiled(add)
    for length in (3, 4):
        context, back = run(KV(mx.ones((2,)), mx.ones((2,))), lengths(length), None)
        assert isinstance(context, KV)
        assert context.keys.tolist() == [1 + length] * 2 and context.values.tolist() == [2, 2]
        assert back.tolist() == [length]
    assert traces == 1
    run(KV(mx.ones((3,)), mx.ones((3,))), lengths(1), None)
    assert traces == 2
    for number in (1, "1"):  # either would be a constant of what is compiled
        with pytest.raises(TypeError, match=f"not {type(number).__name__}"):
            run(KV(mx.ones((3,)), mx.ones((3,))), number, None)


def test_without_a_compiler_functions_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma.backends.mlx.ops.shutil.which", lambda name: None)
    ops = MlxOps("float32", compile=True)
    if not ops.on_cpu:
        pytest.skip("Metal compiles by itself")
    passes = MlxPasses(ops, loaded()[1])
    assert not ops.compiles and passes.compile(primitives) is primitives
    assert passes.batch_sizes == ()  # and so no batch is filled up


# ---- The cache --------------------------------------------------------------------------------------------------


def test_the_cache_grows_in_buckets_and_keeps_every_row() -> None:
    """Bucket sizes change seldom, waste less than 64 rows or a quarter, and lose no row."""
    ops = MlxOps("float32")
    for window in (None, 100):
        held, rows, kept = KV(mx.zeros((1, 2, 0, 4)), mx.zeros((1, 2, 0, 4))), 0, np.zeros((1, 2, 0, 4), np.float32)
        sizes = set()
        for i in range(30):
            new = values(i, 1, 2, 17, 4)
            shown = rows if window is None else min(rows, window - 1)
            span = Span(held=lengths(shown), slots=None, window=window, causal=True)
            held = KV(*(x[:, :, :shown] for x in held))  # as `RowCaches.valid` shows it
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
    span = Span(held=lengths(cached - 7), slots=None, window=None, causal=False)
    mx.eval(*context, q, k, span.held)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(ops.attention(q, k, k, context, span))
    assert mx.get_peak_memory() - before < keys.nbytes / 2


@pytest.mark.parametrize("causal", [True, False])
def test_queries_in_blocks_give_what_they_give_at_once(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = MlxOps("float32")
    q, k, v = (ops.asarray(values(i, 2, heads, 11, 8)) for i, heads in enumerate((4, 2, 2)))
    context = KV(*(ops.asarray(values(i, 2, 2, 30, 8)) for i in (5, 6)))
    for held in ((26, 26), (30, 3)):
        span = Span(held=lengths(*held), slots=None, window=None, causal=causal)
        whole = ops.to_numpy(ops.attention(q, k, v, context, span))
        monkeypatch.setattr(attending, "SCORES", 2 * 4 * 41 * 3)  # three queries at a time
        np.testing.assert_allclose(ops.to_numpy(ops.attention(q, k, v, context, span)), whole, rtol=1e-5, atol=1e-6)
        monkeypatch.undo()


def test_a_batch_is_stacked_once_and_follows_its_rows() -> None:
    """One row is its own arrays; a batch is kept, takes in what a row has read since, and goes with any of its rows."""
    _, model = loaded()
    caches, window = RowCaches(model.config, mx.float32), 8

    def row(number: int, tokens: int) -> None:
        sizes = [stepped(tokens) if one.window is None else window - 1 for one in model.config.layers]
        caches[number] = tuple(
            KV(*(mx.full((1, one.kv_heads, size, one.head_dim), float(number + tokens)) for _ in range(2)))
            for one, size in zip(model.config.layers, sizes, strict=True)
        )

    for number, tokens in enumerate((40, 100, 60)):
        row(number, tokens)
    assert caches.batch([1], 100) is caches[1]
    both = caches.batch([0, 2, 2], 60)  # filled up with its last row
    assert both[-1].keys.shape[2] == 64 and both[0].keys.shape[2] == window - 1
    assert [float(both[-1].keys[i, 0, 0, 0]) for i in range(3)] == [40, 62, 62]
    caches.batch([1], 100)
    row(2, 61)
    again = caches.batch([0, 2, 2], 61)
    assert again is both and [float(both[-1].keys[i, 0, 63, 0]) for i in range(3)] == [40, 63, 63]
    longer = caches.batch([0, 1, 2], 100)  # of the same rows there are no two batches
    assert longer[-1].keys.shape[2] == 128 and len(caches.arrays()) == 2 * len(model.config.layers) * (3 + 1)
    caches.drop(1)
    assert len(caches.arrays()) == 2 * len(model.config.layers) * 2


def test_a_snapshot_is_left_alone_by_what_its_slot_reads_later() -> None:
    ops, model = loaded()
    passes = MlxPasses(MlxOps("float32"), model)
    slot = passes.open(100, CANVAS)
    passes.read([(slot, prompt(20))])
    snapshot, canvas = passes.save(slot), prompt(CANVAS, 4)
    want = passes.logits(slot, canvas)
    passes.read([(slot, prompt(30, 1))])
    assert np.abs(passes.logits(slot, canvas) - want).max() > 0.1
    other = passes.open(100, CANVAS, snapshot)
    np.testing.assert_array_equal(passes.logits(other, canvas), want)
    assert snapshot.length == 20
    assert snapshot.nbytes == sum(ops.to_numpy(x).nbytes for layer in snapshot.data for x in layer)


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
    want = Ops.vocab_head(ops, x, table, 30.0, heat, ops.asarray(u))
    np.testing.assert_array_equal(ops.to_numpy(got[0]), ops.to_numpy(want[0]))
    np.testing.assert_array_equal(ops.to_numpy(got[1]), ops.to_numpy(want[1]))
    for a, b in zip(got[2:], want[2:], strict=True):
        assert_close_f32(ops.to_numpy(a), ops.to_numpy(b))
    assert ops.to_numpy(got[0]).max() < vocab


def test_rows_that_follow_each_other_through_the_head_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ops, rows, vocab = MlxOps("float32"), 7, 700
    x, table = ops.asarray(values(1, 3, rows, 16)), ops.asarray(values(2, vocab, 16, scale=2.0))
    u = ops.asarray(np.random.default_rng(0).random((3, rows), np.float32))
    heat = ops.asarray(np.array([[0.7], [1.0], [0.4]], np.float32))
    whole = ops.vocab_head(x, table, 30.0, heat, u)
    monkeypatch.setattr(head, "HELD", 4 * vocab)  # four of 21 rows
    for a, b in zip(ops.vocab_head(x, table, 30.0, heat, u), whole, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert_close_f32(ops.to_numpy(a), ops.to_numpy(b))


def test_the_head_holds_one_array_of_logits_and_little_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "PART", 1 << 17)  # 32 parts, as 256 positions of 262,144 words have
    ops, rows, vocab, width = MlxOps("float32"), 64, 65_536, 8
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
        device_of("cuda:0")
    with pytest.raises(DgemmaError, match="float64"):
        MlxOps("float64")
    if not mx.is_available(mx.gpu):
        with pytest.raises(DgemmaError, match="no GPU"):
            device_of("gpu")
        assert device_of("auto") == "cpu"
        passes = MlxPasses(*loaded())
        assert passes.device == "cpu" and passes.peak() is None


# ---- Rows ---------------------------------------------------------------------------------------------------------


def test_rows_of_one_length_are_read_together() -> None:
    """Each row's own arrays are what it has alone, and none keeps the memory of the batch it was read in."""
    ops, model = loaded()
    rows = [prompt(13, 5), prompt(13, 6)]
    both, alone = (MlxPasses(MlxOps("float32"), model) for _ in range(2))
    for passes in (both, alone):
        slots = [passes.open(13, CANVAS) for _ in rows]
        for given in [list(zip(slots, rows, strict=True))] if passes is both else [[one] for one in enumerate(rows)]:
            passes.read(given)
    for slot in range(2):
        for a, b in zip(both.save(slot).data, alone.save(slot).data, strict=True):
            valid = min(13, b.keys.shape[2])
            assert a.keys.shape == b.keys.shape
            assert_close_f32(ops.to_numpy(a.keys)[0, :, :valid], ops.to_numpy(b.keys)[0, :, :valid], "keys")
    kept = both.save(0).data
    del passes, both, alone, a, b
    gc.collect()
    before = mx.get_active_memory()
    held = sum(x.nbytes for layer in kept for x in layer)
    del kept
    gc.collect()
    assert before - mx.get_active_memory() < 1.5 * held


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dgemma.DiffusionGemma:
    return dgemma.load(tiny_checkpoint(tmp_path_factory.mktemp("mlx")), backend="mlx")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of canvases that passes are traced for."""
    traces: list[tuple[int, ...]] = []
    advance = MlxOps.advance

    def counted(self: MlxOps, *arguments: Any) -> StepState:
        traces.append(tuple(arguments[2].shape))
        return advance(self, *arguments)

    monkeypatch.setattr(MlxOps, "advance", counted)
    return traces


def test_any_settings_are_one_compilation(tiny: dgemma.DiffusionGemma, traced: list[tuple[int, ...]]) -> None:
    """Entropy bound, confidence and stability go in as arrays: nothing is traced again, so no library is left."""
    plain = dgemma.load(tiny.path, backend="torch")
    model = dgemma.load(tiny.path, backend="mlx")
    model.generate([5, 6, 7], 16, steps=2)
    before = len(traced)
    for i in range(12):
        settings: dict[str, Any] = {"entropy_bound": 0.01 * i, "confidence": 0.3 + 0.01 * i, "stability": i % 3}
        got = model.generate([5, 6, 7], 16, i, 4, greedy=i == 7, **settings)
        assert got.token_ids == plain.generate([5, 6, 7], 16, i, 4, greedy=i == 7, **settings).token_ids
    assert len(traced) == before == 1


def written(events: list[Event]) -> tuple[int, ...]:
    return tuple(token for event in events if isinstance(event, Commit) for token in event.tokens)


def test_rows_of_any_lengths_write_what_they_write_alone(
    tiny: dgemma.DiffusionGemma, traced: list[tuple[int, ...]]
) -> None:
    """Prompts of different lengths, three canvases, other settings each; they begin together and end apart."""
    vocab = tiny.config.vocab_size
    requests = [
        Request(
            prompt=tuple(np.random.default_rng(length).integers(16, vocab, length).tolist()),
            max_new_tokens=16 * canvases,
            seed=length,
            sampler=SamplerConfig(steps=2 + canvases, entropy_bound=0.1 * canvases, greedy=length == 9),
            eos_token_ids=(),
        )
        for length, canvases in ((3, 3), (61, 2), (9, 1), (40, 3), (70, 1))
    ]

    def engine() -> Engine:
        return Engine(tiny.engine.passes, None, prefix_bytes=0)

    alone = [written(list(engine().add(request).events())) for request in requests]
    traced.clear()
    one = engine()
    handles = [one.add(request) for request in requests]
    assert [written(list(handle.events())) for handle in handles] == alone
    assert {batch for batch, _ in traced} >= {2, 6}  # five rows are filled up to six


def test_many_generations_leave_no_memory_and_no_compiled_functions(
    tiny: dgemma.DiffusionGemma, traced: list[tuple[int, ...]]
) -> None:
    """300 with 300 settings, of prompts that differ; memory is MLX's own count."""
    model = dgemma.load(tiny.path, backend="mlx")
    used = []
    for i in range(300):
        model.generate([16 + i % 50, 6, 7, *range(16, 16 + i % 30)], 16, i, 1, entropy_bound=0.001 * i, confidence=0.0)
        used.append(mx.get_active_memory())
    assert max(used[100:]) <= 1.02 * max(used[:100])
    assert len(traced) == 1


def test_a_model_that_is_dropped_takes_its_thread_and_its_memory_with_it(tiny: dgemma.DiffusionGemma) -> None:
    gc.collect()
    before, running = mx.get_active_memory(), set(threading.enumerate())
    model = dgemma.load(tiny.path, backend="mlx")
    model.generate([5, 6, 7], 16, steps=2)
    ours = set(threading.enumerate()) - running
    assert [thread.name for thread in ours] == ["dgemma"]
    del model
    gc.collect()
    for thread in ours:
        thread.join(30)
        assert not thread.is_alive()
    gc.collect()
    assert mx.get_active_memory() <= before + (1 << 16)  # constants of the ops
