"""RMS norms and the additions around them, against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dgemma.backends.cuda.kernels import norm
from dgemma.backends.numpy.ops import NumpyOps
from kernel_cases import WIDTHS, bench, built, cast, hold, meta
from kernel_harness import ARCHITECTURES
from under_test import values

EPS = 1e-6
SHAPES = [(1, 1, 2816), (1, 3, 40), (2, 5, 129), (1, 1, 1)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape: tuple[int, ...], width: str, device: str) -> None:
    x, second, residual = (values(i, *shape) for i in range(3))
    weights = [values(i, shape[-1], scale=0.3, shift=1.0) for i in range(3, 8)]
    scalar = values(9, 1, shift=0.7, scale=0.1)

    def then(ops: NumpyOps, r: Any, count: int) -> tuple[Any, ...]:
        return r, *(ops.rms_norm(r, cast(w, ops), EPS) for w in weights[3 : 3 + count])

    def oracle(ops: NumpyOps) -> dict[str, Any]:
        a, b, c, scale = (cast(one, ops) for one in (x, second, residual, scalar))
        w = [cast(one, ops) for one in weights]
        mixed = ops.rms_norm(a, w[0], EPS) + ops.rms_norm(b, w[1], EPS)
        added = c + ops.rms_norm(a, w[2], EPS)
        return {
            "rms_norm": ops.rms_norm(a, w[0], EPS),
            "without a weight": ops.rms_norm(a, None, EPS),
            "sum_norm": ops.rms_norm(a + b, None, EPS),
            "norm_add": added,
            "norm_add, scaled, two norms": then(ops, added * scale, 2),
            "mix_norm_add": then(ops, (c + ops.rms_norm(mixed, w[2], EPS)) * scale, 1),
        }

    with bench(device) as on:
        a, b, c = (on.put(one, width) for one in (x, second, residual))
        w, scale = [on.put(one, width) for one in weights], on.put(scalar, width)
        got = {
            "rms_norm": on.run(norm.rms_norm, a, w[0], EPS),
            "without a weight": on.run(norm.rms_norm, a, None, EPS),
            "sum_norm": on.run(norm.sum_norm, a, b, None, EPS),
            "norm_add": on.run(norm.norm_add, a, c, w[2], EPS),
            "norm_add, scaled, two norms": on.run(
                norm.norm_add, a, c, w[2], EPS, scalar=scale, next_weights=tuple(w[3:5])
            ),
            "mix_norm_add": on.run(
                norm.mix_norm_add, a, b, c, w[0], w[1], w[2], EPS, scalar=scale, next_weights=(w[3],)
            ),
        }
    steady = width == "float32" or np.prod(shape) > 1000  # twice the oracle's error bounds a norm over many numbers
    for name, result in got.items():
        if steady:
            hold(result, lambda ops, name=name: oracle(ops)[name], width, f"{name} {shape}")


def test_a_canvas_has_a_scalar_of_its_own(device: str) -> None:
    shape, canvas = (2, 5, 129), 2
    a, b, c = (values(i, *shape) for i in range(3))
    weights, scalars = [values(i, shape[-1], shift=1.0) for i in range(3, 6)], [values(i, 1, shift=2.0) for i in (7, 8)]

    def oracle(ops: NumpyOps) -> Any:
        x, y, z, *w = (cast(one, ops) for one in (a, b, c, *weights))
        mixed = z + ops.rms_norm(ops.rms_norm(x, w[0], EPS) + ops.rms_norm(y, w[1], EPS), w[2], EPS)
        first, last = (mixed[:, at] * scale for at, scale in zip((slice(3), slice(3, None)), scalars, strict=True))
        return (np.concatenate([first, last], 1),)

    with bench(device) as on:
        given = [on.put(one, "float32") for one in (a, b, c, *weights)]
        scale, other = (on.put(one, "float32") for one in scalars)
        got = on.run(norm.mix_norm_add, *given, EPS, scalar=scale, canvas_scalar=other, canvas=canvas)
    hold(got, oracle, "float32", "mix_norm_add of two scalars")


def test_a_row_of_zeros_stays_zero(device: str) -> None:
    with bench(device) as on:
        zeros = on.put(np.zeros((1, 2, 24)), "float32")
        out = on.run(norm.rms_norm, zeros, on.put(values(1, 24), "float32"), EPS)
    assert not out.any()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_norms_compile_without_spills(arch: str) -> None:
    x, weight, scalar = meta(1, 256, 2816), meta(2816), meta(1)
    built(lambda: norm.rms_norm(x, weight, EPS), arch)
    built(lambda: norm.norm_add(x, x, weight, EPS, next_weights=(weight, weight)), arch)
    last = (x, x, x, weight, weight, weight, EPS)
    built(lambda: norm.mix_norm_add(*last, scalar=scalar, next_weights=(weight,)), arch)
    built(lambda: norm.mix_norm_add(*last, scalar=scalar, canvas_scalar=scalar, canvas=128), arch)
