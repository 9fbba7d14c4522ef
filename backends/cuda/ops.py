"""The graph's ops on Triton's kernels: bfloat16 on NVIDIA cards of compute capability 8 and later.

Each op says with one line when a kernel takes it; otherwise `InferenceOps` does, which is the same op in torch:

    everything          bfloat16 activations; in float32 and float16 no kernel runs and nothing is captured
    linear              weights that `unpack.supports`: bfloat16 (torch's own product), affine of 4 or 8 bits, nvfp4
    geglu               as linear, gate and up in one format
    moe                 both expert weights as above. In torch the experts' row counts are read by the host, so a model
                        with experts in any other format runs without graphs
    attention, rope     heads of an even width up to 512
    vocab_head and class_head    a bfloat16 table, or an affine one

`layers` runs a whole stack in one op, so that norms, residuals and the next layer's first norm share a launch, and keys
and values go from their projection straight into the row's slot, behind what it holds.

    launches of a layer    projection 1, norm+rope+write 1, attention 1 or 2, o_proj 1, norms 1, dense 2, routing 3,
                           experts 2, norms, with the experts' weighted sum, 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ...core.parts import (
    KV,
    Attention,
    Draws,
    Experts,
    Layer,
    Masses,
    Mlp,
    Model,
    RmsNorm,
    Rope,
    Router,
    Span,
    StepState,
)  # fmt: skip
from ...core.primitives import DType
from ..torch.blocks import Weight
from ..torch.packed import QuantizedTensor
from ..torch.primitives import Array
from .card import CardOps
from .kernels import attention as attention_kernel
from .kernels import experts as expert_kernels
from .kernels import head as head_kernels
from .kernels import linear as linear_kernels
from .kernels import norm as norm_kernels
from .kernels import rope as rope_kernel
from .kernels import routing, sampling, unpack

WIDEST_HEAD = 512


def architecture(device: torch.device) -> str:
    """Return the table of launch sizes that fits a card; on a CPU, for tests, the H100's."""
    if device.type != "cuda":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 10:
        return "sm_100" if major == 10 else "sm_89"  # RTX 50 has the RTX 40's shared memory
    return "sm_90" if major == 9 else "sm_89" if minor else "sm_80"


class CudaOps(CardOps):
    """The ops of `dgemma.load` on a card, with Triton's kernels; arguments as `CardOps`."""

    def __init__(self, dtype: DType = "bfloat16", device: str = "cuda", *, beside: bool = False) -> None:
        """With `beside`, a layer's dense MLP runs on a stream of its own while rows are routed and experts run.

        Off until a card has shown what it gains: `benchmarks/gpu.sh options`.
        """
        super().__init__(dtype, device)
        self._side = torch.cuda.Stream(self.device) if beside and self.device.type == "cuda" else None
        self._arch = architecture(self.device)

    @property
    def kernels(self) -> bool:
        return self.dtype == "bfloat16"

    def can_capture(self, weights: Model) -> bool:
        experts = (one for layer in weights.layers for one in (layer.experts.gate_up_proj, layer.experts.down_proj))
        attend = all(self._attends(layer.self_attn) for layer in weights.layers)
        return self.kernels and attend and all(map(unpack.supports, experts))

    def can_capture_classes(self, weights: Model) -> bool:
        return self.can_capture(weights) and self._scores(weights.embed_tokens)

    def stack(self, part: Any) -> Any:
        """Lay q, k and v, or gate and up, in one weight (`Attention.qkv_proj`); the parts become views of it."""
        if not self.kernels:
            return part
        names = ("gate_proj", "up_proj") if isinstance(part, Mlp) else ("q_proj", "k_proj", "v_proj")
        weights = {name: weight for name in names if (weight := getattr(part, name)) is not None}
        kinds = {
            (weight.format, weight.scales.dtype) if isinstance(weight, QuantizedTensor) else weight.dtype
            for weight in weights.values()
        }
        if len(kinds) > 1 or not all(map(unpack.supports, weights.values())):
            return part
        stacked = linear_kernels.stacked(tuple(weights.values()))
        views, start = {}, 0
        for name, weight in weights.items():
            views[name] = stacked[start : start + weight.shape[0]]
            start += weight.shape[0]
        return replace(part, **views, **{"gate_up_proj" if isinstance(part, Mlp) else "qkv_proj": stacked})

    # ---- Dense layers -------------------------------------------------------------------------------------------

    def linear(self, x: Array, weight: Weight, *, arranged: bool = False) -> Array:
        """`Ops.linear`; `arranged` says that x lies as the words of a packed weight want it (`unpack.arrangement`)."""
        if not (self.kernels and unpack.supports(weight)):
            return super().linear(x, weight)
        return linear_kernels.linear(x.reshape(-1, x.shape[-1]), weight, arranged=arranged).view(*x.shape[:-1], -1)

    def geglu(self, x: Array, mlp: Mlp) -> Array:
        if mlp.gate_up_proj is None:
            return super().geglu(x, mlp)
        return linear_kernels.geglu(x.reshape(-1, x.shape[-1]), mlp.gate_up_proj).view(*x.shape[:-1], -1)

    def rms_norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        return norm_kernels.rms_norm(x, weight, eps) if self.kernels else super().rms_norm(x, weight, eps)

    def moe(self, h: Array, r: Array, router: Router, experts: Experts) -> Array:
        both = experts.gate_up_proj, experts.down_proj
        if not (self.kernels and all(map(unpack.supports, both))):
            return super().moe(h, r, router, experts)
        rows = r.reshape(-1, r.shape[-1])
        weights, index = routing.route(
            rows, dense(router.proj), router.scale, router.per_expert_scale, router.experts_per_token, router.eps
        )
        out = expert_kernels.expert_mlp(h.reshape(rows.shape), index, weights, *both)
        return out.view(h.shape)

    # ---- Attention and its cache --------------------------------------------------------------------------------

    def qkv_norm_rope(self, x: Array, attention: Attention, rope: Rope) -> tuple[Array, Array, Array]:
        if not self._attends(attention):
            return super().qkv_norm_rope(x, attention, rope)
        shape = (x.shape[0], attention.config.kv_heads, x.shape[1], attention.config.head_dim)
        k, v = x.new_empty(shape), x.new_empty(shape)
        return self._project(x, attention, rope, KV(k, v), None, None), k, v

    def attention(self, q: Array, k: Array, v: Array, context: KV, span: Span) -> Array:
        if not (self.kernels and q.shape[-1] <= WIDEST_HEAD):
            return super().attention(q, k, v, context, span)
        self._lay(context, k, v, span)
        return self._attended(q, context, span)

    def _mlp(self, mlp: Mlp, x: Array) -> Array:
        """Run a dense MLP on x that is arranged for gate and up; what lies between is arranged for down."""
        if mlp.gate_up_proj is None:
            return self.linear(self.geglu(x, mlp), mlp.down_proj)
        between = linear_kernels.geglu(
            x.reshape(-1, x.shape[-1]), mlp.gate_up_proj, out_bits=unpack.order_of(mlp.down_proj), arranged=True
        )  # [B·L, F]
        return self.linear(between, mlp.down_proj, arranged=True).view(*x.shape[:-1], -1)

    def _experts(self, h: Array, r: Array, layer: Layer, *, arranged: bool) -> tuple[Array, Array | None]:
        """`moe`, but for its last sum: the results of each row's experts and their shares, or the sum and None."""
        router, both = layer.router, (layer.experts.gate_up_proj, layer.experts.down_proj)
        if not all(map(unpack.supports, both)):
            return self.moe(h, r, router, layer.experts), None
        rows = r.reshape(-1, r.shape[-1])
        shares, index = routing.route(
            rows, dense(router.proj), router.scale, router.per_expert_scale, router.experts_per_token, router.eps
        )
        return expert_kernels.expert_results(h.reshape(rows.shape), index, *both, arranged=arranged), shares

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Run what is launched within on the side stream, behind everything launched so far."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            yield

    def _meet(self) -> None:
        # Each stream reuses only memory that it allocated itself, and between two forks the main one has waited: what
        # the side reads is held until here by its caller, and what it wrote is not overwritten before the next fork.
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def layers(
        self, run: Callable[..., tuple[Array, Array, Array]], layers: Sequence[Layer], x: Array,
        ropes: Mapping[str, Rope], contexts: Sequence[KV], spans: Mapping[str, Span], fresh: int | Array | None,
    ) -> tuple[Array, tuple[KV, ...]]:  # fmt: skip
        if not (layers and all(self._attends(layer.self_attn) for layer in layers)):
            return super().layers(run, layers, x, ropes, contexts, spans, fresh)
        # What one kernel writes and a packed weight reads is written in the order that the weight's words want.
        first = layers[0]
        normed = norm_kernels.rms_norm(
            x, first.input_layernorm.weight, first.input_layernorm.eps, bits=_order(first.self_attn.qkv_proj)
        )  # [B, L, D]
        kept: dict[str, Array | None] = {}
        for i, (layer, context) in enumerate(zip(layers, contexts, strict=True)):
            kind, eps = layer.self_attn.config.kind, layer.input_layernorm.eps
            span = spans[kind]
            q = self._project(normed, layer.self_attn, ropes[kind], context, span.held, span.slots, arranged=True)
            o_proj = layer.self_attn.o_proj
            bits = unpack.order_of(o_proj, q.shape[-1])
            attended = self.linear(self._attended(q, context, span, bits), o_proj, arranged=bits != 16)  # [B, L, D]
            expert_bits = self._expert_order(layer.experts)
            r, dense_in, expert_in = norm_kernels.norm_add(
                attended, x, weight_of(layer.post_attention_layernorm), eps,
                next_weights=(weight_of(layer.pre_feedforward_layernorm), weight_of(layer.pre_feedforward_layernorm_2)),
                next_bits=(_order(layer.mlp.gate_up_proj), expert_bits),
            )  # each [B, L, D]  # fmt: skip
            ahead = layers[i + 1 : i + 2]  # the next layer's first norm, if there is one
            with self._beside():
                mixed = self._mlp(layer.mlp, dense_in)
            sparse, shares = self._experts(expert_in, r, layer, arranged=expert_bits != 16)
            self._meet()
            x, *rest = norm_kernels.mix_norm_add(
                mixed, sparse, r,
                weight_of(layer.post_feedforward_layernorm_1), weight_of(layer.post_feedforward_layernorm_2),
                weight_of(layer.post_feedforward_layernorm), eps,
                scalar=layer.encoder_scalar if span.causal else layer.decoder_scalar,
                canvas_scalar=layer.decoder_scalar if span.canvas else None, canvas=span.canvas,
                next_weights=tuple(weight_of(one.input_layernorm) for one in ahead),
                next_bits=tuple(_order(one.self_attn.qkv_proj) for one in ahead), shares=shares,
            )  # fmt: skip
            normed = rest[0] if rest else x
            if fresh is not None:
                if kind not in kept:  # the same for all layers of a kind
                    kept[kind] = self._kept(context, span, fresh)
                self._slide(context, kept[kind], span)
        return x, tuple(contexts)

    def cache_write(self, context: KV, k: Array, v: Array, span: Span, fresh: int | Array) -> KV:
        """In place, and without asking the device how much a row holds."""
        self._lay(context, k, v, span)  # entries beyond `fresh` land beyond the valid ones
        self._slide(context, self._kept(context, span, fresh), span)
        return context

    def _attends(self, attention: Attention) -> bool:
        return self.kernels and attention.config.head_dim <= WIDEST_HEAD and attention.config.head_dim % 2 == 0

    def _expert_order(self, experts: Experts) -> int:
        both = experts.gate_up_proj, experts.down_proj
        return unpack.order_of(both[0]) if self.kernels and all(map(unpack.supports, both)) else 16

    def _project(
        self, x: Array, attention: Attention, rope: Rope, target: KV, held: Array | None, slots: Array | None, *,
        arranged: bool = False,
    ) -> Array:  # fmt: skip
        """Return q [B, H, L, A]; keys and values go into the rows' slots, behind the entries `held`, int32 [B]."""
        config = attention.config
        if attention.qkv_proj is None:
            q, k = self.linear(x, attention.q_proj), self.linear(x, attention.k_proj)
            v = None if attention.v_proj is None else self.linear(x, attention.v_proj)
        else:
            width = config.kv_heads * config.head_dim
            sizes = [config.heads * config.head_dim, *([width] * (1 if attention.v_proj is None else 2))]
            q, k, *rest = self.linear(x, attention.qkv_proj, arranged=arranged).split(sizes, -1)
            v = rest[0] if rest else None
        return rope_kernel.norm_rope_write(
            q, k, v, attention.q_norm, attention.k_norm, rope.cos, rope.sin, target.keys, target.values, held, slots,
            heads=config.heads, eps=attention.eps,
        )  # fmt: skip

    def _attended(self, q: Array, context: KV, span: Span, bits: int = 16) -> Array:
        return attention_kernel.attention(
            q, context.keys, context.values, span.held, span.slots, window=span.window, causal=span.causal,
            canvas=span.canvas, arch=self._arch, bits=bits,
        )  # fmt: skip

    def _places(self, span: Span) -> Array:
        """Return the slots of a pass's rows, [B, 1]."""
        slots = torch.arange(span.held.shape[0], device=self.device) if span.slots is None else span.slots
        return slots.long()[:, None]

    def _lay(self, context: KV, k: Array, v: Array, span: Span) -> None:
        """Write k and v [B, K, L, A] into the rows' slots, behind the valid entries."""
        slots = self._places(span)
        entries = span.held[:, None] + torch.arange(k.shape[2], device=self.device)  # [B, L]
        for cached, new in zip(context, (k, v), strict=True):
            cached[slots, :, entries] = new.transpose(1, 2)  # [B, L, K, A]

    def _kept(self, context: KV, span: Span, fresh: int | Array) -> Array | None:
        """Return which entries, int64 [B, window − 1], are to stand in front; None where they stand there."""
        if span.window is None:
            return None
        most, capacity = span.window - 1, context.keys.shape[2]
        drop = (span.held + fresh - most).clamp(min=0)  # [B]
        source = torch.arange(min(most, capacity), device=self.device) + drop[:, None]
        return source.clamp(max=capacity - 1)

    def _slide(self, context: KV, kept: Array | None, span: Span) -> None:
        """Bring the newest window − 1 of the entries that now stand in the rows' slots to their fronts."""
        if kept is None:
            return
        slots = self._places(span)
        front = torch.arange(kept.shape[1], device=self.device)[None]  # [1, window − 1]
        for cached in context:
            # All are read before one is written: the two ranges overlap.
            cached[slots, :, front] = cached[slots, :, kept]  # [B, window − 1, K, A]

    # ---- Head and sampler ---------------------------------------------------------------------------------------

    def vocab_head(
        self, x: Array, table: Weight, softcap: float, temperature: Array, u: Array
    ) -> tuple[Array, Array, Array, Array]:
        if not self._scores(table):
            return super().vocab_head(x, table, softcap, temperature, u)
        return head_kernels.vocab_head(x, table, softcap, temperature, u, arch=self._arch)

    def class_head(
        self, x: Array, table: Weight, softcap: float, temperature: Array, classes: Array, count: int
    ) -> tuple[Array, Masses]:
        if not self._scores(table):
            return super().class_head(x, table, softcap, temperature, classes, count)
        return head_kernels.class_head(x, table, softcap, temperature, classes, count, arch=self._arch)

    def _scores(self, table: Weight) -> bool:
        """Whether the vocabulary head's kernels read a table."""
        affine = not isinstance(table, QuantizedTensor) or table.format.mode == "affine"
        return self.kernels and affine and unpack.supports(table)

    def advance(
        self, draws: Draws, state: StepState, token: Array, argmax: Array, entropy: Array, soft: Array
    ) -> StepState:
        if not self.kernels:
            return super().advance(draws, state, token, argmax, entropy, soft)
        return sampling.advance(draws, state, token, argmax, entropy, soft)


def _order(weight: Weight | None) -> int:
    """Return how activations have to lie for stacked weights (`unpack.order_of`): as they are where none is stacked."""
    return 16 if weight is None else unpack.order_of(weight)


def dense(weight: Weight) -> Array:
    """Return the router's projection as an array; recipes that quantize it are unpacked at every call."""
    from ..torch.packed import dequantize

    return dequantize(weight, torch.bfloat16) if isinstance(weight, QuantizedTensor) else weight


def weight_of(norm: RmsNorm) -> Array:
    assert norm.weight is not None  # of a layer's norms each has one
    return norm.weight
