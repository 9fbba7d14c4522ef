"""Acceptance, renoising and the stop test on the device, against core/sampler.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dgemma.backends.cuda.kernels import sampling
from dgemma.backends.numpy.ops import NumpyOps
from dgemma.core import sampler as core
from dgemma.core.config import SamplerConfig
from dgemma.core.parts import Draws, StepState
from kernel_cases import bench, built, meta, to_numpy
from kernel_harness import ARCHITECTURES

KINDS = {
    "canvas": "int32", "argmax": "int32", "stable": "int32", "accepted": "bool", "stop": "bool", "noise": "int32",
    "stability": "int32", "greedy": "bool", "held": "int32",
}  # fmt: skip
SETTINGS = (
    SamplerConfig(), SamplerConfig(stability=0, confidence=1.0), SamplerConfig(entropy_bound=0.0),
    SamplerConfig(entropy_bound=float("inf"), confidence=float("inf"), stability=2), SamplerConfig(greedy=True),
)  # fmt: skip


def state(batch: int, length: int, argmax: Any, stable: Any) -> StepState:
    return StepState(
        canvas=np.zeros((batch, length), np.int32),
        soft=np.zeros((batch, length, 2), np.float32),
        argmax=argmax,
        stable=stable,
        accepted=np.zeros((batch, length), bool),
        entropy=np.zeros((batch, length), np.float32),
        stop=np.zeros(batch, bool),
    )


def draws(settings: list[SamplerConfig], noise: np.ndarray) -> Draws:
    """A row's own settings each."""
    length = noise.shape[1]
    rows = [core.draws_of(one, seed=0, canvas=0, step=0, length=length, vocab_size=9) for one in settings]
    return core.stacked(rows)._replace(noise=noise)


def on_device(on: Any, one: Any) -> Any:
    fields = one._asdict().items()
    return type(one)(**{name: on.put(np.asarray(value), KINDS.get(name, "float32")) for name, value in fields})


def check(
    device: str, given: Draws, before: StepState, token: np.ndarray, argmax: np.ndarray, entropy: np.ndarray
) -> None:
    """Hold the kernel to the definition."""
    want = core.advance(NumpyOps("float64"), given, before, token, argmax, entropy.astype(float), before.soft)
    with bench(device) as on:
        got = on.run(
            sampling.advance, on_device(on, given), on_device(on, before), on.put(token, "int32"),
            on.put(argmax, "int32"), on.put(entropy, "float32"), on.put(before.soft, "float32"),
        )  # fmt: skip
    for name in ("canvas", "argmax", "stable", "accepted", "stop", "entropy"):
        np.testing.assert_array_equal(to_numpy(getattr(got, name)), getattr(want, name), f"{name}, {given}")


def entropies(batch: int, length: int, kind: str) -> np.ndarray:
    draw = np.random.default_rng(length)
    match kind:
        case "all equal":
            result = np.full((batch, length), 2.0**-8)
        case "ties":  # sums of few bits: exact in any order
            result = draw.integers(0, 4, (batch, length)) * 2.0**-6
        case "zero":
            result = np.zeros((batch, length))
        case "peaked":
            result = draw.random((batch, length)) ** 24
        case _:
            result = draw.random((batch, length)) * 3
    return result.astype(np.float32)


@pytest.mark.parametrize("kind", ["flat", "peaked", "ties", "all equal", "zero"])
@pytest.mark.parametrize("batch, length", [(1, 1), (3, 33), (1, 256), (5, 20)])
def test_advance(batch: int, length: int, kind: str, device: str) -> None:
    """All rows with one setting, and each with another."""
    draw = np.random.default_rng(0)
    token, argmax, noise = (draw.integers(0, 1000, (batch, length)).astype(np.int32) for _ in range(3))
    last = argmax.copy()
    last[0, -1] += 1  # the first canvas changed in its last place, the others not at all
    before = state(batch, length, last, np.arange(batch, dtype=np.int32))
    entropy = entropies(batch, length, kind)
    mixed = [SETTINGS[(3 * row + 1) % len(SETTINGS)] for row in range(batch)]
    for settings in (*([one] * batch for one in SETTINGS), mixed):
        check(device, draws(settings, noise), before, token, argmax, entropy)


@pytest.mark.parametrize("kind", ["flat", "ties", "nan"])
@pytest.mark.parametrize("batch, length", [(1, 1), (4, 33), (2, 256)])
def test_held_positions(batch: int, length: int, kind: str, device: str) -> None:
    """Rows with none, a third, all but one and all of their positions held, in one launch; what the model says at a
    held position, NaN too, is nobody's."""
    draw = np.random.default_rng(1)
    token, argmax, noise, last = (draw.integers(0, 1000, (batch, length)).astype(np.int32) for _ in range(4))
    held = draw.integers(0, 1000, (batch, length)).astype(np.int32)
    free = np.stack([np.arange(length) % 3 != 1, np.arange(length) >= 0, np.arange(length) == 2, np.zeros(length) > 0])
    held[free[:batch]] = -1
    last[0] = np.where(held[0] < 0, argmax[0], held[0])  # nothing has changed
    entropy = entropies(batch, length, "ties" if kind == "nan" else kind)
    if kind == "nan":
        entropy[held >= 0] = np.nan
    before = state(batch, length, last, np.arange(batch, dtype=np.int32))
    for one in SETTINGS:
        check(device, draws([one] * batch, noise)._replace(held=held), before, token, argmax, entropy)


def test_the_mean_that_stops_is_that_of_free_positions(device: str) -> None:
    """Nine tenths held: the mean over all would be under the confidence, that over the free ones is not."""
    token, held = np.full((2, 20), 7, np.int32), np.full((2, 20), 7, np.int32)
    held[:, :2] = -1
    entropy = np.full((2, 20), 4e-3, np.float32)
    entropy[1, :2] = 6e-3
    given = draws([SamplerConfig(stability=0, confidence=5e-3)] * 2, token)._replace(held=held)
    with bench(device) as on:
        before = on_device(on, state(2, 20, token, np.zeros(2, np.int32)))
        got = on.run(
            sampling.advance, on_device(on, given), before, on.put(token, "int32"), on.put(token, "int32"),
            on.put(entropy, "float32"), before.soft,
        )  # fmt: skip
    assert got.stop.tolist() == [True, False]


def test_several_passes_count_stability(device: str) -> None:
    """Two canvases that stay the same for three passes, then change; one asks for a pass more than the other."""
    settings = [SamplerConfig(stability=2), SamplerConfig(stability=1)]
    tokens = [np.full((2, 5), n, np.int32) for n in (7, 7, 7, 8)]
    quiet = np.full((2, 5), 1e-4, np.float32)
    with bench(device) as on:
        now = on_device(on, state(2, 5, np.full((2, 5), -1, np.int32), np.zeros(2, np.int32)))
        stable, stop = [], []
        for token in tokens:
            one, given = on.put(token, "int32"), on_device(on, draws(settings, token))
            now = on.run(sampling.advance, given, now, one, one, on.put(quiet, "float32"), now.soft)
            stable.append(now.stable.tolist())
            stop.append(now.stop.tolist())
    assert stable == [[0, 0], [1, 1], [2, 2], [0, 0]]
    assert stop == [[False, False], [False, True], [True, True], [False, False]]


def test_what_a_pass_writes_is_not_read(device: str) -> None:
    """Of the state before, only the argmax and how long it was stable are there in a captured pass."""
    token, quiet = np.full((1, 5), 7, np.int32), np.full((1, 5), 1e-4, np.float32)
    with bench(device) as on:
        given, one = on_device(on, draws([SamplerConfig()], token)), on.put(token, "int32")
        whole = on_device(on, state(1, 5, token, np.zeros(1, np.int32)))
        part = whole._replace(accepted=None, entropy=None, stop=None)
        results = [
            on.run(sampling.advance, given, now, one, one, on.put(quiet, "float32"), now.soft) for now in (whole, part)
        ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_advance_compiles_without_spills(arch: str) -> None:
    one, wide = meta(1, 256, dtype=torch.int32), meta(1, 256, dtype=torch.float32)
    number, count, flag = (meta(1, dtype=kind) for kind in (torch.float32, torch.int32, torch.bool))
    before = StepState(
        canvas=one, soft=meta(1, 256, 8), argmax=one, stable=count, accepted=None, entropy=None, stop=None
    )  # fmt: skip
    given = Draws(
        temperature=number, uniforms=wide, noise=one, entropy_bound=number, confidence=number, stability=count,
        greedy=flag, held=one,
    )  # fmt: skip
    built(lambda: sampling.advance(given, before, one, one, wide, before.soft), arch)
