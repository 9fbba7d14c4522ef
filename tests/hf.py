"""The reference: transformers' DiffusionGemma on small random weights, and how to ask it the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig, DynamicCache

from dgemma.core import reference
from dgemma.core.config import ModelConfig
from dgemma.core.model import denoise, encode, new_cache
from dgemma.core.ops import Ops
from dgemma.core.parts import Cache, Model
from under_test import build

# Three shapes that between them reach every branch: GQA ratios, windows, routing widths, widths that are no power of 2.
SHAPES: dict[str, dict[str, Any]] = {
    "top4": dict(
        vocab_size=600, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        global_head_dim=32, num_global_key_value_heads=1, sliding_window=8, num_experts=8, top_k_experts=4,
        moe_intermediate_size=32, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "top1": dict(
        vocab_size=301, hidden_size=48, intermediate_size=40, num_attention_heads=6, num_key_value_heads=6, head_dim=8,
        global_head_dim=24, num_global_key_value_heads=2, sliding_window=5, num_experts=5, top_k_experts=1,
        moe_intermediate_size=24, layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "wide": dict(
        vocab_size=1100, hidden_size=96, intermediate_size=64, num_attention_heads=8, num_key_value_heads=1,
        head_dim=32, global_head_dim=16, num_global_key_value_heads=4, sliding_window=64, num_experts=16,
        top_k_experts=3, moe_intermediate_size=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
}  # fmt: skip


def make(shape: str, *, seed: int = 0, canvas: int = 16, gain: float = 1.0) -> DiffusionGemmaForBlockDiffusion:
    """Return a float32 model whose every parameter, norms and scalars included, is random.

    A `gain` below one weakens what the layers add to the residual. The tied head then favours the token that it reads,
    so that canvases settle after a few passes, as a trained model's do.
    """
    text = DiffusionGemmaTextConfig(
        num_hidden_layers=len(SHAPES[shape]["layer_types"]), max_position_embeddings=4096, pad_token_id=0,
        eos_token_id=1, bos_token_id=2, use_bidirectional_attention="vision", **SHAPES[shape],
    )  # fmt: skip
    vision = dict(
        model_type="gemma4_vision", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    config = DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=canvas, boi_token_id=3, eoi_token_id=4, image_token_id=5
    )
    config._attn_implementation = "eager"
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "vision" in name or "inv_freq" in name or "embed_scale" in name:
                continue
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.copy_(1.0 + 0.3 * noise)
            else:
                value.copy_(noise * (1.5 * value.shape[-1] ** -0.5 if "embed" not in name else 1.0))
            if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
                value.mul_(gain)
            if "self_conditioning.down_proj" in name:
                value.mul_(gain)
    return model


@cache
def shared(shape: str, canvas: int = 16, gain: float = 1.0) -> DiffusionGemmaForBlockDiffusion:
    """Return one model of a shape, made once for the whole run and never to be changed."""
    return make(shape, canvas=canvas, gain=gain)


def tensors(model: DiffusionGemmaForBlockDiffusion) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def config(model: DiffusionGemmaForBlockDiffusion) -> ModelConfig:
    return ModelConfig.from_hf(model.config.to_dict())


@torch.no_grad()
def logits(
    model: DiffusionGemmaForBlockDiffusion, prompts: list[np.ndarray], canvas: np.ndarray, previous: np.ndarray | None
) -> np.ndarray:
    """Encode each of `prompts` in turn (prompt, then committed canvases), then one denoise pass → float32 [L, V]."""
    cache = DynamicCache(config=model.config.text_config)
    done = 0
    for ids in prompts:
        positions = torch.arange(done, done + len(ids))[None]
        model.model.encoder(input_ids=torch.tensor(ids)[None].long(), past_key_values=cache, position_ids=positions)
        done += len(ids)
    out = model(
        past_key_values=cache,
        decoder_input_ids=torch.tensor(canvas)[None].long(),
        self_conditioning_logits=None if previous is None else torch.tensor(previous)[None],
    )
    return out.logits[0].numpy()


def load(ops: Ops, model: DiffusionGemmaForBlockDiffusion) -> Model:
    """Return our model with the reference's weights."""
    return build(ops, config(model), tensors(model).__getitem__)


def encoded(ops: Ops, model: Model, prompts: Sequence[np.ndarray], *, spare: int = 0) -> Cache:
    """Encode each of `prompts` int [S] in turn into a cache that has room for `spare` tokens more."""
    longest = max(*(len(ids) for ids in prompts), model.config.canvas_length)
    room = sum(len(ids) for ids in prompts) + spare
    held = new_cache(ops, model.config, slots=1, capacity=room, scratch=longest)
    for ids in prompts:
        held = encode(ops, model, held, ops.asarray(ids[None], "int32"))
    return held


def our_logits(
    ops: Ops, model: Model, prompts: Sequence[np.ndarray], canvas: np.ndarray, previous: np.ndarray | None
) -> np.ndarray:
    """Answer the question of `logits` with our graph: → float32 [L, V]."""
    held = encoded(ops, model, prompts)
    if previous is None:
        soft = ops.asarray(np.zeros((1, len(canvas), model.config.hidden_size)), ops.dtype)
    else:
        odds = reference.softmax(ops, ops.asarray(previous[None], ops.wide))
        soft = ops.mean_embedding(odds, model.embed_tokens)
    x = denoise(ops, model, held, ops.asarray(canvas[None], "int32"), soft)
    return ops.to_numpy(ops.logits(x, model.embed_tokens, model.config.softcap))[0]
