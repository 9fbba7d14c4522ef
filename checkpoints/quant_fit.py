"""Fitting scales and codes to weights: the arithmetic under `quant.quantize`. NumPy only.

Weights come transposed, float32 [group_size, n groups], in pieces whose scratch stays in the L2 cache: operations then
run along contiguous groups and a scale broadcasts without a stride, which NumPy does at a few tenths of a nanosecond a
weight.

Every code is decided by operations that IEEE 754 defines to the last bit (+ - × ÷, rint, min, max) in an order written
down here: sums are an explicit tree, never BLAS, einsum or np.sum, whose order and use of FMA differ between machines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .quant_bits import E4M3, E8M0, F32, PERIOD, U8, U16, U32, bf16_down, from_bf16, pack_blocks, to_bf16

# Candidate grids. A plain grid puts the largest weight of the group on the last code; these stretch it by so much
# (above 1 clips that weight), least squares then says which scale the codes want, and the grid that explains most is
# taken. Chosen greedily over normal, Laplace and Student-t(5) groups: 5 of 46 come within 0.2 % of all at 4 bits. From
# 5 bits on more would still help, but no longer where a recipe's error is. Each costs about 1.4 ns a weight.
SYMMETRIC_GRIDS: dict[int, tuple[float, ...]] = {
    2: (0.96, 1.2, 1.5),
    3: (0.82, 0.98, 1.1, 1.22),
    4: (0.9, 0.98, 1.02, 1.06, 1.1),
    5: (0.88, 0.93, 0.98, 1.02),
    6: (0.94, 0.97, 1.0),
    8: (0.983, 1.0),
}
# The same for affine: stretch, and a shift of the grid by a part of a step.
AFFINE_GRIDS: dict[int, tuple[tuple[float, float], ...]] = {
    2: ((1.51, -0.25), (1.51, 0.0), (1.51, 0.25)),
    3: ((1.18, -0.25), (1.18, 0.0), (1.18, 0.25), (1.18, 0.5)),
    4: ((1.02, -0.25), (1.02, 0.0), (1.02, 0.25), (1.065, -0.25), (1.065, 0.25)),
    5: ((0.987, 0.5), (1.01, -0.25), (1.01, 0.0), (1.01, 0.25)),
    6: ((0.973, 0.0), (1.005, 0.0)),
    8: ((0.995, 0.0),),
}
# Scale codes tried, counted from the one that puts the largest weight at or just below the largest code. E8M0 steps are
# octaves, E4M3's eighths of one; +4 to +6 put that weight on the last code but one.
E8M0_STEPS = (0, -1)
E4M3_STEPS = (0, -1, 1, 2, 3, 4, 5, 6)

# Largest magnitude taken: beyond it scale·q could overflow float32 although the weight does not.
WIDEST = float(2.0**125)
MLX_LEAST_SCALE = 1e-7
NVFP4_RANGE = 448.0 * 6.0  # the largest E4M3 scale times the largest E2M1 code


class FitScratch:
    """Buffers for pieces of up to `groups` groups; `weights` holds the current piece, float32 [group_size, n]."""

    def __init__(self, group_size: int, groups: int) -> None:
        # Each on a cache line, where NumPy's loops are up to twice as fast, and not on the same line of their pages.
        size = 4 * group_size * groups
        raw = [np.empty(size + 8192, np.uint8) for _ in range(4)]
        starts = [-buffer.ctypes.data % 4096 + 64 * i for i, buffer in enumerate(raw)]
        self._buffers = [buffer[i : i + size].view(np.float32) for buffer, i in zip(raw, starts, strict=True)]
        self.load(np.zeros((0, group_size), np.float32))

    def load(self, piece: NDArray[np.generic]) -> None:
        """Take weights [n, group_size] of float32, float16, or bf16 bits as uint16."""
        self.weights, self._x, self._q, self._product = (b[: piece.size].reshape(piece.T.shape) for b in self._buffers)
        if piece.dtype == np.uint16:
            wide = self.weights.view(np.uint32)
            np.copyto(wide, piece.T)
            wide <<= 16
        else:
            np.copyto(self.weights, piece.T)

    def extent(self) -> tuple[F32, F32]:
        """Return each group's least and largest weight, [n]; NaN where the group has one."""
        return np.minimum.reduce(self.weights, axis=0), np.maximum.reduce(self.weights, axis=0)

    def sum(self, a: F32, b: F32 | None = None) -> F32:
        """Return the sum of a·b (of a, without b) over each group, [n], halving the group until one row is left."""
        half = len(a) // 2
        total = self._product
        if b is None:
            np.add(a[:half], a[half:], out=total[:half])
            half //= 2
        else:
            np.multiply(a, b, out=total)
        while half:
            np.add(total[:half], total[half : 2 * half], out=total[:half])
            half //= 2
        return total[0].copy()

    def symmetric(self, low: F32, high: F32, bits: int) -> U16:
        """Fit w ≈ scale·q, -2^(bits-1) ≤ q < 2^(bits-1). The scale is negative where the largest weight is positive."""
        top = 1 << (bits - 1)
        largest = np.where(-low >= high, low, high)  # [n], signed
        unit = largest / np.float32(-top) + np.float32(0)  # +0 turns -0 into 0
        x = np.divide(
            self.weights, _nonzero(unit), out=self._x
        )  # the largest weight is now -top, so nothing underflows
        best = np.full(unit.shape, -1, np.float32)
        ratio = np.zeros_like(best)
        for stretch in SYMMETRIC_GRIDS[bits]:
            q = np.multiply(x, np.float32(stretch), out=self._q)
            np.rint(q, out=q)
            if top * stretch > top + 0.5:
                np.maximum(q, np.float32(-top), out=q)
            if top * stretch >= top - 0.5:
                np.minimum(q, np.float32(top - 1), out=q)
            xq, qq = self.sum(x, q), np.maximum(self.sum(q, q), np.float32(1))
            explained = xq * xq / qq
            better = explained > best
            np.copyto(best, explained, where=better)
            np.copyto(ratio, xq / qq, where=better)
        scale = from_bf16(to_bf16(unit * ratio))
        q = np.divide(self.weights, _nonzero(scale), out=self._q)
        np.rint(q, out=q)
        np.clip(q, np.float32(-top), np.float32(top - 1), out=q)
        q += np.float32(top)
        return to_bf16(scale)

    def affine(self, low: F32, high: F32, bits: int) -> tuple[U16, U16]:
        """Fit w ≈ scale·q + bias, 0 ≤ q < 2^bits, scale ≥ 0. Returns the bf16 bits of scales and biases, [n]."""
        last, size = np.float32((1 << bits) - 1), np.float32(len(self.weights))
        middle, step = (low + high) * np.float32(0.5), (high - low) / last
        x = np.subtract(self.weights, middle, out=self._x)
        x /= _nonzero(step)
        x_sum = self.sum(x)
        best = np.full(step.shape, -1, np.float32)
        ratio, q_mean = np.zeros_like(best), np.zeros_like(best)
        for stretch, shift in AFFINE_GRIDS[bits]:
            q = np.multiply(x, np.float32(stretch), out=self._q)
            q += np.float32(last / 2 + shift)
            np.rint(q, out=q)
            np.clip(q, np.float32(0), last, out=q)
            q_sum = self.sum(q)
            mean = q_sum / size
            covariance = self.sum(x, q) - x_sum * mean
            variance = np.maximum(self.sum(q, q) - q_sum * mean, np.float32(1e-3))
            explained = covariance * covariance / variance
            better = explained > best
            np.copyto(best, explained, where=better)
            np.copyto(ratio, covariance / variance, where=better)
            np.copyto(q_mean, mean, where=better)
        scale = from_bf16(to_bf16(step * ratio))
        wanted = middle + (step * (x_sum / size) - scale * q_mean)
        bias = from_bf16(to_bf16(wanted))
        # Where the weights lie far from zero for their spread, rounding the bias moves the grid off some of them (the
        # same for a group of one value, where there is no spread). A grid around all of them is then the better one.
        astray = (np.abs(bias - wanted) > scale * np.float32(0.5)) | (step == 0)
        if astray.any():
            around = bf16_down(low)
            wide = 0 - bf16_down((around - high) / last)  # the least bf16 value not below (high - bias) / last
            bias, scale = np.where(astray, around, bias), np.where(astray, wide, scale)
        # MLX's own grid holds zero exactly, which is worth more in groups of few large weights. With the better of the
        # two no group is worse than MLX would have it.
        mlx_scale, mlx_bias = (from_bf16(to_bf16(part)) for part in _mlx_affine(low, high, step))
        error = self._affine_error(scale, bias, last, step)
        mlx_error = self._affine_error(mlx_scale, mlx_bias, last, step)
        better = (mlx_error < error) & (step > np.float32(MLX_LEAST_SCALE))
        scale, bias = np.where(better, mlx_scale, scale), np.where(better, mlx_bias, bias)
        self._affine_codes(scale, bias, last)
        return to_bf16(scale), to_bf16(bias)

    def _affine_codes(self, scale: NDArray[Any], bias: NDArray[Any], last: np.float32) -> F32:
        """Set the nearest codes; return the weights on the codes' scale, which is scratch."""
        y = np.subtract(self.weights, bias, out=self._x)
        y /= _nonzero(scale)
        q = np.rint(y, out=self._q)
        np.clip(q, np.float32(0), last, out=q)
        return y

    def _affine_error(self, scale: NDArray[Any], bias: NDArray[Any], last: np.float32, unit: F32) -> F32:
        """Return the squared error of each group in parts of `unit`, [n]: squares of tiny weights would underflow."""
        y = self._affine_codes(scale, bias, last)
        y -= self._q
        return self.sum(y, y) * np.square(np.minimum(np.abs(_nonzero(scale)) / _nonzero(unit), np.float32(1e12)))

    def floating(self, low: F32, high: F32, mode: str, global_scale: np.float32 | None) -> U8:
        """Fit w ≈ scale·q, q of E2M1 (E4M3 for mxfp8), with the best of a few scale codes. Returns them, uint8 [n]."""
        top = np.float32(448 if mode == "mxfp8" else 6)
        unit = np.maximum(-low, high) / top  # the scale that would fit the largest weight exactly
        if mode == "nvfp4":
            table = E4M3 if global_scale is None else E4M3 * global_scale
            around = _e4m3_codes(round_float(unit / np.float32(1 if global_scale is None else global_scale), "e4m3"))
            steps, first, last = E4M3_STEPS, 0, 126
        else:
            table, steps, first, last = E8M0, E8M0_STEPS, -127, 127
            around = np.frexp(unit)[1]
        best = np.full(unit.shape, np.inf, np.float32)
        code = np.zeros(unit.shape, np.uint8)
        unit = _nonzero(unit)
        for step in steps:
            tried = (np.clip(around + step, first, last) - first).astype(np.uint8)
            scale = np.take(table, tried)
            y = np.divide(self.weights, _nonzero(scale), out=self._x)
            q = self._round(y, mode)
            y -= q
            # Errors are compared in parts of `unit`: squares of tiny weights would underflow. Past 1e6 all codes are 0.
            with np.errstate(over="ignore"):
                error = self.sum(y, y) * np.square(np.minimum(scale / unit, np.float32(1e6)))
            better = error < best
            np.copyto(best, error, where=better)
            np.copyto(code, tried, where=better)
        y = np.divide(self.weights, _nonzero(np.take(table, code)), out=self._x)
        q = self._round(y, mode)
        sign = np.signbit(q)
        np.abs(q, out=q)
        if mode == "mxfp8":
            q[...] = _e4m3_codes(q)
        else:  # 0 ½ 1 1½ 2 | 3 4 | 6 count up in steps of ½, 1 and 2: the code is the least of three lines
            coarse = np.multiply(q, np.float32(0.5), out=self._product)
            coarse += np.float32(4)
            medium = np.add(q, np.float32(2), out=self._x)
            q += q
            np.minimum(q, medium, out=q)
            np.minimum(q, coarse, out=q)
        np.add(q, np.float32(128 if mode == "mxfp8" else 8), out=q, where=sign)
        return code

    def _round(self, y: F32, mode: str) -> F32:
        return round_float(y, "e4m3" if mode == "mxfp8" else "e2m1", out=self._q, spare=self._product)

    def words(self, bits: int) -> U32:
        """Return the codes of the last fit, packed: uint32 [n, group_size·bits/32]."""
        size = len(self._q)
        groups = self._q.size // size
        codes = self._product.view(np.uint32)
        np.copyto(codes.view(np.int32), self._q, casting="unsafe")
        packed = np.empty((size * bits // 32, groups), np.uint32)
        blocks = size // PERIOD[bits]
        pack_blocks(codes.reshape(blocks, PERIOD[bits], groups), packed.reshape(blocks, -1, groups), bits)
        return packed.T


def round_float(y: NDArray[Any], kind: str, *, out: F32 | None = None, spare: F32 | None = None) -> F32:
    """Round float32 to E2M1 ("e2m1") or E4M3 values, ties to even, saturating at ±6 or ±448. No NaN.

    Adding and subtracting 1.5·2^23 units in the last place rounds to that unit; the unit follows from y's exponent.
    """
    mantissa, smallest, top = (1, 1.0, 6) if kind == "e2m1" else (3, 2.0**-6, 448)
    spare = np.empty_like(y) if spare is None else spare
    exponent = np.bitwise_and(y.view(np.uint32), np.uint32(0x7F800000), out=spare.view(np.uint32)).view(np.float32)
    magic = np.maximum(exponent, np.float32(smallest), out=exponent)
    magic *= np.float32(1.5 * 2.0 ** (23 - mantissa))
    out = np.add(y, magic, out=out)
    out -= magic
    return np.clip(out, np.float32(-top), np.float32(top), out=out)


def _e4m3_codes(value: F32) -> NDArray[np.int32]:
    """Return the codes, 0 … 126, of exact non-negative E4M3 values."""
    normal = (value.view(np.uint32) >> 20).astype(np.int32) - ((127 - 7) << 3)
    return np.where(value < np.float32(2.0**-6), (value * np.float32(512)).astype(np.int32), normal)


def _mlx_affine(low: F32, high: F32, step: F32) -> tuple[F32, F32]:
    """Return mx.quantize's scale and bias before rounding: bias the end farther from zero, a whole number of steps."""
    end = np.where(np.abs(low) > np.abs(high), low, high)
    step = np.maximum(step, np.float32(MLX_LEAST_SCALE))
    step = np.where(end == low, step, -step)
    steps = np.rint(end / step)
    return np.where(steps == 0, step, end / _nonzero(steps)), np.where(steps == 0, np.float32(0), end)


def _nonzero(scale: NDArray[Any]) -> F32:
    """Replace zeros by 1: under a scale of zero weights are zero, or too small for the format, and get code 0 so."""
    return np.where(scale == 0, np.float32(1), scale)
