"""A complete checkpoint of a few hundred kilobytes with random weights: config, tokenizer, chat template, weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from dgemma.checkpoints import safetensors, weights
from dgemma.core.config import ModelConfig

SPECIAL = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>",
    "<|image>", "<|image|>", "<image|>", "<|tool_response>", "<unused0>", "<unused1>", "<unused2>",
)  # fmt: skip
IDS = {token: i for i, token in enumerate(SPECIAL)}
INDEX = "model.safetensors.index.json"
VOCAB = len(SPECIAL) + 256  # and one token per byte

TEMPLATE = """{{ bos_token }}
{%- set system = messages[0]['role'] in ('system', 'developer') -%}
{%- if system or enable_thinking -%}
<|turn>system
{% if enable_thinking %}<|think|>
{% endif %}{% if system %}{{ messages[0]['content'] | trim }}{% endif %}<turn|>
{% endif -%}
{%- for message in (messages[1:] if system else messages) -%}
{%- if message['role'] not in ('user', 'assistant') -%}
{{ raise_exception('no role ' + message['role']) }}
{%- endif -%}
<|turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{{ message['content'] | trim }}<turn|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|turn>model
{% endif -%}
"""

TEXT_CONFIG: dict[str, Any] = dict(
    model_type="diffusion_gemma_text", vocab_size=VOCAB, hidden_size=32, intermediate_size=48,
    moe_intermediate_size=16, num_experts=4, top_k_experts=2, num_hidden_layers=3,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"], num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, global_head_dim=16, num_global_key_value_heads=1, sliding_window=12,
    hidden_activation="gelu_pytorch_tanh", max_position_embeddings=512, final_logit_softcapping=30.0,
    rms_norm_eps=1e-6, pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=True,
    use_bidirectional_attention="vision",
)  # fmt: skip


ADDED = tuple(
    f"{one}.weight" for one in ("post_attention_layernorm", "post_feedforward_layernorm", "conditioning.down_proj")
)


def tiny_checkpoint(
    tmp_path: Path,
    *,
    name: str = "tiny",
    seed: int = 0,
    dtype: str = "float32",
    canvas_length: int = 16,
    gain: float = 1.0,
    generation: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write a checkpoint folder `tmp_path / name` and return its path.

    `overrides` are keys of config.json's text_config, `generation` keys of generation_config.json; `dtype` is what the
    weights are stored in. The weights are large enough that outputs are far from uniform and differ by position. A
    `gain` below one weakens what layers and self-conditioning add, so that rounding does not grow from pass to pass: as
    it does in a random model at full strength, and in no trained one.
    """
    folder = tmp_path / name
    folder.mkdir(parents=True)
    config = {
        "architectures": ["DiffusionGemmaForBlockDiffusion"], "model_type": "diffusion_gemma", "dtype": dtype,
        "canvas_length": canvas_length, "boi_token_id": IDS["<|image>"], "image_token_id": IDS["<|image|>"],
        "eoi_token_id": IDS["<image|>"], "eos_token_id": [IDS["<eos>"], IDS["<turn|>"]], "tie_word_embeddings": True,
        "text_config": TEXT_CONFIG | overrides,
    }  # fmt: skip
    sampling = {
        "max_new_tokens": 32, "max_denoising_steps": 6, "t_max": 0.8, "t_min": 0.4, "stability_threshold": 1,
        "confidence_threshold": 0.005, "bos_token_id": 2, "pad_token_id": 0,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "eos_token_id": [IDS["<eos>"], IDS["<turn|>"], IDS["<|tool_response>"]],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(sampling | (generation or {})))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
        "unk_token": "<unk>", "padding_side": "left",
    }))  # fmt: skip
    tokenizer().save(str(folder / "tokenizer.json"))
    tensors = tiny_weights(ModelConfig.from_hf(config), seed=seed, gain=gain)
    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    safetensors.write(
        folder / "model.safetensors", {key: value.astype(stored) for key, value in tensors.items()}, {"format": "pt"}
    )
    return folder


def tokenizer() -> Tokenizer:
    """One token per byte behind the special tokens; like the published one it puts <bos> first."""
    vocab = IDS | {byte: len(SPECIAL) + i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    result = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=None))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.decoder = decoders.ByteLevel()
    result.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", IDS["<bos>"])]
    )
    result.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return result


def tiny_weights(config: ModelConfig, *, seed: int = 0, gain: float = 1.0) -> dict[str, np.ndarray]:
    """Return float32 weights by name; every one, norms and scalars included, is random."""
    generator = np.random.default_rng(seed)
    result = {}
    for name, shape in weights.shapes(config).items():
        noise = generator.standard_normal(shape)
        if len(shape) == 1:
            value = 1.0 + 0.3 * noise
        else:
            value = noise if "embed" in name else 1.5 * shape[-1] ** -0.5 * noise
        added = (
            "post_attention_layernorm.weight",
            "post_feedforward_layernorm.weight",
            "conditioning.down_proj.weight",
        )
        if name.endswith(added):
            value = gain * value
        result[name] = value.astype(np.float32)
    return result


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    """Change the tensors of a single-file checkpoint."""
    path = folder / "model.safetensors"
    file = safetensors.SafetensorsFile.open(path)
    tensors = {name: file.tensor(name).copy() for name in file.entries}
    change(tensors)
    safetensors.write(path, tensors)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path, parts: int = 3) -> Path:
    """Split a single-file checkpoint as transformers names shards."""
    file = safetensors.SafetensorsFile.open(folder / "model.safetensors")
    table = {}
    for i in range(parts):
        name = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        part = list(file.entries)[i::parts]
        safetensors.write(folder / name, {one: file.tensor(one) for one in part}, {"format": "pt"})
        table |= dict.fromkeys(part, name)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return folder
