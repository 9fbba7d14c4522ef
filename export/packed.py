"""Ops on quantized weights, exact: products, rows, and the experts' dequantization inside a loop.

A code q stands for scale·(q − z) + rest with z = 2^(bits−1), the zero point that ONNX Runtime's operators assume where
none is given. `rest` is 0 for symmetric weights; for others it is bias + z·scale, and its part of a product,
groupsum(x) · restᵀ, is a product a group's size smaller than the whole. Floating zero points, the operators' own way,
are 40 times slower on a CPU, and integer ones would round the stored bias.

`MatMulNBits` is asked for accuracy level 1, float32: the default lets a runtime round activations to 8 bits. On a CPU
it first unpacks its weight more slowly than `GatherBlockQuantized` does, so graphs meant for one do that and `Gemm`.
Portable ones know neither operator: `plain` takes the codes apart in floats, which is exact; with masks and shifts of
bytes OpenVINO 2026.4 gave other numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..checkpoints.quant import Format
from .arrays import Array, product
from .graph import MICROSOFT, Builder, Value
from .weights import DensePlace, PackedPlaces, Place

if TYPE_CHECKING:
    from .primitives import PrimitiveOps

EXACT = 1
"""MatMulNBits' accuracy level for float32 arithmetic."""


def scales_of(ops: PrimitiveOps, weight: PackedPlaces) -> Array:
    """Return scales [..., K/g] in the compute dtype."""
    return _cast(ops, weight.scales)


def rest_of(ops: PrimitiveOps, weight: PackedPlaces) -> Array | None:
    """Return bias + z·scale [..., K/g], or None where that is 0 throughout."""
    if weight.biases is None:
        return None
    zero = float(1 << (weight.format.bits - 1))
    return _cast(ops, weight.biases) + scales_of(ops, weight) * zero


def _cast(ops: PrimitiveOps, place: Place, shape: tuple[int, ...] | None = None) -> Array:
    return DensePlace(where=place).pack(ops, shape)


def linear(ops: PrimitiveOps, x: Array, weight: PackedPlaces) -> Array:
    """x [..., K] · weightᵀ, weight [F, K]."""
    kind, (out, width) = weight.format, weight.shape
    rows, b = x.rows(), ops.builder
    if ops.unpacks:
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


def whole(ops: PrimitiveOps, weight: PackedPlaces, after: Value) -> Array:
    """Return a matrix's values [F, K], made anew in every run, once `after` is computed: see `ops.zero_behind`."""
    b, kind, (count, width) = ops.builder, weight.format, weight.shape
    if kind.bits != 8 or ops.portable:
        ids = b.op("Add", b.constant(np.arange(count), np.int64), ops.zero_behind(after))
        return take(ops, weight, ids, (count,))
    rows = count * width // kind.group_size
    words, scales = weight.words.value(ops, (rows, kind.group_size)), _cast(ops, weight.scales, (rows,))
    made = scaled(b, words, scales.value, ops.bytes_behind(after, 128, rows))
    result, rest = ops.array(made, (rows, kind.group_size), ops.dtype), rest_of(ops, weight)
    if rest is not None:
        result = result + ops.reshape(rest, (rows, 1))
    return ops.reshape(result, (count, width))


def take(ops: PrimitiveOps, weight: PackedPlaces, ids: Value, shape: tuple) -> Array:
    """Return rows by number, dequantized: weight [V, K], ids of `shape` → [*shape, K]."""
    b, kind, (count, width) = ops.builder, weight.format, weight.shape
    words = weight.words.value(ops, (count, width * kind.bits // 8))
    if ops.portable:
        stored = [words, scales_of(ops, weight).value]
        if weight.biases is not None:
            stored.append(_cast(ops, weight.biases).value)
        made = plain(b, ops, kind, [b.op("Gather", one, ids) for one in stored], width)
        return ops.array(made, (*shape, width), ops.dtype, (product(shape), width))
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


def plain(b: Builder, ops: PrimitiveOps, kind: Format, stored: list[Value], width: int) -> Value:
    """Dequantize rows in operators of the standard: words uint8 [n, K·bits/8], scales and biases [n, K/g] → [n, K]."""
    words, *floats = stored
    codes = b.op("Cast", words, to=int(ops.float_type))
    if kind.bits == 4:  # the lower half of a byte comes first
        sixteen, part = (b.constant(one, ops.numpy_type) for one in (16.0, 1 / 16))
        high = b.op("Floor", b.op("Mul", codes, part))
        low = b.op("Sub", codes, b.op("Mul", high, sixteen))
        codes = b.op("Concat", b.op("Unsqueeze", low, b.ints(-1)), b.op("Unsqueeze", high, b.ints(-1)), axis=-1)
    codes = b.op("Reshape", codes, b.ints(-1, width // kind.group_size, kind.group_size))
    scale, *bias = (b.op("Unsqueeze", one, b.ints(-1)) for one in floats)
    if bias:
        values = b.op("Add", b.op("Mul", codes, scale), bias[0])
    else:
        zero = b.constant(float(1 << (kind.bits - 1)), ops.numpy_type)
        values = b.op("Mul", b.op("Sub", codes, zero), scale)
    return b.op("Reshape", values, b.ints(-1, width))
