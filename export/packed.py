"""Ops on quantized weights, exact: products, rows, and the experts' dequantization inside a loop.

A code q stands for scale·(q − z) + rest with z = 2^(bits−1), the zero point that ONNX Runtime's operators assume where
none is given. `rest` is 0 for symmetric weights; for others it is bias + z·scale, and its part of a product,
groupsum(x) · restᵀ, is a product a group's size smaller than the whole. Floating zero points, the operators' own way,
are 40 times slower on a CPU, and integer ones would round the stored bias.

`MatMulNBits` is asked for accuracy level 1, float32: the default lets a runtime round activations to 8 bits. On a CPU
it first unpacks its weight more slowly than `GatherBlockQuantized` does, so graphs meant for one do that and `Gemm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arrays import Array, product
from .graph import MICROSOFT, Builder, Value
from .weights import Packed, Place

if TYPE_CHECKING:
    from .ops import OnnxOps

EXACT = 1
"""MatMulNBits' accuracy level for float32 arithmetic."""


def scales_of(ops: OnnxOps, weight: Packed) -> Array:
    """Return scales [..., K/g] in the compute dtype."""
    return _cast(ops, weight.scales)


def rest_of(ops: OnnxOps, weight: Packed) -> Array | None:
    """Return bias + z·scale [..., K/g], or None where that is 0 throughout."""
    if weight.biases is None:
        return None
    zero = float(1 << (weight.format.bits - 1))
    return _cast(ops, weight.biases) + scales_of(ops, weight) * zero


def _cast(ops: OnnxOps, place: Place, shape: tuple[int, ...] | None = None) -> Array:
    from .weights import Dense

    return Dense(where=place).pack(ops, shape)


def linear(ops: OnnxOps, x: Array, weight: Packed) -> Array:
    """x [..., K] · weightᵀ, weight [F, K]."""
    kind, (out, width) = weight.format, weight.shape
    rows, b = x.rows(), ops.builder
    if ops.cpu:
        made = b.op("Gemm", rows, whole(ops, weight, rows).value, transB=1)
    else:
        groups = width // kind.group_size
        words = weight.words.value(ops, (out, groups, kind.group_size * kind.bits // 8))
        scales = ops.reshape(scales_of(ops, weight), (out * groups,))
        made = b.op(
            "MatMulNBits", rows, words, scales.value, domain=MICROSOFT, K=width, N=out, bits=kind.bits,
            block_size=kind.group_size, accuracy_level=EXACT,
        )  # fmt: skip
        rest = rest_of(ops, weight)
        if rest is not None:
            made = b.op("Gemm", group_sums(b, rows, width, kind.group_size), rest.value, made, transB=1)
    return ops.array(made, (*x.shape[:-1], out), ops.dtype, (product(x.shape[:-1]), out))


def group_sums(b: Builder, rows: Value, width: int, group: int) -> Value:
    """Sum every group of a row: [N, K] → [N, K/g]."""
    return b.op("ReduceSum", b.op("Reshape", rows, b.ints(-1, width // group, group)), b.ints(2), keepdims=0)


def scaled(b: Builder, codes: Value, scales: Value, zeros: Value | None = None) -> Value:
    """Dequantize codes of 8 bits, one to a byte, in rows of one group: codes [N, g], scales [N] → [N, g].

    ONNX Runtime goes through a scale for each row in half the time of blocks, or of `GatherBlockQuantized`. `zeros` is
    the zero point of each row, where it is at hand already.
    """
    zeros = b.op("Expand", b.constant(128, np.uint8), b.op("Shape", scales)) if zeros is None else zeros
    return b.op("DequantizeLinear", codes, scales, zeros, axis=0)


def whole(ops: OnnxOps, weight: Packed, after: Value) -> Array:
    """Return a matrix's values [F, K], made anew in every run, once `after` is computed: see `ops.zero_behind`."""
    b, kind, (count, width) = ops.builder, weight.format, weight.shape
    if kind.bits != 8:
        ids = b.op("Add", b.constant(np.arange(count), np.int64), ops.zero_behind(after))
        return take(ops, weight, ids, (count,))
    rows = count * width // kind.group_size
    words, scales = weight.words.value(ops, (rows, kind.group_size)), _cast(ops, weight.scales, (rows,))
    made = scaled(b, words, scales.value, ops.bytes_behind(after, 128, rows))
    result, rest = ops.array(made, (rows, kind.group_size), ops.dtype), rest_of(ops, weight)
    if rest is not None:
        result = result + ops.reshape(rest, (rows, 1))
    return ops.reshape(result, (count, width))


def take(ops: OnnxOps, weight: Packed, ids: Value, shape: tuple) -> Array:
    """Return rows by number, dequantized: weight [V, K], ids of `shape` → [*shape, K]."""
    b, kind, (count, width) = ops.builder, weight.format, weight.shape
    words = weight.words.value(ops, (count, width * kind.bits // 8))
    made = b.op(
        "GatherBlockQuantized", words, ids, scales_of(ops, weight).value, domain=MICROSOFT, bits=kind.bits,
        block_size=kind.group_size, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    result = ops.array(made, (*shape, width), ops.dtype)
    rest = rest_of(ops, weight)
    if rest is None:
        return result
    groups = width // kind.group_size
    grouped = ops.array(
        b.op("Reshape", made, b.ints(-1, groups, kind.group_size)), (product(shape), groups, kind.group_size), ops.dtype
    )
    more = ops.array(
        b.op("Unsqueeze", b.op("Gather", rest.value, ids), b.ints(-1)), (product(shape), groups, 1), ops.dtype
    )
    return ops.reshape(grouped + more, (*shape, width))
