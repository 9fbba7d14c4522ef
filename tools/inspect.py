"""What a checkpoint holds and what it takes to run it, from config.json and headers alone."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints import foreign, gguf, weights
from ..checkpoints.checkpoint import open_files
from ..checkpoints.files import read_json
from ..checkpoints.links import inside, present
from ..checkpoints.quant import Format
from ..checkpoints.quantized import module_of
from ..convert.gguf_source import open_source
from ..convert.layouts import Source, read_source
from ..convert.plan import wanted_format, written
from ..convert.recipes import Recipe, spell
from ..core.config import ModelConfig, ignored_keys
from ..core.errors import DgemmaError, shown
from ..core.memory import stays_narrow
from ..core.ops import DType, Ops

PARTS = {
    "embedding": ".embed_tokens",
    "attention": ".self_attn.",
    "dense MLP": ".mlp.",
    "self-conditioning": ".self_conditioning.",
    "experts": ".experts.",
    "router": ".router.",
}
OTHER = "norms, scalars"
SETTINGS = ("config.json", "generation_config.json")
WIDTH: dict[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_WIDTHS: dict[str, DType] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the text model."""

    name: str
    parameters: int
    bytes: float
    formats: tuple[str, ...]
    """How its matrices are stored, most parameters first."""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Bytes of keys and values."""

    fixed: int
    """Of the sliding layers, once their windows are full, and of the chunk that is being read."""
    per_token: int
    """Of the full layers."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    config: ModelConfig
    layout: str
    """float, mlx, gguf, modelopt, compressed-tensors or fp8; or "planned", from a config alone."""
    recipe: str
    """The recipe that was asked about, or nothing."""
    parts: tuple[Part, ...]
    image_bytes: int
    stored: DType
    """Width of most of what is not quantized."""
    floats: int
    """Parameters that are not quantized."""
    narrow: int
    """Of these, the ones in 16 bits whose width torch on the CPU leaves to the pass; see `memory.stays_narrow`."""
    packed: float
    """Bytes of those that are."""
    derived: float
    """Bytes of the biases that MLX derives from symmetric scales, and holds."""

    @property
    def quantized(self) -> bool:
        return self.floats < self.parameters

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def text_bytes(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.text_bytes / self.parameters

    def held(self, backend: str, dtype: DType, *, gpu: bool = False) -> float:
        """Return the bytes of weights that a backend holds when it computes in a dtype.

        Quantized weights stay packed, as they are stored, and torch on the CPU leaves 16-bit ones as they are when it
        computes in float32; NumPy, the oracle, unpacks them. ONNX Runtime's sessions, one
        for each kind of pass, share what they map from a file; of weights in another width each makes a copy.
        """
        if backend == "numpy":
            return self.parameters * WIDTH[dtype]
        if backend == "onnx" and not self.quantized and dtype != self.stored:
            return 2 * self.parameters * WIDTH[dtype]
        mapped = self.narrow if backend == "torch" and dtype == "float32" and not gpu else 0
        return self.floats * WIDTH[dtype] - 2 * mapped + self.packed + (self.derived if backend == "mlx" else 0)


def part_of(name: str) -> str:
    matrix = name.endswith(("_proj", "_proj.weight", ".proj.weight", "embed_tokens.weight"))
    return next((part for part, mark in PARTS.items() if matrix and mark in name), OTHER)


def inspect_folder(folder: Path, recipe: Recipe | None = None, *, mlx: bool = False) -> Inspection:
    """Look at a checkpoint folder in any known layout, or a GGUF file, or, with a recipe, at what would become of it.

    Raises:
        DgemmaError: damaged, incomplete, or of no known layout.
    """
    if path := gguf.find(folder):
        opened = open_source(path)
        config, source = opened.config, opened.source
    else:
        config, source = _read_folder(folder)
    image = sum(_stored_bytes(source, one.name) for one in source.image)
    stored = {one.name: (one.format, one.kind.lower() or one.dtype) for one in source.text}
    if recipe is not None and not recipe.keep:
        return _inspection(config, "planned", recipe.name, _planned(config, recipe, mlx), int(image))
    sized = {name: (kind, _stored_bytes(source, name), dtype) for name, (kind, dtype) in stored.items()}
    return _inspection(config, source.layout, "", sized, int(image))


def ignored_in(folder: Path) -> tuple[str, ...]:
    """Return the keys of a folder's settings that have no effect here; see `hf_keys.py`."""
    found = [read_json(inside(folder, name)) if present(folder / name) else {} for name in SETTINGS]
    return ignored_keys(*found) if found[0] else ()


def _read_folder(folder: Path) -> tuple[ModelConfig, Source]:
    where = shown(folder / "config.json")
    foreign.check_folder(folder)
    data = read_json(inside(folder, "config.json"))
    config = ModelConfig.from_hf(data, where=where)
    hinted = (folder / "hf_quant_config.json").exists()
    return config, read_source(open_files(folder), data, config, folder, hinted=hinted)


def inspect_config(config: ModelConfig, recipe: Recipe, *, mlx: bool = False) -> Inspection:
    """Compute what a recipe would make of a model with this config; no weights are needed."""
    return _inspection(config, "planned", recipe.name, _planned(config, recipe, mlx), 0)


def read_config(path: Path) -> ModelConfig:
    """Read a bare config.json."""
    if not os.path.isfile(path):
        raise DgemmaError(f"{shown(path)}: no such file; expected a config.json")
    return ModelConfig.from_hf(read_json(path), where=shown(path))


_Sized = dict[str, tuple[Format | None, float, str]]


def _planned(config: ModelConfig, recipe: Recipe, mlx: bool) -> _Sized:
    sized: _Sized = {}
    for name, shape in weights.shapes(config).items():
        kind = wanted_format(module_of(name), shape, recipe)
        kind = written(kind, mlx) if kind else None
        factor = 4 if kind and kind.mode == "nvfp4" and not mlx else 0
        count = math.prod(shape)
        sized[name] = (kind, count * (kind.bits_per_weight / 8 if kind else 2) + factor, "BF16")
    return sized


def _stored_bytes(source: Source, name: str) -> float:
    one = next(one for one in (*source.text, *source.image) if one.name == name)
    return float(sum(part.nbytes for part in one.parts))


def _inspection(config: ModelConfig, layout: str, recipe: str, sized: _Sized, image: int) -> Inspection:
    shapes = weights.shapes(config)
    parts = []
    for part in (*PARTS, OTHER):
        names = [name for name in shapes if part_of(name) == part]
        counted: dict[str, int] = {}
        for name in names:
            kind, _, dtype = sized[name]
            said = spell(kind) if kind else "fp8" if dtype == "quantized" else dtype.lower()
            counted[said] = counted.get(said, 0) + math.prod(shapes[name])
        parts.append(
            Part(
                name=part,
                parameters=sum(math.prod(shapes[name]) for name in names),
                bytes=sum(sized[name][1] for name in names),
                formats=tuple(sorted(counted, key=lambda one: -counted[one])),
            )
        )
    plain = {name: math.prod(shape) for name, shape in shapes.items() if sized[name][0] is None}
    widths = Counter[DType]()
    for name, count in plain.items():
        widths[_WIDTHS.get(sized[name][2], "bfloat16")] += count  # fp8 is converted to bfloat16
    packed = derived = 0.0
    for name, shape in shapes.items():
        kind, size, _ = sized[name]
        if kind is not None:
            packed += size
            derived += 2 * math.prod(shape) / kind.group_size if kind.symmetric else 0
    return Inspection(
        config=config,
        layout=layout,
        recipe=recipe,
        parts=tuple(parts),
        image_bytes=image,
        stored=widths.most_common(1)[0][0],
        floats=sum(plain.values()),
        narrow=sum(math.prod(shapes[name]) for name in plain if sized[name][2] != "F32" and stays_narrow(shapes[name])),
        packed=packed,
        derived=derived,
    )


def cache_size(config: ModelConfig, dtype: DType) -> Cache:
    """Return what keys and values take at most, as `model.new_cache` reserves them."""
    fixed = per_token = 0
    chunk = max(config.canvas_length, Ops.prefill_chunk)
    for layer in config.layers:
        row = 2 * layer.kv_heads * layer.head_dim * WIDTH[dtype]
        fixed += row * chunk
        if layer.window is None:
            per_token += row
        else:
            fixed += row * (layer.window - 1)
    return Cache(fixed=fixed, per_token=per_token)
