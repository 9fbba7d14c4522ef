"""Weights as a graph names them: external data, a place in a file of the checkpoint, and nothing more.

Quantized words are read as the bytes they are: uint8, which is what MatMulNBits and GatherBlockQuantized call the
same layout. Scales are bf16 in the file and cast in the graph; nothing is written a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import onnx_ir as ir

from ..checkpoints.quant import Format
from ..checkpoints.safetensors import DTYPES
from ..core.errors import DgemmaError, quoted, shown
from .arrays import Array
from .graph import Value

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint
    from .primitives import PrimitiveOps

WIDTHS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TYPES = {
    "F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "U32": ir.DataType.UINT8,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor's bytes in a file beside the graph."""

    name: str
    file: str
    start: int
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    base: str = ""
    """The folder, for who wants to read the bytes while the graph is in memory."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def rows(self, first: int, count: int) -> Place:
        """Some of the rows of a matrix, as a tensor of their own."""
        step = self.nbytes // self.shape[0]
        return replace(
            self, name=f"{self.name}[{first}]", start=self.start + first * step, shape=(count, *self.shape[1:])
        )

    def value(self, ops: PrimitiveOps, shape: tuple[int, ...] | None = None) -> Value:
        """Put the bytes into the graph, words as uint8 in the shape that is asked for."""
        shape = shape or self.shape
        name = self.name if shape == self.shape else f"{self.name} as {'x'.join(map(str, shape))}"
        tensor = ir.ExternalTensor(
            self.file, self.start, self.nbytes, _TYPES[self.dtype], shape=ir.Shape(shape), name=name, base_dir=self.base
        )
        return ops.builder.initializer(name, tensor)


@dataclass(frozen=True, kw_only=True)
class DensePlace:
    """A weight that is stored as numbers."""

    where: Place

    def pack(self, ops: PrimitiveOps, shape: tuple[int, ...] | None = None) -> Array:
        """Put it into the graph, with a cast where the file has another width; runtimes may fold that at load."""
        shape = shape or self.where.shape
        return ops.cast(ops.array(self.where.value(ops, shape), shape, WIDTHS[self.where.dtype]), ops.dtype)


@dataclass(frozen=True, kw_only=True)
class PackedPlaces:
    """A weight that is stored as codes and scales, and, not symmetric, biases; see `checkpoints/quant.py`."""

    format: Format
    shape: tuple[int, ...]
    words: Place
    scales: Place
    biases: Place | None

    def pack(self, ops: PrimitiveOps) -> PackedPlaces:
        """Ops take it as it is: which bytes they want depends on what they do."""
        return self

    def rows(self, first: int, count: int) -> PackedPlaces:
        cut = {part: getattr(self, part).rows(first, count) for part in ("words", "scales")}
        biases = None if self.biases is None else self.biases.rows(first, count)
        return replace(self, shape=(count, *self.shape[1:]), biases=biases, **cut)


PlacedWeight = DensePlace | PackedPlaces


def check(name: str, kind: Format) -> None:
    """Refuse what no operator of ONNX Runtime multiplies by exactly as stored.

    Raises:
        DgemmaError: the tensor's name, its format and what to convert to instead.
    """
    if kind.mode != "affine" or kind.bits not in (4, 8):
        raise DgemmaError(
            f"{quoted(name)} is {kind.bits}-bit {kind.mode}, which ONNX Runtime has no exact operator for; "
            "convert the original checkpoint with --recipe 4bit or 8bit"
        )


def from_checkpoint(checkpoint: Checkpoint, *, in_memory: bool = False) -> Callable[[str], PlacedWeight]:
    """Return what `checkpoints.weights.build` asks for each weight: its place in the checkpoint's files.

    A graph that stays in memory is lent its weights: files have the names that links in the folder lead to, as in a
    Hugging Face cache, and numbers may lie anywhere, as in files that MLX writes. Quantized words are bytes and always
    may.

    Raises (when called):
        DgemmaError: a format that `check` refuses, or numbers that do not lie at a multiple of their width.
    """

    def get(name: str) -> PlacedWeight:
        places = {}
        for part, (file, stored) in checkpoint.parts(name).items():
            entry = file.entries[stored]
            if not in_memory and _TYPES[entry.dtype] is not ir.DataType.UINT8:
                width = DTYPES[entry.dtype].itemsize
                if entry.start % width:
                    raise DgemmaError(
                        f"{quoted(stored)} does not lie at a multiple of {width} bytes in {shown(file.path.name)}, as "
                        "graphs in a folder need it; give --standalone and --out, which copies the weights so"
                    )
            path = file.path.resolve() if in_memory else file.path
            places[part] = Place(
                name=stored, file=path.name, start=entry.start, dtype=entry.dtype, shape=entry.shape or (1,),
                base=str(path.parent),
            )  # fmt: skip
        return assemble(name, checkpoint.format(name), places)

    return get


def assemble(name: str, kind: Format | None, places: dict[str, Place]) -> PlacedWeight:
    if kind is None:
        return DensePlace(where=places["weight"])
    check(name, kind)
    words = places["weight"]
    return PackedPlaces(
        format=kind, shape=(*words.shape[:-1], words.shape[-1] * 32 // kind.bits), words=words,
        scales=places["scales"], biases=places.get("biases"),
    )  # fmt: skip


def imagined(
    shapes: dict[str, tuple[int, ...]], formats: Callable[[str], Format | None]
) -> Callable[[str], PlacedWeight]:
    """Weights of a checkpoint that is not there, for a graph's structure alone: one file, all in bf16 or packed."""

    def get(name: str) -> PlacedWeight:
        shape, kind = shapes[name], formats(name.removesuffix(".weight"))
        if kind is None:
            return DensePlace(where=Place(name=name, file="model.safetensors", start=0, dtype="BF16", shape=shape))
        module = name.removesuffix(".weight")
        words, groups = kind.words_per_row(shape[-1]), kind.groups_per_row(shape[-1])
        parts = {
            "weight": Place(name=name, file="model.safetensors", start=0, dtype="U32", shape=(*shape[:-1], words)),
        }
        for part in ("scales", *(["biases"] if kind.stores_biases else [])):
            parts[part] = Place(
                name=f"{module}.{part}", file="model.safetensors", start=0, dtype="BF16", shape=(*shape[:-1], groups)
            )
        return assemble(name, kind, parts)

    return get
