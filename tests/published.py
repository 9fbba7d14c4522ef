"""Small checkpoints in every layout that others publish, each with the weights that it means, in float32.

Codes and scales are random rather than fitted, and decoded here by ml_dtypes or MLX: nothing of dgemma's own
quantization is on either side of a comparison.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

from dgemma.checkpoints import safetensors, weights
from dgemma.core.config import ModelConfig
from tiny import tiny_checkpoint, tiny_weights

Weights = dict[str, np.ndarray]

SIZES: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=128, moe_intermediate_size=64, head_dim=16, global_head_dim=32, num_experts=4,
)  # fmt: skip
LAYOUTS = ("modelopt", "nvfp4", "fp8", "mlx")
SHARD, MANIFEST = "model-00001-of-00001.safetensors", "dgemma-manifest.json"
IMAGE = "model.encoder.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight"


def floats(tmp_path: Path, name: str = "source", dtype: str = "bfloat16", **overrides: Any) -> Path:
    """A float checkpoint whose rows divide into groups of 64, with an image tower of one tensor."""
    folder = tiny_checkpoint(tmp_path, name=name, dtype=dtype, **(SIZES | overrides))
    config = read_config(folder)
    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    save(folder, {key: value.astype(stored) for key, value in tiny_weights(config).items()} | image())
    return folder


def image() -> Weights:
    return {IMAGE: np.arange(24, dtype=np.float32).reshape(4, 6).astype(ml_dtypes.bfloat16)}


def read_config(folder: Path) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))


def save(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})


def published(tmp_path: Path, layout: str, seed: int = 0) -> tuple[Path, Weights]:
    """Write a checkpoint in one of `LAYOUTS`; returns the folder, and the float32 weights that it means."""
    folder = floats(tmp_path, name=layout)
    config = read_config(folder)
    meant = {name: as_bf16(value) for name, value in tiny_weights(config, seed=seed).items()}
    make = {"modelopt": _modelopt, "nvfp4": _compressed, "fp8": _float8, "mlx": _mlx}[layout]
    stored, declared = make(meant, np.random.default_rng(seed))
    save(folder, stored | image())
    data = json.loads((folder / "config.json").read_text()) | declared
    (folder / "config.json").write_text(json.dumps(data))
    if layout == "modelopt":
        quant = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
        (folder / "hf_quant_config.json").write_text(json.dumps(quant))
    if layout == "mlx":  # which writes an index beside a single file
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(stored | image(), "model.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, meant


def as_bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def narrow(meant: Weights) -> Weights:
    return {name: value.astype(ml_dtypes.bfloat16) for name, value in meant.items()}


def one_by_one(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """Split fused experts as quantizers do: `experts.0.gate_proj`, its `up_proj`, …"""
    layer = name.removesuffix(".gate_up_proj").removesuffix(".down_proj")
    parts = {}
    for i, expert in enumerate(value):
        if name.endswith("gate_up_proj"):
            parts[f"{layer}.{i}.gate_proj"], parts[f"{layer}.{i}.up_proj"] = np.split(expert, 2)
        else:
            parts[f"{layer}.{i}.down_proj"] = expert
    return parts


def joined(name: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The inverse of `one_by_one`."""
    layer, experts = name.rpartition(".")[0], SIZES["num_experts"]
    if name.endswith("down_proj"):
        return np.stack([parts[f"{layer}.{i}.down_proj"] for i in range(experts)])
    halves = [[parts[f"{layer}.{i}.{kind}_proj"] for kind in ("gate", "up")] for i in range(experts)]
    return np.stack([np.concatenate(pair) for pair in halves])


def is_expert(name: str) -> bool:
    return ".experts." in name


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def _random_nvfp4(shape: tuple[int, ...], draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Codes two a byte, the first in the low half; scales; and the factor that goes with them."""
    codes = draw.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)
    scales = draw.uniform(20, 400, (*shape[:-1], shape[-1] // 16)).astype(ml_dtypes.float8_e4m3fn)
    return codes, scales, np.float32(draw.uniform(0.5, 2.0) * 0.1 / 400)


def _decode_nvfp4(codes: np.ndarray, scales: np.ndarray, factor: np.float32) -> np.ndarray:
    halves = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1).astype(np.uint8)
    values = halves.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return values * np.repeat(scales.astype(np.float32) * factor, 16, -1)


def _modelopt(meant: Weights, draw: np.random.Generator) -> tuple[Weights, dict[str, Any]]:
    """NVIDIA's: experts only, all else in bf16."""
    stored: Weights = {"lm_head.weight": narrow(meant)["model.decoder.embed_tokens.weight"]}
    for name in list(meant):
        if not is_expert(name):
            stored[name] = meant[name].astype(ml_dtypes.bfloat16)
            continue
        decoded = {}
        for module, value in one_by_one(name, meant[name]).items():
            codes, scales, factor = _random_nvfp4(value.shape, draw)
            stored |= {
                f"{module}.weight": codes, f"{module}.weight_scale": scales,
                f"{module}.weight_scale_2": np.asarray(factor), f"{module}.input_scale": np.asarray(np.float32(0.01)),
            }  # fmt: skip
            decoded[module] = _decode_nvfp4(codes, scales, factor)
        meant[name] = joined(name, decoded)
    ignored = ["lm_head", "*mlp*", "*router*", "*self_attn*", "*self_conditioning*", "*vision_tower*"]
    return stored, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ignored}}


def _compressed(meant: Weights, draw: np.random.Generator) -> tuple[Weights, dict[str, Any]]:
    """RedHat's NVFP4: every linear layer but the router; the global scale divides."""
    stored: Weights = {}
    for name in list(meant):
        if not (is_expert(name) or is_linear(name)):
            stored[name] = meant[name].astype(ml_dtypes.bfloat16)
            continue
        parts = one_by_one(name, meant[name]) if is_expert(name) else {name.removesuffix(".weight"): meant[name]}
        decoded = {}
        for module, value in parts.items():
            codes, scales, factor = _random_nvfp4(value.shape, draw)
            divisor = np.float32(1) / factor
            stored |= {
                f"{module}.weight_packed": codes, f"{module}.weight_scale": scales,
                f"{module}.weight_global_scale": divisor.reshape(1),
                f"{module}.input_global_scale": np.ones(1, np.float32),
            }  # fmt: skip
            decoded[module] = _decode_nvfp4(codes, scales, np.float32(1) / divisor)
        meant[name] = joined(name, decoded) if is_expert(name) else decoded[name.removesuffix(".weight")]
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["re:.*router.*"]}
    return stored, {"quantization_config": config}


def _float8(meant: Weights, draw: np.random.Generator) -> tuple[Weights, dict[str, Any]]:
    """RedHat's FP8-dynamic: E4M3 with a scale for each row; copies of tied weights are there as well."""
    stored: Weights = {}
    for name in list(meant):
        if not (is_expert(name) or is_linear(name)):
            stored[name] = meant[name].astype(ml_dtypes.bfloat16)
            continue
        parts = one_by_one(name, meant[name]) if is_expert(name) else {name.removesuffix(".weight"): meant[name]}
        decoded = {}
        for i, (module, value) in enumerate(parts.items()):
            scale = (np.abs(value).max(-1, keepdims=True) / 448).astype(ml_dtypes.bfloat16)
            codes = (value / scale.astype(np.float32)).astype(ml_dtypes.float8_e4m3fn)
            kept = scale if i % 2 else scale.astype(np.float32)  # published in both widths
            stored |= {f"{module}.weight": codes, f"{module}.weight_scale": kept}
            decoded[module] = codes.astype(np.float32) * scale.astype(np.float32)
            if "layers.0.mlp" in module:
                copy = module.replace("model.decoder", "model.encoder.language_model")
                stored |= {f"{copy}.weight": codes, f"{copy}.weight_scale": kept}
        meant[name] = joined(name, decoded) if is_expert(name) else decoded[name.removesuffix(".weight")]
    return stored, {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}


def _mlx(meant: Weights, draw: np.random.Generator) -> tuple[Weights, dict[str, Any]]:
    """mlx-community's 4 bits: experts and self-conditioning 4-bit g64, the rest 8-bit g64."""
    stored: Weights = {}
    eight = {"group_size": 64, "bits": 8}
    quantization: dict[str, Any] = {"group_size": 64, "bits": 4, "mode": "affine"}
    for name in list(meant):
        if meant[name].ndim < 2:
            stored[name] = meant[name].astype(ml_dtypes.bfloat16)
            continue
        module = name.removesuffix(".weight")
        bits = 4 if is_expert(name) or "self_conditioning" in name else 8
        if bits == 8:
            quantization[module] = eight
        parts = mx.quantize(mx.array(meant[name]).astype(mx.bfloat16), 64, bits, stream=mx.cpu)
        words, scales, biases = (np.array(part.view(mx.uint16) if i else part) for i, part in enumerate(parts))
        stored |= {
            f"{module}.weight": words, f"{module}.scales": scales.view(ml_dtypes.bfloat16),
            f"{module}.biases": biases.view(ml_dtypes.bfloat16),
        }  # fmt: skip
        wide = [part.astype(mx.float32) for part in parts[1:]]
        meant[name] = np.array(mx.dequantize(parts[0], *wide, group_size=64, bits=bits, stream=mx.cpu))
    return stored, {"quantization": quantization, "quantization_config": quantization}


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return weights.shapes(read_config(folder))


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def left(tmp_path: Path) -> set[str]:
    """What lies beside the source."""
    return {path.name for path in tmp_path.iterdir()} - {"source"}


SUITED = {"modelopt": "nvfp4", "nvfp4": "nvfp4", "fp8": "bf16", "mlx": "4bit-mlx"}
RULES = '"*.experts.*" = "nvfp4"\n"*_proj" = "nvfp4"\n'


def suited(tmp_path: Path, layout: str) -> dict[str, Any]:
    """Options under which a layout is carried as far as it can be."""
    if layout == "nvfp4":  # RedHat's has every linear layer in it
        (tmp_path / "all.toml").write_text(RULES)
        return {"rules": tmp_path / "all.toml"}
    return {"recipe": SUITED[layout], "requantize": layout == "fp8"}
