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
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ...checkpoints.quant import QTensor
from ...core.memory import stays_narrow
from ...core.parts import KV, Attention, Experts, Masses, Mlp, Rope, Router, Span
from ...core.primitives import DType
from . import blocks, processor
from .blocks import Weight
from .experts import expert_mlp, gelu_times
from .head import VocabHead
from .packed import QuantizedTensor, Workspace, converted, dequantize, from_numpy
from .primitives import TORCH_DTYPES, Array, TorchOps

TOGETHER = 1 << 21
"""Scores, up to which rows that hold differently much attend in one call with a mask: beyond, a call for each of them
costs less than what a mask computes in vain."""


class InferenceOps(TorchOps):
    """The torch backend of `dgemma.load`: float32, bfloat16 or float16, no gradients.

    `products` is the width of matrix products, the dtype's own or float32; by default what the processor is made for.
    Where they are wider than the dtype, sums are float32 and what passes between the ops is rounded to the dtype.
    """

    def __init__(self, dtype: DType = "float32", device: str = "cpu", *, products: DType | None = None) -> None:
        super().__init__(dtype, device)
        by_default = processor.multiplies(dtype) if self.device.type == "cpu" else dtype
        self._product = TORCH_DTYPES[products or by_default]
        self._workspace = Workspace()
        self._head = VocabHead(self._workspace)
        self._scored: Array | None = None  # whose logits the head still has

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
        return converted(stored, dtype) if self.device.type == "cpu" else stored.to(device=self.device, dtype=dtype)

    def embed(self, table: Weight, tokens: Array, scale: float) -> Array:
        if isinstance(table, QuantizedTensor):
            return dequantize(table[tokens], TORCH_DTYPES[self.dtype]) * self.rounded(scale)
        return F.embedding(tokens, table).to(TORCH_DTYPES[self.dtype]) * self.rounded(scale)

    def linear(self, x: Array, weight: Weight) -> Array:
        wide = x.to(self._product)
        if blocks.ready(weight, wide.dtype):
            return F.linear(wide, weight).to(x.dtype)  # type: ignore[arg-type]
        return blocks.linear(wide, weight, self._workspace).to(x.dtype)

    def rms_norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        wide = x.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        normed = wide * square.add_(eps).rsqrt_()
        return (normed if weight is None else normed.mul_(weight)).to(x.dtype)

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

    def geglu(self, x: Array, mlp: Mlp) -> Array:
        return gelu_times(self.linear(x, mlp.gate_proj), self.linear(x, mlp.up_proj))

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
        out = expert_mlp(h.reshape(rows.shape).to(self._product), index, weights, *both, self._workspace)
        return out.to(h.dtype).view(h.shape)

    # ---- Attention and its cache ------------------------------------------------------------------------------

    def attention(self, q: Array, k: Array, v: Array, context: KV, span: Span) -> Array:
        """Attend over views of the cache, with each row's own keys laid behind the valid ones of its slot."""
        batch, heads, length, width = q.shape
        if span.canvas:
            read = length - span.canvas
            (q, last_q), (k, last_k), (v, last_v) = (x.split([read, span.canvas], 2) for x in (q, k, v))
            first = self.attention(q, k, v, context, replace(span, canvas=0))
            # Their keys now stand behind the cached ones, and are to the canvas what those are.
            ahead = replace(span, held=span.held + read, causal=False, canvas=0)
            return torch.cat([first, self.attention(last_q, last_k, last_v, context, ahead)], 1)
        runs = list(_runs(span, batch))
        reach = max(held for _, _, held in runs) + length
        first, last = runs[0][1].start, runs[-1][1].stop
        neighbours = all(one[1].stop == other[1].start for one, other in pairwise(runs))
        if len(runs) > 1 and neighbours and batch * heads * length * reach <= TOGETHER:
            part = KV(*(x[first:last, :, :reach] for x in context))
            whole = self._attend_together(q, k, v, part, span)
        else:
            out = [self._attend(q[rows], k[rows], v[rows], context, slots, held, span) for rows, slots, held in runs]
            whole = out[0] if len(out) == 1 else torch.cat(out)
        return whole.transpose(1, 2).reshape(batch, length, heads * width)

    def _attend(
        self, q: Array, k: Array, v: Array, context: KV, slots: slice, held: int, span: Span
    ) -> Array:  # fmt: skip
        """Attention of rows in neighbouring slots that hold equally much: q [B, H, L, A] → [B, H, L, A]."""
        length = q.shape[2]
        context.keys[slots, :, held : held + length] = k
        context.values[slots, :, held : held + length] = v
        first, mask, causal = 0, None, False
        if span.causal:
            mask, causal = _causal_mask(held, length, span.window, q.device)
        elif span.window is not None:
            first = max(0, held - span.window + 1)
        keys, values = (x[slots, :, first : held + length] for x in context)
        out = F.scaled_dot_product_attention(
            *(x.to(self._product) for x in (q, keys, values)),
            attn_mask=mask, is_causal=causal, scale=1.0, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out.to(q.dtype)

    def _attend_together(self, q: Array, k: Array, v: Array, context: KV, span: Span) -> Array:
        """Attention of rows that hold differently much, each over its own slot of [B, K, S, A], with room for it."""
        rows, i = torch.arange(len(q), device=q.device)[:, None], torch.arange(q.shape[2], device=q.device)
        held, length = span.held[:, None], q.shape[2]
        for cached, new in ((context.keys, k), (context.values, v)):
            cached[rows, :, held + i] = new.transpose(1, 2)
        j = torch.arange(context.keys.shape[2], device=q.device)
        ahead = held[:, :, None] + (i[:, None] if span.causal else 0) - j  # query's place minus key's, [B, L or 1, S]
        seen = ahead >= (0 if span.causal else 1 - length)
        if span.window is not None:
            seen &= ahead < span.window
        out = F.scaled_dot_product_attention(
            *(x.to(self._product) for x in (q, *context)),
            attn_mask=seen[:, None], scale=1.0, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out.to(q.dtype)

    def cache_write(self, context: KV, k: Array, v: Array, span: Span, fresh: int | Array) -> KV:
        """The default body, in place."""
        counts = fresh.tolist() if isinstance(fresh, torch.Tensor) else [fresh] * len(k)
        most = None if span.window is None else span.window - 1
        for rows, slots, held in _runs(span, len(k), counts):
            count = counts[rows.start]
            for cached, new in ((context.keys, k), (context.values, v)):
                if most is None or held + count <= most:
                    cached[slots, :, held : held + count] = new[rows, :, :count]
                    continue
                kept = max(0, most - count)  # of the old entries
                cached[slots, :, :kept] = cached[slots, :, held - kept : held].clone()  # the two may overlap
                cached[slots, :, kept:most] = new[rows, :, count - (most - kept) : count]
        return context

    # ---- Head -------------------------------------------------------------------------------------------------

    def logits(self, x: Array, table: Weight, softcap: float) -> Array:
        wide = x.to(self._product)
        ready = blocks.ready(table, wide.dtype)
        raw = F.linear(wide, table) if ready else blocks.linear(wide, table, self._workspace)  # type: ignore[arg-type]
        return raw.to(TORCH_DTYPES[self.wide]).div_(softcap).tanh_().mul_(softcap)

    def logits_at(self, x: Array, places: Array, table: Weight, softcap: float) -> Array:
        if x is not self._scored:
            return super().logits_at(x, places, table, softcap)
        return self._head.scores(places, table.shape[0]).mul_(softcap)[None]

    def mean_embedding(self, probabilities: Array, table: Weight) -> Array:
        shares = probabilities.to(self._product)
        if blocks.ready(table, shares.dtype):
            return self.cast(torch.matmul(shares, table), self.dtype)  # type: ignore[arg-type]
        mean = blocks.mix(shares.reshape(-1, shares.shape[-1]), table, self._workspace)
        return self.cast(mean, self.dtype).view(*shares.shape[:-1], -1)

    def vocab_head(
        self, x: Array, table: Weight, softcap: float, temperature: Array, u: Array
    ) -> tuple[Array, Array, Array, Array]:
        self._scored = None
        *found, soft = self._head(x.to(self._product), table, softcap, temperature, u)
        return *found, soft.to(x.dtype)  # type: ignore[return-value]

    def class_head(
        self, x: Array, table: Weight, softcap: float, temperature: Array, classes: Array, count: int
    ) -> tuple[Array, Masses]:
        soft, *found = self._head.classes(x.to(self._product), table, softcap, temperature, classes, count)
        self._scored = x if self._head.keeps(x) else None
        return soft.to(x.dtype), Masses(*found)


def _rotate(x: Array, rope: Rope) -> Array:
    """Rotate pairs (i, i + A/2) of x [B, L, H, A]."""
    cos, sin = rope.cos.transpose(1, 2), rope.sin.transpose(1, 2)  # [B or 1, L, 1, A/2]
    a, b = x.chunk(2, -1)
    return torch.cat([(a * cos).addcmul_(b, sin, value=-1.0), (b * cos).addcmul_(a, sin)], -1)


def _runs(span: Span, batch: int, counts: Sequence[int] = ()) -> Iterator[tuple[slice, slice, int]]:
    """Cut a pass's rows into runs in neighbouring slots that hold equally much and append equally much.

    Yields rows, their slots, and how many entries each holds.
    """
    held = span.held.tolist()
    slots = range(batch) if span.slots is None else span.slots.tolist()
    start = 0
    for end in range(1, batch + 1):
        alike = end < batch and slots[end] == slots[end - 1] + 1 and held[end] == held[start]
        if alike and (not counts or counts[end] == counts[start]):
            continue
        yield slice(start, end), slice(slots[start], slots[start] + end - start), held[start]
        start = end


def _causal_mask(held: int, length: int, window: int | None, device: torch.device) -> tuple[Array | None, bool]:
    """Return the mask [L, held + L] of a causal span, or none and SDPA's own causal flag where that says it all."""
    reach = window or math.inf
    if held == 0 and length <= reach:
        return None, True
    j = torch.arange(held + length, device=device)
    ahead = torch.arange(held, held + length, device=device)[:, None] - j  # query's place minus key's
    mask = ahead >= 0
    if held + length > reach:
        mask &= ahead < reach
    return mask, False
