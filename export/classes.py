"""The vocabulary head for classes of tokens: mean embedding and `Masses` of one pass; see `Ops.class_head`.

Tokens are put in the order of their classes, those of none last, and each class is filled up to whole blocks of 16 or
64. The table's rows are taken in that order, part by part, so that a block's scores lie side by side and belong to one
class: its highest score, its mass and its moment are reductions of the last axis, at which ONNX Runtime is fast. A
scatter of scores to their classes, one by one, took a hundred times as long. A few numbers for each block stay of a
part; nothing is as large as the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.parts import NOTHING, Masses
from . import packed
from .arrays import Array, Size, product
from .graph import TYPES, Builder, Value
from .head import MOST_PARTS, PART, add_product
from .weights import PackedPlaces

if TYPE_CHECKING:
    from .primitives import PrimitiveOps

BLOCK, LARGE = 16, 1 << 16
"""Tokens in a block: every class wastes half of one. From so large a vocabulary on it is four times as many."""
_END = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where tokens stand: parts of n blocks of S places each; their total is T blocks, a multiple of the parts."""

    block: int  # S
    count: Value  # [1]: C, and the number that tokens of no class have
    sizes: Value  # [C + 1]: tokens of each class
    places: Value  # [T, S]: the token at each place; any where the place is filled up
    of: Value  # [T]: each block's class
    tokens: tuple[Value, ...]  # [n, S] each, parts of `places`
    valid: tuple[Value, ...]  # bool [n, S] each: whether there is a token


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What is kept of a part, a number for each block; `peak` is the m that masses are relative to."""

    tops: Value  # (rows, n): the highest score
    best: Value  # (rows, n): its place, counted over all parts
    sums: Value  # (rows, n): Σ exp((score − m) / temperature)
    moments: Value  # (rows, n): Σ mass · (score − m) / temperature
    peak: Value  # (rows, 1): the highest score of this part and those before


def class_head(
    ops: PrimitiveOps, x: Array, table: Any, softcap: float, temperature: Array, classes: Array, count: Any
) -> tuple[Array, Masses]:
    """`count` is an int, or an int64 [1] of the graph."""
    b, (vocab, width) = ops.builder, table.shape
    shape = x.shape[:-1]
    counted = b.ints(count) if isinstance(count, int) else count.value
    parts = min(MOST_PARTS, max(1, vocab * width * 4 // PART))
    layout = _laid_out(ops, classes.value, counted, vocab, parts)
    spread = b.op("Expand", b.op("Div", b.constant(softcap, np.float32), temperature.value), ops.shape_value(shape))
    sharpness = b.op("Reshape", spread, b.ints(-1, 1))  # [rows, 1]
    made: list[_Part] = []
    soft = None  # [rows, D], relative to the last part's peak
    for number in range(parts):
        values = _rows(ops, table, layout.tokens[number], x.rows() if soft is None else soft)
        one, mass = _part(ops, x, values, softcap, layout, number, sharpness, made[-1].peak if made else None)
        if soft is not None:  # relative to the peak there is now
            fall = b.op("Exp", b.op("Mul", b.op("Sub", made[-1].peak, one.peak), sharpness))
            soft = b.op("Mul", soft, fall)
        soft = add_product(ops, mass, values, soft)
        made.append(one)
    total, masses = _joined(b, made, layout, sharpness)
    mean = ops.array(b.op("Div", soft, total), (*shape, width), ops.wide, (product(shape), width))
    apart = b.op("Concat", ops.shape_value(shape), counted, axis=0)
    full = (*shape, count if isinstance(count, int) else Size.named("classes"))
    kinds = ("float32", "int32", "float32", "float32")
    back = (ops.array(b.op("Reshape", x, apart), full, kind) for x, kind in zip(masses, kinds, strict=True))
    return ops.cast(mean, ops.dtype), Masses(*back)


def _laid_out(ops: PrimitiveOps, classes: Value, count: Value, vocab: int, parts: int) -> _Layout:
    """Lay out tokens by their classes, int64 [V]."""
    b, size = ops.builder, BLOCK if vocab < LARGE else 4 * BLOCK
    block = b.ints(size)
    own = b.op("Where", b.op("Less", classes, b.ints(0)), count, classes)  # those of none have a class at the end
    _, order = b.ops("TopK", own, b.ints(vocab), outputs=2, axis=0, largest=0, sorted=1)  # of equals the first
    kinds = b.op("Add", count, b.ints(1))
    none = b.op("Expand", b.ints(0), kinds)
    sizes = b.op("ScatterElements", none, own, b.op("Expand", b.ints(1), b.ints(vocab)), axis=0, reduction="add")
    blocks = b.op("Div", b.op("Add", sizes, b.ints(size - 1)), block)
    along = b.constant(0, np.int64)
    token_ends, block_ends = (b.op("CumSum", one, along) for one in (sizes, blocks))
    token_starts, block_starts = b.op("Sub", token_ends, sizes), b.op("Sub", block_ends, blocks)
    last = b.op("Slice", block_ends, b.ints(-1), b.ints(_END), b.ints(0))
    whole = b.op("Mul", b.op("Div", b.op("Add", last, b.ints(parts - 1)), b.ints(parts)), b.ints(parts))
    number = b.op("Range", along, b.op("Squeeze", whole), b.constant(1, np.int64))  # of each block
    ended = b.op("Expand", b.ints(0), b.op("Add", whole, b.ints(1)))
    ended = b.op("ScatterElements", ended, block_ends, b.op("Expand", b.ints(1), kinds), axis=0, reduction="add")
    of = b.op("Gather", b.op("CumSum", ended, along), number)  # how many classes end before a block
    of = b.op("Min", of, count)  # blocks behind the last are of no class either, and hold nothing
    skipped = b.op("Mul", b.op("Sub", number, b.op("Gather", block_starts, of)), block)
    first = b.op("Unsqueeze", b.op("Add", b.op("Gather", token_starts, of), skipped), b.ints(1))
    place = b.op("Add", first, b.constant(np.arange(size)[None], np.int64))  # [T, S]
    valid = b.op("Less", place, b.op("Unsqueeze", b.op("Gather", token_ends, of), b.ints(1)))
    places = b.op("Gather", order, b.op("Min", place, b.ints(vocab - 1)))
    tokens, held = (b.ops("Split", one, outputs=parts, axis=0, num_outputs=parts) for one in (places, valid))
    return _Layout(block=size, count=count, sizes=sizes, places=places, of=of, tokens=tokens, valid=held)


def _rows(ops: PrimitiveOps, table: Any, tokens: Value, after: Value) -> Value:
    """Return rows of the table by number, [n · S, D], made behind `after`: see `ops.zero_behind`."""
    b = ops.builder
    ids = b.op("Add", b.op("Reshape", tokens, b.ints(-1)), ops.zero_behind(after))
    if isinstance(table, PackedPlaces):
        return packed.take(ops, table, ids, (Size.named("part"),)).value
    return b.op("Gather", table.value, ids)


def _part(
    ops: PrimitiveOps, x: Array, values: Value, softcap: float, layout: _Layout, number: int, sharpness: Value,
    before: Value | None,
) -> tuple[_Part, Value]:  # fmt: skip
    """Reduce a part, and return its masses [rows, n · S] besides; `before` is the peak of the parts before."""
    b = ops.builder
    flat = b.op("Gemm", x.rows(), values, transB=1, alpha=1.0 / softcap)
    if ops.dtype != "float32":
        flat = b.op("Cast", flat, to=int(TYPES["float32"]))
    near = b.op("Reshape", b.op("Tanh", flat), b.ints(0, -1, layout.block))
    near = b.op("Where", layout.valid[number], near, b.constant(NOTHING, np.float32))
    tops = b.op("ReduceMax", near, b.ints(2), keepdims=0)  # [rows, n]
    inside = b.op("ArgMax", near, axis=2, keepdims=0)
    size = b.op("Shape", layout.tokens[number], start=0, end=1)
    first = b.op("Mul", size, b.ints(number))
    block = b.op("Range", b.constant(0, np.int64), b.op("Squeeze", size), b.constant(1, np.int64))
    best = b.op("Add", b.op("Mul", b.op("Add", block, first), b.ints(layout.block)), inside)
    top = b.op("ReduceMax", tops, b.ints(1), keepdims=1)
    peak = top if before is None else b.op("Max", top, before)
    steep = b.op("Unsqueeze", sharpness, b.ints(2))
    shifted = b.op("Mul", b.op("Sub", near, b.op("Unsqueeze", peak, b.ints(2))), steep)
    mass = b.op("Exp", shifted)
    moments = b.op("ReduceSum", b.op("Mul", mass, shifted), b.ints(2), keepdims=0)
    sums = b.op("ReduceSum", mass, b.ints(2), keepdims=0)
    return _Part(tops=tops, best=best, sums=sums, moments=moments, peak=peak), b.op("Reshape", mass, b.ints(0, -1))


def _joined(b: Builder, parts: list[_Part], layout: _Layout, sharpness: Value) -> tuple[Value, tuple[Value, ...]]:
    """Bring blocks [rows, T] together by their classes: the total mass [rows, 1], and four of [rows, C]."""

    def joined(values: list[Value]) -> Value:
        return b.op("Concat", *values, axis=1)

    peak = parts[-1].peak
    lags = [b.op("Mul", b.op("Sub", one.peak, peak), sharpness) for one in parts]  # at most 0
    scales = [b.op("Exp", lag) for lag in lags]
    sums = joined([b.op("Mul", one.sums, scale) for one, scale in zip(parts, scales, strict=True)])
    raised = [b.op("Add", one.moments, b.op("Mul", one.sums, lag)) for one, lag in zip(parts, lags, strict=True)]
    moments = joined([b.op("Mul", one, scale) for one, scale in zip(raised, scales, strict=True)])
    tops, best = joined([one.tops for one in parts]), joined([one.best for one in parts])
    total = b.op("ReduceSum", sums, b.ints(1), keepdims=1)

    rows = b.op("Shape", tops, start=0, end=1)
    kinds = b.op("Add", layout.count, b.ints(1))
    index = b.op("Expand", layout.of, b.op("Shape", tops))  # [rows, T]
    shape = b.op("Concat", rows, kinds, axis=0)
    nothing, far = b.constant([NOTHING], np.float32), b.ints(_END)
    top = b.op("ScatterElements", b.op("Expand", nothing, shape), index, tops, axis=1, reduction="max")
    highest = b.op("Equal", tops, b.op("GatherElements", top, index, axis=1))
    place = b.op("Where", highest, best, far)  # within a class places rise with tokens: the first of equals
    place = b.op("ScatterElements", b.op("Expand", far, shape), index, place, axis=1, reduction="min")

    classes = b.op("Range", b.constant(0, np.int64), b.op("Squeeze", layout.count), b.constant(1, np.int64))
    mine = b.op("Equal", b.op("Unsqueeze", layout.of, b.ints(1)), b.op("Unsqueeze", classes, b.ints(0)))
    mine = b.op("Cast", mine, to=int(TYPES["float32"]))  # [T, C]: products add up alike on every device
    share, moment = b.op("MatMul", sums, mine), b.op("MatMul", moments, mine)

    def live(x: Value) -> Value:
        return b.op("Slice", x, b.ints(0), layout.count, b.ints(1))

    log_total = b.op("Log", total)
    some = b.op("Greater", b.op("Slice", layout.sizes, b.ints(0), layout.count, b.ints(0)), b.ints(0))  # [C]
    score = b.op("Sub", b.op("Mul", b.op("Sub", live(top), peak), sharpness), log_total)
    score = b.op("Where", some, score, b.constant(NOTHING, np.float32))
    flat = b.op("Reshape", layout.places, b.ints(-1))
    known = b.op("Less", live(place), far)  # not of a class without tokens, nor of scores that are no numbers
    found = b.op("Gather", flat, b.op("Where", known, live(place), b.ints(0)))
    found = b.op("Where", known, found, b.ints(0))
    has = b.op("Greater", b.op("Div", share, total), b.constant(0.0, np.float32))
    one = b.constant(1.0, np.float32)
    mass = b.op("Where", has, b.op("Log", b.op("Div", b.op("Where", has, share, one), total)), score)
    moment = b.op("Div", b.op("Sub", moment, b.op("Mul", share, log_total)), total)
    return total, (b.op("Max", mass, score), found, score, moment)
