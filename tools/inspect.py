"""What a checkpoint holds and what it takes to run it, from config.json and headers alone."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints import foreign, gguf, sizes, weights
from ..checkpoints.checkpoint import open_files
from ..checkpoints.files import read_json
from ..checkpoints.links import inside, present
from ..checkpoints.quantized import module_of
from ..convert.gguf_source import open_source
from ..convert.layouts import Source, read_source
from ..convert.plan import wanted_format, written
from ..convert.recipes import Recipe, spell
from ..core.config import ModelConfig, ignored_keys
from ..core.errors import DgemmaError, shown
from ..core.memory import WIDTH, CacheGrowth, StoredWeights, cache_growth, held_bytes
from ..core.ops import DType
from ..core.passes import Passes

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


@dataclass(frozen=True, kw_only=True)
class PartSize:
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
class Inspection:
    config: ModelConfig
    layout: str
    """float, mlx, gguf, modelopt, compressed-tensors or fp8; or "planned", from a config alone."""
    recipe: str
    """The recipe that was asked about, or nothing."""
    parts: tuple[PartSize, ...]
    image_bytes: int
    weights: StoredWeights

    @property
    def stored(self) -> DType:
        """Width of most of what is not quantized."""
        return self.weights.stored

    @property
    def quantized(self) -> bool:
        return self.weights.floats < self.weights.parameters

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
        """Return the bytes of weights that a backend holds when it computes in a dtype; see `memory.held_bytes`."""
        return held_bytes(self.weights, backend, dtype, gpu=gpu)


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


_Sized = dict[str, sizes.Size]


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
            PartSize(
                name=part,
                parameters=sum(math.prod(shapes[name]) for name in names),
                bytes=sum(sized[name][1] for name in names),
                formats=tuple(sorted(counted, key=lambda one: -counted[one])),
            )
        )
    return Inspection(
        config=config,
        layout=layout,
        recipe=recipe,
        parts=tuple(parts),
        image_bytes=image,
        weights=sizes.count(config, sized),
    )


def cache_size(config: ModelConfig, dtype: DType) -> CacheGrowth:
    """Return what keys and values take at most, as `model.new_cache` reserves them."""
    return cache_growth(config, WIDTH[dtype], scratch=max(config.canvas_length, Passes.chunk))
