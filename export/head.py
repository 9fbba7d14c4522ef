"""The vocabulary head: token, argmax, entropy and mean embedding of one denoising pass; see `Ops.vocab_head`.

The vocabulary is gone through in parts, one behind another. A part's scores become masses, exp(score − m), where m is
the highest score of a row so far, and the masses' product with the same part of the table is added to the sums of the
parts before, brought down to the new m. So a quantized table is dequantized once in a pass, a part at a time, and of
what is as large as the vocabulary only the masses stay, for the draw.

Inside a part scores are seen in blocks of 512 tokens: their maxima lead to the argmax, and their sums to the draw, each
of which then looks into one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..core.reference import _BELOW_ONE, DRAW_BLOCK
from . import packed
from .arrays import Array, product
from .graph import Builder, Value
from .weights import PackedPlaces

if TYPE_CHECKING:
    from .primitives import PrimitiveOps

PART = 8 << 20
"""Bytes of a dequantized part that are still in a processor's cache at its second product."""
MOST_PARTS = 32
"""Large tables have larger parts, so that the graph does not grow with them."""
_NOTHING = -1e30
"""What fills the last block of scores: its mass is 0 at any temperature, and 0 · score is not NaN, as with infinity."""


class Table:
    """The embedding in parts [v, D], all of one size but the last, and each a whole number of blocks."""

    def __init__(self, ops: PrimitiveOps, table: Array | PackedPlaces) -> None:
        self._ops = ops
        self.rows, self.width = table.shape
        least = max(PART // (4 * self.width), self.rows // MOST_PARTS)
        self.part_rows = -(-least // DRAW_BLOCK) * DRAW_BLOCK if isinstance(table, PackedPlaces) else self.rows
        self.starts = range(0, self.rows, self.part_rows)
        self._table = table

    def part(self, start: int, after: Value) -> tuple[Array | PackedPlaces, Value]:
        """A part as it is stored, and its values [v, D], which are made behind `after`."""
        if not isinstance(self._table, PackedPlaces):
            return self._table, self._table.value
        one = self._table.rows(start, min(self.part_rows, self.rows - start))
        return one, packed.whole(self._ops, one, after).value


def _scores(ops: PrimitiveOps, x: Array, part: Array | PackedPlaces, values: Value, softcap: float) -> Value:
    """Return tanh(x · partᵀ / softcap), wide [rows, v]."""
    b = ops.builder
    if isinstance(part, PackedPlaces) and not ops.unpacks:
        made = b.op("Mul", packed.linear(ops, x, part).rows(), b.constant(1.0 / softcap, ops.numpy_type))
    else:
        made = b.op("Gemm", x.rows(), values, transB=1, alpha=1.0 / softcap)
    if ops.dtype != "float32":
        made = b.op("Cast", made, to=int(ir.DataType.FLOAT))
    return b.op("Tanh", made)


def scores(ops: PrimitiveOps, x: Array, table: Array | PackedPlaces, softcap: float) -> Value:
    """Return tanh(x · tableᵀ / softcap), wide [rows, V] <- very big."""
    parts: list[Value] = []
    whole = Table(ops, table)
    for start in whole.starts:
        parts.append(_scores(ops, x, *whole.part(start, parts[-1] if parts else x.rows()), softcap))
    return parts[0] if len(parts) == 1 else ops.builder.op("Concat", *parts, axis=1)


def mean_embedding(ops: PrimitiveOps, probabilities: Array, table: Any) -> Array:
    """`Ops.mean_embedding`, with a quantized table in parts."""
    b, whole = ops.builder, Table(ops, table)
    given = probabilities.rows()
    soft = None
    for start in whole.starts:
        stored, values = whole.part(start, given if soft is None else soft)
        mass = b.op("Slice", given, b.ints(start), b.ints(start + stored.shape[0]), b.ints(1))
        soft = add_product(ops, mass, values, soft)
    shape = probabilities.shape[:-1]
    made = ops.array(soft, (*shape, whole.width), ops.wide, (product(shape), whole.width))  # type: ignore[arg-type]
    return ops.cast(made, ops.dtype)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What is kept of a part; `peak` is the m that its masses are relative to."""

    mass: Value  # (rows, blocks, 512)
    sums: Value  # (rows, blocks)
    moment: Value  # (rows, 1): Σ mass · (score − m) / temperature
    peak: Value  # (rows, 1): the highest score of this part and those before
    top: Value  # (rows, 1): of this part
    argmax: Value  # (rows, 1), counted over the vocabulary


def vocab_head(
    ops: PrimitiveOps, x: Array, table: Any, softcap: float, temperature: Array, u: Array
) -> tuple[Array, Array, Array, Array]:
    b, whole = ops.builder, Table(ops, table)
    shape = x.shape[:-1]
    rows = product(shape)

    spread = b.op("Expand", b.op("Div", b.constant(softcap, np.float32), temperature.value), ops.shape_value(shape))
    sharpness = b.op("Reshape", spread, b.ints(-1, 1))  # [rows, 1]
    steep = b.op("Unsqueeze", sharpness, b.ints(2))

    parts: list[_Part] = []
    soft = None  # [rows, D], relative to the last part's peak
    for start in whole.starts:
        stored, values = whole.part(start, x.rows() if soft is None else soft)
        count = stored.shape[0]
        flat = _scores(ops, x, stored, values, softcap)
        if padding := -count % DRAW_BLOCK:
            flat = b.op("Pad", flat, b.ints(0, 0, 0, padding), b.constant(_NOTHING, np.float32))
        one = _part(b, flat, start, steep, parts[-1].peak if parts else None)
        if soft is not None:  # relative to the peak there is now
            fall = b.op("Mul", b.op("Sub", parts[-1].peak, one.peak), sharpness)
            soft = b.op("Mul", soft, b.op("Exp", fall))
        soft = _mean(ops, one.mass, values, count, soft)
        parts.append(one)
    assert soft is not None

    def joined(name: str) -> Value:
        return b.op("Concat", *(getattr(one, name) for one in parts), axis=1)

    best = b.op("ArgMax", joined("top"), axis=1, keepdims=1)  # the first of equals, and so is the one inside it
    argmax = b.op("GatherElements", joined("argmax"), best, axis=1)
    lag = b.op("Mul", b.op("Sub", joined("peak"), parts[-1].peak), sharpness)  # [rows, parts], at most 0
    scales = b.op("Exp", lag)
    own = b.op("Concat", *(b.op("ReduceSum", one.sums, b.ints(1), keepdims=1) for one in parts), axis=1)
    total = b.op("ReduceSum", b.op("Mul", own, scales), b.ints(1), keepdims=1)  # [rows, 1]
    moment = b.op("Mul", b.op("Add", joined("moment"), b.op("Mul", own, lag)), scales)
    moment = b.op("ReduceSum", moment, b.ints(1), keepdims=1)
    entropy = b.op("Sub", b.op("Log", total), b.op("Div", moment, total))
    token = _draw(b, parts, scales, -(-whole.part_rows // DRAW_BLOCK), b.op("Reshape", u.value, b.ints(-1, 1)))

    def back(value: Value, dtype: str) -> Array:
        return ops.array(value, shape, dtype, (rows, 1))

    mean = ops.array(b.op("Div", soft, total), (*shape, whole.width), ops.wide, (rows, whole.width))
    return back(token, "int32"), back(argmax, "int32"), back(entropy, "float32"), ops.cast(mean, ops.dtype)


def _part(b: Builder, flat: Value, start: int, steep: Value, before: Value | None) -> _Part:
    """Turn the scores of a part into masses: flat [rows, blocks · 512], steep [rows, 1, 1].

    `before` is the peak of the parts before.
    """
    near = b.op("Reshape", flat, b.ints(0, -1, DRAW_BLOCK))
    peaks = b.op("ReduceMax", near, b.ints(2), keepdims=0)  # [rows, blocks]
    block = b.op("ArgMax", peaks, axis=1, keepdims=1)
    top = b.op("ReduceMax", peaks, b.ints(1), keepdims=1)
    peak = top if before is None else b.op("Max", top, before)
    # Nothing reads the scores behind this, so that it is written over them.
    shifted = b.op("Mul", b.op("Sub", near, b.op("Unsqueeze", peak, b.ints(2))), steep)
    argmax = b.op("ArgMax", b.op("GatherND", shifted, block, batch_dims=1), axis=1, keepdims=1)
    argmax = b.op("Add", b.op("Add", b.op("Mul", block, b.ints(DRAW_BLOCK)), argmax), b.ints(start))
    mass = b.op("Exp", shifted)
    moment = b.op("Squeeze", b.op("ReduceSum", b.op("Mul", mass, shifted), b.ints(1, 2)), b.ints(2))
    sums = b.op("ReduceSum", mass, b.ints(2), keepdims=0)
    return _Part(mass=mass, sums=sums, moment=moment, peak=peak, top=top, argmax=argmax)


def _mean(ops: PrimitiveOps, mass: Value, values: Value, count: int, before: Value | None) -> Value:
    """Return before + mass · values, wide [rows, D]; mass has `count` columns that are tokens."""
    b = ops.builder
    flat = b.op("Reshape", mass, b.ints(0, -1))
    if count % DRAW_BLOCK:
        flat = b.op("Slice", flat, b.ints(0), b.ints(count), b.ints(1))
    return add_product(ops, flat, values, before)


def add_product(ops: PrimitiveOps, mass: Value, values: Value, before: Value | None) -> Value:
    """Return before + mass · values, wide: mass wide [rows, v], values [v, D] → [rows, D]."""
    b = ops.builder
    if ops.dtype == "float32":
        return b.op("Gemm", mass, values, before)
    made = b.op("Cast", b.op("MatMul", b.op("Cast", mass, to=int(ops.float_type)), values), to=int(ir.DataType.FLOAT))
    return made if before is None else b.op("Add", made, before)


def _draw(b: Builder, parts: list[_Part], scales: Value, blocks_in_part: int, u: Value) -> Value:
    """`reference.draw`: scales [rows, parts] of the parts' masses, u [rows, 1] → int64 [rows, 1]."""
    last = b.constant(1, np.int64)

    def end(x: Value) -> Value:
        return b.op("Slice", x, b.ints(-1), b.ints(np.iinfo(np.int64).max), b.ints(1))

    apart = b.ops("Split", scales, outputs=len(parts), axis=1, num_outputs=len(parts))
    sums = b.op("Concat", *(b.op("Mul", one.sums, scale) for one, scale in zip(parts, apart, strict=True)), axis=1)
    ends = b.op("CumSum", sums, last)  # [rows, blocks]
    target = b.op("Mul", u, end(ends))
    before = b.op("Cast", b.op("LessOrEqual", ends, target), to=int(ir.DataType.INT64))
    final = b.op("Sub", b.op("Shape", ends, start=1, end=2), b.ints(1))
    block = b.op("Min", b.op("ReduceSum", before, b.ints(1), keepdims=1), final)  # [rows, 1]
    skipped = b.op("Sub", b.op("GatherElements", ends, block, axis=1), b.op("GatherElements", sums, block, axis=1))
    # The block's masses, out of the part that has it; rows that look elsewhere take its first block meanwhile.
    part = b.op("Div", block, b.ints(blocks_in_part))
    local = b.op("Sub", block, b.op("Mul", part, b.ints(blocks_in_part)))
    inside = None
    for i, one in enumerate(parts):
        here = b.op("Equal", part, b.ints(i))
        at = b.op("Where", here, local, b.ints(0))
        found = b.op("GatherND", one.mass, at, batch_dims=1)  # [rows, 512]
        inside = found if inside is None else b.op("Where", here, found, inside)
    assert inside is not None
    inside = b.op("CumSum", b.op("Mul", inside, b.op("GatherElements", scales, part, axis=1)), last)
    # The two levels round apart: keep the rest strictly inside the block's own sum, on a token that has mass.
    limit = b.op("Mul", end(inside), b.constant(_BELOW_ONE, np.float32))
    rest = b.op("Min", b.op("Sub", target, skipped), limit)
    within = b.op("Cast", b.op("LessOrEqual", inside, rest), to=int(ir.DataType.INT64))
    within = b.op("ReduceSum", within, b.ints(1), keepdims=1)
    return b.op("Add", b.op("Mul", block, b.ints(DRAW_BLOCK)), within)
