"""The graph's ops on MLX: Apple silicon through Metal, and Linux through `mlx[cpu]`.

All of it is the same code on both. Only the CPU is run in this project's tests; a line that depends on the device says
so, and what it does on Metal is unverified here. On the CPU `mx.fast` falls back to MLX's plain ops.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ...checkpoints.loading import dense
from ...checkpoints.quant import QTensor
from ...core.errors import DgemmaError
from ...core.ops import Ops
from ...core.parts import KV, Attention, Experts, Masses, Mlp, Rope, Router, Span
from ...core.primitives import DType, Reduction, Unary
from . import attention as attending
from .classes import Layouts
from .experts import expert_mlp, gated, grouped_matmul
from .head import capped, class_head, vocab_head
from .packed import QuantizedTensor, Weight, mix, project

Array = mx.array

MLX_DTYPES: dict[str, mx.Dtype] = {
    "float64": mx.float64, "float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16, "int32": mx.int32,
    "bool": mx.bool_,
}  # fmt: skip


class MlxOps(Ops):
    """The mlx backend of `dgemma.load`: float32, bfloat16 or float16, on MLX's default device.

    With `compile` element-wise functions, and the passes over these ops, go through `mx.compile`. On the CPU MLX
    compiles its kernels with the system's `g++`, once per machine; where there is none, they run as they are.
    """

    name = "mlx"

    def __init__(self, dtype: DType = "float32", *, compile: bool = False) -> None:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise DgemmaError(f"the mlx backend computes in float32, bfloat16 or float16, not in {dtype}")
        self.dtype = dtype
        self.wide = "float32"
        self.on_cpu = mx.default_device().type == mx.cpu
        self.device = "cpu" if self.on_cpu else "gpu"
        self._counts: dict[int, Array] = {}
        self._layouts = Layouts()
        self.compiles = compile and not (self.on_cpu and shutil.which("g++") is None)
        self.gated = mx.compile(gated) if self.compiles else gated

    # ---- Primitives -------------------------------------------------------------------------------------------

    def asarray(self, x: Any, dtype: DType | None = None) -> Array:
        if isinstance(x, np.ndarray) and x.dtype.name == "bfloat16":  # ml_dtypes' own type: MLX reads its bits
            x = mx.array(x.view(np.uint16)).view(mx.bfloat16)
        wanted = None if dtype is None else MLX_DTYPES[dtype]
        if isinstance(x, mx.array):
            return x if wanted is None else x.astype(wanted)
        return mx.array(x, wanted)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)

    def cast(self, x: Array, dtype: DType) -> Array:
        return x.astype(MLX_DTYPES[dtype])

    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        return x.reshape(tuple(shape))

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        return x.transpose(tuple(axes))

    def concat(self, xs: Sequence[Array], axis: int) -> Array:
        return mx.concatenate(list(xs), axis)

    def split(self, x: Array, parts: int, axis: int) -> Sequence[Array]:
        return list(mx.split(x, parts, axis))

    def where(self, condition: Array, a: Any, b: Any) -> Array:
        return mx.where(condition, a, b)

    def take(self, x: Array, index: Array, axis: int) -> Array:
        return mx.take(x, index, axis)

    def take_along(self, x: Array, index: Array, axis: int) -> Array:
        return mx.take_along_axis(x, index, axis)

    def arange(self, n: int) -> Array:
        # A constant and one object, because MLX's compiler merges equal operations only where their inputs are.
        if n not in self._counts:
            self._counts[n] = mx.array(np.arange(n, dtype=np.int32))
        return self._counts[n]

    def matmul(self, a: Array, b: Array) -> Array:
        return a @ b

    def grouped_matmul(self, x: Array, w: Array, counts: Array) -> Array:
        ends = mx.cumsum(counts)
        group = (self.arange(x.shape[0])[:, None] >= ends).astype(mx.int32).sum(-1)
        return grouped_matmul(x[:, None], w, group).squeeze(1)

    def reduce(self, x: Array, how: Reduction, axis: int, keepdims: bool = False) -> Array:
        out = getattr(mx, how)(x, axis=axis, keepdims=keepdims)
        return out.astype(mx.int32) if how == "argmax" else out

    def unary(self, x: Array, how: Unary) -> Array:
        return getattr(mx, how)(x)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        index = mx.argpartition(x, -k, axis=-1)[..., -k:].astype(mx.int32)
        return mx.take_along_axis(x, index, -1), index

    def argsort(self, x: Array) -> Array:
        return mx.argsort(x, axis=-1).astype(mx.int32)

    def cumsum(self, x: Array, axis: int) -> Array:
        return mx.cumsum(x, axis)

    # ---- Dense layers -----------------------------------------------------------------------------------------

    def embed(self, table: Weight, tokens: Array, scale: float) -> Array:
        if isinstance(table, QuantizedTensor):  # the rows that are read, and no others, are unpacked
            return table[tokens].dequantized().astype(MLX_DTYPES[self.dtype]) * self.rounded(scale)
        return super().embed(table, tokens, scale)

    def linear(self, x: Array, weight: Weight) -> Array:
        return project(x, weight)

    def rms_norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        return mx.fast.rms_norm(x, weight, eps)

    def qkv_norm_rope(self, x: Array, attention: Attention, rope: Rope) -> tuple[Array, Array, Array]:
        batch, length, width = x.shape
        config = attention.config
        heads, kv_heads = config.heads, config.kv_heads
        rows = x.reshape(-1, width)
        weights = (attention.q_proj, attention.k_proj, attention.v_proj)
        projected = mx.concatenate([self.linear(rows, weight) for weight in weights if weight is not None], -1)
        # One norm serves all: the value's has no weight, and on full layers the value is the key before its own.
        normed = self.rms_norm(projected.reshape(batch, length, -1, config.head_dim), None, attention.eps)
        q, k, v = normed[:, :, :heads], normed[:, :, heads : heads + kv_heads], normed[:, :, -kv_heads:]
        q, k = attending.rotate(q, attention.q_norm, rope), attending.rotate(k, attention.k_norm, rope)
        return q, k, v.transpose(0, 2, 1, 3)

    def geglu(self, x: Array, mlp: Mlp) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        gate, up = self.linear(rows, mlp.gate_proj), self.linear(rows, mlp.up_proj)
        return self.gated(gate, up).reshape(*x.shape[:-1], -1)

    def moe(self, h: Array, r: Array, router: Router, experts: Experts) -> Array:
        width, k = h.shape[-1], router.experts_per_token
        scores = self.linear(self.rms_norm(r.reshape(-1, width), router.scale, router.eps), router.proj)
        index = mx.argpartition(scores, -k, axis=-1)[:, -k:]
        # The softmax of the chosen scores is the softmax over all experts, renormalised.
        top = mx.take_along_axis(scores, index, -1).astype(mx.float32) * width**-0.5
        weights = mx.softmax(top, axis=-1) * router.per_expert_scale[index]
        rows = h.reshape(-1, 1, width)
        out = expert_mlp(rows, index, weights, experts.gate_up_proj, experts.down_proj, self.gated)
        return out.reshape(h.shape)

    # ---- Attention and its cache ------------------------------------------------------------------------------

    def attention(self, q: Array, k: Array, v: Array, context: KV, span: Span) -> Array:
        out = attending.attention(self, q, k, v, context, span)
        return out.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)

    def cache_write(self, context: KV, k: Array, v: Array, span: Span, fresh: int | Array) -> KV:
        """The default body where rows have slots; else as long as what it may hold by now, see `attention.append`."""
        if span.slots is not None:
            return super().cache_write(context, k, v, span, fresh)
        return attending.append(context, k, v, span, fresh)

    # ---- Head -------------------------------------------------------------------------------------------------

    def logits(self, x: Array, table: Weight, softcap: float) -> Array:
        return capped(self.linear(x, table), softcap)

    def mean_embedding(self, probabilities: Array, table: Weight) -> Array:
        dtype = MLX_DTYPES[self.dtype]
        return mix(probabilities, table, dtype).astype(dtype)

    def vocab_head(
        self, x: Array, table: Weight, softcap: float, temperature: Array, u: Array
    ) -> tuple[Array, Array, Array, Array]:
        return vocab_head(self, x, table, softcap, temperature, u)

    def class_head(
        self, x: Array, table: Weight, softcap: float, temperature: Array, classes: Array, count: int
    ) -> tuple[Array, Masses]:
        """Not to be compiled: how classes are laid out follows what is in the array."""
        soft, found = class_head(x, table, softcap, temperature, partial(self._layouts.of, classes, count))
        return soft, Masses(*found)

    # ---- Weights ----------------------------------------------------------------------------------------------

    def pack(self, weight: Any) -> Weight:
        """Copy one stored weight into MLX's own memory; nothing of the memory map is held.

        A quantized one stays packed, with the biases of symmetric formats beside it; one that Metal's kernels would
        misread (nvfp4 in rows that are no multiple of 32 weights) is dequantized here. Each is copied once, by itself:
        loading never holds more than the weights so far and one of them.
        """
        if isinstance(weight, QTensor) and QuantizedTensor.fits(weight):
            return QuantizedTensor.from_host(weight, wide=self.dtype == "float32")
        array = self.asarray(dense(weight, self.dtype), self.dtype)
        if self.on_cpu and array.ndim > 1 and array.dtype == mx.float32:
            # The CPU's BLAS is a quarter faster where the inner dimension is not the contiguous one. A shape is no
            # layout: the array still reads [F, D].
            array = mx.contiguous(array.swapaxes(-1, -2)).swapaxes(-1, -2)
        mx.eval(array)  # or a cast would keep the stored width alive until the weight is first used
        return array
