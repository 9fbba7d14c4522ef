"""The ONNX backend's fused ops: the same as `core/ops.py` has them, in the operators that runtimes are fast at.

linear         Gemm on [rows, D] with the weight as the checkpoint has it, transposed by an attribute
norms, rotary  RMSNormalization-23 and RotaryEmbedding-23
attention      Attention-23, whose past inputs are the cache; masks only where the span is causal
experts        the function `dgemma::GegluMoE` (`experts.py`)
head           `head.py`; of classes of tokens `classes.py`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.parts import KV, Masses, Rope, Span
from ..core.primitives import DType
from . import packed
from .arrays import Array, Size, product
from .classes import class_head
from .experts import geglu_moe
from .graph import Builder
from .head import mean_embedding, scores, vocab_head
from .primitives import PrimitiveOps
from .weights import PackedPlaces

if TYPE_CHECKING:
    from ..core.parts import Attention, Experts, Mlp, Router


@dataclass(frozen=True, eq=False)
class Heads:
    """Queries, keys or values as the projections leave them: [B, H, L, A] by its shape, [B, L, H·A] in memory."""

    value: Array  # (B, L, H·A)
    count: int

    @property
    def shape(self) -> tuple[Any, ...]:
        batch, length, width = self.value.shape
        return batch, self.count, length, width // self.count

    def apart(self, ops: PrimitiveOps) -> Array:
        """The array that the shape says."""
        batch, count, length, width = self.shape
        return ops.transpose(ops.reshape(self.value, (batch, length, count, width)), (0, 2, 1, 3))


class OnnxOps(PrimitiveOps):
    """Writes `encode` and `denoise` for ONNX Runtime."""

    def __init__(self, builder: Builder, dtype: DType = "float32", **target: Any) -> None:
        """`target` as in `PrimitiveOps`."""
        super().__init__(builder, dtype, **target)
        self._masks: dict[Any, Any] = {}
        self._present: dict[Any, KV] = {}

    def pack(self, weight: Any) -> Any:
        return weight.pack(self)

    # ---- Dense layers -----------------------------------------------------------------------------------------

    def embed(self, table: Any, tokens: Array, scale: float) -> Array:
        rows = product(tokens.shape)
        ids = self.reshape(tokens, (rows,)).value
        width = table.shape[1]
        if isinstance(table, PackedPlaces):
            picked = packed.take(self, table, ids, (rows,)).value
        else:
            picked = self.builder.op("Gather", table.value, ids)
        return self.array(picked, (*tokens.shape, width), self.dtype, (rows, width)) * self.rounded(scale)

    def linear(self, x: Array, weight: Any) -> Array:
        if isinstance(weight, PackedPlaces):
            return packed.linear(self, x, weight)
        out = weight.shape[0]
        made = self.builder.op("Gemm", x.rows(), weight.value, transB=1)
        return self.array(made, (*x.shape[:-1], out), self.dtype, (product(x.shape[:-1]), out))

    def rms_norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        width = x.shape[-1]
        scale = self.builder.constant(np.ones(width, self.numpy_type)) if weight is None else weight.value
        made = self.builder.op("RMSNormalization", x.rows(), scale, axis=-1, epsilon=eps)
        return self.array(made, x.shape, self.dtype, (product(x.shape[:-1]), width))

    def gelu_times(self, gate: Array, up: Array) -> Array:
        bent = self.builder.op("Gelu", gate.raw, approximate="tanh")
        return self.array(bent, gate.shape, gate.dtype, gate.held) * up

    def geglu(self, x: Array, mlp: Mlp) -> Array:
        return self.gelu_times(self.linear(x, mlp.gate_proj), self.linear(x, mlp.up_proj))

    def moe(self, h: Array, r: Array, router: Router, experts: Experts) -> Array:
        return geglu_moe(self, h, r, router, experts)

    # ---- Attention --------------------------------------------------------------------------------------------

    def qkv_norm_rope(self, x: Array, attention: Attention, rope: Rope) -> tuple[Any, Any, Any]:
        config, eps = attention.config, attention.eps
        batch, length, _ = x.shape

        def heads(y: Array, count: int, weight: Array | None) -> Array:
            y = self.rms_norm(self.reshape(y, (batch, length, count, config.head_dim)), weight, eps)
            return self.reshape(y, (batch, length, count * config.head_dim))

        def turned(y: Array, count: int) -> Heads:
            cos, sin = (self.reshape(one, (batch, length, config.head_dim // 2)) for one in (rope.cos, rope.sin))
            made = self.builder.op("RotaryEmbedding", y.value, cos.value, sin.value, num_heads=count)
            return Heads(self.array(made, y.shape, y.dtype), count)

        k = self.linear(x, attention.k_proj)
        # A full layer has no v_proj: its value is the key projection before the key's norm.
        v = k if attention.v_proj is None else self.linear(x, attention.v_proj)
        q = turned(heads(self.linear(x, attention.q_proj), config.heads, attention.q_norm), config.heads)
        return (
            q,
            turned(heads(k, config.kv_heads, attention.k_norm), config.kv_heads),
            Heads(heads(v, config.kv_heads, None), config.kv_heads),
        )

    def attention(self, q: Any, k: Any, v: Any, context: KV, span: Span) -> Array:
        """`span.held` and `slots` are not asked: here row b has cache b, and every entry of it is valid."""
        past = (context.keys.value, context.values.value)
        mask = self._mask(context.keys.shape[2], q.shape[2], span.window) if span.causal else None
        out, keys, values = self.builder.ops(
            "Attention", q.value.value, k.value.value, v.value.value, mask, *past,
            outputs=3, scale=1.0, q_num_heads=q.count, kv_num_heads=k.count,
        )  # fmt: skip
        batch, count, cached, width = context.keys.shape
        shape = (batch, count, cached + k.shape[2], width)
        self._present[k] = KV(self.array(keys, shape, self.dtype), self.array(values, shape, self.dtype))
        return self.array(out, q.value.shape, self.dtype)

    def _mask(self, cached: Any, length: Any, window: int | None) -> Any:
        """Return the causal span as a mask [L, S + L], the same value for every layer that has the same one."""
        key = (cached, length, window)
        if key not in self._masks:
            query = self.reshape(self.arange(length) + cached, (length, 1))
            ahead = query - self.reshape(self.arange(cached + length), (1, cached + length))
            near = ahead >= 0
            self._masks[key] = (near if window is None else near & (ahead < window)).value
        return self._masks[key]

    def cache_write(self, context: KV, k: Any, v: Any, span: Span, fresh: Any) -> KV:
        """The cache is what the attention op put together; with a window, its newest rows."""
        present = self._present.get(k) or KV(
            *(self.concat([old, new.apart(self)], 2) for old, new in zip(context, (k, v), strict=True))
        )
        if span.window is None:
            return present
        b, held = self.builder, span.window - 1

        def newest(x: Array) -> Array:
            raw = b.op("Slice", x.value, b.ints(-held), b.ints(np.iinfo(np.int64).max), b.ints(2))
            return self.array(raw, (*x.shape[:2], Size.named("present_sliding_length"), x.shape[3]), self.dtype)

        return KV(newest(present.keys), newest(present.values))

    # ---- Head -------------------------------------------------------------------------------------------------

    def logits(self, x: Array, table: Any, softcap: float) -> Array:
        rows = (product(x.shape[:-1]), table.shape[0])
        return self.array(scores(self, x, table, softcap), (*x.shape[:-1], table.shape[0]), self.wide, rows) * softcap

    def vocab_head(
        self, x: Array, table: Any, softcap: float, temperature: Array, u: Array
    ) -> tuple[Array, Array, Array, Array]:
        return vocab_head(self, x, table, softcap, temperature, u)

    def mean_embedding(self, probabilities: Array, table: Any) -> Array:
        return mean_embedding(self, probabilities, table)

    def class_head(
        self, x: Array, table: Any, softcap: float, temperature: Array, classes: Array, count: Any
    ) -> tuple[Array, Masses]:
        return class_head(self, x, table, softcap, temperature, classes, count)
