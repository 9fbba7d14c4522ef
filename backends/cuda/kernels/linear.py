"""Linear layers with packed weights, for 1 to some 1,024 rows: `linear`, and `geglu` with both of its products in one.

Shapes: x [N, K] bf16, weight [R, K] → [N, R] bf16. At N = 256 a layer of 8-bit codes, one bf16 scale for 32 of them:

    product         R      K     weight    FLOP    floor at 3.35 TB/s / 990 TFLOP/s
    q, k, v         8192   2816  24.5 MB   11.8 G   7.3 µs / 11.9 µs   (sliding layers, rows of all three in one weight)
    o               2816   4096  12.3 MB    5.9 G   3.7 µs /  6.0 µs
    gate and up     4224   2816  12.6 MB    6.1 G   3.8 µs /  6.2 µs
    down            2816   2112   6.3 MB    3.0 G   1.9 µs /  3.1 µs

From 160 rows on arithmetic binds, not bytes, so what counts is that every multiprocessor has a program and that codes
are dequantized for many columns at once. Rows of several weights that read the same x belong in one weight (`stacked`):
one launch, and enough programs. `geglu` takes gate's rows and then up's, as the experts have them.

A norm before is not folded into the product. Its factor could be, a row's own as it is, but its weight could not: x
times that would be rounded once more. What folding would save is a launch, and the norm's launch can save the same one
by writing x as the words want it (`unpack.place`). A residual never follows a product in this model: a norm stands
between. Weights of bf16 go to torch's matmul in `linear`.

Numerics: products of bf16, sums in float32, rounded once. Tolerance: the law's for low precision.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A launch's options, and constants where numbers are meant, are beyond Triton's type hints.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from ....core.errors import DgemmaError
from ...torch.packed import QuantizedTensor
from .configs import Config, card, for_linear
from .experts import factors, gelu, split_halves, store_arranged
from .unpack import Stored, Weight, activations, arrange, fitted, stored, times, wait_turn

Tensor = torch.Tensor


def linear(x: Tensor, weight: Weight, *, arranged: bool = False, config: Config | None = None) -> Tensor:
    """Return x · weightᵀ.

    Args:
        x: bf16 [N, K].
        weight: [R, K].
        arranged: x lies in the order that the weight's words want (`unpack.arrangement`).
        config: how to cut the work; None for the table's.

    Raises:
        DgemmaError: a weight that the kernels do not read, or shapes that do not fit.
    """
    if isinstance(weight, torch.Tensor) and config is None:
        return F.linear(x, weight)
    x, parts = _fitting(x, weight)
    early = card(x.device).early
    cut = fitted(config or for_linear(card(x.device), "linear", parts.bits, parts.shape[-2:], len(x)), parts)
    x = x if arranged else arrange(x, parts.bits)
    out = torch.empty((len(x), parts.rows), dtype=x.dtype, device=x.device)
    if not len(x):
        return out
    partial = out
    if cut.split > 1:
        partial = torch.empty((cut.split, *out.shape), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(len(x), cut.tokens) * triton.cdiv(parts.rows, cut.rows), cut.split)
    linear_kernel[grid](
        x, partial, len(x), **parts.arguments(), WIDTH=parts.width, ROWS=parts.rows, SPLIT=cut.split, N=cut.rows,
        M=cut.tokens, BLOCK=cut.block, STAGES=cut.stages, num_warps=cut.warps, num_stages=cut.stages,
        maxnreg=cut.registers, EARLY=early, launch_pdl=early,
    )  # fmt: skip
    if cut.split > 1:
        size = out.numel()
        sum_kernel[(triton.cdiv(size, 1024),)](
            partial, out, size, SPLIT=cut.split, EARLY=early, BLOCK=1024, num_warps=4, launch_pdl=early
        )
    return out


def geglu(
    x: Tensor, weight: Weight, *, out_bits: int = 16, arranged: bool = False, config: Config | None = None
) -> Tensor:
    """Return gelu_tanh(x · gateᵀ) · (x · upᵀ).

    Args:
        x: bf16 [N, K].
        weight: [2F, K], gate's rows first.
        out_bits: lay the result out for a weight of so many bits.
        arranged: x lies in the order that the weight's words want.
        config: how to cut the work; None for the table's.

    Returns:
        bf16 [N, F], arranged for `out_bits`.
    """
    x, parts = _fitting(x, weight)
    inner = parts.rows // 2
    early = card(x.device).early
    cut = fitted(config or for_linear(card(x.device), "geglu", parts.bits, parts.shape[-2:], len(x)), parts)
    x = x if arranged else arrange(x, parts.bits)
    out = torch.empty((len(x), inner), dtype=x.dtype, device=x.device)
    if len(x):
        half = cut.rows // 2
        grid = (triton.cdiv(len(x), cut.tokens) * triton.cdiv(inner, half),)
        geglu_kernel[grid](
            x, out, len(x), **parts.arguments(), WIDTH=parts.width, INNER=inner, OUT_BITS=out_bits, HALF=half,
            M=cut.tokens, BLOCK=cut.block, STAGES=cut.stages, num_warps=cut.warps, num_stages=cut.stages,
            maxnreg=cut.registers, EARLY=early, launch_pdl=early,
        )  # fmt: skip
    return out


def stacked(weights: Sequence[Weight]) -> Weight:
    """Return weights [R₁, K], [R₂, K], … of one format as one [R₁ + R₂ + …, K]; a copy, bit for bit.

    Raises:
        DgemmaError: different formats.
    """
    first = weights[0]
    if isinstance(first, torch.Tensor):
        return torch.cat([weight for weight in weights if isinstance(weight, torch.Tensor)])
    packed = [
        weight
        for weight in weights
        if isinstance(weight, QuantizedTensor)
        and (weight.format, weight.scales.dtype) == (first.format, first.scales.dtype)
    ]
    scales = [weight.global_scale for weight in packed]
    if len(packed) != len(weights) or any((scale is None) != (scales[0] is None) for scale in scales):
        raise DgemmaError("only weights of one format can share a product")
    rows = [
        torch.as_tensor(scale).reshape(-1, 1).expand(weight.shape[0], 1)
        for scale, weight in zip(scales, packed, strict=True)
        if scale is not None
    ]
    biases = [weight.biases for weight in packed if weight.biases is not None]
    return QuantizedTensor(
        words=torch.cat([weight.words for weight in packed]),
        scales=torch.cat([weight.scales for weight in packed]),
        biases=torch.cat(biases) if biases else None,
        global_scale=torch.cat(rows) if rows else None,
        format=first.format,
    )


def _fitting(x: Tensor, weight: Weight) -> tuple[Tensor, Stored]:
    parts = stored(weight)
    if x.shape[-1] != parts.width or len(parts.shape) != 2:
        raise DgemmaError(f"linear: rows {list(x.shape)} and a weight {list(parts.shape)} do not fit together")
    return activations(x), parts


@triton.jit(do_not_specialize=["magic", "count"])
def linear_kernel(
    x, out, count, words, scales, biases, factor, magic,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PER_ROW: tl.constexpr,
    SPLIT: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program: N columns of M rows of the result, over one of SPLIT parts of K. Neighbours share weights."""
    wait_turn(EARLY)
    tiles = (count + M - 1) // M
    token = tl.program_id(0) % tiles * M + tl.arange(0, M)
    first_row = tl.program_id(0) // tiles * N
    rows = first_row + tl.arange(0, N)
    live = token < count
    STEP: tl.constexpr = WIDTH if SPLIT == 1 else ((WIDTH + BLOCK - 1) // BLOCK + SPLIT - 1) // SPLIT * BLOCK
    acc = times(
        x, token * WIDTH, live, words, scales, biases, 0, rows, rows < ROWS, magic,
        tl.program_id(1) * STEP if SPLIT > 1 else 0, STEP, SPLIT,
        WIDTH, BITS, GROUP, ROWS % N == 0, N, M, BLOCK, STAGES,
    )  # fmt: skip
    if factor is not None:
        acc = acc * factors(factor, rows, rows < ROWS, PER_ROW)[:, None]
    at = (tl.program_id(1).to(tl.int64) * count + token) * ROWS
    store_arranged(out, at, live, acc.to(out.dtype.element_ty), first_row, ROWS, 16, N, M)


@triton.jit
def sum_kernel(partial, out, size, SPLIT: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    wait_turn(EARLY)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(partial + part * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(tl.bfloat16), mask=at < size)


@triton.jit(do_not_specialize=["magic", "count"])
def geglu_kernel(
    x, out, count, words, scales, biases, factor, magic,
    WIDTH: tl.constexpr, INNER: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PER_ROW: tl.constexpr,
    OUT_BITS: tl.constexpr, HALF: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program: HALF columns of M rows of the result."""
    wait_turn(EARLY)
    tiles = (count + M - 1) // M
    token = tl.program_id(0) % tiles * M + tl.arange(0, M)
    first = tl.program_id(0) // tiles * HALF
    live = token < count
    line = tl.arange(0, 2 * HALF)
    inner = first + line % HALF
    rows = line // HALF * INNER + inner
    acc = times(
        x, token * WIDTH, live, words, scales, biases, 0, rows, inner < INNER, magic, 0, WIDTH, 1, WIDTH, BITS, GROUP,
        INNER % HALF == 0, 2 * HALF, M, BLOCK, STAGES,
    )  # fmt: skip
    if factor is not None:
        acc = acc * factors(factor, rows, inner < INNER, PER_ROW)[:, None]
    gate, up = split_halves(acc, HALF, M)
    value = (gelu(gate) * up).to(tl.bfloat16)
    store_arranged(out, token.to(tl.int64) * INNER, live, value, first, INNER, OUT_BITS, HALF, M)
