"""RMS norms with the additions around them: one read of each row, one write of each result.

A row is one program's work, held in registers: D = 2816 in a block of 4096. Sums are float32; nothing between the read
and the write is rounded, except the residual stream itself, which is what its own norms must see.

    function      reads   writes   256 rows of 2816 in bf16                                    where
    rms_norm      1       1        2.9 MB = 0.9 µs at 3.35 TB/s, no arithmetic to speak of     input norm, final norm
    sum_norm      2       1        4.3 MB                                                      self-conditioning
    norm_add      2       1 to 3   4.3 to 7.2 MB                                               after attention
    mix_norm_add  3       1 or 2   5.8 to 7.2 MB                                               end of a layer

All are far below a launch's own few microseconds: what the fused forms save is launches. Norms that a packed weight
reads can be stored in the order its words want (`unpack.arrangement`), which saves another. Tolerance: the law, float32
NMSE ≤ 1e-10; in bf16 the error is below the oracle's, which rounds after every operation.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# A launch's options, and constants where numbers are meant, are beyond Triton's type hints.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .unpack import place

Tensor = torch.Tensor

WARPS = ((1024, 2), (2048, 4), (4096, 8), (1 << 30, 16))
"""Widest block → warps: 16 elements of a row in each thread."""


@triton.jit
def _scaled(wide, weight, columns, inside, width, eps):
    """Norm one row [BLOCK] of float32, times its weight where it has one."""
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    if weight is not None:
        wide = wide * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    return wide


@triton.jit
def _rms_norm(x, other, weight, out, width, eps, BITS: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.program_id(0).to(tl.int64) * width
    at = row + columns
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if other is not None:
        wide += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
    wide = _scaled(wide, weight, columns, inside, width, eps)
    tl.store(out + row + place(columns, BITS), wide.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_add(
    x, second, shares, residual, first_weight, second_weight, weight, scalar, canvas_scalar, next_weight,
    other_next_weight, out, normed, other_normed, width, eps, length, read,
    CHOICES: tl.constexpr, BITS: tl.constexpr, OTHER_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.program_id(0).to(tl.int64) * width
    at = row + columns
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if second is not None:
        wide = _scaled(wide, first_weight, columns, inside, width, eps)
        if CHOICES == 0:
            mixed = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
        else:
            mixed = tl.zeros((BLOCK,), tl.float32)
            for j in tl.static_range(CHOICES):
                one = tl.load(second + row * CHOICES + j * width + columns, mask=inside, other=0.0)
                mixed += one.to(tl.float32) * tl.load(shares + tl.program_id(0) * CHOICES + j)
        wide += _scaled(mixed, second_weight, columns, inside, width, eps)
    wide = _scaled(wide, weight, columns, inside, width, eps)
    wide += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if scalar is not None:
        factor = tl.load(scalar).to(tl.float32)
        if canvas_scalar is not None:
            factor = tl.where(tl.program_id(0) % length < read, factor, tl.load(canvas_scalar).to(tl.float32))
        wide *= factor
    stored = wide.to(out.dtype.element_ty)
    tl.store(out + at, stored, mask=inside)
    if normed is not None:
        wide = stored.to(tl.float32)
        first = _scaled(wide, next_weight, columns, inside, width, eps)
        tl.store(normed + row + place(columns, BITS), first.to(normed.dtype.element_ty), mask=inside)
        if other_normed is not None:
            last = _scaled(wide, other_next_weight, columns, inside, width, eps)
            last = last.to(other_normed.dtype.element_ty)
            tl.store(other_normed + row + place(columns, OTHER_BITS), last, mask=inside)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, bits: int = 16) -> Tensor:
    """`Ops.rms_norm`: x [..., D], weight [D] or None → [..., D], arranged for a weight of so many bits."""
    return _run_rms_norm(x, None, weight, eps, bits)


def sum_norm(x: Tensor, other: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return the RMS norm of x + other, both [..., D]."""
    return _run_rms_norm(x, other, weight, eps, 16)


def norm_add(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, scalar: Tensor | None = None,
    next_weights: tuple[Tensor, ...] = (), next_bits: tuple[int, ...] = (),
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return r = (residual + rms_norm(x)) · scalar, and the norm of r under each of at most two `next_weights`.

    x and residual [..., D], weights [D], scalar [1] → one to three of [..., D]. The norms of r are arranged for weights
    of `next_bits`, where given.
    """
    return _run_norm_add(x, None, None, residual, None, None, weight, scalar, None, 0, next_weights, next_bits, eps)


def mix_norm_add(
    x: Tensor, second: Tensor, residual: Tensor, first_weight: Tensor, second_weight: Tensor, weight: Tensor,
    eps: float, *, scalar: Tensor | None = None, next_weights: tuple[Tensor, ...] = (),
    next_bits: tuple[int, ...] = (), shares: Tensor | None = None, canvas_scalar: Tensor | None = None, canvas: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`norm_add` of rms_norm(x) + rms_norm(second), each under its own weight: the end of a layer.

    x is the dense MLP's output and second the experts', all [..., D]; weights [D], scalar [1]. With `shares`, float32
    [N, k], second holds the results of each row's k experts, [N·k, D], and what is normed is their weighted sum. With
    `canvas_scalar`, x is [B, L, D] and the last `canvas` rows of each L are multiplied by that instead.
    """
    return _run_norm_add(
        x, second, shares, residual, first_weight, second_weight, weight, scalar, canvas_scalar, canvas, next_weights,
        next_bits, eps,
    )  # fmt: skip


def _run_rms_norm(x: Tensor, other: Tensor | None, weight: Tensor | None, eps: float, bits: int) -> Tensor:
    x = x.contiguous()
    other = None if other is None else other.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    rows = x.numel() // width
    _rms_norm[(rows,)](x, other, weight, out, width, eps, BITS=bits, BLOCK=block, num_warps=_warps(block))
    return out


def _run_norm_add(
    x: Tensor, second: Tensor | None, shares: Tensor | None, residual: Tensor, first_weight: Tensor | None,
    second_weight: Tensor | None,
    weight: Tensor | None, scalar: Tensor | None, canvas_scalar: Tensor | None, canvas: int,
    next_weights: tuple[Tensor, ...], next_bits: tuple[int, ...], eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    x, residual = x.contiguous(), residual.contiguous()
    second = None if second is None else second.contiguous()
    outs = [torch.empty_like(x) for _ in range(1 + len(next_weights))]
    normed, other_normed = [*outs[1:], None, None][:2]
    after, other_after = [*next_weights, None, None][:2]
    bits, other_bits = [*next_bits, 16, 16][:2]
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    rows = x.numel() // width
    length, read = (None, None) if canvas_scalar is None else (x.shape[-2], x.shape[-2] - canvas)
    _norm_add[(rows,)](
        x, second, shares, residual, first_weight, second_weight, weight, scalar, canvas_scalar, after, other_after,
        outs[0], normed, other_normed, width, eps, length, read,
        CHOICES=0 if shares is None else shares.shape[-1], BITS=bits, OTHER_BITS=other_bits,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return tuple(outs)


def _warps(block: int) -> int:
    return next(warps for widest, warps in WARPS if block <= widest)
