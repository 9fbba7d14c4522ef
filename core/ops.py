"""The contract between the graph and a backend: arithmetic, and nothing else.

`ops` is the first argument of everything in the graph. A backend subclasses `Ops`, supplies the primitives
(`primitives.py`) and can then run the whole model; it gets fast by overriding fused ops. The default bodies below are
their documentation and the oracle they are tested against. Shape letters are those of `parts.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from . import reference, sampler
from .parts import KV, NOTHING, Array, Attention, Draws, Experts, Layer, Masses, Mlp, Rope, Router, Span, StepState
from .primitives import NUMPY_DTYPES, DType, Primitives, Reduction, Unary

__all__ = ["KV", "NUMPY_DTYPES", "Array", "DType", "Ops", "Primitives", "Reduction", "Rope", "Span", "Unary"]


class Ops(Primitives):
    """The fused ops, each with what it means in primitives."""

    # ---- Dense layers -----------------------------------------------------------------------------------------

    def embed(self, table: Array, tokens: Array, scale: float) -> Array:
        """Look up rows: table [V, D], tokens int32 [B, L] → [B, L, D], times `scale` rounded to the compute dtype."""
        return self.take(table, tokens, 0) * self.rounded(scale)

    def linear(self, x: Array, weight: Array) -> Array:
        """Return x [..., D] · weightᵀ, weight [F, D] as checkpoints store it."""
        return self.matmul(x, self.transpose(weight, (1, 0)))

    def rms_norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        """Root-mean-square norm over the last axis, computed wide; the weight multiplies as stored (no 1 + w)."""
        wide = self.cast(x, self.wide)
        normed = wide * self.unary(self.reduce(wide * wide, "mean", -1, True) + eps, "rsqrt")
        if weight is not None:
            normed = normed * self.cast(weight, self.wide)
        return self.cast(normed, self.dtype)

    def geglu(self, x: Array, mlp: Mlp) -> Array:
        """Return gelu_tanh(x · gateᵀ) · (x · upᵀ): x [..., D], gate and up [F, D] → [..., F]."""
        return reference.gelu(self, self.linear(x, mlp.gate_proj)) * self.linear(x, mlp.up_proj)

    # ---- Attention and its cache ------------------------------------------------------------------------------

    def qkv_norm_rope(self, x: Array, attention: Attention, rope: Rope) -> tuple[Array, Array, Array]:
        """Project, norm and rotate: x [B, L, D] → q [B, H, L, A], k and v [B, K, L, A]."""
        config, eps = attention.config, attention.eps

        def heads(y: Array, count: int) -> Array:
            y = self.reshape(y, (x.shape[0], x.shape[1], count, config.head_dim))
            return self.transpose(y, (0, 2, 1, 3))  # [B, count, L, A]

        q = heads(self.linear(x, attention.q_proj), config.heads)
        k = heads(self.linear(x, attention.k_proj), config.kv_heads)
        # A full layer has no v_proj: its value is the key projection before the key's norm.
        v = k if attention.v_proj is None else heads(self.linear(x, attention.v_proj), config.kv_heads)
        q = reference.rotate(self, self.rms_norm(q, attention.q_norm, eps), rope)
        k = reference.rotate(self, self.rms_norm(k, attention.k_norm, eps), rope)
        return q, k, self.rms_norm(v, None, eps)

    def attention(self, q: Array, k: Array, v: Array, context: KV, span: Span) -> Array:
        """Attend over the cache and the query's own keys, kept apart; scale 1, softmax wide.

        q [B, H, L, A], k and v [B, K, L, A], context [N, K, S, A] → [B, L, H·A]. The first `span.held` entries of each
        row's slot come back bit-identical, and so do other slots; a backend may use the entries beyond as scratch.
        """
        batch, heads, length, width = q.shape
        kv_heads, cached = k.shape[1], context.keys.shape[2]
        old_keys, old_values = (reference.slots_of(self, x, span.slots) for x in context)
        keys = self.concat([old_keys, k], 2)  # [B, K, S+L, A]
        values = self.concat([old_values, v], 2)
        q = self.reshape(q, (batch, kv_heads, heads // kv_heads * length, width))  # query heads share a key-value head
        scores = self.cast(self.matmul(q, self.transpose(keys, (0, 1, 3, 2))), self.wide)
        scores = self.reshape(scores, (batch, kv_heads, heads // kv_heads, length, cached + length))
        scores = self.where(reference.visible(self, span, length, cached), scores, -math.inf)
        weights = self.cast(reference.softmax(self, scores), self.dtype)
        weights = self.reshape(weights, (batch, kv_heads, -1, cached + length))
        out = self.reshape(self.matmul(weights, values), (batch, heads, length, width))
        return self.reshape(self.transpose(out, (0, 2, 1, 3)), (batch, length, heads * width))

    def cache_write(self, context: KV, k: Array, v: Array, span: Span, fresh: int | Array) -> KV:
        """Append the first `fresh` (one number, or int32 [B]) entries of k and v [B, K, L, A] to the rows' slots.

        With a window only the newest `window − 1` entries are kept, at the front: all that any later query sees. The
        argument may be consumed; only the returned cache is valid.
        """
        cached, length = context.keys.shape[2], k.shape[2]
        source = reference.appended(self, span.held, fresh, cached, length, span.window)
        source = self.reshape(source, (-1, 1, cached, 1))

        def write(old: Array, new: Array) -> Array:
            mine = self.concat([reference.slots_of(self, old, span.slots), new], 2)
            return reference.put_back(self, old, self.take_along(mine, source, 2), span.slots)

        return KV(write(context.keys, k), write(context.values, v))

    # ---- Experts, and a whole stack ---------------------------------------------------------------------------

    def moe(self, h: Array, r: Array, router: Router, experts: Experts) -> Array:
        """Mixture of experts in one op, so that ordering and ties stay inside.

        h [B, L, D] is what the experts read, r [B, L, D] the raw residual that routes → [B, L, D].
        """
        batch, length, width = h.shape
        rows, k = batch * length, router.experts_per_token
        weights, index = self._route(self.reshape(r, (rows, width)), router)
        flat = self.reshape(index, (rows * k,))
        order = self.argsort(flat)  # (token, choice) pairs, expert by expert
        ids = self.reshape(self.arange(router.experts), (router.experts, 1))
        counts = self.reduce(self.cast(ids == self.reshape(flat, (1, rows * k)), "int32"), "sum", -1)
        x = self.take(self.reshape(h, (rows, width)), order // k, 0)
        gate, up = self.split(self.grouped_matmul(x, experts.gate_up_proj, counts), 2, -1)
        out = self.grouped_matmul(reference.gelu(self, gate) * up, experts.down_proj, counts)
        back = self.take(out, self.argsort(order), 0)  # argsort of a permutation is its inverse
        back = self.reshape(self.cast(back, self.wide), (rows, k, width)) * self.reshape(weights, (rows, k, 1))
        return self.cast(self.reshape(self.reduce(back, "sum", 1), (batch, length, width)), self.dtype)

    def _route(self, r: Array, router: Router) -> tuple[Array, Array]:
        """Choose each row's experts: r [N, D] → their weights, wide [N, k], and numbers, int32 [N, k]."""
        scale = self.cast(router.scale, self.dtype) * self.rounded(r.shape[-1] ** -0.5)
        scores = self.linear(self.rms_norm(r, None, router.eps) * scale, router.proj)
        top, index = self.top_k(reference.softmax(self, self.cast(scores, self.wide)), router.experts_per_token)
        top = top / self.reduce(top, "sum", -1, True)
        return top * self.cast(self.take(router.per_expert_scale, index, 0), self.wide), index

    def layers(
        self, run: Callable[..., tuple[Array, Array, Array]], layers: Sequence[Layer], x: Array,
        ropes: Mapping[str, Rope], contexts: Sequence[KV], spans: Mapping[str, Span], fresh: int | Array | None,
    ) -> tuple[Array, tuple[KV, ...]]:  # fmt: skip
        """Run all layers of one pass: x [B, L, D] → x [B, L, D], and the caches.

        `run` is `model.layer`, which a backend that fuses across its borders need not call. Ropes and spans are by
        layer kind. With `fresh` (see `cache_write`) each layer appends to its cache; None reads only, and the caches
        come back as they are.
        """
        caches = []
        for layer, context in zip(layers, contexts, strict=True):
            kind = layer.self_attn.config.kind
            x, k, v = run(self, layer, x, ropes[kind], context, spans[kind])
            caches.append(context if fresh is None else self.cache_write(context, k, v, spans[kind], fresh))
        return x, tuple(caches)

    # ---- Head and sampler -------------------------------------------------------------------------------------

    def logits(self, x: Array, table: Array, softcap: float) -> Array:
        """Return softcap · tanh(x · tableᵀ / softcap) in the wide dtype: x [B, L, D], table [V, D] → [B, L, V]."""
        return self.unary(self.cast(self.linear(x, table), self.wide) / softcap, "tanh") * softcap

    def logits_at(self, x: Array, places: Array, table: Array, softcap: float) -> Array:
        """Return `logits` of some positions of a pass: x [B, L, D], places int32 [R] in B·L → [1, R, V].

        A head that has just been through all of x may still have them.
        """
        return self.logits(self.take(self.reshape(x, (1, -1, x.shape[-1])), places, 1), table, softcap)

    def mean_embedding(self, probabilities: Array, table: Array) -> Array:
        """Return the expected embedding, unscaled: wide [B, L, V] · table [V, D] → [B, L, D] in the compute dtype."""
        return self.matmul(self.cast(probabilities, self.dtype), table)

    def vocab_head(
        self, x: Array, table: Array, softcap: float, temperature: Array, u: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Attention over the embedding table: everything a denoising pass needs of the logits, and no logits.

        x [B, L, D], table [V, D], temperature wide [B, 1], u float32 [B, L] uniforms →
        sampled token int32 [B, L], argmax int32 [B, L], entropy in nats, wide [B, L], and the probabilities' mean
        embedding, unscaled, [B, L, D] in the compute dtype. Softmax, entropy and draw are wide.
        """
        scores = self.logits(x, table, softcap) / self.reshape(temperature, (-1, 1, 1))  # [B, L, V] <- very big
        shifted = scores - self.reduce(scores, "max", -1, True)
        mass = self.unary(shifted, "exp")
        total = self.reduce(mass, "sum", -1, True)
        entropy = self.unary(total, "log") - self.reduce(mass * shifted, "sum", -1, True) / total
        soft = self.mean_embedding(mass / total, table)
        token, argmax = reference.draw(self, mass, u), self.reduce(scores, "argmax", -1)
        return token, argmax, self.reshape(entropy, entropy.shape[:2]), soft

    def class_head(
        self, x: Array, table: Array, softcap: float, temperature: Array, classes: Array, count: int
    ) -> tuple[Array, Masses]:
        """`vocab_head` for what looks at classes of tokens, not at one: a read, an automaton.

        classes int32 [V]: the class of each token, 0 … count − 1, or −1 for none → the mean embedding under the whole
        distribution [B, L, D], as `vocab_head`'s, and the classes' `Masses` [B, L, C]. A score is exact however small
        it is: a soft cap of 30 at a temperature of 0.4 spans 150 nats, and the exponential of a float32 ends at −103.
        """
        scores = self.logits(x, table, softcap) / self.reshape(temperature, (-1, 1, 1))  # [B, L, V] <- very big
        shifted = scores - self.reduce(scores, "max", -1, True)
        raw = self.unary(shifted, "exp")
        total = self.reduce(raw, "sum", -1, True)
        logs, probabilities = shifted - self.unary(total, "log"), raw / total
        parts = []
        for i in range(count):
            mine = classes == i
            score = self.reduce(self.where(mine, logs, NOTHING), "max", -1)
            best = self.reduce(self.where(mine, logs, NOTHING), "argmax", -1)
            share = self.reduce(self.where(mine, probabilities, 0.0), "sum", -1)
            mass = self.where(share > 0, self.unary(self.where(share > 0, share, 1.0), "log"), score)
            moment = self.reduce(self.where(mine, probabilities * logs, 0.0), "sum", -1)
            parts.append((self.where(mass < score, score, mass), best, score, moment))
        masses = (self.concat([self.reshape(x, (*x.shape, 1)) for x in some], -1) for some in zip(*parts, strict=True))
        return self.mean_embedding(probabilities, table), Masses(*masses)

    def advance(
        self, draws: Draws, state: StepState, token: Array, argmax: Array, entropy: Array, soft: Array
    ) -> StepState:
        """Accept, renoise and test whether the canvas is finished; see `sampler.advance`."""
        return sampler.advance(self, draws, state, token, argmax, entropy, soft)
