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
from kernel_cases import bench, built, meta, to_numpy
from kernel_harness import ARCHITECTURES


def state(batch: int, length: int, argmax: Any, stable: Any) -> core.StepState:
    return core.StepState(
        canvas=np.zeros((batch, length), np.int32),
        soft=np.zeros((batch, length, 2), np.float32),
        argmax=argmax,
        stable=stable,
        accepted=np.zeros((batch, length), bool),
        entropy=np.zeros((batch, length), np.float32),
        stop=np.zeros(batch, bool),
    )


def on_device(on: Any, one: core.StepState) -> core.StepState:
    kinds = {"canvas": "int32", "argmax": "int32", "stable": "int32", "accepted": "bool", "stop": "bool"}
    return core.StepState(**{
        name: on.put(np.asarray(value), kinds.get(name, "float32")) for name, value in one._asdict().items()
    })  # fmt: skip


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
@pytest.mark.parametrize("batch, length", [(1, 1), (3, 33), (1, 256)])
def test_advance(batch: int, length: int, kind: str, device: str) -> None:
    draw = np.random.default_rng(0)
    token, argmax, noise = (draw.integers(0, 1000, (batch, length)).astype(np.int32) for _ in range(3))
    last = argmax.copy()
    last[0, -1] += 1  # the first canvas changed in its last place, the others not at all
    before = state(batch, length, last, np.arange(batch, dtype=np.int32))
    entropy = entropies(batch, length, kind)
    soft = np.zeros((batch, length, 2), np.float32)
    for settings in (
        SamplerConfig(), SamplerConfig(stability=0, confidence=1.0), SamplerConfig(entropy_bound=0.0),
        SamplerConfig(entropy_bound=float("inf"), confidence=float("inf"), stability=2),
    ):  # fmt: skip
        want = core.advance(NumpyOps("float64"), settings, before, token, argmax, entropy.astype(float), soft, noise)
        with bench(device) as on:
            given = (on.put(one, "int32") for one in (token, argmax))
            got = on.run(
                sampling.advance, settings, on_device(on, before), *given, on.put(entropy, "float32"),
                on.put(soft, "float32"), on.put(noise, "int32"),
            )  # fmt: skip
        for name in ("canvas", "argmax", "stable", "accepted", "stop"):
            np.testing.assert_array_equal(to_numpy(getattr(got, name)), getattr(want, name), f"{name}, {settings}")


def test_several_passes_count_stability(device: str) -> None:
    """A canvas that stays the same for three passes, then changes."""
    settings = SamplerConfig(stability=2)
    tokens = [np.full((1, 5), n, np.int32) for n in (7, 7, 7, 8)]
    quiet = np.full((1, 5), 1e-4, np.float32)
    with bench(device) as on:
        now = on_device(on, state(1, 5, np.full((1, 5), -1, np.int32), np.zeros(1, np.int32)))
        stable, stop = [], []
        for token in tokens:
            one = on.put(token, "int32")
            now = on.run(sampling.advance, settings, now, one, one, on.put(quiet, "float32"), now.soft, one)
            stable.append(int(now.stable[0]))
            stop.append(bool(now.stop[0]))
    assert (stable, stop) == ([0, 1, 2, 0], [False, False, True, False])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_advance_compiles_without_spills(arch: str) -> None:
    one, wide = meta(1, 256, dtype=torch.int32), meta(1, 256, dtype=torch.float32)
    before = core.StepState(
        canvas=one, soft=meta(1, 256, 8), argmax=one, stable=meta(1, dtype=torch.int32),
        accepted=meta(1, 256, dtype=torch.bool), entropy=wide, stop=meta(1, dtype=torch.bool),
    )  # fmt: skip
    built(lambda: sampling.advance(SamplerConfig(), before, one, one, wide, before.soft, one), arch)
