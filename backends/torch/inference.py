"""Fast inference in PyTorch, CPU and CUDA: the fused ops of `TorchOps`, written for speed and without gradients.

What is done differently from the default bodies, and why:
    cache      reserved once and written in place; a canvas's keys go into the tail, so a pass copies no context
    experts    rows sorted by expert and only the experts that are hit (`experts.py`)
    head       one [L, V] buffer, worked through in blocks of rows that stay in the processor's own cache (`head.py`)
    norms      one read for the mean square, one for the product
    weights    large ones stay as the file has them, packed (`packed.py`) or narrow; a block is dequantized or widened
               when it is used (`blocks.py`)
    products   in the width that the processor multiplies (`processor.py`): float32 where bfloat16 is emulated
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from ...checkpoints.quant import QTensor
from ...core.errors import DgemmaError
from ...core.memory import stays_narrow
from ...core.ops import KV, DType, Rope, Span
from . import blocks, processor
from .blocks import Weight
from .experts import expert_mlp, gelu_times
from .head import VocabHead
from .packed import QuantizedTensor, Scratch, dequantize, from_numpy
from .primitives import TORCH_DTYPES, Array, TorchOps

if TYPE_CHECKING:
    from ...core.model import Attention, Experts, Router


BUCKET = 512
"""Rows that a compiled pass's cache is rounded up to: one compilation serves every context within a bucket."""


class InferenceOps(TorchOps):
    """The torch backend of `dgemma.load`: float32, bfloat16 or float16, no gradients.

    `products` is the width of matrix products, the dtype's own or float32; by default what the processor is made for.
    Where they are wider than the dtype, sums are float32 and what passes between the ops is rounded to the dtype.

    With `compile`, functions given to `ops.compile` go through `torch.compile(fullgraph=True)`; give them the
    cache's length as an int32 tensor, or every new length is compiled anew.
    """

    def __init__(
        self, dtype: DType = "float32", device: str = "cpu", *, compile: bool = False, products: DType | None = None
    ) -> None:  # fmt: skip
        super().__init__(dtype, device)
        by_default = processor.multiplies(dtype) if self.device.type == "cpu" else dtype
        self._product = TORCH_DTYPES[products or by_default]
        self.compiles = compile
        self.maps_weights = self.reserves_cache = self.device.type == "cpu"
        self._scratch = Scratch()
        self._head = VocabHead(self._scratch)

    # ---- Weights and dense layers -----------------------------------------------------------------------------

    def pack(self, weight: Any) -> Weight:
        """Bring one stored weight to the device.

        On the CPU the memory map itself is the tensor where widths agree, always where the weight is quantized, which
        then stays packed, and where it is large and narrower than the compute dtype.
        """
        if isinstance(weight, QTensor):
            return QuantizedTensor.from_host(weight, self.device)
        stored, dtype = from_numpy(np.asarray(weight)), TORCH_DTYPES[self.dtype]
        narrow = stored.is_floating_point() and stored.element_size() < dtype.itemsize
        if narrow and self.device.type == "cpu" and stays_narrow(stored.shape):
            return stored
        return stored.to(device=self.device, dtype=dtype)

    def asarray(self, x: Any, dtype: DType | None = None) -> Array:
        array = super().asarray(x, dtype)
        # NumPy's `x[None]` has stride 0, which a compiled function takes for another layout and compiles anew.
        return array.clone(memory_format=torch.contiguous_format) if self.compiles else array

    def embed(self, table: Weight, tokens: Array, scale: float) -> Array:
        if isinstance(table, QuantizedTensor):
            return dequantize(table[tokens], TORCH_DTYPES[self.dtype]) * self.rounded(scale)
        return F.embedding(tokens, table).to(TORCH_DTYPES[self.dtype]) * self.rounded(scale)

    def linear(self, x: Array, weight: Weight) -> Array:
        return self._multiply(x.to(self._product), weight).to(x.dtype)

    def _multiply(self, x: Array, weight: Weight) -> Array:
        if blocks.ready(weight, x.dtype):
            return F.linear(x, weight)  # type: ignore[arg-type]
        if torch.compiler.is_compiling():
            return torch.ops.dgemma.packed_linear(x, *blocks.flat(weight), 1.0)
        return blocks.linear(x, weight, self._scratch)

    def rms_norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        wide = x.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        normed = wide * square.add_(eps).rsqrt_()
        return (normed if weight is None else normed.mul_(weight)).to(x.dtype)

    def norm_add(self, x: Array, residual: Array, weight: Array, eps: float) -> Array:
        return self.rms_norm(x, weight, eps).add_(residual)

    def qkv_norm_rope(self, x: Array, attention: Attention, rope: Rope) -> tuple[Array, Array, Array]:
        config, eps = attention.config, attention.eps
        shape = (x.shape[0], x.shape[1], -1, config.head_dim)
        q = self.linear(x, attention.q_proj).view(shape)
        k = self.linear(x, attention.k_proj).view(shape)
        v = k if attention.v_proj is None else self.linear(x, attention.v_proj).view(shape)
        v = self.rms_norm(v, None, eps)
        q = _rotate(self.rms_norm(q, attention.q_norm, eps), rope)
        k = _rotate(self.rms_norm(k, attention.k_norm, eps), rope)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def geglu(self, x: Array, gate: Weight, up: Weight) -> Array:
        return gelu_times(self.linear(x, gate), self.linear(x, up))

    def moe(self, h: Array, r: Array, router: Router, experts: Experts) -> Array:
        rows = r.reshape(-1, r.shape[-1])
        # Routing is computed wide even in low precision: a rounded score can pick another expert, at no gain in speed.
        scale = router.scale.to(TORCH_DTYPES[self.wide]) * r.shape[-1] ** -0.5
        proj = router.proj
        proj = dequantize(proj, scale.dtype) if isinstance(proj, QuantizedTensor) else proj.to(scale.dtype)
        scores = F.linear(self.rms_norm(rows.to(scale.dtype), scale, router.eps), proj)
        top, index = scores.topk(router.experts_per_token, -1)
        # The softmax of the chosen scores is the softmax over all experts, renormalised.
        weights = top.softmax(-1) * router.per_expert_scale[index]
        both = experts.gate_up_proj, experts.down_proj
        out = expert_mlp(h.reshape(rows.shape).to(self._product), index, weights, *both, self._scratch)
        return out.to(h.dtype).view(h.shape)

    # ---- Attention and its cache ------------------------------------------------------------------------------

    def new_cache(self, batch: int, kv_heads: int, head_dim: int, capacity: int) -> KV:
        if self.compiles:
            capacity = -(-capacity // BUCKET) * BUCKET
        shape = (batch, kv_heads, capacity, head_dim)
        keys, values = (torch.zeros(shape, dtype=TORCH_DTYPES[self.dtype], device=self.device) for _ in range(2))
        return KV(keys, values)

    def attention(self, q: Array, k: Array, v: Array, context: KV, span: Span) -> Array:
        """Attend over a view of the cache, with the query's own keys laid into the rows behind the valid ones."""
        batch, heads, length, width = q.shape
        if span.canvas:
            read = length - span.canvas
            (q, last_q), (k, last_k), (v, last_v) = (x.split([read, span.canvas], 2) for x in (q, k, v))
            first = self.attention(q, k, v, context, replace(span, canvas=0))
            # Their keys now stand behind the cached ones, and are to the canvas what those are.
            ahead = Span(rows=span.rows + read, window=span.window, causal=False)
            return torch.cat([first, self.attention(last_q, last_k, last_v, context, ahead)], 1)
        if isinstance(span.rows, int):
            _lay(context, k, v, span.rows)
            first, mask, causal = 0, None, False
            if span.causal:
                mask, causal = _causal_mask(span, length, q.device)
            elif span.window is not None:
                first = max(0, span.rows - span.window + 1)
            keys, values = (x[:, :, first : span.rows + length] for x in context)
        else:
            _lay_ragged(context, k, v, span.rows)
            mask, causal = _ragged_mask(span, length, context.keys.shape[2]), False
            keys, values = context
        out = F.scaled_dot_product_attention(
            *(x.to(self._product) for x in (q, keys, values)),
            attn_mask=mask, is_causal=causal, scale=1.0, enable_gqa=heads != k.shape[1],
        )  # fmt: skip
        return out.to(q.dtype).transpose(1, 2).reshape(batch, length, heads * width)

    def cache_write(self, context: KV, k: Array, v: Array, span: Span, fresh: int | Array) -> KV:
        held = None if span.window is None else span.window - 1
        if isinstance(span.rows, int) and isinstance(fresh, int):
            if held is None or span.rows + fresh <= held:
                _lay(context, k[:, :, :fresh], v[:, :, :fresh], span.rows)
                return context
            kept = max(0, held - fresh)  # of the old rows
            for cached, new in ((context.keys, k), (context.values, v)):
                cached[:, :, :kept] = cached[:, :, span.rows - kept : span.rows].clone()  # the two may overlap
                cached[:, :, kept:held] = new[:, :, fresh - (held - kept) : fresh]
            return context
        rows = torch.as_tensor(span.rows, dtype=torch.int32, device=k.device).expand(k.shape[0])
        _lay_ragged(context, k, v, rows)  # rows beyond `fresh` land beyond the valid ones
        if held is None:
            return context
        size = min(held, context.keys.shape[2])
        drop = (rows + fresh - held).clamp(min=0)
        source = torch.arange(size, device=k.device) + drop[:, None]
        source = source.clamp(max=context.keys.shape[2] - 1)[:, None, :, None].long()
        for cached in context:
            cached[:, :, :size] = cached.gather(2, source.expand(-1, cached.shape[1], -1, cached.shape[3]))
        return context

    # ---- Head -------------------------------------------------------------------------------------------------

    def logits(self, x: Array, table: Weight, softcap: float) -> Array:
        scores = self._multiply(x.to(self._product), table).to(TORCH_DTYPES[self.wide])
        return scores.div_(softcap).tanh_().mul_(softcap)

    def mean_embedding(self, probabilities: Array, table: Weight) -> Array:
        shares = probabilities.to(self._product)
        if blocks.ready(table, shares.dtype):
            return self.cast(torch.matmul(shares, table), self.dtype)  # type: ignore[arg-type]
        mean = blocks.mix(shares.reshape(-1, shares.shape[-1]), table, self._scratch)
        return self.cast(mean, self.dtype).view(*shares.shape[:-1], -1)

    def vocab_head(
        self, x: Array, table: Weight, softcap: float, temperature: Array, u: Array
    ) -> tuple[Array, Array, Array, Array]:
        *found, soft = self._head(x.to(self._product), table, softcap, temperature, u)
        return *found, soft.to(x.dtype)  # type: ignore[return-value]

    # ---- Running ----------------------------------------------------------------------------------------------

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self.compiles:
            return function
        # Marked here and not by a decorator, which would import the compiler, seconds of it, for everybody.
        torch.compiler.assume_constant_result(InferenceOps.rounded)
        return torch.compile(function, fullgraph=True, dynamic=False)

    def rounded(self, value: float) -> float:
        return super().rounded(value)  # NumPy: not for the compiler to trace

    def extent(self, length: int) -> int | Array:
        return torch.tensor([length], dtype=torch.int32, device=self.device) if self.compiles else length

    @contextmanager
    def guarded(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            raise DgemmaError(f"out of memory while {doing}; take a shorter context or a smaller recipe") from None

    def synchronize(self, *arrays: Array) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def _rotate(x: Array, rope: Rope) -> Array:
    """Rotate pairs (i, i + A/2) of x [B, L, H, A]."""
    cos, sin = rope.cos.transpose(1, 2), rope.sin.transpose(1, 2)  # [B or 1, L, 1, A/2]
    a, b = x.chunk(2, -1)
    return torch.cat([(a * cos).addcmul_(b, sin, value=-1.0), (b * cos).addcmul_(a, sin)], -1)


def _lay(context: KV, k: Array, v: Array, rows: int) -> None:
    """Write k and v [B, K, L, A] into the cache's rows from `rows` on."""
    context.keys[:, :, rows : rows + k.shape[2]] = k
    context.values[:, :, rows : rows + k.shape[2]] = v


def _lay_ragged(context: KV, k: Array, v: Array, rows: Array) -> None:
    """`_lay`, with a place of its own for each sequence: rows int32 [B]."""
    where = rows[:, None] + torch.arange(k.shape[2], device=k.device)  # [B, L]
    batch = torch.arange(k.shape[0], device=k.device)[:, None]
    context.keys[batch, :, where] = k.transpose(1, 2)
    context.values[batch, :, where] = v.transpose(1, 2)


def _causal_mask(span: Span, length: int, device: torch.device) -> tuple[Array | None, bool]:
    """Return the mask [L, rows + L] of a causal span, or none and SDPA's own causal flag where that says it all."""
    window = span.window or math.inf
    if span.rows == 0 and length <= window:
        return None, True
    j = torch.arange(span.rows + length, device=device)
    ahead = torch.arange(span.rows, span.rows + length, device=device)[:, None] - j  # query's place minus key's
    mask = ahead >= 0
    if span.rows + length > window:
        mask &= ahead < window
    return mask, False


def _ragged_mask(span: Span, length: int, capacity: int) -> Array:
    """Return the mask [B, 1, L or 1, S] of a span with its own number of rows for each sequence."""
    rows: Array = span.rows[:, None, None]  # type: ignore[index]
    window = span.window or 1 << 30
    i = torch.arange(length, device=rows.device, dtype=torch.int32)[:, None]
    j = torch.arange(capacity, device=rows.device, dtype=torch.int32)
    if span.causal:
        ahead = rows + i - j  # own key j' stands at column rows + j'
        mask = (ahead >= 0) & (ahead < window)
    else:
        mask = (j < rows + length) & (rows - j < window)
    return mask[:, None]
