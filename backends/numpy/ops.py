"""The primitives in NumPy: clear before fast.

float64 is the oracle that the other backends' ops are held to; float32 is the oracle's float32. In bfloat16 and float16
every op rounds its result (matrix products accumulate in float32 and round once), which is the "oracle's own error"
of the tolerance law.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...checkpoints.loading import dense
from ...core.ops import Ops
from ...core.parts import KV, NOTHING, Masses, Span
from ...core.primitives import NUMPY_DTYPES, DType, Reduction, Unary

Array = np.ndarray


class NumpyOps(Ops):
    name = "numpy"

    def __init__(self, dtype: DType = "float32") -> None:
        self.dtype = dtype
        self.wide = "float64" if dtype == "float64" else "float32"

    def asarray(self, x: Any, dtype: DType | None = None) -> Array:
        return np.asarray(x, None if dtype is None else NUMPY_DTYPES[dtype])

    def to_numpy(self, x: Array) -> Array:
        return x.astype(np.float32) if x.dtype == NUMPY_DTYPES["bfloat16"] else np.asarray(x)

    def cast(self, x: Array, dtype: DType) -> Array:
        return x.astype(NUMPY_DTYPES[dtype], copy=False)

    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        return x.reshape(shape)

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        return x.transpose(axes)

    def concat(self, xs: Sequence[Array], axis: int) -> Array:
        return np.concatenate(xs, axis)

    def split(self, x: Array, parts: int, axis: int) -> Sequence[Array]:
        return np.split(x, parts, axis)

    def where(self, condition: Array, a: Any, b: Any) -> Array:
        return np.where(condition, a, b)

    def take(self, x: Array, index: Array, axis: int) -> Array:
        return np.take(x, index, axis)

    def take_along(self, x: Array, index: Array, axis: int) -> Array:
        return np.take_along_axis(x, index, axis)

    def arange(self, n: int) -> Array:
        return np.arange(n, dtype=np.int32)

    def matmul(self, a: Array, b: Array) -> Array:
        if a.dtype.itemsize > 2:
            return np.matmul(a, b)
        return np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype)

    def grouped_matmul(self, x: Array, w: Array, counts: Array) -> Array:
        runs = np.split(x, np.cumsum(counts)[:-1])
        return np.concatenate([self.matmul(run, one.T) for run, one in zip(runs, w, strict=True)])

    def reduce(self, x: Array, how: Reduction, axis: int, keepdims: bool = False) -> Array:
        out = getattr(np, how)(x, axis=axis, keepdims=keepdims)
        return out.astype(np.int32) if how == "argmax" or x.dtype == np.int32 else out

    def unary(self, x: Array, how: Unary) -> Array:
        return 1.0 / np.sqrt(x) if how == "rsqrt" else getattr(np, how)(x)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        index = np.argsort(-x, axis=-1, kind="stable")[..., :k].astype(np.int32)
        return np.take_along_axis(x, index, -1), index

    def argsort(self, x: Array) -> Array:
        return np.argsort(x, axis=-1, kind="stable").astype(np.int32)

    def cumsum(self, x: Array, axis: int) -> Array:
        return np.cumsum(x, axis, dtype=x.dtype)

    def cache_write(self, context: KV, k: Array, v: Array, span: Span, fresh: int | Array) -> KV:
        """The default body, row by row and in place."""
        slots = range(len(k)) if span.slots is None else span.slots
        counts = np.broadcast_to(fresh, len(k))
        for row, (slot, held, count) in enumerate(zip(slots, span.held, counts, strict=True)):
            kept = held + count if span.window is None else min(held + count, span.window - 1)
            for old, new in ((context.keys, k), (context.values, v)):
                both = np.concatenate([old[slot, :, :held], new[row, :, :count]], 1)
                old[slot, :, :kept] = both[:, both.shape[1] - kept :]
        return context

    def class_head(
        self, x: Array, table: Array, softcap: float, temperature: Array, classes: Array, count: int
    ) -> tuple[Array, Masses]:
        """The default body with each class's tokens side by side, and not one class after the other."""
        scores = self.logits(x, table, softcap) / np.reshape(temperature, (-1, 1, 1))
        shifted = scores - scores.max(-1, keepdims=True)
        raw = np.exp(shifted)
        total = raw.sum(-1, keepdims=True)
        logs, probabilities = shifted - np.log(total), raw / total
        soft = self.mean_embedding(probabilities, table)
        live = np.flatnonzero(classes >= 0)
        live = live[np.argsort(classes[live], kind="stable")]
        found = np.unique(classes[live])  # those that have tokens
        starts = np.searchsorted(classes[live], found)
        shape = (*x.shape[:2], count)
        mass, score = (np.full(shape, NOTHING, logs.dtype) for _ in range(2))
        best, moment = np.zeros(shape, np.int32), np.zeros(shape, logs.dtype)
        if len(live):
            logs, probabilities = logs[..., live], probabilities[..., live]
            score[..., found] = top = np.maximum.reduceat(logs, starts, -1)
            sizes = np.diff(np.append(starts, len(live)))
            at = np.where(logs == np.repeat(top, sizes, -1), live, len(classes) - 1)
            best[..., found] = np.minimum.reduceat(at, starts, -1)
            with np.errstate(divide="ignore"):
                share = np.log(np.add.reduceat(probabilities, starts, -1))
            mass[..., found] = np.maximum(share, top)
            moment[..., found] = np.add.reduceat(np.multiply(probabilities, logs, out=logs), starts, -1)
        return soft, Masses(mass, best, score, moment)

    def pack(self, weight: Any) -> Array:
        """Return one stored weight; a quantized one is dequantized."""
        with np.errstate(over="ignore"):  # beyond float16: infinite, and so will be what a pass comes to
            return self.asarray(dense(weight, self.dtype), self.dtype)

    def rounded(self, value: float) -> float:
        return NUMPY_DTYPES[self.dtype](value)  # a Python float would widen ml_dtypes' bfloat16 arrays to float32
