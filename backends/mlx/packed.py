"""Quantized weights as MLX holds them, packed, and the products that read them so.

What a weight is worth is defined in checkpoints/quant.py; words, scales and biases are the file's. MLX has no symmetric
formats, so their biases, -2^(bits-1)·scale, are derived at load, exactly, and held. MLX's layers know no global scale
either: here it multiplies what comes out of a product, in float32, or what goes in where it belongs to the summed axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...checkpoints.quant import QTensor, scale_values

Array = mx.array

TILE = 32
"""Weights of a row that Metal's kernels read at a time, without a check for the row's end."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedTensor:
    """A quantized weight [..., F, N] in MLX's memory.

    Beside float32 activations MLX widens bf16 scales, call by call, and computes the definition, scale·q + bias, in
    float32; beside bf16 ones it reads them as they are. So a model that computes in float32 holds them wide: a bit more
    for each weight in groups of 32, and a quarter fewer kernels in a pass. Beside float16 MLX computes in float32.
    """

    words: Array  # uint32 [..., F, N·bits/32]
    scales: (
        Array  # [..., F, N/group_size]: bfloat16, float16 or float32 (affine), uint8 (mxfp4, mxfp8: E8M0, nvfp4: E4M3)
    )
    biases: Array | None  # as scales; None in the float modes
    factor: Array | None  # float32 [..., F], [..., 1] where all rows of a matrix share it: the global scale; None for 1
    group_size: int
    bits: int
    mode: str

    @staticmethod
    def fits(q: QTensor) -> bool:
        """Whether MLX's kernels take it: not nvfp4 with an odd number of groups in a row."""
        return q.shape[-1] % TILE == 0

    @classmethod
    def from_host(cls, q: QTensor, *, wide: bool) -> QuantizedTensor:
        """Copy a stored tensor into MLX's memory; `wide` holds scales and biases of 16 bits in float32."""
        biases = q.mlx_biases()
        if biases is not None and biases.dtype == np.float16 and not np.isfinite(biases).all():
            biases, wide = scale_values(q) * np.float32(-(1 << (q.format.bits - 1))), True  # too large for float16

        def from_bits(bits: np.ndarray) -> Array:
            narrow = mx.array(bits).view(mx.bfloat16) if bits.dtype == np.uint16 else mx.array(bits)
            return narrow.astype(mx.float32) if wide else narrow

        factor = None if q.global_scale is None else np.atleast_1d(np.asarray(q.global_scale, np.float32))
        if factor is not None and factor.ndim > 1:
            factor = factor[..., 0]
            if (factor == factor[..., :1]).all():
                factor = factor[..., :1]
        result = cls(
            words=mx.array(q.words),
            scales=from_bits(q.scales) if q.format.mode == "affine" else mx.array(q.scales),
            biases=None if biases is None else from_bits(biases),
            factor=None if factor is None else mx.array(factor),
            group_size=q.format.group_size,
            bits=q.format.bits,
            mode=q.format.mode,
        )
        mx.eval(result.arrays)
        return result

    @property
    def arrays(self) -> list[Array]:
        return [part for part in (self.words, self.scales, self.biases, self.factor) if part is not None]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.arrays)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, [..., F, N]."""
        return (*self.words.shape[:-1], self.words.shape[-1] * 32 // self.bits)

    @property
    def ndim(self) -> int:
        return self.words.ndim

    def __getitem__(self, index: slice | Array) -> QuantizedTensor:
        """Return rows of a matrix: a slice is a view, rows by number are gathered, [..., N] for an index [...]."""

        def pick(part: Array | None) -> Array | None:
            return None if part is None else part[index]

        words, scales = self.words[index], self.scales[index]
        factor = self.factor if self.factor is None or self.factor.size == 1 else self.factor[index]
        return QuantizedTensor(
            words=words, scales=scales, biases=pick(self.biases), factor=factor, group_size=self.group_size,
            bits=self.bits, mode=self.mode,
        )  # fmt: skip

    def dequantized(self) -> Array:
        """Return the weights in float32: the definition, bit for bit, and so without MLX's rounding of bf16 scales."""
        scales, biases = self.scales, self.biases
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        value = mx.dequantize(
            self.words, scales, biases, group_size=self.group_size, bits=self.bits, mode=self.mode, dtype=mx.float32
        )
        if self.factor is None:
            return value
        return value * (self.factor if self.factor.size == 1 else self.factor[..., None])

    def product(self, x: Array, *, transpose: bool) -> Array:
        """Return x · weightᵀ (`transpose`) or x · weight, before the factor, in x's width or wider."""
        return mx.quantized_matmul(
            wide_on_cpu(x), self.words, self.scales, self.biases, transpose=transpose, group_size=self.group_size,
            bits=self.bits, mode=self.mode,
        )  # fmt: skip

    def grouped(self, x: Array, group: Array) -> Array:
        """x [M, 1, N], weights [E, F, N], group [M] integers ascending → [M, 1, F] = x · weight[group]ᵀ.

        The shape of Metal's fast path: single rows, an index for the weights alone, sorted, and four rows or more for
        each expert on average, which 256 positions with 8 of 128 experts each have four times over. With fewer, MLX
        multiplies row by row.
        """
        y = mx.gather_qmm(
            wide_on_cpu(x), self.words, self.scales, self.biases, rhs_indices=group, transpose=True,
            group_size=self.group_size, bits=self.bits, mode=self.mode, sorted_indices=True,
        )  # fmt: skip
        factor = self.factor
        if factor is not None and factor.ndim > 1:
            factor = factor[group][:, None]  # [M, 1, F or 1]
        return scaled(y, factor, x.dtype)


Weight = Array | QuantizedTensor


def project(x: Array, weight: Weight) -> Array:
    """Return x [..., N] · weightᵀ, weight [F, N]."""
    if isinstance(weight, QuantizedTensor):
        return scaled(weight.product(x, transpose=True), weight.factor, x.dtype)
    return x @ weight.T


def mix(shares: Array, weight: Weight, dtype: mx.Dtype) -> Array:
    """Return shares, float32 [..., F], · weight [F, N], multiplied in `dtype` or wider."""
    if not isinstance(weight, QuantizedTensor):
        return shares.astype(dtype) @ weight
    # The factor belongs to the summed axis. Times it a share may be too small for float16, and stays wide.
    shares = shares.astype(dtype) if weight.factor is None else shares * weight.factor
    return weight.product(shares, transpose=False)


def scaled(y: Array, factor: Array | None, dtype: mx.Dtype) -> Array:
    """Return y · factor, multiplied in float32, in a dtype."""
    return (y if factor is None else y.astype(mx.float32) * factor).astype(dtype)


def wide_on_cpu(x: Array) -> Array:
    """Return activations as the device multiplies them with packed weights.

    MLX's CPU sums in the width of the activations, and in bf16 loses several per cent in a row of 2,816; in float32 it
    is right, and ten times as fast. Metal sums in float32 by itself.
    """
    return x.astype(mx.float32) if mx.default_device().type == mx.cpu else x
