"""What a conversion will write, byte for byte, before a weight is read: each tensor's format, and where it goes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..checkpoints.quant import Format
from ..checkpoints.safetensors import DTYPES
from ..core.errors import DgemmaError, quoted
from .layouts import Source
from .recipes import Recipe, spell
from .stored import Factor, MlxPart, SourceWeight

How = Literal["stored", "cast", "quantized", "carried", "requantized", "dequantized"]
"""stored: byte for byte; cast: another float width; carried: somebody's codes, not rounded again."""

SHARD = 4 << 30
"""Bytes of tensors in a file, at most; a larger tensor has a file to itself."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One tensor of an output file: a weight, or a part of a quantized one."""

    name: str
    kind: str
    """weight, scales, biases or global_scale."""
    dtype: str
    shape: tuple[int, ...]
    row_bytes: int
    """Bytes that a row of the weight takes here; 0 for a number that all rows share."""

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, kw_only=True)
class Item:
    """One weight, and what becomes of it."""

    weight: SourceWeight
    how: How
    format: Format | None
    """What its codes are of; None for a float tensor."""
    dtype: str
    """Of a float tensor, as written."""
    factor: Factor
    fallback: str
    """Why the recipe's format could not be had, or nothing."""
    image: bool
    components: tuple[Component, ...]

    @property
    def parameters(self) -> int:
        return math.prod(self.weight.shape)

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.components)

    @property
    def described(self) -> str:
        return spell(self.format) if self.format else self.dtype.lower()


def decide(source: Source, recipe: Recipe, *, mlx: bool, requantize: bool) -> tuple[Item, ...]:
    """Choose what becomes of every weight.

    Raises:
        DgemmaError: weights that would have to be rounded a second time, without `requantize`.
    """
    items = [_item(weight, recipe, mlx=mlx, image=False) for weight in source.text]
    items += [_item(weight, recipe, mlx=mlx, image=True) for weight in source.image]
    twice = [item for item in items if item.how in ("requantized", "dequantized")]
    if twice and not requantize:
        one = twice[0].weight
        why = " without the global scale that MLX's layers do not know" if mlx and one.factor != "none" else ""
        could = all(item.weight.format and _holds(item.weight.format, item.weight, mlx) for item in twice)
        keep = "keep their codes with --recipe keep, " if could and not recipe.keep else ""
        published = f" ({one.kind})" if one.kind else ""
        raise DgemmaError(
            f"{len(twice)} weights are quantized already and recipe {quoted(recipe.name, 30)} would round them again, "
            f"such as {one.name}{published} to {twice[0].described}{why}; better {keep}convert the bf16 original, "
            "or allow it with --requantize"
        )
    return tuple(items)


def wanted(weight: SourceWeight, recipe: Recipe) -> bool:
    """Whether a recipe asks to quantize a weight, groups that divide or not."""
    if recipe.keep and (not weight.quantized or weight.format is not None):
        return weight.quantized
    return len(weight.shape) > 1 and isinstance(recipe.target(weight.module), Format)


def wanted_format(module: str, shape: tuple[int, ...], recipe: Recipe) -> Format | None:
    """Return the format that a recipe gives a float weight of a shape; None where it stays as it is."""
    if recipe.keep:
        return None
    target = recipe.target(module)
    fits = isinstance(target, Format) and len(shape) > 1 and shape[-1] % target.group_size == 0
    return target if isinstance(target, Format) and fits else None


def _item(weight: SourceWeight, recipe: Recipe, *, mlx: bool, image: bool) -> Item:
    kept_as_it_is = recipe.keep and (not weight.quantized or (weight.format and _holds(weight.format, weight, mlx)))
    target = "stored" if image or kept_as_it_is else recipe.target(weight.module)
    fallback = ""
    if isinstance(target, Format) and len(weight.shape) < 2:
        target = "stored"
    if isinstance(target, Format) and weight.width % target.group_size:
        fallback = f"rows of {weight.width} do not divide into groups of {target.group_size}"
        target = recipe.otherwise
    how: How
    kept: Format | None = None
    if isinstance(target, Format):
        kept = target
        how = "quantized" if not weight.quantized else "carried" if _holds(target, weight, mlx) else "requantized"
    elif weight.format is not None and target == "stored" and _holds(weight.format, weight, mlx):
        how, kept = "carried", weight.format
    elif weight.quantized:
        how = "dequantized"
    else:
        how = "cast" if target == "bf16" and weight.dtype in ("F32", "F16") else "stored"
    factor: Factor = "none"
    if kept is not None and kept.mode == "nvfp4" and not mlx:
        factor = weight.factor if how == "carried" else "one"
    dtype = weight.dtype if how == "stored" else "BF16"
    return Item(
        weight=weight,
        how=how,
        format=kept,
        dtype=dtype,
        factor=factor,
        fallback=fallback,
        image=image,
        components=_components(
            weight, written(kept, mlx) if kept else None, dtype, factor, weight.scales if how == "carried" else "BF16"
        ),
    )


def _holds(target: Format, weight: SourceWeight, mlx: bool) -> bool:
    """Whether a format has the very codes and scales that a weight is stored in."""
    kept = weight.format
    if kept is None or (mlx and weight.factor != "none"):  # MLX's layers know no global scale
        return False
    if kept == target or (kept.symmetric and written(kept, True) == target):
        return True
    if target.symmetric and written(target, True) == kept:
        return all(isinstance(part, MlxPart) and part.symmetric() for part in weight.parts)
    return False


def written(kind: Format, mlx: bool) -> Format:
    """Return the format as config.json states it: for MLX, a symmetric one is affine, with its biases stored."""
    return Format(bits=kind.bits, group_size=kind.group_size) if mlx and kind.symmetric else kind


def _components(
    weight: SourceWeight, kind: Format | None, dtype: str, factor: Factor, scales: str
) -> tuple[Component, ...]:
    if kind is None:
        row = weight.width * DTYPES[dtype].itemsize
        return (Component(name=weight.name, kind="weight", dtype=dtype, shape=weight.shape, row_bytes=row),)
    lead, words, groups = weight.shape[:-1], kind.words_per_row(weight.width), kind.groups_per_row(weight.width)
    scale = scales if kind.mode == "affine" else "U8"
    parts: list[tuple[str, str, tuple[int, ...]]] = [
        ("weight", "U32", (*lead, words)), ("scales", scale, (*lead, groups)),
    ]  # fmt: skip
    if kind.stores_biases:
        parts.append(("biases", scale, (*lead, groups)))
    if factor != "none":
        parts.append(("global_scale", "F32", () if factor == "one" else (*lead, 1)))
    return tuple(
        Component(
            name=f"{weight.module}.{part}",
            kind=part,
            dtype=code,
            shape=shape,
            row_bytes=shape[-1] * DTYPES[code].itemsize if shape else 0,
        )
        for part, code, shape in parts
    )


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One output file: its header, and the offset of every tensor from the beginning of the file."""

    name: str
    header: bytes
    places: dict[str, int]
    size: int


def lay_out(items: Sequence[Item], *, limit: int = SHARD, style: str = "mlx") -> tuple[Shard, ...]:
    """Distribute tensors over files, in order; within a file the widest types come first, so that all are aligned.

    `style` is what the header calls its `format`: transformers and MLX each look for their own name.
    """
    groups: list[list[Component]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + item.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1] += item.components
        size += item.nbytes
    return lay_out_components(groups, style=style)


def lay_out_components(groups: Sequence[Sequence[Component]], *, style: str) -> tuple[Shard, ...]:
    """Make one file of each group of tensors."""
    shards = []
    for i, group in enumerate(groups):
        table: dict[str, Any] = {"__metadata__": {"format": style}}
        end, offsets = 0, {}
        for one in sorted(group, key=lambda one: -one.itemsize):
            table[one.name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [end, end + one.nbytes]}
            offsets[one.name] = end
            end += one.nbytes
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
        shards.append(
            Shard(
                name=f"model-{i + 1:05}-of-{len(groups):05}.safetensors",
                header=header,
                places={name: len(header) + start for name, start in offsets.items()},
                size=len(header) + end,
            )
        )
    return tuple(shards)
