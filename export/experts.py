"""The experts as one function, `dgemma::GegluMoE`, whose body is standard ops; and the routing before it.

    GegluMoE(x [N, D], index int64 [N, k], weights [N, k], gate_up [E, 2F, D], down [E, D, F]) → [N, D]

No row is dropped: each expert has as many places as the busiest one needs (`room`), rows are laid into them by one
gather, two batched products follow, and another gather brings the results back. Places that nobody needs hold row 0,
whose result nobody reads.

Quantized, words, scales and, where there are any, biases stand in for gate_up and for down, and the products are a loop
over the experts that any row has chosen: each is dequantized into a buffer that stays in the processor's cache and
multiplied by its rows alone. The others have no places either.

In a portable graph the body stands in the graph itself, and products are `MatMul` and `Gemm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ..checkpoints.quant import Format
from .arrays import Array, product
from .graph import MICROSOFT, Builder, Value, function
from .packed import EXACT, group_sums, plain, scaled
from .weights import PackedPlaces

if TYPE_CHECKING:
    from ..core.parts import Experts, Router
    from .primitives import PrimitiveOps


def geglu_moe(ops: PrimitiveOps, h: Array, r: Array, router: Router, experts: Experts) -> Array:
    """See `Ops.moe`."""
    b = ops.builder
    width, k = r.shape[-1], router.experts_per_token
    scale = ops.cast(router.scale, ops.dtype) * ops.rounded(width**-0.5)
    flat = ops.reshape(r, (product(r.shape[:-1]), width))
    scores = ops.cast(ops.linear(ops.rms_norm(flat, scale, router.eps), router.proj), ops.wide)
    top, index = b.ops("TopK", scores.value, b.ints(k), outputs=2, axis=-1, largest=1, sorted=1)
    # The softmax of the chosen scores is the softmax over all experts, renormalised.
    factor = ops.cast(router.per_expert_scale, ops.wide).value
    weights = b.op("Mul", b.op("Softmax", top, axis=-1), b.op("Gather", factor, index))
    inputs = [h.rows(), index, ops.cast(ops.array(weights, (), ops.wide), ops.dtype).raw]
    matrices = [_Matrix.of(ops, one, inputs) for one in (experts.gate_up_proj, experts.down_proj)]
    if ops.portable:
        made = _body(b, ops, router.experts, matrices, inputs)
    else:
        made = b.call("GegluMoE", tuple(matrices), lambda name: _written(name, ops, router.experts, matrices), *inputs)
    return ops.array(made, h.shape, ops.dtype, (product(h.shape[:-1]), width))


@dataclass(frozen=True)
class _Matrix:
    """One matrix for each expert, [E, R, K], as the function's body sees it."""

    shape: tuple[int, ...]
    format: Format | None
    inputs: int
    """How many of the function's inputs it takes."""

    @classmethod
    def of(cls, ops: PrimitiveOps, weight: Array | PackedPlaces, inputs: list[Value]) -> _Matrix:
        """Describe a weight, and append what the function has to be given of it."""
        if not isinstance(weight, PackedPlaces):
            inputs.append(weight.value)
            return cls(weight.shape, None, 1)
        count, out, width = weight.shape
        stored = [weight.words.value(ops, (count, out, width * weight.format.bits // 8)), weight.scales.value(ops)]
        if weight.biases is not None:
            stored.append(weight.biases.value(ops))
        inputs += stored
        return cls(weight.shape, weight.format, len(stored))


def _written(name: str, ops: PrimitiveOps, count: int, matrices: list[_Matrix]) -> ir.Function:
    b = Builder(function=True)
    names = ["x", "index", "weights"]
    for part, one in zip(("gate_up", "down"), matrices, strict=True):
        names += (
            [part] if one.format is None else [f"{part}_{kind}" for kind in ("words", "scales", "biases")[: one.inputs]]
        )
    b.inputs = [ir.Value(name=one) for one in names]
    return function(name, b, [_body(b, ops, count, matrices, b.inputs)], opset=ops.opset)


def _body(b: Builder, ops: PrimitiveOps, count: int, matrices: list[_Matrix], inputs: list[Value]) -> Value:
    x, index, weights, *stored = inputs
    dense = all(one.format is None for one in matrices)
    expert, rank, row, counts = _ranked(b, index, count)
    room = b.op("ReduceMax", counts, b.ints(0), keepdims=1)  # [1]
    if dense:
        slot, slots, used = expert, b.ints(count), None
    else:
        chosen = b.op("Cast", b.op("Greater", counts, b.ints(0)), to=int(ir.DataType.INT64))
        before = b.op("CumSum", chosen, b.constant(0, np.int64), exclusive=1)
        slot, used = b.op("Gather", before, expert), b.op("Squeeze", b.op("NonZero", counts), b.ints(0))
        slots = b.op("Shape", used)
    place = b.op("Add", b.op("Mul", slot, room), rank)
    width = b.op("Shape", x, start=1, end=2)
    empty = b.op("Expand", b.ints(0), b.op("Mul", room, slots))
    source = b.op("ScatterElements", empty, place, row, axis=0)  # which row each place holds
    laid = b.op("Reshape", b.op("Gather", x, source), b.op("Concat", slots, room, width, axis=0))
    first, second = stored[: matrices[0].inputs], stored[matrices[0].inputs :]
    if used is None and ops.portable:  # matrices first, so that rows are transposed and never a matrix
        both = b.op("MatMul", *first, b.op("Transpose", laid, perm=[0, 2, 1]))  # [E, 2F, room]
        out = b.op("Transpose", b.op("MatMul", *second, _bent(b, both, axis=1)), perm=[0, 2, 1])  # [E, room, D]
    elif used is None:
        both = b.op("FusedMatMul", laid, *first, domain=MICROSOFT, transB=1)  # [E, room, 2F]
        out = b.op("FusedMatMul", _bent(b, both), *second, domain=MICROSOFT, transB=1)  # [E, room, D]
    else:
        out = _looped(b, ops, laid, (used, counts, room), (first, second), matrices)
    back = b.op("Gather", b.op("Reshape", out, b.op("Concat", b.ints(-1), width, axis=0)), place)
    back = b.op("Reshape", back, b.op("Concat", b.op("Shape", index), width, axis=0))  # [N, k, D]
    mixed = b.op("MatMul", b.op("Unsqueeze", weights, b.ints(1)), back)  # [N, 1, D]
    return b.op("Squeeze", mixed, b.ints(1))


def _ranked(b: Builder, index: Value, count: int) -> tuple[Value, Value, Value, Value]:
    """Number each (row, choice) pair among those of its expert: index [N, k] → expert, rank and row, [N·k] each.

    Also returns how many rows each expert has, [E].
    """
    flat = b.op("Reshape", index, b.ints(-1))
    column = b.op("Unsqueeze", flat, b.ints(1))
    hit = b.op("Equal", column, b.constant(np.arange(count)[None], np.int64))
    ranks = b.op("CumSum", b.op("Cast", hit, to=int(ir.DataType.INT32)), b.constant(0, np.int64))  # [N·k, E]
    # Ranks count from 1, and an expert's last is how many rows it has.
    counts = b.op("Cast", b.op("ReduceMax", ranks, b.ints(0), keepdims=0), to=int(ir.DataType.INT64))
    own = b.op("Squeeze", b.op("GatherElements", ranks, column, axis=1), b.ints(1))
    rank = b.op("Sub", b.op("Cast", own, to=int(ir.DataType.INT64)), b.ints(1))
    pairs = b.op("Range", b.constant(0, np.int64), b.op("Size", flat), b.constant(1, np.int64))
    return flat, rank, b.op("Div", pairs, b.op("Shape", index, start=1, end=2)), counts


def _bent(b: Builder, both: Value, axis: int = -1) -> Value:
    """[..., 2F], gate half first → gelu(gate) · up [..., F], or with an `axis` the same along that."""
    gate, up = b.ops("Split", both, outputs=2, axis=axis, num_outputs=2)
    return b.op("Mul", b.op("Gelu", gate, approximate="tanh"), up)


def _looped(
    b: Builder, ops: PrimitiveOps, laid: Value, sizes: tuple[Value, Value, Value],
    stored: tuple[list[Value], list[Value]], matrices: list[_Matrix],
) -> Value:  # fmt: skip
    """Both products, one used expert after another, on the rows that it has: laid [used, room, D] → the same shape."""
    used, counts, room = sizes
    loop = Builder(outer=b)
    turn = loop.input("turn", ir.DataType.INT64, ())
    going = loop.input("going", ir.DataType.BOOL, ())
    expert = loop.op("Gather", used, turn)
    own = loop.op("Gather", counts, loop.op("Reshape", expert, b.ints(1)))
    rows = loop.op("Slice", loop.op("Gather", laid, turn), b.ints(0), own, b.ints(0))
    both = _product(b, loop, ops, rows, expert, stored[0], matrices[0])
    one = _product(b, loop, ops, _bent(loop, both), expert, stored[1], matrices[1])
    # What a loop hands out is of one shape.
    one = loop.op("Pad", one, loop.op("Concat", b.ints(0, 0), loop.op("Sub", room, own), b.ints(0), axis=0))
    on = loop.op("Identity", going)
    on.type, one.type = ir.TensorType(ir.DataType.BOOL), ir.TensorType(ops.float_type)
    return b.op(
        "Loop", b.op("Size", used), b.constant(True, np.bool_),
        body=loop.graph([on, one], name="one_expert", opset=None),
    )  # fmt: skip


def _product(
    b: Builder, loop: Builder, ops: PrimitiveOps, x: Value, expert: Value, stored: list[Value], matrix: _Matrix
) -> Value:
    """Multiply by one expert's matrix: x [room, K] → [room, R]. Scales are cast before the loop."""
    (_, out, width), kind = matrix.shape, matrix.format
    words, *floats = stored
    if kind is None:
        return _transposed(loop, ops, x, loop.op("Gather", words, expert))
    size, groups = kind.group_size, width // kind.group_size
    wide, *rest = (b.op("Cast", one, to=int(ops.float_type)) for one in floats)  # [E, R, K/g]
    scales = loop.op("Gather", wide, expert)
    if ops.portable:
        own = [loop.op("Gather", one, expert) for one in (words, wide, *rest)]
        return _transposed(loop, ops, x, plain(loop, ops, kind, own, width))
    if not ops.cpu:
        codes = loop.op("Reshape", loop.op("Gather", words, expert), b.ints(out, groups, size * kind.bits // 8))
        made = loop.op(
            "MatMulNBits", x, codes, loop.op("Reshape", scales, b.ints(-1)), domain=MICROSOFT, K=width, N=out,
            bits=kind.bits, block_size=size, accuracy_level=EXACT,
        )  # fmt: skip
    else:
        if kind.bits == 8:
            codes = loop.op("Reshape", loop.op("Gather", words, expert), b.ints(-1, size))
            values = scaled(loop, codes, loop.op("Reshape", scales, b.ints(-1)))
        else:
            # Row by row, which is what the operator spreads over threads.
            ids = loop.op(
                "Add", loop.op("Mul", expert, b.constant(out, np.int64)), b.constant(np.arange(out), np.int64)
            )
            values = loop.op(
                "GatherBlockQuantized", b.op("Reshape", words, b.ints(-1, width * kind.bits // 8)), ids,
                b.op("Reshape", wide, b.ints(-1, groups)), domain=MICROSOFT, bits=kind.bits, block_size=size,
                gather_axis=0, quantize_axis=1,
            )  # fmt: skip
        values = loop.op("Reshape", values, b.ints(out, width))
        made = _transposed(loop, ops, x, values)
    if rest:
        zero = b.constant(float(1 << (kind.bits - 1)), ops.numpy_type)
        more = loop.op("Add", loop.op("Gather", rest[0], expert), loop.op("Mul", scales, zero))
        made = loop.op("Gemm", group_sums(loop, x, width, size), more, made, transB=1)
    return made


def _transposed(b: Builder, ops: PrimitiveOps, x: Value, matrix: Value) -> Value:
    """x [n, K] · matrixᵀ, matrix [R, K]."""
    if ops.portable:
        return b.op("Gemm", x, matrix, transB=1)
    return b.op("FusedMatMul", x, matrix, domain=MICROSOFT, transB=1)
