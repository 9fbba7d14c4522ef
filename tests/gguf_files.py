"""GGUF files of a small model, written by the gguf library, with the weights that they mean as that library reads them.

Names of tensors and settings are those of the published diffusiongemma-26B-A4B-it-Q8_0.gguf. Blocks of quantized types
are random bytes but for their scales, so that every code occurs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from dgemma.core.config import ModelConfig
from tiny import SPECIAL, TEMPLATE, tiny_checkpoint, tiny_weights

Weights = dict[str, np.ndarray]
PIECES = ("▁", *"abcdefghijklmnopqrstuvwxyz.,\n", "in", "th", "▁t", "▁th", "the", "▁the", "ing", "\n\n")
MERGES = ("i n", "t h", "▁ t", "▁t h", "▁ th", "th e", "▁th e", "▁ the", "in g", "\n \n")
TOKENS = (*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *PIECES)
VISIBLE = ("<|channel>", "<channel|>", "<|tool_response>")  # llama.cpp calls them text, so that they show
SIZES: dict[str, Any] = dict(
    vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, moe_intermediate_size=32, head_dim=16,
    global_head_dim=32,
)  # fmt: skip
WIDE: dict[str, Any] = SIZES | dict(
    hidden_size=256, intermediate_size=256, moe_intermediate_size=256, head_dim=64, global_head_dim=64, num_experts=2,
    num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
_SCALE_AT = {
    "Q2_K": (-4, -2), "Q3_K": (-2,), "Q6_K": (-2,), "TQ2_0": (-2,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2),
    "Q5_K": (0, 2),
}  # fmt: skip
"""Where the float16 scales of a block stand, counted from its beginning or end; first where nothing is said."""


def spelled(name: str) -> str:
    """What llama.cpp calls one of our weights."""
    outer = {
        "model.decoder.embed_tokens.weight": "token_embd.weight", "model.decoder.norm.weight": "output_norm.weight",
        "model.decoder.self_conditioning.pre_norm.weight": "self_cond_pre_norm.weight",
        **{
            f"model.decoder.self_conditioning.{one}_proj.weight": f"self_cond_{one}.weight"
            for one in ("gate", "up", "down")
        },
    }  # fmt: skip
    if name in outer:
        return outer[name]
    layer, rest = name.split(".layers.")[1].split(".", 1)
    inner = {
        "input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "post_attention_norm.weight",
        "pre_feedforward_layernorm.weight": "ffn_norm.weight",
        "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
        "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
        "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
        "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
        "self_attn.o_proj.weight": "attn_output.weight",
        **{f"self_attn.{one}_proj.weight": f"attn_{one}.weight" for one in "qkv"},
        **{f"self_attn.{one}_norm.weight": f"attn_{one}_norm.weight" for one in "qk"},
        **{f"mlp.{one}_proj.weight": f"ffn_{one}.weight" for one in ("gate", "up", "down")},
        "router.proj.weight": "ffn_gate_inp.weight", "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale", "experts.gate_up_proj": "ffn_gate_up_exps.weight",
        "experts.down_proj": "ffn_down_exps.weight",
        "layer_scalar": ("enc_" if "encoder" in name else "") + "layer_output_scale.weight",
    }  # fmt: skip
    return f"blk.{layer}.{inner[rest]}"


def is_matrix(name: str) -> bool:
    """Whether llama-quantize would quantize it: not norms, scalars or the router."""
    return name.endswith(("_proj", "_proj.weight", "embed_tokens.weight"))


def random_blocks(draw: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return bytes [..., N/block·size] of a type, any codes there are, under scales of a weight's size."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = draw.integers(0, 256, (*shape[:-1], shape[-1] // block, size), np.uint8)
    if kind == "MXFP4":
        raw[..., 0] = draw.integers(118, 124, raw.shape[:-1])
    else:
        bits = {"Q8_0": 7, "Q6_K": 12, "Q3_K": 7, "Q5_K": 10, "IQ4_XS": 11, "IQ4_NL": 7}.get(
            kind, 5 if block == 32 else 8
        )
        for at in _SCALE_AT.get(kind, (0,)):
            scale = (draw.uniform(0.5, 2.0, raw.shape[:-1]) * 0.2 / 2.0 ** (bits - 1)).astype(np.float16)
            if kind.endswith("_1") and at:  # a minimum, as far below zero as the codes reach above
                scale = -scale * np.float16(2 ** (bits - 1))
            raw[..., at % size : at % size + 2] = scale[..., None].view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


Change = Callable[[dict[str, tuple[np.ndarray, str]]], Any]


def gguf_file(
    tmp_path: Path, kinds: str | Callable[[str], str] = "Q8_0", *, name: str = "model.gguf", seed: int = 0,
    settings: Mapping[str, Any] | None = None, tensors: Change | None = None, tokenizer: str = "gemma4",
    split: int = 0, **sizes: Any,
) -> tuple[Path, Weights]:  # fmt: skip
    """Write a GGUF file; returns its path, and the float32 weights that it means.

    Args:
        kinds: the type of the matrices, or a function from our name of a matrix to its type.
        settings: of other values than usual, or None to leave one out, without the prefix of the architecture.
        tensors: changes the table of tensors, raw bytes and their type, before it is written.
        split: tensors in a file, where it is to be split.
    """
    folder = tiny_checkpoint(tmp_path, name="float", seed=seed, **(SIZES | sizes))
    data = json.loads((folder / "config.json").read_text())
    config = ModelConfig.from_hf(data)
    meant, table, draw = (
        tiny_weights(config, seed=seed),
        dict[str, tuple[np.ndarray, str]](),
        np.random.default_rng(seed),
    )
    for one, value in list(meant.items()):
        kind = (kinds if isinstance(kinds, str) else kinds(one)) if is_matrix(one) else "F32"
        if kind == "F32":
            stored = value
        elif kind in ("F16", "BF16"):
            stored = gguf.quants.quantize(value, GGMLQuantizationType[kind])
        else:
            stored = random_blocks(draw, kind, value.shape)
        meant[one] = dequantized(stored, kind, value.shape)
        table[spelled(one)] = stored, kind
    half = config.layers[-1].head_dim // 2
    turning = config.layers[-1].rotary_dims // 2
    table["rope_freqs.weight"] = np.array([1.0] * turning + [1e30] * (half - turning), np.float32), "F32"
    if tensors:
        tensors(table)
    return write(tmp_path / name, config, data, table, settings or {}, tokenizer, split), meant


def dequantized(stored: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(gguf.quants.dequantize(stored, GGMLQuantizationType[kind]), np.float32).reshape(shape)


def write(
    path: Path, config: ModelConfig, data: Mapping[str, Any], table: Mapping[str, tuple[np.ndarray, str]],
    settings: Mapping[str, Any], tokenizer: str, split: int,
) -> Path:  # fmt: skip
    text, layers = data["text_config"], config.layers
    arch = settings.get("general.architecture", "diffusion-gemma")
    usual: dict[str, Any] = {
        f"{arch}.{key}": value
        for key, value in {
            "block_count": len(layers), "context_length": 512, "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size, "attention.head_count": layers[0].heads,
            "attention.head_count_kv": [one.kv_heads for one in layers], "rope.freq_base": 1e6,
            "rope.freq_base_swa": 1e4, "attention.layer_norm_rms_epsilon": 1e-6, "expert_count": config.experts,
            "expert_used_count": config.experts_per_token, "attention.key_length": layers[-1].head_dim,
            "attention.value_length": layers[-1].head_dim, "final_logit_softcapping": 30.0,
            "attention.sliding_window": text["sliding_window"], "attention.shared_kv_layers": 0,
            "embedding_length_per_layer_input": 0,
            "attention.sliding_window_pattern": [one.window is not None for one in layers],
            "attention.key_length_swa": layers[0].head_dim, "attention.value_length_swa": layers[0].head_dim,
            "expert_feed_forward_length": config.expert_size, "rope.dimension_count": layers[-1].head_dim,
            "rope.dimension_count_swa": layers[0].head_dim, "attention.causal": False,
        }.items()
    } | {
        "diffusion.canvas_length": config.canvas_length, "diffusion.eb_max_steps": 6, "diffusion.eb_t_min": 0.4,
        "diffusion.eb_t_max": 0.8, "diffusion.eb_entropy_bound": 0.1, "diffusion.eb_stability_threshold": 1,
        "diffusion.eb_confidence_threshold": 0.005, "general.name": "tiny", "general.file_type": 7,
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.model": tokenizer, "tokenizer.chat_template": TEMPLATE,
        "tokenizer.ggml.tokens": list(TOKENS), "tokenizer.ggml.token_type": [token_type(one) for one in TOKENS],
        "tokenizer.ggml.scores": scores(), "tokenizer.ggml.merges": list(MERGES) if tokenizer != "llama" else None,
    }  # fmt: skip
    for key, value in settings.items():
        usual[key if key.split(".")[0] in ("general", "tokenizer", "diffusion") else f"{arch}.{key}"] = value
    with warnings.catch_warnings():
        writer = gguf.GGUFWriter(str(path), arch, split_max_tensors=split)
        for key, value in usual.items():
            if value is not None and key != "general.architecture":
                _setting(writer, key, value)
        for name, (stored, kind) in table.items():
            writer.add_tensor(name, stored, raw_dtype=GGMLQuantizationType[kind] if kind != "F32" else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path if not split else next(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def _setting(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list | tuple):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def token_type(token: str) -> int:
    if token.startswith("<0x"):
        return 6
    if token in VISIBLE:
        return 4
    return 2 if token == "<unk>" else 3 if token in SPECIAL else 1


def scores() -> list[float]:
    """A SentencePiece vocabulary's: the earlier a piece was merged, the higher."""
    order = [merge.replace(" ", "") for merge in MERGES]
    return [-float(order.index(one)) if one in order else -1000.0 for one in TOKENS]
