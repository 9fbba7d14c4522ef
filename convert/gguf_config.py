"""A config.json and a generation_config.json from the settings of a GGUF file.

Of the keys that begin with the architecture each is used, checked against what the graph does, or neutral: zero, false
or empty, for something that the model does not have. Anything else is refused by name, as in `core/config.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..checkpoints.gguf import Array, GgufFile, Tensor
from ..core.config import ModelConfig
from ..core.errors import DgemmaError, quoted, shown

ARCHITECTURES = ("diffusion-gemma", "diffusion_gemma", "gemma4")
"""What it may be called. A plain Gemma 4 lacks the tensors of self-conditioning, and is refused for that."""
END_TOKENS = ("<turn|>", "<|tool_response>")
"""Tokens that end an answer besides the end of text; a GGUF file names no more than one."""
_IMAGES = {"boi_token_id": "<|image>", "image_token_id": "<|image|>", "eoi_token_id": "<image|>"}
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "attention.shared_kv_layers": (0,), "embedding_length_per_layer_input": (0,), "attention.scale": (1.0,),
    "expert_gating_func": (1,), "expert_weights_norm": (True,), "expert_weights_scale": (1.0,),
    "rope.scaling.type": ("none",), "rope.scaling.factor": (1.0,), "attention.causal": (False, True),
}  # fmt: skip
_OF_TRAINING = ("rope.scaling.original_context_length", "rope.scaling.finetuned", "vocab_size", "tensor_data_layout")


class _Settings:
    """Settings under an architecture's prefix, taken one by one."""

    def __init__(self, file: GgufFile) -> None:
        self.where = shown(file.path)
        self.arch = _architecture(file)
        prefix = f"{self.arch}."
        self.left = {key.removeprefix(prefix): one for key, one in file.metadata.items() if key.startswith(prefix)}

    def take(self, key: str, *default: Any) -> Any:
        if key not in self.left and not default:
            raise DgemmaError(f"{self.where}: the setting {self.arch}.{key} is missing")
        value = self.left.pop(key, *default)
        return value.numbers() if isinstance(value, Array) else value

    def integer(self, key: str, *default: int) -> int:
        value = self.take(key, *default)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise DgemmaError(f"{self.where}: {self.arch}.{key} is {quoted(value, 40)}, expected one number")
        return value

    def number(self, key: str, *default: float) -> float:
        value = self.take(key, *default)
        if type(value) not in (int, float):
            raise DgemmaError(f"{self.where}: {self.arch}.{key} is {quoted(value, 40)}, expected a number")
        return decimal(value)

    def finish(self) -> None:
        for key, value in list(self.left.items()):
            known = _MUST_BE.get(key, ())
            neutral = not isinstance(value, Array) and not value  # a feature that is not there
            if neutral or value in known or key in _OF_TRAINING:
                del self.left[key]
        if self.left:
            key, value = next(iter(self.left.items()))
            said = "a list" if isinstance(value, Array) else quoted(value, 40)
            raise DgemmaError(f"{self.where}: the setting {quoted(f'{self.arch}.{key}', 60)} is {said}, which this "
                              "runtime does not have")  # fmt: skip


def decimal(value: float) -> float:
    """Return the shortest decimal that is this float32: 0.4 for 0.4000000059604645."""
    return float(str(np.float32(value)))


def _architecture(file: GgufFile) -> str:
    arch, where = file.metadata.get("general.architecture"), shown(file.path)
    if arch == "clip":
        raise DgemmaError(
            f"{where}: an image projector (clip), which is no model by itself; give the text model's file"
        )
    if arch not in ARCHITECTURES:
        raise DgemmaError(f"{where}: a model of the architecture {quoted(arch, 40)}; what runs here is DiffusionGemma, "
                          f"{ARCHITECTURES[0]} in GGUF")  # fmt: skip
    return arch


def make_config(
    file: GgufFile, tensors: Mapping[str, Tensor], turning: tuple[int, int] | None
) -> dict[str, Any]:  # fmt: skip
    """Return a config.json, in the spelling that transformers writes.

    Args:
        file: the first of a split.
        tensors: of all files.
        turning: how many of how many pairs of a full layer's head RoPE turns.

    Raises:
        DgemmaError: another model, or a setting that is missing, unknown, or of a value the graph does not support.
    """
    read = _Settings(file)
    if read.arch == "gemma4" and not any(name.startswith(("self_cond", "sc_")) for name in tensors):
        raise DgemmaError(
            f"{read.where}: a Gemma 4 (gemma4), which writes word by word; what runs here is DiffusionGemma"
        )
    layers = read.integer("block_count")
    if not 0 < layers <= 10_000:
        raise DgemmaError(f"{read.where}: {read.arch}.block_count is {layers}")
    kinds = _kinds(read, layers)
    full, sliding = read.integer("attention.key_length"), read.integer("attention.key_length_swa")
    for key, dim in (("value_length", full), ("value_length_swa", sliding)):
        if (found := read.integer(f"attention.{key}", dim)) != dim:
            raise DgemmaError(f"{read.where}: {read.arch}.attention.{key} is {found}, where keys have {dim}")
    for key, dim in (("dimension_count", full), ("dimension_count_swa", sliding)):
        if (found := read.integer(f"rope.{key}", dim)) != dim:
            raise DgemmaError(f"{read.where}: {read.arch}.rope.{key} is {found}, where heads have {dim}")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise DgemmaError(f"{read.where}: no matrix token_embd.weight, the embedding, in it")
    if turning is None:
        raise DgemmaError(f"{read.where}: no rope_freqs.weight in it, which says what share of a head turns")
    if 2 * turning[1] != full:
        raise DgemmaError(
            f"{read.where}: rope_freqs.weight is for heads of {2 * turning[1]}, and full layers have {full}"
        )
    share = turning[0] / turning[1]
    kv = _kv_heads(read, kinds)
    text = {
        "model_type": "diffusion_gemma_text", "vocab_size": embedding.shape[0],
        "hidden_size": read.integer("embedding_length"), "intermediate_size": read.integer("feed_forward_length"),
        "moe_intermediate_size": read.integer("expert_feed_forward_length"),
        "num_experts": read.integer("expert_count"), "top_k_experts": read.integer("expert_used_count"),
        "num_hidden_layers": layers, "layer_types": kinds, "num_attention_heads": read.integer("attention.head_count"),
        "num_key_value_heads": kv[0], "num_global_key_value_heads": kv[1], "head_dim": sliding, "global_head_dim": full,
        "sliding_window": read.integer("attention.sliding_window"),
        "max_position_embeddings": read.integer("context_length", 262_144),
        "final_logit_softcapping": read.number("final_logit_softcapping"),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"), "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True, "use_bidirectional_attention": "vision",
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": read.number("rope.freq_base_swa", 10_000.0)},
            "full_attention": {
                "rope_type": "proportional", "partial_rotary_factor": share,
                "rope_theta": read.number("rope.freq_base"),
            },
        },
    }  # fmt: skip
    canvas = file.metadata.get("diffusion.canvas_length", read.left.pop("canvas_length", None))
    if type(canvas) is not int:
        raise DgemmaError(f"{read.where}: the setting diffusion.canvas_length is missing or no number")
    read.finish()
    ids = special_ids(file)
    there = _ids_of(file, _IMAGES.values())
    images = {key: there[token] for key, token in _IMAGES.items() if token in there}
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"], "model_type": "diffusion_gemma", "dtype": "bfloat16",
        "canvas_length": canvas, "tie_word_embeddings": True, "eos_token_id": end_ids(file),
        **{f"{name}_token_id": ids[name] for name in ("bos", "pad") if name in ids}, **images,
        "text_config": text | {f"{name}_token_id": one for name, one in ids.items() if name in ("bos", "eos", "pad")},
    }  # fmt: skip


def _kinds(read: _Settings, layers: int) -> list[str]:
    """Return each layer's kind, from one flag for each layer, or from the period of full layers."""
    pattern = read.take("attention.sliding_window_pattern")
    if type(pattern) is int and 0 < pattern <= layers:
        pattern = [(i + 1) % pattern != 0 for i in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise DgemmaError(f"{read.where}: {read.arch}.attention.sliding_window_pattern does not name {layers} layers")
    return ["sliding_attention" if one else "full_attention" for one in pattern]


def _kv_heads(read: _Settings, kinds: list[str]) -> tuple[int, int]:
    """Return the key-value heads of sliding layers and of full ones."""
    found = read.take("attention.head_count_kv")
    found = found if isinstance(found, list) else [found] * len(kinds)
    by_kind = {kind: {heads for heads, one in zip(found, kinds, strict=False) if one == kind} for kind in set(kinds)}
    if len(found) != len(kinds) or any(len(heads) != 1 for heads in by_kind.values()):
        raise DgemmaError(f"{read.where}: {read.arch}.attention.head_count_kv is not one number for each kind of layer")
    either = next(iter(by_kind.values()))
    (sliding,), (full,) = by_kind.get("sliding_attention", either), by_kind.get("full_attention", either)
    if any(type(one) is not int or one < 1 for one in (sliding, full)):
        raise DgemmaError(f"{read.where}: {read.arch}.attention.head_count_kv is {quoted([sliding, full], 40)}")
    return sliding, full


def special_ids(file: GgufFile) -> dict[str, int]:
    """Return the ids of bos, eos, pad and unk, as far as the file names them."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    found = {short: file.metadata.get(f"tokenizer.ggml.{long}_token_id") for short, long in names.items()}
    return {short: one for short, one in found.items() if type(one) is int}


def end_ids(file: GgufFile) -> list[int]:
    """Return the ids that end an answer: those the file names, and the tokens that end a turn."""
    named = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    found = _ids_of(file, END_TOKENS)
    return list(
        dict.fromkeys([one for one in named if type(one) is int] + [found[one] for one in END_TOKENS if one in found])
    )


def _ids_of(file: GgufFile, names: Iterable[str]) -> dict[str, int]:
    """Return the ids of some tokens, as far as they are there."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    wanted = {name.encode(): name for name in names}
    if not isinstance(tokens, Array):
        return {}
    return {wanted[one]: i for i, one in enumerate(tokens.strings()) if one in wanted}


def make_generation(file: GgufFile, config: ModelConfig) -> dict[str, Any]:
    """Return a generation_config.json: the sampler's settings, where the file has them."""
    keys = {
        "eb_max_steps": "max_denoising_steps", "eb_t_min": "t_min", "eb_t_max": "t_max",
        "eb_stability_threshold": "stability_threshold", "eb_confidence_threshold": "confidence_threshold",
    }  # fmt: skip
    made: dict[str, Any] = {"eos_token_id": end_ids(file)}
    for key, ours in keys.items():
        value = file.metadata.get(f"diffusion.{key}")
        if isinstance(value, int | float):
            made[ours] = value if isinstance(value, int) else decimal(value)
    bound = file.metadata.get("diffusion.eb_entropy_bound")
    if isinstance(bound, int | float):
        made["sampler_config"] = {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": decimal(bound)}
    made |= {"pad_token_id": config.pad_token_id, "bos_token_id": config.bos_token_id}
    return made
