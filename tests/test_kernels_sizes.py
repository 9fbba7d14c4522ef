"""Kernels at sizes that fill a card: every address, computed in the integers that it is computed in there, is inside.

Tensors have shapes and no memory, and of each launch the programs at the corners of its grid run. Offsets within a
matrix are int32, which is why kernels bring stacks, batches and parts to int64: here is what shows that they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterError

from dgemma.backends.cuda.kernels import (
    attention,
    configs,
    experts,
    head,
    head_classes,
    head_sizes,
    linear,
    norm,
    rope,
    routing,
    sampling,
)
from dgemma.core.parts import Draws, StepState
from interpreter import reach
from kernel_harness import Launch, launched
from kernel_weights import meta, meta_weight

ROWS, BATCH, WIDTH, VOCAB, CHOICES, EXPERTS = 8 * 1024, 8, 2816, 262144, 8, 128
"""Eight prompts' chunks at once, on the 26B's shapes."""

HELD = 262144
"""Entries of a slot: its longest context."""

SLOTS = 2 * BATCH
"""Of the pool; the last one is among a pass's rows."""


def corners(launch: Launch) -> list[tuple[int, int, int]]:
    across, down, deep = (*launch.grid, 1, 1)[:3]
    return sorted(set(product({0, across - 1}, {0, down - 1}, {0, deep - 1})))


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def check(
    run: Callable[[], Any], ends: Mapping[str, tuple[str, ...]], *,
    programs: Callable[[Launch], list[tuple[int, int, int]]] = corners, **contents: np.ndarray,
) -> None:  # fmt: skip
    """`ends`: by kernel, the tensors whose last element some program has to reach, or the test would show nothing."""
    left: dict[tuple[str, str], int] = {}
    for launch in launched(run):
        memory = reach(launch.kernel, launch.grid, launch.arguments, programs(launch), contents)
        for name in ends.get(launch.name, ()):
            missing = launch.arguments[name].numel() - 1 - memory.touched(name)
            left[launch.name, name] = min(missing, left.get((launch.name, name), missing))
    assert left == {(kernel, name): 0 for kernel, names in ends.items() for name in names}


@triton.jit
def row_kernel(x, row, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    tl.load(x + (row.to(tl.int64) if WIDE else row) * WIDTH)


def test_an_offset_that_overflows_is_found() -> None:
    x = meta(1 << 21, 1 << 11)
    reach(row_kernel, (1,), {"x": x, "row": (1 << 21) - 1, "WIDTH": 1 << 11, "WIDE": True}, [(0, 0, 0)], {})
    with pytest.raises(InterpreterError, match="outside of its tensors"):
        reach(row_kernel, (1,), {"x": x, "row": (1 << 21) - 1, "WIDTH": 1 << 11, "WIDE": False}, [(0, 0, 0)], {})


@pytest.mark.parametrize("form", ["bf16", "symmetric4", "affine8"])
def test_experts(form: str) -> None:
    index = meta(ROWS, CHOICES, dtype=torch.int32)
    gate_up, down = meta_weight(form, EXPERTS, 1408, WIDTH), meta_weight(form, EXPERTS, WIDTH, 704)
    pairs = ROWS * CHOICES
    tile = configs.for_experts(configs.ASSUMED, 16 if form == "bf16" else int(form[-1]), (1408, WIDTH), 512)[0].tokens
    tiles = np.zeros((3, routing.most_tiles(pairs, EXPERTS, tile)), np.int32)
    tiles[:, -1] = EXPERTS - 1, pairs - tile, pairs  # the last tile is the last expert's, and full
    check(
        lambda: experts.combine(
            experts.expert_results(meta(ROWS, WIDTH), index, gate_up, down), meta(ROWS, CHOICES, dtype=torch.float32)
        ),
        {
            "gate_up_kernel": ("x", "words", "hidden"), "down_kernel": ("hidden", "words", "results"),
            "combine_kernel": ("results", "out"), "schedule_kernel": ("index", "tiles"),
        },
        tiles=tiles, order=np.arange(pairs, dtype=np.int32),
    )  # fmt: skip


def test_routing() -> None:
    check(
        lambda: routing.route(meta(ROWS, WIDTH), meta(EXPERTS, WIDTH), meta(WIDTH), meta(EXPERTS), CHOICES, 1e-6),
        {"scores_kernel": ("r", "proj", "partial", "squares"), "choose_kernel": ("partial", "weights", "index")},
    )


@pytest.mark.parametrize("form", ["symmetric8", "affine4"])
def test_linear(form: str) -> None:
    weight = meta_weight(form, 8192, 4096)
    cut = replace(configs.LINEAR[90][8][0], split=4)

    def run() -> None:
        linear.linear(meta(ROWS, 4096), weight)
        linear.linear(meta(ROWS, 4096), weight, config=cut)
        linear.geglu(meta(ROWS, 4096), weight, out_bits=4)

    check(run, {"linear_kernel": ("x", "words", "scales", "out"), "geglu_kernel": ("out",), "sum_kernel": ("partial",)})


@pytest.mark.parametrize("causal, batch, length", [(False, BATCH, 256), (True, 2, 1024)])
@pytest.mark.parametrize("kv_heads, width, window, programs", [(8, 256, 1024, 132), (2, 512, None, 1 << 17)])
def test_attention(
    kv_heads: int, width: int, window: int | None, programs: int, causal: bool, batch: int, length: int
) -> None:
    q, cache = meta(batch, length, 16, width).transpose(1, 2), meta(SLOTS, kv_heads, HELD, width)
    sizes = replace(attention.tiling("sm_90", torch.bfloat16, width), programs=programs)
    one = meta(batch, dtype=torch.int32)
    check(
        lambda: attention.attention(q, cache, cache, one, one, window=window, causal=causal, sizes=sizes, bits=4),
        {"_attend": ("q", "keys", "values", "out"), **({"_merge": ("parts", "out")} if programs > 132 else {})},
        held_of=np.full(batch, HELD - length, np.int32),
        slots=np.full(batch, SLOTS - 1, np.int32),
    )


@pytest.mark.parametrize("full", [False, True])
def test_rotation_into_the_cache(full: bool) -> None:
    kv_heads, width = (2, 512) if full else (8, 256)
    sizes = [16 * width, kv_heads * width] + ([] if full else [kv_heads * width])
    joined = meta(BATCH, 1024, sum(sizes)).split(sizes, -1)
    angle, weight = meta(BATCH, 1, 1024, width // 2), meta(width)
    keys, values = meta(SLOTS, kv_heads, HELD, width), meta(SLOTS, kv_heads, HELD, width)
    check(
        lambda: rope.norm_rope_write(
            joined[0], joined[1], None if full else joined[2], weight, weight, angle, angle, keys, values,
            meta(BATCH, dtype=torch.int32), meta(BATCH, dtype=torch.int32), heads=16, eps=1e-6,
        ),
        {"_qkv": ("q_out", "k_out", "v_out", "cos")}, held_of=np.full(BATCH, HELD - 1024, np.int32),
        slots=np.full(BATCH, SLOTS - 1, np.int32),
        programs=lambda launch: list(product((0, launch.grid[0] - 1), range(launch.grid[1]), (0,))),
    )  # fmt: skip


@pytest.mark.parametrize("form", ["bf16", "symmetric8", "affine4"])
def test_head(form: str) -> None:
    """Rows in chunks of 256, so that only the table is large; of its tiles, the last is the only one that matters."""
    table, wide = meta_weight(form, VOCAB, WIDTH), meta(2, 200, dtype=torch.float32)
    tiles = VOCAB // head_sizes.TILINGS["sm_90"].tokens
    check(
        lambda: head.vocab_head(meta(2, 200, WIDTH), table, 30.0, meta(2, 1, dtype=torch.float32), wide),
        {
            "_score": ("words", "masses", "statistics", "ceilings", "wanted"), "_settle": ("statistics",),
            "_list": ("listed",), "_mean": ("words", "masses", "parts"), "_gather": ("parts", "out"),
        },
        wanted=np.ones(tiles, np.int32), listed=np.full(tiles, tiles - 1, np.int32), count=ints(6),
    )  # fmt: skip


def test_classes() -> None:
    """One class that all but a token are in, and 149 of none: what is read begins and ends with the table."""
    table, wide = meta_weight("symmetric8", VOCAB, WIDTH), meta(2, 1, dtype=torch.float32)
    slices = VOCAB // head_classes.SLICE
    edges = np.full(151, VOCAB, np.int32)
    edges[0] = 0
    check(
        lambda: head.class_head(
            meta(2, 200, WIDTH), table, 30.0, wide, meta(VOCAB, dtype=torch.int32), 150
        ),
        {"_score": ("raw",), "_slice": ("scores", "order"), "_join": ("mass", "best", "score", "moment_out")},
        programs=lambda launch: corners(launch) if launch.name != "_slice" else [
            (slices - 1, 0, 0), (slices - 1, launch.grid[1] - 1, 0), (0, 0, 0), (launch.grid[0] - 1, 0, 0)
        ],
        order=np.arange(VOCAB, dtype=np.int32), edges=edges,
    )  # fmt: skip


def test_norms_and_sampler() -> None:
    x, results, weight = meta(ROWS, WIDTH), meta(ROWS * CHOICES, WIDTH), meta(WIDTH)
    shares, one = meta(ROWS, CHOICES, dtype=torch.float32), meta(BATCH, 256, dtype=torch.int32)
    entropy, flag = meta(BATCH, 256, dtype=torch.float32), meta(BATCH, dtype=torch.bool)
    number, count = meta(BATCH, dtype=torch.float32), meta(BATCH, dtype=torch.int32)
    given = Draws(
        temperature=number, uniforms=entropy, noise=one, entropy_bound=number, confidence=number, stability=count,
        greedy=flag, held=one,
    )  # fmt: skip
    before = StepState(
        canvas=one, soft=meta(BATCH, 256, 8), argmax=one, stable=count,
        accepted=None, entropy=None, stop=None,
    )  # fmt: skip

    def run() -> None:
        norm.rms_norm(x, weight, 1e-6, bits=4)
        norm.mix_norm_add(
            x, results, x, weight, weight, weight, 1e-6, next_weights=(weight,), next_bits=(4,), shares=shares
        )
        sampling.advance(given, before, one, one, entropy, before.soft)

    check(run, {"_rms_norm": ("x", "out"), "_norm_add": ("second", "shares", "normed"), "_advance": ("canvas", "stop")})
