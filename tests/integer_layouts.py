"""Checkpoints in integers (W4A16, W8A16, W8A8 of compressed-tensors) and in fp8 by blocks, each with what it means.

Codes, scales and zero points are random. What they mean is computed here from the codes before they are packed, and
packing is the plain arithmetic of the formats' descriptions: nothing of dgemma's own is on this side.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from published import Weights, floats, is_expert, is_linear, joined, one_by_one, read_config, save
from tiny import tiny_weights

FP8 = ml_dtypes.float8_e4m3fn


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes [F, N] → int32 [F, ⌈N·bits/32⌉], the first in the lowest bits."""
    per = 32 // bits
    padded = np.zeros((codes.shape[0], -(-codes.shape[1] // per) * per), np.uint64)
    padded[:, : codes.shape[1]] = codes
    words = sum(padded[:, i::per] << np.uint64(bits * i) for i in range(per))
    return np.asarray(words).astype(np.uint32).view(np.int32)


def integer_codes(draw: np.random.Generator, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Signed codes, both ends among them."""
    codes = draw.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape)
    codes[0, 0], codes[-1, -1] = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return codes


def quantized_module(
    draw: np.random.Generator, shape: tuple[int, int], bits: int, group: int, width: Any, *, zeros: bool, flat: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the tensors of one linear layer, and its value; `group` 0 is a scale for each row."""
    rows, columns = shape
    groups = columns // group if group else 1
    codes = integer_codes(draw, bits, shape)
    scale = (draw.uniform(0.5, 2.0, (rows, groups)) * 0.02 * 2.0 ** (4 - bits)).astype(width)
    zero = (
        draw.integers(-(1 << (bits - 1)), 1 << (bits - 1), (rows, groups)) if zeros else np.zeros((rows, groups), int)
    )
    value = (codes.reshape(rows, groups, -1) - zero[..., None]) * scale.astype(np.float64)[..., None]
    half = 1 << (bits - 1)
    tensors = {"weight_scale": scale[:, 0] if flat else scale}
    if bits == 8 and flat:  # naive: one code a byte
        tensors["weight"] = codes.astype(np.int8)
    else:
        tensors["weight_packed"] = pack(codes + half, bits)
        tensors["weight_shape"] = np.array(shape, np.int64)
    if zeros:
        tensors["weight_zero_point"] = pack((zero + half).T, bits).T.copy()
    return tensors, value.reshape(shape).astype(np.float32)


def integers(
    tmp_path: Path, *, bits: int = 4, group: int = 32, width: Any = ml_dtypes.bfloat16, zeros: bool = False,
    flat: bool = False, stacked: bool = False, seed: int = 0, **sizes: Any,
) -> tuple[Path, Weights]:  # fmt: skip
    """Write a folder of compressed-tensors' integers; every linear layer but the router is quantized."""
    folder = floats(tmp_path, **sizes)
    meant, stored = tiny_weights(read_config(folder), seed=seed), dict[str, np.ndarray]()
    draw = np.random.default_rng(seed)
    for name in list(meant):
        if not (is_expert(name) or is_linear(name)):
            stored[name] = meant[name].astype(ml_dtypes.bfloat16)
            meant[name] = stored[name].astype(np.float32)
            continue
        if is_expert(name) and stacked:
            made = [
                quantized_module(draw, value.shape, bits, group, width, zeros=zeros, flat=flat) for value in meant[name]
            ]
            for kind in made[0][0]:
                if kind != "weight_shape":
                    stored[f"{name}_{kind.removeprefix('weight_')}"] = np.stack([one[kind] for one, _ in made])
            meant[name] = np.stack([value for _, value in made])
            continue
        parts = one_by_one(name, meant[name]) if is_expert(name) else {name.removesuffix(".weight"): meant[name]}
        decoded = {}
        for module, value in parts.items():
            tensors, decoded[module] = quantized_module(draw, value.shape, bits, group, width, zeros=zeros, flat=flat)
            stored |= {f"{module}.{kind}": tensor for kind, tensor in tensors.items()}
        meant[name] = joined(name, decoded) if is_expert(name) else decoded[name.removesuffix(".weight")]
    save(folder, stored)
    declare(folder, {"quant_method": "compressed-tensors", "format": "pack-quantized"})
    return folder, meant


def declare(folder: Path, quantization: dict[str, Any]) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"quantization_config": quantization}))


def fp8_blocks(
    tmp_path: Path, *, block: tuple[int, int] = (128, 128), stacked: bool = False, static: bool = False,
    width: Any = np.float32, seed: int = 0, **sizes: Any,
) -> tuple[Path, Weights]:  # fmt: skip
    """Write a folder as transformers' FineGrainedFP8Config and DeepSeek do: codes, and a scale for each block."""
    folder = floats(tmp_path, **sizes)
    meant, stored = tiny_weights(read_config(folder), seed=seed), dict[str, np.ndarray]()
    draw = np.random.default_rng(seed)

    def one(value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, columns = (-(-size // step) for size, step in zip(value.shape, block, strict=True))
        scale = draw.uniform(0.5, 2.0, (rows, columns)).astype(width)
        codes = (value / 2).astype(FP8)
        wide = np.kron(scale.astype(np.float64), np.ones(block))[: value.shape[0], : value.shape[1]]
        return codes, scale, (codes.astype(np.float64) * wide).astype(np.float32)

    for name in list(meant):
        if not (is_expert(name) or is_linear(name)):
            stored[name] = meant[name].astype(ml_dtypes.bfloat16)
            meant[name] = stored[name].astype(np.float32)
        elif is_expert(name) and stacked:
            made = [one(value) for value in meant[name]]
            stored[name] = np.stack([codes for codes, _, _ in made])
            stored[f"{name}_scale_inv"] = np.stack([scale for _, scale, _ in made])
            if static:
                stored[f"{name}_activation_scale"] = np.ones(len(made), np.float32)
            meant[name] = np.stack([value for _, _, value in made])
        else:
            parts = one_by_one(name, meant[name]) if is_expert(name) else {name.removesuffix(".weight"): meant[name]}
            decoded = {}
            for module, value in parts.items():
                codes, scale, decoded[module] = one(value)
                stored |= {f"{module}.weight": codes, f"{module}.weight_scale_inv": scale}
                if static:
                    stored[f"{module}.activation_scale"] = np.ones((), np.float32)
            meant[name] = joined(name, decoded) if is_expert(name) else decoded[name.removesuffix(".weight")]
    save(folder, stored)
    declare(folder, {"quant_method": "fp8", "weight_block_size": list(block)})
    return folder, meant
