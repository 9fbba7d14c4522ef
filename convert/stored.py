"""Weights as they lie in files, read by rows into buffers.

Nothing is mapped: memory use is what it seems, and a file that is cut short under our feet is an error, not a crash.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ..checkpoints.files import open_file
from ..checkpoints.quant import Format, QTensor, carry, is_symmetric
from ..checkpoints.quant_bits import E4M3
from ..checkpoints.quantized import Packed, bits_of, module_of
from ..checkpoints.safetensors import DTYPES, Entry
from ..core.errors import DgemmaError, quoted, shown

NVFP4 = Format(mode="nvfp4", bits=4, group_size=16)
Rows = np.ndarray | QTensor
Factor = Literal["none", "one", "rows"]


def blocks(rows: int, width: int, size: int = 1 << 22) -> Iterator[tuple[int, int]]:
    """Cut [rows, width] into runs of rows of about `size` values."""
    step = max(1, size // max(width, 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


class SourcePart(Protocol):
    """Consecutive rows of a weight, [rows, N]."""

    @property
    def rows(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes in the file, all that belongs to it."""
        ...

    def read(self, start: int, stop: int) -> Rows: ...


@dataclass(frozen=True, kw_only=True)
class SourceWeight:
    """One weight of a source, under the name that `weights.shapes` knows."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Of a float tensor: the file's code, which for the image tower can be any. Of a quantized one: "quantized"."""
    format: Format | None
    """What it is quantized in, if a QTensor can hold it."""
    parts: tuple[SourcePart, ...]
    factor: Factor = "none"
    """Global scales: none, one number, or one for each row."""
    kind: str = ""
    """What its publisher calls the format, such as Q4_K, where messages should say so."""
    scales: str = "BF16"
    """The file's code for the scales and biases of an affine format: BF16 or F16."""

    @property
    def module(self) -> str:
        return module_of(self.name)

    @property
    def quantized(self) -> bool:
        return self.dtype == "quantized"

    @property
    def width(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    def read(self, start: int, stop: int) -> Rows:
        """Return rows [stop − start, N]: floats as stored, float32 for float8, a QTensor where `format` is one."""
        found, at = [], 0
        for part in self.parts:
            low, high = max(start - at, 0), min(stop - at, part.rows)
            if low < high:
                found.append(part.read(low, high))
            at += part.rows
        packed = [one for one in found if isinstance(one, QTensor)]
        if not packed:
            return found[0] if len(found) == 1 else np.concatenate(found)
        first = packed[0]
        factor = first.global_scale
        if factor is not None and self.factor == "rows":
            factors: list[Any] = [one.global_scale for one in packed]
            factor = np.concatenate(
                [np.full((len(one.words), 1), 1, np.float32) * f for one, f in zip(packed, factors, strict=True)]
            )
        biases = [one.biases for one in packed if one.biases is not None]
        scales: list[Any] = [one.scales for one in packed]
        return QTensor(
            words=np.concatenate([one.words for one in packed]),
            scales=np.concatenate(scales),
            biases=np.concatenate(biases) if biases else None,
            global_scale=factor,
            format=first.format,
        )


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file, read by rows."""

    path: Path
    entry: Entry

    @property
    def rows(self) -> int:
        return math.prod(self.entry.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows [stop − start, N] in the file's dtype."""
        dtype = DTYPES[self.entry.dtype]
        width = self.entry.shape[-1] if self.entry.shape else 1
        out = np.empty((stop - start, width), dtype)
        done = 0
        buffer = memoryview(out.reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]
        try:
            with open_file(self.path) as file:
                file.seek(self.entry.start + start * width * dtype.itemsize)
                while done < len(buffer):
                    count = file.readinto(buffer[done:])
                    if not count:
                        raise DgemmaError(f"{shown(self.path)}: the file became shorter while it was being read")
                    done += count
        except OSError as error:
            raise DgemmaError(f"{shown(self.path)}: {error.strerror or error}") from None
        return out

    def number(self) -> np.float32:
        return np.float32(self.read(0, 1).reshape(-1)[0])


@dataclass(frozen=True, kw_only=True)
class MlxPart:
    packed: Packed
    stored: Mapping[str, Stored]

    @property
    def rows(self) -> int:
        return math.prod(self.packed.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def read(self, start: int, stop: int) -> Rows:
        def get(name: str) -> np.ndarray:
            one = self.stored[name]
            return one.read(start, stop) if one.rows == self.rows else one.read(0, 1)

        return self.packed.read(get)

    def symmetric(self) -> bool:
        """Whether all biases are what a symmetric format derives from the scales."""
        scales, biases = (self.stored[self.packed.parts[part]] for part in ("scales", "biases"))
        return all(
            is_symmetric(bits_of(scales.read(i, j)), bits_of(biases.read(i, j)), self.packed.format.bits)
            for i, j in blocks(self.rows, scales.entry.shape[-1])
        )


@dataclass(frozen=True, kw_only=True)
class Nvfp4Part:
    module: str
    codes: Stored
    scales: Stored
    factor: Stored
    divides: bool

    @property
    def rows(self) -> int:
        return self.codes.rows

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.factor.nbytes

    def read(self, start: int, stop: int) -> QTensor:
        factor: Any = self.factor.number()
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = np.float32(1) / factor if self.divides else factor
        try:
            return carry(
                self.codes.read(start, stop).view(np.uint32),
                self.scales.read(start, stop).view(np.uint8),
                format=NVFP4,
                global_scale=factor,
            )
        except DgemmaError as error:
            raise DgemmaError(f"{quoted(self.module)}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Float8Part:
    codes: Stored
    scales: Stored

    @property
    def rows(self) -> int:
        return self.codes.rows

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def read(self, start: int, stop: int) -> np.ndarray:
        count = math.prod(self.scales.entry.shape)
        if count == 1:
            factor = self.scales.number()
        else:
            factor = reshaped(self.scales, (count, 1)).read(start, stop).astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite, and the result then says so
            return np.take(E4M3, self.codes.read(start, stop).view(np.uint8)) * factor


def reshaped(stored: Stored, shape: tuple[int, ...]) -> Stored:
    """See a tensor in another shape of as many elements."""
    entry = stored.entry
    return Stored(path=stored.path, entry=Entry(dtype=entry.dtype, shape=shape, start=entry.start, nbytes=entry.nbytes))


def source_bytes(weight: SourceWeight, rows: int | None = None) -> int:
    """Return about the bytes that rows take in the source, all by default."""
    width = weight.format.bits_per_weight / 8 if weight.format else {"F32": 4, "quantized": 1}.get(weight.dtype, 2)
    return int((weight.rows if rows is None else rows) * weight.width * width)
