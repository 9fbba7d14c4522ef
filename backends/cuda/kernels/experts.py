"""A layer's experts in three launches: gate and up with GeGLU, down, and the weighted sum of each row's k results.

Shapes: x [N, D] bf16, gate_up [E, 2F, D], down [E, D, F], pairs sorted by `routing.schedule` → [N, D] bf16.
At N = 256, k = 8, E = 128, F = 704, D = 2816, 4 bits with a bf16 scale for 32 weights (0.5625 bytes a weight):

    kernel    weights read   FLOP    other bytes                    floor at 3.35 TB/s / 990 TFLOP/s
    gate_up   285.5 MB       16.2 G  x 1.4 MB, hidden 2.9 MB         86 µs / 16 µs
    down      142.7 MB        8.1 G  hidden 2.9 MB, results 11.5 MB  47 µs /  8 µs
    combine                          results 11.5 MB, out 1.4 MB      4 µs (from the L2 cache, less)

and by 8 bits 255, by bf16 480 µs for the layer. What binds is the reading of weights, so a program reads its weights
once for all rows of its expert, up to a tile; a tile of 32 rows holds nearly every expert's when 16 come on average.

Numerics: products of bf16, sums in float32, GeGLU in float32 and rounded once; results rounded to bf16 before their
routing weights, float32, are applied and summed in the order of the choices. Nothing is atomic: runs are bit-identical.
Tolerance: the law's for low precision, at most twice the error of the oracle in bf16.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A launch's options, and constants where numbers are meant, are beyond Triton's type hints.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ....core.errors import DgemmaError
from .configs import Config, card, for_experts
from .routing import Schedule, schedule
from .unpack import Stored, Weight, activations, arrange, fitted, stored, times, wait_turn

Tensor = torch.Tensor


def expert_mlp(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Weight, down: Weight, *,
    arranged: bool = False, cuts: tuple[Config, Config] | None = None,
) -> Tensor:  # fmt: skip
    """Run every row through its experts and add up the results → bf16 [N, D]. Arguments and errors as `expert_results`.

    weights: float32 [N, k].
    """
    return combine(expert_results(x, index, gate_up, down, arranged=arranged, cuts=cuts), weights.contiguous())


def expert_results(
    x: Tensor, index: Tensor, gate_up: Weight, down: Weight, *,
    arranged: bool = False, cuts: tuple[Config, Config] | None = None,
) -> Tensor:  # fmt: skip
    """Run every row through its experts → bf16 [N·k, D], row by row in the order of its choices.

    Args:
        x: bf16 [N, D].
        index: int32 [N, k], the experts of each row.
        gate_up: [E, 2F, D], gate half first.
        down: [E, D, F].
        arranged: x lies in the order that gate_up's words want (`unpack.arrangement`).
        cuts: how to cut gate_up and down, with the same token tile; None for the table's.

    Raises:
        DgemmaError: a weight that the kernels do not read, or shapes that do not fit.
    """
    first, second = stored(gate_up), stored(down)
    x, index = activations(x), index.contiguous()
    (experts, double, width), (also, out, inner) = first.shape, second.shape
    if (experts, double, width, width) != (also, 2 * inner, x.shape[1], out):
        found = f"{list(x.shape)}, {list(first.shape)} and {list(second.shape)}"
        raise DgemmaError(f"experts: rows, gate_up and down of shapes {found} do not fit together")
    cuts = cuts or for_experts(card(x.device), first.bits, (double, width), -(-index.numel() // experts))
    if cuts[0].tokens != cuts[1].tokens:
        raise DgemmaError(f"experts: tiles of {cuts[0].tokens} and {cuts[1].tokens} rows; both products need the same")
    plan = schedule(index, experts, cuts[0].tokens)
    x = x if arranged else arrange(x, first.bits)
    hidden = gate_up_geglu(x, plan, first, second.bits, index.shape[1], cuts[0])
    return down_project(hidden, plan, second, cuts[1])


def gate_up_geglu(x: Tensor, plan: Schedule, weight: Stored, out_bits: int, choices: int, config: Config) -> Tensor:
    """Return gelu(gate) · up of each pair, sorted, arranged for a weight of `out_bits`: bf16 [N·k, F].

    x [N, D] is arranged; pair p is row p // choices.
    """
    inner = weight.rows // 2
    hidden = torch.empty((len(plan.order), inner), dtype=x.dtype, device=x.device)
    early = card(x.device).early
    config = fitted(config, weight)
    if len(plan.order):
        half = config.rows // 2
        grid = (triton.cdiv(inner, half) * plan.count,)
        gate_up_kernel[grid](
            x, plan.order, plan.tiles, hidden, choices, plan.count, **weight.arguments(), WIDTH=weight.width,
            INNER=inner, OUT_BITS=out_bits, HALF=half, M=config.tokens, BLOCK=config.block, STAGES=config.stages,
            EARLY=early, num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers, launch_pdl=early,
        )  # fmt: skip
    return hidden


def down_project(hidden: Tensor, plan: Schedule, weight: Stored, config: Config) -> Tensor:
    """Return each pair's result, back in the order of pairs: sorted, arranged hidden [N·k, F] → bf16 [N·k, D]."""
    results = torch.empty((len(hidden), weight.rows), dtype=hidden.dtype, device=hidden.device)
    early = card(hidden.device).early
    config = fitted(config, weight)
    if len(hidden):
        grid = (triton.cdiv(weight.rows, config.rows) * plan.count,)
        down_kernel[grid](
            hidden, plan.order, plan.tiles, results, plan.count, **weight.arguments(), WIDTH=weight.width,
            ROWS=weight.rows, N=config.rows, M=config.tokens, BLOCK=config.block, STAGES=config.stages,
            EARLY=early, num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers, launch_pdl=early,
        )  # fmt: skip
    return results


def combine(results: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of each row's results: bf16 [N·k, D], float32 [N, k] → bf16 [N, D]."""
    rows, k = weights.shape
    width = results.shape[1]
    out = torch.empty((rows, width), dtype=results.dtype, device=results.device)
    if rows:
        block = min(1024, triton.next_power_of_2(width))
        early = card(results.device).early
        combine_kernel[(rows, triton.cdiv(width, block))](
            results, weights, out, width, K=k, EARLY=early, BLOCK=block, num_warps=4, launch_pdl=early
        )
    return out


@triton.jit
def gelu(x):
    """Tanh form; ½(1 + tanh z) is the sigmoid of 2z. For x of -inf: -0."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def factors(factor, rows, real, PER_ROW: tl.constexpr):
    """Return what rows of a weight are multiplied by: float32 [N]."""
    if PER_ROW:
        return tl.load(factor + rows, mask=real, other=0.0)
    return tl.load(factor + 0 * rows)


@triton.jit
def split_halves(acc, HALF: tl.constexpr, M: tl.constexpr):
    """Cut [2·HALF, M] into its upper and lower half."""
    return tl.split(tl.permute(tl.reshape(acc, (2, HALF, M)), (1, 2, 0)))


@triton.jit
def store_arranged(
    out, at, live, value, first, WIDTH: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr, M: tl.constexpr
):
    """Store value [N, M], elements `first` … of M rows that begin at `at` [M], as `unpack.arrangement` has them."""
    place = first + tl.arange(0, N)
    if BITS != 16:
        HALF: tl.constexpr = 16 // BITS
        value = tl.permute(tl.reshape(value, (N // (8 * HALF), 4, 2, HALF, M)), (0, 3, 1, 2, 4))
        value = tl.reshape(value, (N, M))
    tl.store(out + at[:, None] + place[None, :], tl.trans(value), mask=live[:, None] & (place < WIDTH)[None, :])


@triton.jit(do_not_specialize=["magic", "tile_count"])
def gate_up_kernel(
    x, order, tiles, hidden, choices, tile_count, words, scales, biases, factor, magic,
    WIDTH: tl.constexpr, INNER: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PER_ROW: tl.constexpr,
    OUT_BITS: tl.constexpr, HALF: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program: HALF rows of gate and the same of up, for one tile of an expert's rows."""
    wait_turn(EARLY)
    SLICES: tl.constexpr = (INNER + HALF - 1) // HALF
    tile = tl.program_id(0) // SLICES
    part = tl.program_id(0) % SLICES
    begin = tl.load(tiles + tile_count + tile)
    end = tl.load(tiles + 2 * tile_count + tile)
    if begin >= end:
        return
    expert = tl.load(tiles + tile).to(tl.int64) * (2 * INNER)
    place = begin + tl.arange(0, M)
    live = place < end
    token = tl.load(order + place, mask=live, other=0) // choices

    line = tl.arange(0, 2 * HALF)
    f = part * HALF + line % HALF
    rows = line // HALF * INNER + f
    acc = times(
        x, token * WIDTH, live, words, scales, biases, expert, rows, f < INNER, magic, 0,
        WIDTH, 1, WIDTH, BITS, GROUP, INNER % HALF == 0, 2 * HALF, M, BLOCK, STAGES,
    )  # fmt: skip
    if factor is not None:
        acc = acc * factors(factor + (expert if PER_ROW else 0), rows, f < INNER, PER_ROW)[:, None]
    gate, up = split_halves(acc, HALF, M)
    value = (gelu(gate) * up).to(tl.bfloat16)
    store_arranged(hidden, place.to(tl.int64) * INNER, live, value, part * HALF, INNER, OUT_BITS, HALF, M)


@triton.jit(do_not_specialize=["magic", "tile_count"])
def down_kernel(
    hidden, order, tiles, results, tile_count, words, scales, biases, factor, magic,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PER_ROW: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program: N columns of the results of one tile of an expert's rows."""
    wait_turn(EARLY)
    SLICES: tl.constexpr = (ROWS + N - 1) // N
    tile = tl.program_id(0) // SLICES
    part = tl.program_id(0) % SLICES
    begin = tl.load(tiles + tile_count + tile)
    end = tl.load(tiles + 2 * tile_count + tile)
    if begin >= end:
        return
    expert = tl.load(tiles + tile).to(tl.int64) * ROWS
    place = begin + tl.arange(0, M)
    live = place < end
    rows = part * N + tl.arange(0, N)
    acc = times(
        hidden, place * WIDTH, live, words, scales, biases, expert, rows, rows < ROWS, magic,
        0, WIDTH, 1, WIDTH, BITS, GROUP, ROWS % N == 0, N, M, BLOCK, STAGES,
    )  # fmt: skip
    if factor is not None:
        acc = acc * factors(factor + (expert if PER_ROW else 0), rows, rows < ROWS, PER_ROW)[:, None]
    pair = tl.load(order + place, mask=live, other=0).to(tl.int64) * ROWS
    store_arranged(results, pair, live, acc.to(tl.bfloat16), part * N, ROWS, 16, N, M)


@triton.jit
def combine_kernel(results, weights, out, width, K: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    wait_turn(EARLY)
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        pair = row * K + j
        value = tl.load(results + pair.to(tl.int64) * width + column, mask=inside, other=0.0)
        total += value.to(tl.float32) * tl.load(weights + pair)
    tl.store(out + row.to(tl.int64) * width + column, total.to(tl.bfloat16), mask=inside)
