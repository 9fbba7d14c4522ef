"""What must hold of the graph whatever the weights: chunks, batches, the read-only cache, and the random numbers."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hf
from dgemma.core.config import SamplerConfig
from dgemma.core.errors import DgemmaError
from dgemma.core.model import denoise, encode, encode_hidden, new_cache, step
from dgemma.core.ops import Ops
from dgemma.core.parts import KV, Cache, Model
from dgemma.core.random import step_noise
from dgemma.core.sampler import draws_of, stacked, start
from law import assert_close_f32
from traces import LAST_UNIFORM
from under_test import BACKENDS, make_ops, on_device

SHAPE = "top4"  # window 8
CANVAS = 16
SALT = 2  # chosen so that no prompt drawn below makes two experts all but tie; see under_test.Margins


@cache
def loaded(backend: str) -> tuple[Ops, Model]:
    ops = make_ops(backend, "float32")
    return ops, hf.load(ops, hf.shared(SHAPE))


def tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([SALT, seed]).integers(6, hf.SHAPES[SHAPE]["vocab_size"], shape).astype(np.int32)


def rows(ops: Ops, held: Cache, model: Model, length: int, slots: Any = slice(None)) -> list[np.ndarray]:
    """The valid entries of some slots' keys and values in every layer, copied to the host."""
    valid = [length if one.window is None else min(length, one.window - 1) for one in model.config.layers]
    return [ops.to_numpy(x)[slots, :, :n].copy() for n, layer in zip(valid, held.layers, strict=True) for x in layer]


def spread(ops: Ops, held: Cache, slots: list[int], count: int) -> Cache:
    """Lay a cache's rows into these of `count` slots; in the others stands what nobody may read."""

    def lay(x: Any) -> Any:
        wide = np.full((count, *x.shape[1:]), np.nan, np.float32)
        wide[slots] = ops.to_numpy(x)
        return ops.asarray(wide, ops.dtype)

    layers = tuple(KV(*map(lay, layer)) for layer in held.layers)
    return Cache(layers, held.length, ops.asarray(np.array(slots), "int32"))


def canvas_states(ops: Ops, model: Model, held: Cache, canvas: np.ndarray, seed: int = 9) -> np.ndarray:
    """One conditioned pass: canvas [B, L] → normed states [B, L, D]."""
    soft = np.random.default_rng(seed).normal(0.0, 0.1, (*canvas.shape, model.config.hidden_size))
    return ops.to_numpy(denoise(ops, model, held, ops.asarray(canvas, "int32"), ops.asarray(soft, ops.dtype)))


# ---- The cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_denoise_leaves_the_cache_bit_identical(backend: str, length: int) -> None:
    """The valid entries of the row's own slot, and all of the others'."""
    ops, model = loaded(backend)
    alone = hf.encoded(ops, model, [tokens(1, length)])
    for held, own in ((alone, [0]), (spread(ops, alone, [2], 4), [2])):
        others = [slot for slot in range(held.layers[0].keys.shape[0]) if slot not in own]
        before = rows(ops, held, model, length, own)
        beside = [ops.to_numpy(x)[others].copy() for layer in held.layers for x in layer]
        first = canvas_states(ops, model, held, tokens(2, 1, CANVAS))
        canvas_states(ops, model, held, tokens(3, 1, CANVAS))  # another canvas leaves nothing behind either
        for old, new in zip(before, rows(ops, held, model, length, own), strict=True):
            np.testing.assert_array_equal(old, new)
        after = [ops.to_numpy(x)[others] for layer in held.layers for x in layer]
        for old, new in zip(beside, after, strict=True):
            np.testing.assert_array_equal(old, new)
        np.testing.assert_array_equal(first, canvas_states(ops, model, held, tokens(2, 1, CANVAS)))


@given(cuts=st.lists(st.integers(1, 24), max_size=6), length=st.integers(2, 25))
def test_encode_in_chunks_equals_encode_at_once(cuts: list[int], length: int) -> None:
    prompt = tokens(length, length)
    bounds = sorted({0, length, *(cut for cut in cuts if cut < length)})
    chunks = [prompt[a:b] for a, b in pairwise(bounds)]
    for backend in BACKENDS:
        ops, model = loaded(backend)
        whole, parts = (hf.encoded(ops, model, one) for one in ([prompt], chunks))
        for a, b in zip(rows(ops, parts, model, length), rows(ops, whole, model, length), strict=True):
            assert_close_f32(a, b, f"{backend} cache after {bounds}")
        got, want = (canvas_states(ops, model, one, tokens(2, 1, CANVAS)) for one in (parts, whole))
        assert_close_f32(got, want, f"{backend} canvas after {bounds}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_encode_predicts_the_same_states_in_chunks(backend: str) -> None:
    ops, model = loaded(backend)
    prompt = tokens(5, 1, 21)

    def states(*sizes: int) -> np.ndarray:
        held, done, out = new_cache(ops, model.config, slots=1, capacity=21, scratch=21), 0, []
        for size in sizes:
            held, x = encode_hidden(ops, model, held, ops.asarray(prompt[:, done : done + size]))
            out.append(ops.to_numpy(x).copy())
            done += size
        return np.concatenate(out, 1)

    assert_close_f32(states(9, 1, 11), states(21), f"{backend} encoder states")


# ---- Batches ----------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), min_size=2, max_size=4),
    order=st.permutations(range(6)),
    backend=st.sampled_from(BACKENDS),
)
def test_a_row_does_not_notice_its_batch(lengths: list[tuple[int, int]], order: list[int], backend: str) -> None:
    """Ragged prompts in two chunks, then a canvas for each, in any slots: every row equals the same row alone."""
    ops, model = loaded(backend)
    count, slots = len(lengths), order[: len(lengths)]
    prompts = [tokens(row, first + second) for row, (first, second) in enumerate(lengths)]
    held = spread(ops, new_cache(ops, model.config, slots=count, capacity=40, scratch=CANVAS + 20), slots, 6)
    done = np.zeros(count, int)
    for fresh in np.array(lengths).T:
        padded = np.full((count, max(1, int(fresh.max()))), 7, np.int32)
        for row, n in enumerate(fresh):
            padded[row, :n] = prompts[row][done[row] : done[row] + n]
        held = encode(ops, model, held, ops.asarray(padded), ops.asarray(np.array(fresh), "int32"))
        done += fresh
    np.testing.assert_array_equal(ops.to_numpy(held.length), done)

    canvases = tokens(50, count, CANVAS)
    soft = np.random.default_rng(9).normal(0.0, 0.1, (count, CANVAS, model.config.hidden_size))
    together = ops.to_numpy(denoise(ops, model, held, ops.asarray(canvases), ops.asarray(soft, ops.dtype)))
    for row, prompt in enumerate(prompts):
        alone = hf.encoded(ops, model, [prompt])
        one = denoise(
            ops, model, alone, ops.asarray(canvases[row : row + 1]), ops.asarray(soft[row : row + 1], ops.dtype)
        )
        assert_close_f32(together[row], ops.to_numpy(one)[0], f"{backend} row {row} of {lengths}")
    others = [slot for slot in range(6) if slot not in slots]
    for layer in held.layers:
        for x in layer:
            assert np.isnan(ops.to_numpy(x)[others]).all(), "a slot that no row has was written"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_a_batch_samples_what_its_rows_sample_alone(backend: str) -> None:
    """Rows of three settings, two of them greedy or hot, behind slots of any order."""
    ops, model = loaded(backend)
    width, vocab = model.config.hidden_size, model.config.vocab_size
    samplers = [
        SamplerConfig(), SamplerConfig(greedy=True, entropy_bound=2.0),
        SamplerConfig(t_max=1.1, stability=0, confidence=9.0, entropy_bound=0.0),
    ]  # fmt: skip
    prompts, canvases = tokens(1, 3, 11), tokens(2, 3, CANVAS)
    draws = [
        draws_of(one, seed=row, canvas=0, step=row, length=CANVAS, vocab_size=vocab) for row, one in enumerate(samplers)
    ]

    def run(which: slice, slots: list[int], count: int) -> Any:
        rows = len(prompts[which])
        held = new_cache(ops, model.config, slots=rows, capacity=11, scratch=CANVAS)
        held = encode(
            ops, model, held if count == rows else spread(ops, held, slots, count), ops.asarray(prompts[which])
        )
        state = start(ops, ops.asarray(canvases[which]), width)
        return step(ops, model, held, state, on_device(ops, stacked(draws[which])))

    together = run(slice(0, 3), [4, 0, 3], 5)
    assert ops.to_numpy(together.stop).tolist() == [False, False, True]
    for row in range(3):
        alone = run(slice(row, row + 1), [0], 1)
        for name in ("canvas", "argmax", "accepted", "stable", "stop"):
            batch, single = (ops.to_numpy(getattr(state, name)) for state in (together, alone))
            np.testing.assert_array_equal(batch[row], single[0], name)
        assert_close_f32(ops.to_numpy(together.entropy)[row], ops.to_numpy(alone.entropy)[0], "entropy")


# ---- Random numbers ---------------------------------------------------------------------------------------------

GOLDEN = {  # (seed, canvas, step): uniforms in units of 2^-24, and tokens of a vocabulary of 262,144
    (0, 0, 0): (
        [193722, 4052523, 1869415, 9469306, 8428531, 4657448],
        [248130, 258491, 66538, 51131, 186570, 34410],
    ),
    (7, 2, 48): (
        [12238703, 12875570, 11774935, 12764558, 1398052, 10106139],
        [64625, 88461, 118015, 142619, 79040, 260025],
    ),
    (2**64 - 1, 5, 1): (
        [186689, 11023215, 6766857, 15521825, 15488992, 2316408],
        [53606, 78483, 25444, 12165, 254123, 109761],
    ),
}


def noise(seed: int, canvas: int, index: int, length: int = 6, vocab: int = 262_144) -> tuple[np.ndarray, np.ndarray]:
    return step_noise(seed=seed, canvas=canvas, step=index, length=length, vocab_size=vocab)


@pytest.mark.parametrize("key", GOLDEN)
def test_step_noise_is_pinned(key: tuple[int, int, int]) -> None:
    """A seed's text must survive every release: these numbers may never change."""
    uniforms, drawn = noise(*key)
    assert uniforms.dtype == np.float32 and drawn.dtype == np.int32
    assert (uniforms.astype(np.float64) * 2**24).tolist() == GOLDEN[key][0]
    assert drawn.tolist() == GOLDEN[key][1]


KEYS = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))


@given(a=KEYS, b=KEYS)
def test_step_noise_depends_on_its_key_alone(a: tuple[int, int, int], b: tuple[int, int, int]) -> None:
    first, again, other = noise(*a, length=32), noise(*a, length=32), noise(*b, length=32)
    for x, y, z in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.array_equal(x, z) == (a == b)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 2, 2**63 - 1, 2**64 - 3])
def test_neighbouring_keys_have_nothing_in_common(seed: int) -> None:
    keys = [(seed + s, canvas, index) for s in range(3) for canvas in range(3) for index in range(3)]
    drawn = np.array([noise(*key, length=64)[1] for key in keys])
    assert len(np.unique(drawn)) > 0.98 * drawn.size, "of 1,728 draws from 262,144 about 6 repeat by chance"


@pytest.mark.parametrize("vocab", [1, 3, 600, 262_144])
def test_step_noise_is_uniform(vocab: int) -> None:
    uniforms, drawn = noise(3, 0, 0, length=40_000, vocab=vocab)
    assert uniforms.min() >= 0.0 and uniforms.max() <= LAST_UNIFORM
    assert drawn.min() >= 0 and drawn.max() < vocab
    counts = np.histogram(uniforms, 20, (0.0, 1.0))[0]
    assert np.abs(counts - 2000).max() < 220, "five standard deviations"
    low = np.mean(drawn < vocab / 2)
    assert abs(low - np.ceil(vocab / 2) / vocab) < 0.0125, "five standard deviations"
    assert len(set(drawn.tolist())) == vocab or vocab > 600


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_named(seed: int) -> None:
    with pytest.raises(DgemmaError, match=f"seed is {seed}"):
        noise(seed, 0, 0)
