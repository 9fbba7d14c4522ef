"""Kernels and memory: what a card would punish and the interpreter, as it comes, would not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

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
    head_mean,
    linear,
    norm,
    rope,
    routing,
    sampling,
    unpack,
)
from dgemma.backends.cuda.ops import CudaOps
from dgemma.checkpoints.checkpoint import Checkpoint
from dgemma.core.config import SamplerConfig
from dgemma.core.model import denoise, encode, new_cache
from dgemma.core.parts import Draws, StepState
from interpreter import COARSE, ORDERS, interpreted
from kernel_weights import normal, weight
from test_cuda_ops import SHAPE, build
from test_kernels_sampling import draws
from tiny import tiny_checkpoint

MODULES = (attention, experts, head, linear, norm, rope, routing, sampling)


@triton.jit
def shift_kernel(x, out, count):
    """Each program writes what the next one reads."""
    at = tl.program_id(0)
    tl.store(out + at, tl.load(x + at + 1, mask=at + 1 < count, other=0.0))


@triton.jit
def beyond_kernel(x, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at), mask=at < count)


@triton.jit
def clash_kernel(out, SAME: tl.constexpr):
    tl.store(out, tl.where(SAME, 1, tl.program_id(0)))


@triton.jit
def threads_kernel(out):
    """One program, whose threads write to the same place."""
    at = tl.arange(0, 8)
    tl.store(out + at // 2, at)


@triton.jit
def stamp_kernel(out, clock):
    at = tl.program_id(0) * 6 + tl.program_id(1) * 2 + tl.program_id(2)
    tl.store(out + at, at)


def test_what_a_launch_must_not_do_is_found() -> None:
    x = torch.arange(8.0)
    with interpreted():
        shift_kernel[(8,)](x, torch.empty(8), 8)
        with pytest.raises(InterpreterError, match="which this launch has"):
            shift_kernel[(8,)](x, x, 8)
        beyond_kernel[(1,)](x, torch.empty(8), 8, BLOCK=8)
        with pytest.raises(InterpreterError, match="reads outside of its tensors: elements 0 to 15 counted from x"):
            beyond_kernel[(1,)](x, torch.empty(8), 8, BLOCK=16)
        with pytest.raises(InterpreterError, match="writes outside of its tensors"):
            beyond_kernel[(1,)](torch.zeros(16), torch.empty(8), 16, BLOCK=16)
        flag = torch.empty(1, dtype=torch.int32)
        clash_kernel[(4,)](flag, SAME=True)
        with pytest.raises(InterpreterError, match="a second time, and another value"):
            clash_kernel[(4,)](flag, SAME=False)
        with pytest.raises(InterpreterError, match="a second time, and another value"):
            threads_kernel[(1,)](torch.empty(4, dtype=torch.int32))


def test_views_of_one_buffer_are_the_same_memory() -> None:
    x = torch.zeros(4, 6)
    with interpreted(), pytest.raises(InterpreterError, match="which this launch has"):
        shift_kernel[(4,)](x[0, 1:], x[0], 4)


@pytest.mark.parametrize("order", ORDERS)
def test_every_program_runs_once_in_any_order(order: str) -> None:
    with interpreted(order):
        out = torch.empty(30, dtype=torch.int32)
        stamp_kernel[(5, 3, 2)](out, 0)
    assert torch.equal(out, torch.arange(30, dtype=torch.int32))
    turns = [ORDERS[order](at, 30) for at in range(30)]
    assert sorted(turns) == list(range(30)) and (order == "grid") == (turns == list(range(30)))


@triton.jit
def functions_kernel(x, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    one = tl.load(x + at)
    tl.store(out + at, tl.exp2(one))
    tl.store(out + COUNT + at, tl.exp(one))
    tl.store(out + 2 * COUNT + at, tl.rsqrt(one))
    tl.store(out + 3 * COUNT + at, one / 3.0)


def test_functions_are_as_coarse_as_a_cards() -> None:
    """And no coarser: what tests then allow for is what the instructions may do."""
    x = torch.linspace(0.1, 30, 256)
    with interpreted():
        fresh = torch.empty(4, 256)
        assert fresh.isnan().all() and (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
        functions_kernel[(1,)](x, fresh, COUNT=256)
    wide = x.double()
    want = torch.stack([wide.exp2(), wide.exp(), wide.rsqrt(), wide / 3])
    error = ((fresh.double() - want).abs() / want).amax(1) / COARSE
    slack = torch.tensor([1.3, 13.0, 1.3, 1.3])  # and a rounding; exp rounds its argument times log2 e, of up to 43
    assert (error < slack).all() and (error > 0.9).all(), error


# ---- The kernels --------------------------------------------------------------------------------------------------


def every_kernel() -> dict[str, torch.Tensor]:
    """Launch each kernel of the package, with several programs that share tiles, splits and parts."""
    rng = np.random.default_rng(0)

    def wide(*shape: int) -> torch.Tensor:
        return normal(rng, *shape).float()

    x, y, w = normal(rng, 17, 64), normal(rng, 3, 64), normal(rng, 64)
    shares = torch.rand(3, 2, generator=torch.Generator().manual_seed(0))
    cut = configs.Config(rows=32, tokens=16, block=32, stages=2, warps=4)
    packed = {rows: weight(rng, "symmetric4", rows, 64)[0] for rows in (80, 128)}
    experts_in, experts_out = (weight(rng, "symmetric8", 5, *shape)[0] for shape in ((64, 64), (64, 32)))
    results: dict[str, torch.Tensor] = {
        "rms_norm": norm.rms_norm(y, w, 1e-6, bits=4),
        "norm_add": norm.norm_add(y, y, w, 1e-6, next_weights=(w, w), next_bits=(4, 8))[2],
        "mix_norm_add": norm.mix_norm_add(y, torch.cat([y, y]), y, w, w, w, 1e-6, shares=shares)[0],
        "linear": linear.linear(x, packed[80], config=cut),
        "linear in parts": linear.linear(x, packed[80], config=replace(cut, split=2)),
        "geglu": linear.geglu(x, packed[128], out_bits=8, config=cut),
    }
    chosen, index = routing.route(x, normal(rng, 5, 64), w, normal(rng, 5).abs(), 2, 1e-6)
    plan = routing.schedule(index, 5, 16)
    results |= {"route": chosen, "schedule": plan.order, "tiles": plan.tiles}
    results["experts"] = experts.expert_mlp(x, index, chosen, experts_in, experts_out, cuts=(cut, cut))

    keys, values = (torch.full((4, 2, 60, 32), torch.nan) for _ in range(2))
    keys[:, :, :50], values[:, :, :50] = wide(4, 2, 50, 32), wide(4, 2, 50, 32)
    held, slots = (torch.tensor(one, dtype=torch.int32) for one in ([50, 17], [3, 1]))
    q, k, turn, own = wide(2, 5, 128), wide(2, 5, 64), wide(1, 1, 5, 16), wide(32)
    turned = rope.norm_rope_write(q, k, k, own, own, turn, turn, keys, values, held, slots, heads=4, eps=1e-6)
    parts = attention.Tiling(rows=16, keys=8, warps=4, stages=1, columns=16, programs=48, merged=4)
    attended = attention.attention(turned, keys, values, held, slots, window=None, causal=True, sizes=parts)
    results |= {"rope": turned, "keys": keys, "values": values, "attention": attended}

    table = weight(rng, "symmetric8", 300, 64)[0]
    cuts = head.Tiling(rows=16, tokens=128, depth=32, warps=4, stages=1, mean_rows=16, mean_width=32, mean_depth=64,
                       mean_warps=4, mean_stages=1, programs=12, chunk=16)  # fmt: skip
    u = torch.rand(2, 12, generator=torch.Generator().manual_seed(1))
    temperature = torch.tensor([[0.4], [0.8]])
    token, argmax, entropy, soft = head.vocab_head(normal(rng, 2, 12, 64), table, 30.0, temperature, u, sizes=cuts)
    classes = torch.arange(300, dtype=torch.int32) % 4 - 1
    _, masses = head.class_head(normal(rng, 2, 12, 64), table, 30.0, temperature, classes, 4, sizes=cuts)
    results |= {f"classes' {name}": one for name, one in masses._asdict().items()}
    count, flag = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.bool)
    before = StepState(
        canvas=token, soft=soft, argmax=argmax, stable=count, accepted=torch.zeros(2, 12, dtype=torch.bool),
        entropy=entropy, stop=flag,
    )  # fmt: skip
    given = device_draws([SamplerConfig(), SamplerConfig(greedy=True)], token * 0)
    after = sampling.advance(given, before, token, argmax, entropy, soft)
    results |= {"entropy": entropy, "soft": soft, "canvas": after.canvas, "stable": after.stable, "token": token}
    return results


def device_draws(settings: list[SamplerConfig], noise: torch.Tensor) -> Draws:
    rows = draws(settings, noise.numpy())
    wide = ("entropy_bound", "confidence")
    return Draws(*(torch.as_tensor(x.astype(np.float32) if name in wide else x) for name, x in rows._asdict().items()))


def launched_names() -> set[str]:
    """Names of all the kernels that the package's own code launches."""
    sources = [Path(module.__file__ or "").read_text() for module in (*MODULES, head_classes, head_mean, unpack)]
    return {
        name
        for source in sources
        for name in re.findall(r"(\w+)\[\([^\]]+\)\]\(|(\w+)\[grid\]\(", source)
        for name in name
        if name
    }


def test_no_result_depends_on_the_order_of_programs() -> None:
    """Nor on what stood in fresh memory, of which nothing may come through; and all kernels are looked at."""
    results: list[dict[str, torch.Tensor]] = []
    for order in ORDERS:
        with interpreted(order) as watch:
            results.append(every_kernel())
        assert watch.kernels == launched_names()
    for name, result in results[0].items():
        unwritten = name in ("keys", "values")
        assert unwritten or not result.is_floating_point() or result.isfinite().all(), name
        for other in results[1:]:
            assert torch.equal(result.view(torch.uint8), other[name].view(torch.uint8)), name


def test_the_cache_is_read_as_far_as_it_is_filled(tmp_path: Path) -> None:
    """Whole passes with NaN in every row that holds nothing yet: padded chunks, a moving window, two prompts."""
    config = {**SHAPE, "sliding_window": 4, "canvas_length": 4}
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path, **config))
    tokens, soft = torch.randint(0, 200, (3, 2, 4), dtype=torch.int32), torch.zeros(2, 4, 32, dtype=torch.bfloat16)
    results = []
    for filler in (0.0, torch.nan):
        ops = CudaOps("bfloat16", "cpu")
        model = build(ops, checkpoint, "8bit")
        cache = new_cache(ops, model.config, slots=2, capacity=12, scratch=4)
        for x in (x for layer in cache.layers for x in layer):
            x.fill_(filler)
        with interpreted():
            for block, fresh in zip(tokens[:2], ([3, 1], [4, 4]), strict=True):
                cache = encode(ops, model, cache, block, torch.tensor(fresh, dtype=torch.int32))
            results.append(denoise(ops, model, cache, tokens[2], soft))
    assert results[0].isfinite().all() and torch.equal(*results)
