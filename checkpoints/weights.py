"""From named tensors to a `Model`: the one table of where each weight stands in a checkpoint.

Names are the checkpoint's own. Text weights sit under `model.decoder`; the encoder shares them all except its layer
scalars. `names.py` says what else may be in a file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..core.config import ModelConfig
from ..core.parts import Attention, Experts, Layer, Mlp, Model, RmsNorm, Router, SelfConditioning

DECODER = "model.decoder"
ENCODER = "model.encoder.language_model"

NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2",
)  # fmt: skip


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor the text model needs."""
    width, inner, expert = config.hidden_size, config.intermediate_size, config.expert_size
    result: dict[str, tuple[int, ...]] = {
        f"{DECODER}.embed_tokens.weight": (config.vocab_size, width),
        f"{DECODER}.norm.weight": (width,),
        f"{DECODER}.self_conditioning.pre_norm.weight": (width,),
        f"{DECODER}.self_conditioning.gate_proj.weight": (inner, width),
        f"{DECODER}.self_conditioning.up_proj.weight": (inner, width),
        f"{DECODER}.self_conditioning.down_proj.weight": (width, inner),
    }
    for i, attention in enumerate(config.layers):
        layer = f"{DECODER}.layers.{i}"
        queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        result |= {f"{layer}.{norm}.weight": (width,) for norm in NORMS}
        result |= {
            f"{layer}.self_attn.q_proj.weight": (queries, width),
            f"{layer}.self_attn.k_proj.weight": (keys, width),
            f"{layer}.self_attn.o_proj.weight": (width, queries),
            f"{layer}.self_attn.q_norm.weight": (attention.head_dim,),
            f"{layer}.self_attn.k_norm.weight": (attention.head_dim,),
            f"{layer}.mlp.gate_proj.weight": (inner, width),
            f"{layer}.mlp.up_proj.weight": (inner, width),
            f"{layer}.mlp.down_proj.weight": (width, inner),
            f"{layer}.router.proj.weight": (config.experts, width),
            f"{layer}.router.scale": (width,),
            f"{layer}.router.per_expert_scale": (config.experts,),
            f"{layer}.experts.gate_up_proj": (config.experts, 2 * expert, width),
            f"{layer}.experts.down_proj": (config.experts, width, expert),
            f"{layer}.layer_scalar": (1,),
            f"{ENCODER}.layers.{i}.layer_scalar": (1,),
        }
        if attention.kind == "sliding_attention":
            result[f"{layer}.self_attn.v_proj.weight"] = (keys, width)
    return result


def build(config: ModelConfig, pack: Callable[[str], Any], stack: Callable[[Any], Any] = lambda part: part) -> Model:
    """Assemble a model.

    Args:
        config: the model's.
        pack: returns the weight of a name in `shapes` as a backend's ops take it, on the device.
        stack: lays the weights of an `Attention` or an `Mlp` that read the same activations together, where the backend
            wants them so (`Attention.qkv_proj`, `Mlp.gate_up_proj`).
    """

    def norm(name: str) -> RmsNorm:
        return RmsNorm(weight=pack(f"{name}.weight"), eps=config.norm_eps)

    def mlp(name: str) -> Mlp:
        return stack(Mlp(**{part: pack(f"{name}.{part}.weight") for part in ("gate_proj", "up_proj", "down_proj")}))

    layers = []
    for i, attention in enumerate(config.layers):
        layer = f"{DECODER}.layers.{i}"
        has_value = attention.kind == "sliding_attention"
        layers.append(
            Layer(
                self_attn=stack(
                    Attention(
                        config=attention,
                        eps=config.norm_eps,
                        q_proj=pack(f"{layer}.self_attn.q_proj.weight"),
                        k_proj=pack(f"{layer}.self_attn.k_proj.weight"),
                        v_proj=pack(f"{layer}.self_attn.v_proj.weight") if has_value else None,
                        o_proj=pack(f"{layer}.self_attn.o_proj.weight"),
                        q_norm=pack(f"{layer}.self_attn.q_norm.weight"),
                        k_norm=pack(f"{layer}.self_attn.k_norm.weight"),
                    )
                ),
                mlp=mlp(f"{layer}.mlp"),
                router=Router(
                    experts=config.experts,
                    experts_per_token=config.experts_per_token,
                    eps=config.norm_eps,
                    proj=pack(f"{layer}.router.proj.weight"),
                    scale=pack(f"{layer}.router.scale"),
                    per_expert_scale=pack(f"{layer}.router.per_expert_scale"),
                ),
                experts=Experts(
                    gate_up_proj=pack(f"{layer}.experts.gate_up_proj"), down_proj=pack(f"{layer}.experts.down_proj")
                ),
                encoder_scalar=pack(f"{ENCODER}.layers.{i}.layer_scalar"),
                decoder_scalar=pack(f"{layer}.layer_scalar"),
                **{name: norm(f"{layer}.{name}") for name in NORMS},
            )
        )
    return Model(
        config=config,
        embed_tokens=pack(f"{DECODER}.embed_tokens.weight"),
        layers=tuple(layers),
        norm=norm(f"{DECODER}.norm"),
        self_conditioning=SelfConditioning(
            pre_norm=norm(f"{DECODER}.self_conditioning.pre_norm"),
            post_norm=RmsNorm(weight=None, eps=config.norm_eps),
            mlp=mlp(f"{DECODER}.self_conditioning"),
        ),
    )


def random_weights(config: ModelConfig, *, seed: int = 0, scale: float = 0.02) -> dict[str, np.ndarray]:
    """Return float32 weights for tests, benchmarks and the start of training: N(0, scale), norms and scales one."""
    generator = np.random.default_rng(seed)
    result = {}
    for name, shape in shapes(config).items():
        constant = len(shape) == 1
        draw = np.ones(shape) if constant else generator.normal(0.0, scale, shape)
        result[name] = draw.astype(np.float32)
    return result
