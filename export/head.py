"""The vocabulary head: token, argmax, entropy and mean embedding of one denoising pass; see `Ops.vocab_head`.

Scores are seen in blocks of 512 tokens throughout: their maxima lead to the argmax, and their sums to the draw, each of
which then looks into one block. A quantized table is worked on in parts, each dequantized in every pass and no larger
than `PART` bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..core.reference import _BELOW_ONE, DRAW_BLOCK
from . import packed
from .arrays import Array, product
from .graph import Builder, Value
from .weights import Packed

if TYPE_CHECKING:
    from .ops import OnnxOps

PART = 96 << 20
_NOTHING = -1e30
"""What fills the last block of scores: its mass is 0 at any temperature, and 0 · score is not NaN, as with infinity."""


class Table:
    """The embedding as matrices [v, D], one or, quantized and large, several."""

    def __init__(self, ops: OnnxOps, table: Array | Packed) -> None:
        self._ops = ops
        self.rows, self.width = table.shape
        if not isinstance(table, Packed):
            self.parts: list[Array | Packed] = [table]
        else:
            most = max(DRAW_BLOCK, PART // (4 * self.width) // DRAW_BLOCK * DRAW_BLOCK)
            self.parts = [table.rows(at, min(most, self.rows - at)) for at in range(0, self.rows, most)]
        self._values: dict[int, Value] = {}

    def part(self, i: int, after: Value) -> Value:
        """The values of a part [v, D], made behind `after`: parts that are there one at a time take no more memory.

        One that is the whole table is made once for both of its products.
        """
        one = self.parts[i]
        if not isinstance(one, Packed):
            return one.value
        if len(self.parts) > 1:
            return packed.whole(self._ops, one, after).value
        if i not in self._values:
            self._values[i] = packed.whole(self._ops, one, after).value
        return self._values[i]


def scores(ops: OnnxOps, x: Array, table: Array | Packed, softcap: float, shared: Table | None = None) -> Value:
    """Return tanh(x · tableᵀ / softcap), wide [rows, V] <- very big."""
    b, shared = ops.builder, shared or Table(ops, table)
    parts = []
    for i, one in enumerate(shared.parts):
        if isinstance(one, Packed) and not ops.cpu:
            made = b.op("Mul", packed.linear(ops, x, one).rows(), b.constant(1.0 / softcap, ops.numpy_type))
        else:
            before = parts[-1] if parts else x.rows()
            made = b.op("Gemm", x.rows(), shared.part(i, before), transB=1, alpha=1.0 / softcap)
        parts.append(made)
    made = parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=1)
    if ops.dtype != "float32":
        made = b.op("Cast", made, to=int(ir.DataType.FLOAT))
    return b.op("Tanh", made)


def vocab_head(
    ops: OnnxOps, x: Array, table: Any, softcap: float, temperature: Array, u: Array
) -> tuple[Array, Array, Array, Array]:
    b, shared = ops.builder, Table(ops, table)
    shape, vocab = x.shape[:-1], shared.rows
    rows = product(shape)
    blocks = -(-vocab // DRAW_BLOCK)
    last = b.constant(1, np.int64)

    spread = b.op("Expand", b.op("Div", b.constant(softcap, np.float32), temperature.value), ops.shape_value(shape))
    sharpness = b.op("Reshape", spread, b.ints(-1, 1, 1))  # [rows, 1, 1]

    flat = scores(ops, x, table, softcap, shared)
    if padding := blocks * DRAW_BLOCK - vocab:
        flat = b.op("Pad", flat, b.ints(0, 0, 0, padding), b.constant(_NOTHING, np.float32))
    near = b.op("Reshape", flat, b.ints(-1, blocks, DRAW_BLOCK))  # [rows, blocks, 512]
    peaks = b.op("ReduceMax", near, b.ints(2), keepdims=0)  # [rows, blocks]
    block = b.op("ArgMax", peaks, axis=1, keepdims=1)  # the first of equals, and so is the one inside it
    top = b.op("ReduceMax", peaks, b.ints(1), keepdims=1)
    # Nothing reads the scores behind this, so that it is written over them.
    shifted = b.op("Mul", b.op("Sub", near, b.op("Unsqueeze", top, b.ints(2))), sharpness)
    argmax = b.op("ArgMax", b.op("GatherND", shifted, block, batch_dims=1), axis=1, keepdims=0)
    argmax = b.op("Add", b.op("Mul", b.op("Reshape", block, b.ints(-1)), b.ints(DRAW_BLOCK)), argmax)
    mass = b.op("Exp", shifted)
    sums = b.op("ReduceSum", mass, b.ints(2), keepdims=0)  # [rows, blocks]
    ends = b.op("CumSum", sums, last)
    total = b.op("ReduceSum", sums, b.ints(1), keepdims=1)  # [rows, 1]
    moment = b.op("ReduceSum", b.op("Mul", mass, shifted), b.ints(1, 2), keepdims=0)
    flat_total = b.op("Reshape", total, b.ints(-1))
    entropy = b.op("Sub", b.op("Log", flat_total), b.op("Div", moment, flat_total))
    soft = b.op("Div", _mean(ops, mass, shared, padding), total)
    token = _draw(b, mass, sums, ends, b.op("Reshape", u.value, b.ints(-1, 1)), blocks)

    def back(value: Value, dtype: str) -> Array:
        return ops.array(value, shape, dtype, (rows,))

    mean = ops.cast(ops.array(soft, (*shape, shared.width), ops.wide, (rows, shared.width)), ops.dtype)
    return back(token, "int32"), back(argmax, "int32"), back(entropy, "float32"), mean


def _mean(ops: OnnxOps, mass: Value, table: Table, padding: int) -> Value:
    """Return mass · table, wide [rows, D]."""
    b = ops.builder
    flat = b.op("Reshape", mass, b.ints(0, -1))
    if padding:
        flat = b.op("Slice", flat, b.ints(0), b.ints(table.rows), b.ints(1))
    if ops.dtype != "float32":
        flat = b.op("Cast", flat, to=int(ops.float_type))
    sizes = [one.shape[0] for one in table.parts]
    cuts = [flat]
    if len(sizes) > 1:
        cuts = list(b.ops("Split", flat, b.ints(*sizes), outputs=len(sizes), axis=1))
    products: list[Value] = []
    for i, cut in enumerate(cuts):
        products.append(b.op("MatMul", cut, table.part(i, products[-1] if products else cut)))
    if ops.dtype != "float32":
        products = [b.op("Cast", one, to=int(ir.DataType.FLOAT)) for one in products]
    return products[0] if len(products) == 1 else b.op("Sum", *products)


def _draw(b: Builder, mass: Value, sums: Value, ends: Value, u: Value, blocks: int) -> Value:
    """`reference.draw`: mass [rows, blocks, 512], u [rows, 1] → int64 [rows]."""
    last = b.constant(1, np.int64)

    def end(x: Value, size: int) -> Value:
        return b.op("Slice", x, b.ints(size - 1), b.ints(size), b.ints(1))

    target = b.op("Mul", u, end(ends, blocks))
    before = b.op("Cast", b.op("LessOrEqual", ends, target), to=int(ir.DataType.INT64))
    block = b.op("Min", b.op("ReduceSum", before, b.ints(1), keepdims=1), b.ints(blocks - 1))  # [rows, 1]
    skipped = b.op("Sub", b.op("GatherElements", ends, block, axis=1), b.op("GatherElements", sums, block, axis=1))
    inside = b.op("CumSum", b.op("GatherND", mass, block, batch_dims=1), last)  # [rows, 512]
    # The two levels round apart: keep the rest strictly inside the block's own sum, on a token that has mass.
    limit = b.op("Mul", end(inside, DRAW_BLOCK), b.constant(_BELOW_ONE, np.float32))
    rest = b.op("Min", b.op("Sub", target, skipped), limit)
    within = b.op("Cast", b.op("LessOrEqual", inside, rest), to=int(ir.DataType.INT64))
    within = b.op("ReduceSum", within, b.ints(1), keepdims=0)
    return b.op("Add", b.op("Mul", b.op("Reshape", block, b.ints(-1)), b.ints(DRAW_BLOCK)), within)
