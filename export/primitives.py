"""Tier one of the Ops contract in ONNX: each primitive appends a node or two, and all default bodies work on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from ..core.errors import DgemmaError
from ..core.ops import Ops
from ..core.primitives import DType, Reduction, Unary
from .arrays import Array, Size, broadcast, product, quotient, scalar
from .graph import NUMPY, TYPES, Builder, Value

_END = np.iinfo(np.int64).max
_REDUCTIONS = {"sum": "ReduceSum", "max": "ReduceMax", "min": "ReduceMin", "mean": "ReduceMean"}
_UNARY = {"exp": "Exp", "log": "Log", "tanh": "Tanh", "cos": "Cos", "sin": "Sin"}


class PrimitiveOps(Ops):
    """Writes into a `Builder`. Nothing is computed, so there is nothing to bring to the host."""

    name = "onnx"

    def __init__(
        self, builder: Builder, dtype: DType = "float32", *, opset: int = 23, cpu: bool = False, portable: bool = False
    ) -> None:
        if dtype not in ("float32", "float16"):
            raise DgemmaError(f"ONNX graphs are float32 or float16, not {dtype}: no bfloat16 product runs everywhere")
        self.builder = builder
        self.dtype = dtype
        self.opset = opset
        self.cpu = cpu
        """Whether the graph is for a CPU, where quantized products are written otherwise; see `packed.py`."""
        self.portable = portable
        """Whether it may hold operators of the ONNX standard only, and no function of ours."""
        self.wide = "float32"
        self._dims: dict[str, tuple[Value, int]] = {}
        self._sizes: dict[Size, Value] = {}
        self._zeros: dict[Value, Value] = {}

    @property
    def float_type(self) -> ir.DataType:
        return TYPES[self.dtype]

    @property
    def numpy_type(self) -> Any:
        return NUMPY[self.dtype]

    @property
    def unpacks(self) -> bool:
        """Whether quantized matrices become numbers before they are multiplied by."""
        return self.cpu or self.portable

    def branch(self, builder: Builder) -> Self:
        """Return ops that write into a branch of this graph and know its inputs."""
        made = type(self)(builder, self.dtype, opset=self.opset, cpu=self.cpu, portable=self.portable)
        made._dims = self._dims
        return made

    def seen(self, x: Array) -> Array:
        """Return an array of the graph around a branch as one of the branch."""
        return self.array(x.raw, x.shape, x.dtype, x.held)

    def zero_behind(self, value: Value) -> Value:
        """Return a zero, int64 [1], that no runtime knows before it has computed `value`.

        What depends on it is neither folded into the graph when that is loaded nor computed ahead of its turn: the
        dequantized matrices of all layers would then lie in memory at once, which quantization was to save.
        """
        if value not in self._zeros:
            size = self.builder.op("Shape", value, start=0, end=1)
            self._zeros[value] = self.builder.op("Mul", size, self.builder.ints(0))
        return self._zeros[value]

    def bytes_behind(self, value: Value, number: int, count: int) -> Value:
        """Return uint8 [count] of one number, made when `value` is there; see `zero_behind`."""
        size = self.builder.op("Add", self.builder.ints(count), self.zero_behind(value))
        return self.builder.op("Expand", self.builder.constant(number, np.uint8), size)

    # ---- Graph inputs and sizes -------------------------------------------------------------------------------

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> Array:
        """Declare an input; a name among its sizes is a dimension that is known when the graph runs."""
        value = self.builder.input(name, TYPES[dtype], shape)
        for axis, size in enumerate(shape):
            if isinstance(size, str):
                self._dims.setdefault(size, (value, axis))
        return self.array(value, tuple(Size.named(one) if isinstance(one, str) else one for one in shape), dtype)

    def array(self, value: Value, shape: tuple[Any, ...], dtype: str, held: Any = None) -> Array:
        return Array(self, value, shape, dtype, held)

    def size(self, x: int | Size) -> Value:
        """Return a size as an int64 [1] value."""
        if isinstance(x, int):
            return self.builder.ints(x)
        if x not in self._sizes:
            total = None
            for names, count in x.terms:
                factors = [] if count == 1 and names else [self.builder.ints(count)]
                for name in names:
                    source, axis = self._dims[name]
                    key = Size.named(name)
                    if key not in self._sizes:
                        self._sizes[key] = self.builder.op("Shape", source, start=axis, end=axis + 1)
                    factors.append(self._sizes[key])
                term = factors[0]
                for factor in factors[1:]:
                    term = self.builder.op("Mul", term, factor)
                total = term if total is None else self.builder.op("Add", total, term)
            assert total is not None
            self._sizes[x] = total
        return self._sizes[x]

    def shape_value(self, shape: Sequence[int | Size]) -> Value:
        """Return a shape as an int64 [n] value."""
        if all(isinstance(one, int) for one in shape):
            return self.builder.ints(*shape)  # type: ignore[arg-type]
        return self.builder.op("Concat", *(self.size(one) for one in shape), axis=0)

    def reshaped(self, raw: Value, held: Sequence[int | Size], shape: Sequence[int | Size]) -> Value:
        written: list[int | Size] = []
        for i, one in enumerate(shape):
            same = isinstance(one, Size) and i < len(held) and held[i] == one
            written.append(0 if same else one)
        open_ = [i for i, one in enumerate(written) if isinstance(one, Size)]
        if len(open_) == 1:
            written[open_[0]] = -1
        return self.builder.op("Reshape", raw, self.shape_value(written))

    # ---- Operators --------------------------------------------------------------------------------------------

    def binary(self, kind: str, a: Any, b: Any, dtype: str | None) -> Array:
        if not isinstance(a, Array) or not isinstance(b, Array):
            array, other = (a, b) if isinstance(a, Array) else (b, a)
            if isinstance(other, Size):
                constant = self.size(other)
            else:
                constant = self.builder.constant(scalar(other, array.dtype))
            pair = (array.raw, constant) if array is a else (constant, array.raw)
            return self.array(self.builder.op(kind, *pair), array.shape, dtype or array.dtype, array.held)
        assert a.dtype == b.dtype, (kind, a.dtype, b.dtype)
        left, right, held = self._aligned(a, b)
        shape = broadcast(a.shape, b.shape)
        return self.array(self.builder.op(kind, left, right), shape, dtype or a.dtype, held or shape)

    def _aligned(self, a: Array, b: Array) -> tuple[Value, Value, Any]:
        """Both operands in shapes that broadcast, and the result's shape where that is not the logical one."""
        if a.shape == b.shape:
            if a.held == b.held:
                return a.raw, b.raw, a.held
            rows = (product(a.shape[:-1]), a.shape[-1])
            return a.rows(), b.rows(), rows
        for one, other in ((a, b), (b, a)):
            if other.ndim == 1 and other.shape[0] in (1, one.held[-1]) and one.shape[-1] == one.held[-1]:
                values = {id(one): one.raw, id(other): other.value}
                return values[id(a)], values[id(b)], one.held
        return a.value, b.value, None

    def sliced(self, x: Array, index: Any) -> Array:
        """Slices with integer bounds, one for each leading axis."""
        starts, ends, axes = [], [], []
        shape = list(x.shape)
        for axis, one in enumerate(index if isinstance(index, tuple) else (index,)):
            if one == slice(None):
                continue
            start, stop = one.start or 0, one.stop
            size = shape[axis]
            if start < 0:
                shape[axis] = -start if stop is None else None
            elif isinstance(stop, int) and stop >= 0:
                shape[axis] = stop - start
            else:
                shape[axis] = size - start + (stop or 0)
            starts.append(start)
            ends.append(_END if stop is None else stop)
            axes.append(axis)
        b = self.builder
        raw = b.op("Slice", x.value, b.ints(*starts), b.ints(*ends), b.ints(*axes))
        return self.array(raw, tuple(shape), x.dtype)

    # ---- Primitives -------------------------------------------------------------------------------------------

    def asarray(self, x: Any, dtype: DType | None = None) -> Array:
        if isinstance(x, Array):
            return x if dtype is None else self.cast(x, dtype)
        array = np.asarray(x, None if dtype is None else NUMPY[dtype])
        if dtype is None:
            dtype = {"i": "int32", "u": "int32", "b": "bool"}.get(array.dtype.kind, "float32")  # type: ignore[assignment]
            array = array.astype(NUMPY[str(dtype)])
        return self.array(self.builder.constant(array), array.shape, str(dtype))

    def to_numpy(self, x: Array) -> np.ndarray:
        raise TypeError("an ONNX graph is being written; it has no values yet")

    def cast(self, x: Array, dtype: DType) -> Array:
        if x.dtype == dtype:
            return x
        return self.array(self.builder.op("Cast", x.raw, to=int(TYPES[dtype])), x.shape, dtype, x.held)

    def reshape(self, x: Array, shape: Sequence[Any]) -> Array:
        full = list(shape)
        open_ = [i for i, one in enumerate(shape) if isinstance(one, int) and one == -1]
        if open_:
            known = product(one for i, one in enumerate(shape) if i != open_[0])
            full[open_[0]] = quotient(product(x.shape), known)
        return self.array(x.raw, tuple(full), x.dtype, x.held)

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        shape = tuple(x.shape[i] for i in axes)
        return self.array(self.builder.op("Transpose", x.value, perm=list(axes)), shape, x.dtype)

    def concat(self, xs: Sequence[Array], axis: int) -> Array:
        axis %= xs[0].ndim
        shape = list(xs[0].shape)
        for x in xs[1:]:
            shape[axis] = shape[axis] + x.shape[axis]
        return self.array(self.builder.op("Concat", *(x.value for x in xs), axis=axis), tuple(shape), xs[0].dtype)

    def split(self, x: Array, parts: int, axis: int) -> Sequence[Array]:
        axis %= x.ndim
        last = axis == x.ndim - 1 and x.held[-1] == x.shape[-1]  # a cut of the last axis leaves the others lazy
        shape, held = list(x.shape), list(x.held)
        shape[axis] = quotient(shape[axis], parts)
        if last:
            held[-1] = shape[axis]
        raw, along = (x.raw, -1) if last else (x.value, axis)
        made = self.builder.ops("Split", raw, outputs=parts, axis=along, num_outputs=parts)
        return [self.array(one, tuple(shape), x.dtype, tuple(held) if last else None) for one in made]

    def where(self, condition: Array, a: Any, b: Any) -> Array:
        like = a if isinstance(a, Array) else b
        assert isinstance(like, Array)
        values, shape = [], condition.shape
        for one in (a, b):
            if isinstance(one, Array):
                values.append(one.value)
                shape = broadcast(shape, one.shape)
            elif isinstance(one, Size):
                values.append(self.size(one))
            else:
                values.append(self.builder.constant(scalar(one, like.dtype)))
        return self.array(self.builder.op("Where", condition.value, *values), shape, like.dtype)

    def take(self, x: Array, index: Array, axis: int) -> Array:
        shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
        return self.array(self.builder.op("Gather", x.value, index.value, axis=axis), shape, x.dtype)

    def take_along(self, x: Array, index: Array, axis: int) -> Array:
        axis %= x.ndim
        shape = [*x.shape[:axis], index.shape[axis], *x.shape[axis + 1 :]]
        raw = index.value
        if list(index.shape) != shape:
            raw = self.builder.op("Expand", raw, self.shape_value(shape))
        return self.array(self.builder.op("GatherElements", x.value, raw, axis=axis), tuple(shape), x.dtype)

    def arange(self, n: int | Size) -> Array:
        if isinstance(n, int):
            return self.asarray(np.arange(n), "int32")
        stop = self.builder.op("Squeeze", self.size(n))
        zero, one = (self.builder.constant(i, np.int64) for i in (0, 1))
        return self.array(self.builder.op("Range", zero, stop, one), (n,), "int32")

    def matmul(self, a: Array, b: Array) -> Array:
        shape = (*broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        return self.array(self.builder.op("MatMul", a.value, b.value), shape, a.dtype)

    def grouped_matmul(self, x: Array, w: Array, counts: Array) -> Array:
        """Each group's rows are cut out by its count; for as many groups as a graph can have nodes for."""
        b = self.builder
        count, out, _ = w.shape
        runs = b.ops("Split", x.value, counts.value, outputs=count, axis=0)
        parts = []
        for i, run in enumerate(runs):
            one = b.op("Squeeze", b.op("Slice", w.value, b.ints(i), b.ints(i + 1), b.ints(0)), b.ints(0))
            parts.append(b.op("Gemm", run, one, transB=1))
        return self.array(b.op("Concat", *parts, axis=0), (x.shape[0], out), x.dtype)

    def reduce(self, x: Array, how: Reduction, axis: int, keepdims: bool = False) -> Array:
        axis %= x.ndim
        shape = (*x.shape[:axis], *((1,) if keepdims else ()), *x.shape[axis + 1 :])
        last = axis == x.ndim - 1 and x.held[-1] == x.shape[-1]
        raw = x.raw if last else x.value
        held = (*x.held[:-1], *((1,) if keepdims else ())) if last else None
        along = len(x.held) - 1 if last else axis
        if how == "argmax":
            made = self.builder.op("ArgMax", raw, axis=along, keepdims=int(keepdims))
            return self.array(made, shape, "int32", held)
        if how in ("any", "all"):
            whole = self.builder.op("Cast", raw, to=int(TYPES["int32"]))
            kind = "ReduceMax" if how == "any" else "ReduceMin"
            made = self.builder.op(kind, whole, self.builder.ints(along), keepdims=int(keepdims))
            return self.array(self.builder.op("Cast", made, to=int(ir.DataType.BOOL)), shape, "bool", held)
        made = self.builder.op(_REDUCTIONS[how], raw, self.builder.ints(along), keepdims=int(keepdims))
        return self.array(made, shape, x.dtype, held)

    def unary(self, x: Array, how: Unary) -> Array:
        if how == "rsqrt":
            made = self.builder.op("Reciprocal", self.builder.op("Sqrt", x.raw))
        else:
            made = self.builder.op(_UNARY[how], x.raw)
        return self.array(made, x.shape, x.dtype, x.held)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        shape = (*x.shape[:-1], k)
        top, index = self.builder.ops("TopK", x.value, self.builder.ints(k), outputs=2, axis=-1, largest=1, sorted=1)
        return self.array(top, shape, x.dtype), self.array(index, shape, "int32")

    def argsort(self, x: Array) -> Array:
        _, index = self.builder.ops(
            "TopK", x.value, self.size(x.shape[-1]), outputs=2, axis=-1, largest=0, sorted=1
        )  # of equals the one with the smaller index comes first
        return self.array(index, x.shape, "int32")

    def cumsum(self, x: Array, axis: int) -> Array:
        return self.array(
            self.builder.op("CumSum", x.value, self.builder.constant(axis % x.ndim, np.int64)), x.shape, x.dtype
        )
