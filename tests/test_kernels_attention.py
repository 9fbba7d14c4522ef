"""Attention over the cache and the canvas in its tail, against the oracle's, which is given the two apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton

from dgemma.backends.cuda.kernels.attention import TILINGS, Tiling, attention
from dgemma.backends.numpy.ops import NumpyOps
from dgemma.core.parts import KV, Span
from kernel_cases import bench, built, cast, hold, meta
from kernel_harness import ARCHITECTURES
from under_test import values

WINDOW = 9
SMALL = Tiling(rows=16, keys=16, warps=4, stages=1, programs=1, merged=4)
SPLIT = Tiling(rows=16, keys=4, warps=4, stages=1, columns=8, programs=128, merged=4)
"""Parts of few keys, some of which see nothing at all behind a short history; and half a head to a program."""

PINNED = f"triton=={triton.__version__}" in (Path(__file__).parents[1] / "constraints.txt").read_text().split()
SPILLS = {("full", "sm_80"): 84, ("sliding", "sm_90"): 48, ("sliding", "sm_100"): 300}
"""Bytes of stores and loads, at most, that a thread spills behind a newer Triton; docs/cuda.md says where. The shipped
sizes are those that spill nothing behind the one that constraints.txt pins."""


def check(
    device: str, held: list[int], *, window: int | None, causal: bool, length: int, heads: int = 4,
    kv_heads: int = 2, width: int = 16, sizes: Tiling = SMALL, dtype: str = "float32", stretch: float = 1.0,
    canvas: int = 0, slots: list[int] | None = None,
) -> None:  # fmt: skip
    """`held` has one number for each row; all that is not a row's own, other slots included, holds NaN."""
    if device != "cpu":
        sizes = replace(sizes, keys=max(16, sizes.keys))  # compiled, a product sums no fewer
    batch, longest = len(held), max(held)
    capacity = longest + length + 3
    q = values(1, batch, heads, length, width, scale=stretch)
    history = values(2, 2, batch, kv_heads, longest, width)
    own = values(3, 2, batch, kv_heads, length, width)
    places = slots or range(batch)
    buffers = np.full((2, max(places) + 1, kv_heads, capacity, width), np.nan, np.float32)
    for b, slot in enumerate(places):
        buffers[:, slot, :, : held[b]] = history[:, b, :, : held[b]]
        buffers[:, slot, :, held[b] : held[b] + length] = own[:, b]

    def oracle(ops: NumpyOps) -> Any:
        span = Span(held=np.array(held, np.int32), slots=None, window=window, causal=causal, canvas=canvas)
        context = KV(cast(history[0], ops), cast(history[1], ops))
        return ops.attention(cast(q, ops), cast(own[0], ops), cast(own[1], ops), context, span)

    with bench(device) as on:
        keys, cached = (on.put(one, dtype) for one in buffers)
        got = on.run(
            attention, on.put(q.swapaxes(1, 2), dtype).transpose(1, 2), keys, cached,
            on.put(np.array(held), "int32"), None if slots is None else on.put(np.array(slots), "int32"),
            window=window, causal=causal, canvas=canvas, sizes=sizes,
        )  # fmt: skip
    hold(got, oracle, dtype, f"attention of {length} behind {held}, window {window}, causal {causal}, canvas {canvas}")


@pytest.mark.parametrize("sizes", [SMALL, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("causal", [False, True], ids=["denoise", "encode"])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
def test_every_history(window: int | None, causal: bool, sizes: Tiling, device: str) -> None:
    for held in (0, 1, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 37):
        check(device, [held], window=window, causal=causal, length=5, sizes=sizes)
    for length in (1, WINDOW + 4):
        check(device, [WINDOW - 1], window=window, causal=causal, length=length, sizes=sizes)


@pytest.mark.parametrize("causal", [False, True], ids=["denoise", "encode"])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
def test_ragged_batch(window: int | None, causal: bool, device: str) -> None:
    check(device, [0, WINDOW - 1, 17], window=window, causal=causal, length=6, sizes=SPLIT)
    check(device, [7, 7], window=window, causal=causal, length=3, sizes=SMALL)


@pytest.mark.parametrize("causal", [False, True], ids=["denoise", "encode"])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
def test_rows_in_slots(window: int | None, causal: bool, device: str) -> None:
    """In any order, with slots of others between; and one row of a pool."""
    for held, slots in (([17, 0, WINDOW - 1], [4, 0, 2]), ([5], [3]), ([3, 21], [1, 0])):
        for sizes in (SMALL, SPLIT):
            check(device, held, slots=slots, window=window, causal=causal, length=6, sizes=sizes)
    if causal:
        check(device, [9, 30], slots=[2, 1], window=window, causal=True, canvas=3, length=8, sizes=SPLIT)


def test_a_row_is_the_same_whatever_shares_its_batch(device: str) -> None:
    """Bit by bit: in another place, behind others of other lengths, in another slot, and twice."""
    q, cache = values(1, 1, 4, 5, 16), values(2, 1, 2, 40, 16)
    others, slots = values(3, 3, 4, 5, 16), values(4, 4, 2, 40, 16)
    with bench(device) as on:

        def row(place: int, held: list[int], where: list[int], copies: int = 1) -> list[torch.Tensor]:
            batch, pool = others.copy(), slots.copy()
            batch[place : place + copies], pool[where[place]] = q, cache
            out = on.run(
                attention, on.put(batch, "float32"), *(on.put(pool, "float32") for _ in range(2)),
                on.put(np.array(held), "int32"), on.put(np.array(where), "int32"), window=WINDOW, causal=False,
                sizes=SPLIT,
            )  # fmt: skip
            return list(out[place : place + copies])

        first, *rest = (
            *row(0, [20, 0, 33], [0, 1, 2]), *row(2, [7, 30, 20], [0, 1, 3]), *row(1, [1, 20, 20], [0, 2, 2], 2),
        )  # fmt: skip
    assert len(rest) == 3 and all(torch.equal(first, one) for one in rest)


def test_how_much_rows_hold_may_be_an_expanded_number(device: str) -> None:
    """`expand` repeats a number without memory behind it."""
    with bench(device) as on:
        q, cache = on.put(values(1, 3, 4, 5, 16), "float32"), on.put(values(2, 3, 2, 16, 16), "float32")
        held = on.put(np.array([9]), "int32")
        results = [
            on.run(attention, q, cache, cache, one, window=None, causal=False, sizes=SMALL)
            for one in (held.expand(3), held.repeat(3))
        ]
    assert torch.equal(*results)


@pytest.mark.parametrize("heads, kv_heads, width", [(1, 1, 16), (6, 6, 8), (6, 1, 24), (6, 3, 6), (8, 1, 512)])
def test_heads(heads: int, kv_heads: int, width: int, device: str) -> None:
    for causal in (False, True):
        check(device, [11], window=None, causal=causal, length=5, heads=heads, kv_heads=kv_heads, width=width)


@pytest.mark.parametrize("sizes", [SMALL, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding"])
def test_a_canvas_behind_what_is_read(window: int | None, sizes: Tiling, device: str) -> None:
    """Both in one block of 8 positions, the border inside a block and between two; more and less than a window read."""
    for held, length, canvas in ((0, 5, 2), (WINDOW - 1, 11, 6), (37, 16, 8), (3, WINDOW + 7, 5)):
        check(device, [held], window=window, causal=True, canvas=canvas, length=length, sizes=sizes)
    check(device, [0, WINDOW, 17], window=window, causal=True, canvas=4, length=11, sizes=sizes)


def test_the_window_of_the_model(device: str) -> None:
    """1023 entries are held and all of them seen; one more would be one too many."""
    sizes = Tiling(rows=16, keys=128, warps=4, stages=1, programs=2)
    for held in (1023, 1024):
        for causal in (False, True):
            check(device, [held], window=1024, causal=causal, length=2, heads=2, kv_heads=1, sizes=sizes)


def test_large_scores_do_not_overflow(device: str) -> None:
    """Scores of hundreds, that rise from part to part and fall again: e^300 is beyond float32."""
    for sizes in (SMALL, SPLIT):
        check(device, [40], window=None, causal=False, length=4, sizes=sizes, stretch=24.0)


@pytest.mark.parametrize("causal", [False, True], ids=["denoise", "encode"])
@pytest.mark.parametrize("width", [64, 256])
def test_bfloat16(width: int, causal: bool, device: str) -> None:
    for sizes in (SMALL, replace(SPLIT, keys=16, columns=width // 2, programs=24)):
        check(device, [30], window=None, causal=causal, length=33, width=width, sizes=sizes, dtype="bfloat16")


def spilled(window: int | None, arch: str) -> int:
    return 0 if PINNED else SPILLS.get(("sliding" if window else "full", arch), 0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kv_heads, width, window", [(8, 256, 1024), (2, 512, None)], ids=["sliding", "full"])
def test_attention_compiles_without_spills(kv_heads: int, width: int, window: int | None, arch: str) -> None:
    cache, one = meta(8, kv_heads, 1536, width), meta(1, dtype=torch.int32)
    for length, causal, canvas in ((256, False, 0), (256, True, 0), (512, True, 256)):
        q = meta(1, length, 16, width).transpose(1, 2)
        seen: dict[str, Any] = dict(window=window, causal=causal, canvas=canvas)
        results = built(
            lambda q=q, seen=seen: attention(q, cache, cache, one, one, **seen, arch=arch), arch,
            spills=spilled(window, arch),
        )  # fmt: skip
        if arch == "sm_90":
            assert "wgmma" in results["_attend"].ptx and "cp.async" in results["_attend"].ptx


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("batch, length, causal", [(4, 256, False), (1, 1024, True)], ids=["batch", "prompt"])
@pytest.mark.parametrize("kv_heads, width, window", [(8, 256, 1024), (2, 512, None)], ids=["sliding", "full"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_where_no_parts_are_needed_it_compiles_without_spills(
    arch: str, kv_heads: int, width: int, window: int | None, batch: int, length: int, causal: bool, bits: int
) -> None:
    q, cache = meta(batch, length, 16, width).transpose(1, 2), meta(batch, kv_heads, 4096, width)
    held = meta(batch, dtype=torch.int32)
    results = built(
        lambda: attention(q, cache, cache, held, held, window=window, causal=causal, arch=arch, bits=bits), arch,
        spills=spilled(window, arch),
    )  # fmt: skip
    merges = (arch, width, bits) == ("sm_80", 512, 4)
    assert set(results) == ({"_attend", "_merge"} if merges else {"_attend"})


def test_every_width_has_sizes() -> None:
    assert set(TILINGS) == {(arch, 2, width) for arch in ARCHITECTURES for width in (256, 512)}
