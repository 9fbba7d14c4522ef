"""The training objective on the project's own graph, and the ops that make its backward pass affordable on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dgemma.backends.torch.primitives import TorchOps
from dgemma.checkpoints.weights import build, shapes
from dgemma.core import reference
from dgemma.core.config import ModelConfig
from dgemma.core.model import denoise, encode_hidden, layer
from dgemma.core.parts import KV, Cache, Experts, Mlp, Model, Router, Span

Tensor = torch.Tensor


class TrainOps(TorchOps):
    """Float32 activations and norms, matrix products in `low` (bfloat16 has its own units on recent CPUs).

    Some default bodies are replaced. The experts are computed all at once and weighted, zero where a token was not
    routed: at this size that is one large product instead of a sort and eight small ones. All rows of a batch are
    equally long, so that a cache is what they read and no more, and attention has no mask where nothing is hidden.
    """

    def __init__(self, low: torch.dtype = torch.bfloat16, *, compiled: bool = False) -> None:
        super().__init__("float32")
        self.low = low
        # Compiled once for each layer kind and mode, not for each layer.
        self.run = torch.compile(layer, dynamic=False) if compiled else layer

    def layers(self, run: Callable[..., Any], *given: Any) -> tuple[Tensor, tuple[KV, ...]]:
        return super().layers(self.run, *given)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.to(self.low), weight.to(self.low)).float()

    def geglu(self, x: Tensor, mlp: Mlp) -> Tensor:
        x, gate, up = (one.to(self.low) for one in (x, mlp.gate_proj, mlp.up_proj))
        return F.gelu(F.linear(x, gate), approximate="tanh") * F.linear(x, up)

    def moe(self, h: Tensor, r: Tensor, router: Router, experts: Experts) -> Tensor:
        count, inner, width = experts.gate_up_proj.shape
        rows = r.reshape(-1, width)
        scale = router.scale * width**-0.5
        # Routing stays in float32: a rounded score picks another expert than inference will.
        scores = torch.softmax(F.linear(self.rms_norm(rows, None, router.eps) * scale, router.proj), -1)
        top, index = scores.topk(router.experts_per_token, -1)
        top = top / top.sum(-1, keepdim=True) * router.per_expert_scale[index]
        weights = torch.zeros_like(scores).scatter(1, index, top)  # [N, E]
        both = F.linear(h.reshape(-1, width).to(self.low), experts.gate_up_proj.reshape(-1, width).to(self.low))
        gate, up = both.view(-1, count, inner).chunk(2, -1)
        hidden = F.gelu(gate, approximate="tanh") * up * weights[:, :, None].to(self.low)
        down = experts.down_proj.permute(1, 0, 2).reshape(width, -1).to(self.low)  # [D, E·F]
        return F.linear(hidden.reshape(len(rows), -1), down).float().view(h.shape)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, context: KV, span: Span) -> Tensor:
        batch, heads, length, width = q.shape
        kv_heads, low = k.shape[1], self.low
        keys, values = (torch.cat([old, new], 2).to(low) for old, new in ((context.keys, k), (context.values, v)))
        total = keys.shape[2]
        scores = q.to(low).reshape(batch, kv_heads, -1, width) @ keys.transpose(2, 3)  # [B, K, H/K·L, S+L]
        scores = scores.float().view(batch, kv_heads, heads // kv_heads, length, total)
        if span.causal:
            scores = scores.masked_fill(~reference.visible(self, span, length, total - length), -1e9)
        weights = torch.softmax(scores, -1).to(low).view(batch, kv_heads, -1, total)
        out = (weights @ values).view(batch, heads, length, width)
        return out.transpose(1, 2).reshape(batch, length, heads * width)

    def cache_write(self, context: KV, k: Tensor, v: Tensor, span: Span, fresh: int | Tensor) -> KV:
        kept = slice(None) if span.window is None else slice(1 - span.window, None)
        return KV(*(torch.cat([old, new], 2)[:, :, kept] for old, new in ((context.keys, k), (context.values, v))))


def make_model(config: ModelConfig, parameters: dict[str, Tensor]) -> Model:
    """The graph over the parameters themselves, so that an optimizer's in-place update is all a step needs."""
    return build(config, parameters.__getitem__)


def initial(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Fresh float32 parameters by name: fan-in for matrices; norms start attention soft and residuals small."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in shapes(config).items():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            # Attention's scale is 1, so the norms carry the 1/sqrt(head dim); doubled, for scores worth a softmax.
            result[name] = torch.full(shape, 1.4 * shape[0] ** -0.25)
        elif name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            result[name] = torch.full(shape, 0.5)
        elif len(shape) == 1:
            result[name] = torch.ones(shape)
        else:
            gain = 1.0 if "router" in name else shape[-1] ** -0.5
            result[name] = torch.randn(shape, generator=generator) * gain
    return result


def loss(
    ops: TrainOps, model: Model, prompt: Tensor, target: Tensor, noise: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Block diffusion plus the encoder's next-token loss: FACTS §4.

    Every board is denoised from `copies` independently corrupted canvases over one encoding of its prompt; the first
    half of the canvases is conditioned on a first pass without gradient, the other half on zeros.

    Args:
        prompt: int [B, P].
        target: int [B, L], the answer with its <eos> fill.
        noise: `canvas` int [B·copies, L], copies outermost, and `temperature` [B·copies / 2] of the first pass.

    Returns:
        the sum, and its parts: canvas cross-entropy over all positions, and next-token cross-entropy. Nats.
    """
    config, canvas = model.config, noise["canvas"]
    copies, half = len(canvas) // len(prompt), len(canvas) // 2
    empty = (torch.zeros(len(prompt), one.kv_heads, 0, one.head_dim) for one in config.layers)
    cache = Cache(tuple(KV(x, x) for x in empty), torch.zeros(len(prompt), dtype=torch.int32))
    cache, hidden = encode_hidden(ops, model, cache, prompt)
    ahead = ops.logits(hidden[:, :-1], model.embed_tokens, config.softcap)
    next_token = F.cross_entropy(ahead.flatten(0, 1), prompt[:, 1:].flatten().long())

    repeated = tuple(KV(*(torch.cat([x] * copies) for x in kv)) for kv in cache.layers)
    cache = Cache(repeated, cache.length.repeat(copies))
    soft = torch.zeros(*canvas.shape, config.hidden_size)
    with torch.no_grad():
        first = Cache(tuple(KV(*(x[:half] for x in kv)) for kv in cache.layers), cache.length[:half])
        scores = ops.logits(denoise(ops, model, first, canvas[:half], soft[:half]), model.embed_tokens, config.softcap)
        # As in sampling, where self-conditioning reads the distribution after the temperature.
        probabilities = torch.softmax(scores / noise["temperature"][:, None, None], -1)
        soft = torch.cat([ops.mean_embedding(probabilities, model.embed_tokens), soft[half:]])
    scores = ops.logits(denoise(ops, model, cache, canvas, soft), model.embed_tokens, config.softcap)
    answer = F.cross_entropy(scores.flatten(0, 1), target.repeat(copies, 1).flatten().long())
    return answer + next_token, answer.detach(), next_token.detach()


def corrupt(rng: np.random.Generator, target: np.ndarray, copies: int, vocab: int) -> dict[str, Tensor]:
    """Uniform corruption: t ~ U(0, 1) for each canvas; each token becomes any of the vocabulary with probability t."""
    clean = np.tile(target, (copies, 1))
    level = rng.random((len(clean), 1))
    canvas = np.where(rng.random(clean.shape) < level, rng.integers(vocab, size=clean.shape, dtype=np.int32), clean)
    temperature = rng.uniform(0.4, 0.8, len(clean) // 2).astype(np.float32)
    return {"canvas": torch.from_numpy(canvas), "temperature": torch.from_numpy(temperature)}
