"""A layer's experts, from packed words to the sum over a row's choices, against the oracle; and what is compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from dgemma.backends.cuda.kernels import configs, experts, routing, unpack
from dgemma.checkpoints.quant import Format
from dgemma.core import reference
from dgemma.core.errors import DgemmaError
from dgemma.core.ops import Ops
from dgemma.core.parts import Experts, Router
from kernel_harness import ARCHITECTURES, Launch, compile_ahead_launch, launched, running
from kernel_weights import EXACT, FORMATS, ROUNDED, exact, guarded, meta, meta_weight, narrow, normal, weight
from law import assert_close_f32, assert_low_precision

SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
"""Bytes of shared memory that one program can have (CUDA C++ Programming Guide, technical specifications)."""


def oracle(ops: Any, x: Any, index: np.ndarray, weights: np.ndarray, gate_up: Any, down: Any) -> np.ndarray:
    """`Ops.moe` with the routing given."""
    unused = np.zeros(1)
    router = Router(
        experts=len(gate_up), experts_per_token=index.shape[1], eps=0.0, proj=unused, scale=unused,
        per_expert_scale=unused,
    )  # fmt: skip
    given = ops.asarray(weights, ops.wide), index.astype(np.int32)
    with mock.patch.object(Ops, "_route", lambda *_: given):
        return ops.moe(x[None], x[None], router, Experts(gate_up_proj=gate_up, down_proj=down))[0]


def cut(rows: int, tokens: int, block: int) -> configs.Config:
    return configs.Config(rows=rows, tokens=tokens, block=block, stages=2, warps=4)


def check(
    device: str, form: str, index: np.ndarray, count: int, inner: int, width: int, cuts: tuple[Any, Any], seed: int = 0
) -> None:
    rng = np.random.default_rng(seed)
    gate_up, gate_up_values = weight(rng, form, count, 2 * inner, width, device=device)
    down, down_values = weight(rng, form, count, width, inner, device=device)
    x, heat = normal(rng, len(index), width), rng.random(index.shape, np.float32)
    chosen = torch.from_numpy(index.astype(np.int32)).to(device)
    with running(device), guarded(device):
        out = experts.expert_mlp(x.to(device), chosen, torch.from_numpy(heat).to(device), gate_up, down, cuts=cuts)
    want = oracle(EXACT, exact(x), index, heat, gate_up_values.astype(np.float64), down_values.astype(np.float64))
    rounded = oracle(ROUNDED, narrow(x), index, heat, narrow(gate_up_values), narrow(down_values))
    assert_low_precision(exact(out), rounded, want, form)


def drawn(rows: int, count: int, k: int) -> np.ndarray:
    rng = np.random.default_rng(rows)
    return np.stack([rng.permutation(count)[:k] for _ in range(rows)])


@pytest.mark.parametrize("form", FORMATS)
def test_the_experts_are_the_oracles(device: str, form: str) -> None:
    """Rows that fill no tile, an inner width that fills no slice of gate_up, and a K that fills no block."""
    inner = 64 if form.startswith("affine") else 96
    check(device, form, drawn(19, 5, 3), 5, inner, 192, (cut(64, 16, 128), cut(128, 16, 64)))


@pytest.mark.parametrize(
    ("index", "count"),
    [
        (np.array([[2]]), 4),
        (np.full((37, 1), 3), 4),
        (np.full((5, 1), 0), 1),
        (drawn(40, 6, 5), 6),
    ],
    ids=["one row", "all rows to the last expert", "a single expert", "several tiles each"],
)
def test_any_assignment_of_rows_is_served(device: str, index: np.ndarray, count: int) -> None:
    check(device, "symmetric4", index, count, 64, 128, (cut(64, 16, 64), cut(64, 16, 64)))


@pytest.mark.parametrize(("first", "second"), [("symmetric8", "symmetric4"), ("symmetric4", "bf16")])
def test_gate_up_writes_what_the_words_of_down_want(device: str, first: str, second: str) -> None:
    rng = np.random.default_rng(5)
    index = drawn(9, 3, 2)
    gate_up, gate_up_values = weight(rng, first, 3, 128, 64, device=device)
    down, down_values = weight(rng, second, 3, 64, 64, device=device)
    x, heat = normal(rng, 9, 64), rng.random(index.shape, np.float32)
    cuts = cut(64, 16, 64), cut(64, 16, 64)
    with running(device):
        chosen, heat_there = torch.from_numpy(index.astype(np.int32)).to(device), torch.from_numpy(heat).to(device)
        out = experts.expert_mlp(x.to(device), chosen, heat_there, gate_up, down, cuts=cuts)
        before = unpack.arrange(x.to(device), unpack.stored(gate_up).bits)
        again = experts.expert_mlp(before, chosen, heat_there, gate_up, down, cuts=cuts, arranged=True)
    want = oracle(EXACT, exact(x), index, heat, gate_up_values.astype(np.float64), down_values.astype(np.float64))
    rounded = oracle(ROUNDED, narrow(x), index, heat, narrow(gate_up_values), narrow(down_values))
    assert_low_precision(exact(out), rounded, want)
    assert torch.equal(out, again), "activations may come arranged, and two runs are bit-identical"


def test_no_rows_give_no_rows() -> None:
    rng = np.random.default_rng(6)
    out = experts.expert_mlp(
        normal(rng, 0, 64), torch.empty((0, 2), dtype=torch.int32), torch.empty((0, 2)),
        weight(rng, "symmetric4", 2, 128, 64)[0], weight(rng, "symmetric4", 2, 64, 64)[0],
    )  # fmt: skip
    assert out.shape == (0, 64)


def test_what_does_not_fit_is_refused_by_name() -> None:
    x, index, heat = meta(4, 64), meta(4, 2, dtype=torch.int32), meta(4, 2, dtype=torch.float32)
    good = meta_weight("symmetric4", 2, 128, 64), meta_weight("symmetric4", 2, 64, 64)
    other = replace(
        good[0], words=meta(2, 128, 16, dtype=torch.int32), format=Format(mode="mxfp8", bits=8, group_size=32)
    )
    with pytest.raises(DgemmaError, match=r"do not read 8-bit mxfp8 weights of shape \[2, 128, 64\]"):
        experts.expert_mlp(x, index, heat, other, good[1])
    with pytest.raises(DgemmaError, match=r"\[4, 64\], \[2, 128, 64\] and \[2, 64, 128\] do not fit"):
        experts.expert_mlp(x, index, heat, good[0], meta_weight("symmetric4", 2, 64, 128))
    with pytest.raises(DgemmaError, match="contiguous"):
        experts.expert_mlp(x, index, heat, meta(2, 64, 128).transpose(1, 2), good[1])
    with pytest.raises(DgemmaError, match="tiles of 16 and 32 rows"):
        experts.expert_mlp(x, index, heat, *good, cuts=(cut(64, 16, 64), cut(64, 32, 64)))


@triton.jit
def gelu_kernel(x, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, experts.gelu(tl.load(x + at)))


def test_gelu_is_the_tanh_form_over_its_whole_range(device: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 250), torch.tensor([0.0, -0.0, 300.0, -300.0, 1e30, -1e30])]).to(device)
    out = torch.empty_like(x)
    with running(device):
        gelu_kernel[(1,)](x, out, COUNT=256)
    assert_close_f32(out.cpu().numpy(), reference.gelu(EXACT, exact(x)))


# ---- Ahead of time -----------------------------------------------------------------------------------------------


def products(run: Callable[[], Any]) -> list[Launch]:
    return [launch for launch in launched(run) if launch.name in ("gate_up_kernel", "down_kernel")]


def real(form: str, cuts: tuple[configs.Config, ...], rows: int = 256) -> list[Launch]:
    """The launches of the 26B model's experts, cut so."""
    index, heat = meta(rows, 8, dtype=torch.int32), meta(rows, 8, dtype=torch.float32)
    gate_up, down = meta_weight(form, 128, 1408, 2816), meta_weight(form, 128, 2816, 704)
    return products(lambda: experts.expert_mlp(meta(rows, 2816), index, heat, gate_up, down, cuts=(cuts[0], cuts[1])))


SHIPPED = {4: "symmetric4", 8: "symmetric8", 16: "bf16"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shipped_cuts_compile_without_spills(arch: str) -> None:
    table = configs.EXPERTS[int(arch.removeprefix("sm_"))]
    tried = [(SHIPPED[bits], cuts) for bits, lines in table.items() for _, cuts in lines]
    tried.append(("affine4", next(cuts for most, cuts in table[4] if most >= 16)))  # what others have published
    for form, cuts in tried:
        for launch in real(form, cuts):
            built = compile_ahead_launch(launch, arch)
            assert built.spills == 0 and built.stack == 0 and not built.serialized, (form, cuts, built)
            assert built.shared <= SHARED[arch], (form, cuts, built)


@pytest.mark.parametrize("form", ["affine8", "nvfp4"])
def test_the_other_formats_compile_without_spills_on_hopper(form: str) -> None:
    bits = 8 if form == "affine8" else 4
    for launch in real(form, configs.EXPERTS[90][bits][1][1]):
        built = compile_ahead_launch(launch, "sm_90")
        assert built.spills == 0, built


def test_on_hopper_weights_go_from_registers_to_the_matrix_units() -> None:
    """The point of the arrangement: no dequantized weight in shared memory, and three programs to a multiprocessor."""
    for launch in real("symmetric4", configs.EXPERTS[90][4][1][1]):
        built = compile_ahead_launch(launch, "sm_90")
        instructions = [line for line in built.ptx.splitlines() if "wgmma.mma_async" in line]
        assert instructions and all("m64n32k16.f32.bf16.bf16" in line for line in instructions)
        # Four registers where the left operand stands, a descriptor where the right one does.
        assert all(line.count("{") == 2 for line in instructions), instructions[0]
        assert "cp.async" in built.ptx and "stmatrix" not in built.ptx.split("wgmma.wait_group")[0]
        assert built.registers * 128 * 3 <= 1 << 16 and built.shared * 3 <= SHARED["sm_90"], built


def test_what_is_launched_early_waits_before_it_reads() -> None:
    early = replace(configs.ASSUMED, early=True)
    index, heat = meta(256, 8, dtype=torch.int32), meta(256, 8, dtype=torch.float32)
    packed = meta_weight("symmetric4", 128, 1408, 2816), meta_weight("symmetric4", 128, 2816, 704)
    with ExitStack() as patches:
        for module in (experts, routing, unpack):
            patches.enter_context(mock.patch.object(module, "card", lambda _: early))
        found = launched(lambda: experts.expert_mlp(meta(256, 2816), index, heat, *packed))
    assert len(found) == 5
    for launch in found:
        assert launch.options["launch_pdl"], launch.name
        ptx = compile_ahead_launch(launch, "sm_90").ptx
        wait = ptx.index("griddepcontrol.wait")
        assert wait < min(ptx.index(word) for word in ("ld.global", "cp.async", "st.global") if word in ptx), (
            launch.name
        )
    assert not any(launch.options["launch_pdl"] for launch in real("symmetric4", configs.EXPERTS[90][4][1][1]))


def test_the_grid_depends_on_sizes_alone() -> None:
    """A captured graph replays it for whatever routing comes."""
    first = real("symmetric4", configs.EXPERTS[90][4][1][1])
    assert [launch.grid for launch in first] == [(11 * (128 + 60),), (22 * (128 + 60),)]


def test_every_table_serves_every_number_of_rows() -> None:
    for generation in configs.EXPERTS:
        on = configs.Card(generation=generation, multiprocessors=100)
        for bits, rows in chain.from_iterable([(b, r) for r in (1, 8, 16, 64, 5000)] for b in (4, 8, 16)):
            first, second = configs.for_experts(on, bits, (1408, 2816), rows)
            assert first.tokens == second.tokens and first.rows % 2 == 0


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_place_and_element_are_inverse(device: str, bits: int) -> None:
    order = unpack.arrangement(128, bits)
    assert torch.equal(order.sort().values, torch.arange(128))
    x = torch.arange(128, dtype=torch.float32)[None]
    with running(device):
        there = unpack.arrange(x.to(device), bits).cpu()
    assert torch.equal(there[0].long(), order)
    # The kernel language's operators are Python's, so the function for producers runs on tensors as it stands.
    assert torch.equal(unpack.place.fn(torch.arange(128), bits)[order], torch.arange(128))
