"""Norm, rotation and the write into the cache's tail, against the oracle's projection without its product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from dgemma.backends.cuda.kernels import rope
from dgemma.backends.numpy.ops import NumpyOps
from dgemma.core.config import AttentionConfig
from dgemma.core.reference import rotate
from kernel_cases import WIDTHS, bench, built, cast, hold, meta, to_numpy
from kernel_harness import ARCHITECTURES
from under_test import values

EPS = 1e-6
CONFIG = AttentionConfig(
    kind="sliding_attention", heads=4, kv_heads=2, head_dim=16, window=8, rope_theta=1e4, rotary_dims=16
)
CASES: dict[str, tuple[AttentionConfig, int, int, list[int] | None]] = {
    # heads and rotation, batch, length, entries held
    "sliding": (CONFIG, 2, 5, [0, 3]),
    "full, proportional": (
        replace(CONFIG, kind="full_attention", kv_heads=1, head_dim=32, rotary_dims=8),
        2,
        3,
        [4, 4],
    ),
    "one token, odd heads": (replace(CONFIG, heads=3, kv_heads=3, head_dim=6, rotary_dims=6), 1, 1, [2]),
    "real width": (replace(CONFIG, heads=6, kv_heads=3, head_dim=256, rotary_dims=256), 1, 2, [7]),
    "fresh tensors": (CONFIG, 3, 4, None),
}


def angles(config: AttentionConfig, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    angle = (starts[:, None, None, None] + np.arange(length)[:, None]) * np.array(config.inverse_frequencies())
    cos, sin = (f(angle).astype(ml_dtypes.bfloat16).astype(np.float32) for f in (np.cos, np.sin))
    return cos, sin


@pytest.mark.parametrize("slots", [None, [3, 0, 2]], ids=["in order", "in slots"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", CASES)
def test_norm_rope_write(case: str, width: str, slots: list[int] | None, device: str) -> None:
    config, batch, length, first = CASES[case]
    slots = None if slots is None or first is None else slots[:batch]
    pool = batch if slots is None else 4
    mine = np.array(slots or range(batch))
    full = config.kind == "full_attention"
    if width == "bfloat16":
        length += 30  # twice the oracle's error bounds a norm over many numbers
    capacity = length + 8 if first else length
    held = np.zeros(batch, int) + (first or 0)
    raw = values(1, batch, length, (config.heads + 2 * config.kv_heads) * config.head_dim)
    cut = np.cumsum([config.heads, config.kv_heads]) * config.head_dim
    w_q, w_k = (values(i, config.head_dim, shift=1.0, scale=0.3) for i in (2, 3))
    starts = np.arange(len(first) if first else 1) * 900
    cos, sin = angles(config, starts, length)

    def oracle(ops: NumpyOps) -> Any:
        def heads(y: np.ndarray, count: int) -> np.ndarray:
            return cast(y, ops).reshape(batch, length, count, config.head_dim).transpose(0, 2, 1, 3)

        q, k, v = np.split(raw, cut, -1)
        q, k = heads(q, config.heads), heads(k, config.kv_heads)
        v = k if full else heads(v, config.kv_heads)
        turn: Any = type("Turn", (), {"cos": cast(cos, ops), "sin": cast(sin, ops)})
        q, k = (rotate(ops, ops.rms_norm(x, cast(w, ops), EPS), turn) for x, w in ((q, w_q), (k, w_k)))
        return q, k, ops.rms_norm(v, None, EPS)

    before = values(4, 2, pool, config.kv_heads, capacity, config.head_dim)
    with bench(device) as on:
        q, k, v = (on.put(part, width) for part in np.split(raw, cut, -1))
        keys, cached = (on.put(one, width) for one in before)
        q = on.run(
            rope.norm_rope_write, q, k, None if full else v, on.put(w_q, width), on.put(w_k, width),
            on.put(cos, width), on.put(sin, width), keys, cached,
            None if first is None else on.put(np.array(first), "int32"),
            None if slots is None else on.put(np.array(slots), "int32"), heads=config.heads, eps=EPS,
        )  # fmt: skip
    keys, cached = to_numpy(keys), to_numpy(cached)
    place = held[:, None] + np.arange(length)  # [B, L]
    own = [x[mine[:, None], :, place].transpose(0, 2, 1, 3) for x in (keys, cached)]
    hold((q, *own), oracle, width, case)
    for new, old in zip((keys, cached), before, strict=True):  # all other entries as they were
        untouched = np.ones((pool, capacity), bool)
        untouched[mine[:, None], place] = False
        np.testing.assert_array_equal(new.swapaxes(1, 2)[untouched], old.swapaxes(1, 2)[untouched])


def test_projections_may_be_views_of_one_product(device: str) -> None:
    raw = values(1, 2, 3, 8 * 16)
    with bench(device) as on:
        whole = on.put(raw, "float32")
        apart = [on.put(part, "float32") for part in np.split(raw, [64, 96], -1)]
        weight, turn = on.put(values(2, 16), "float32"), on.put(values(3, 1, 1, 3, 8), "float32")
        results = []
        for q, k, v in (whole.split([64, 32, 32], -1), apart):
            keys, cached = (on.put(np.zeros((2, 2, 3, 16)), "float32") for _ in range(2))
            out = on.run(
                rope.norm_rope_write, q, k, v, weight, weight, turn, turn, keys, cached, None, heads=4, eps=EPS
            )
            results.append((out, keys, cached))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_entries_beyond_the_slot_are_not_written(device: str) -> None:
    with bench(device) as on:
        q, k, v = (on.put(values(i, 1, 4, 2 * 8), "float32") for i in range(3))
        weight, turn = on.put(values(4, 8), "float32"), on.put(values(5, 1, 1, 4, 4), "float32")
        keys, cached = (on.put(np.zeros((1, 2, 5, 8)), "float32") for _ in range(2))
        held = on.put(np.array([3]), "int32")
        on.run(rope.norm_rope_write, q, k, v, weight, weight, turn, turn, keys, cached, held, heads=2, eps=EPS)
    assert not keys[:, :, :3].any() and keys[:, :, 3:].all(), "two entries fit; the sentinels have seen the others"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("full", [False, True])
def test_rope_compiles_without_spills(full: bool, arch: str) -> None:
    kv_heads, width = (2, 512) if full else (8, 256)
    q, k, angle = meta(1, 256, 16 * width), meta(1, 256, kv_heads * width), meta(1, 1, 256, width // 2)
    cache, weight = meta(8, kv_heads, 1536, width), meta(width)
    one = meta(1, dtype=torch.int32)
    built(
        lambda: rope.norm_rope_write(
            q, k, None if full else k, weight, weight, angle, angle, cache, cache, one, one, heads=16, eps=EPS
        ),
        arch,
    )
