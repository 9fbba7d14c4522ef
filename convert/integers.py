"""Weights that others store as integers, or as float8 in blocks: what the codes of compressed-tensors and fp8 mean.

    value = scale · (q - z)      q, z: codes of `bits` bits, z = 2^(bits-1) where the file has no zero points
    value = scale · e4m3(q)      one scale for each block of rows × columns

Codes packed in int32 are a little-endian bit stream along the row, in 2, 4 and 8 bits the layout that MLX has too; zero
points are packed so along the rows. Stacks of experts, [E, F, N], are the same with E·F rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..checkpoints.quant import AFFINE_GROUPS, Format, carry
from ..checkpoints.quant_bits import E4M3, E8M0, unpack
from ..checkpoints.quantized import bits_of
from ..checkpoints.safetensors import Entry
from ..core.errors import DgemmaError, quoted
from .stored import Rows, Stored, reshaped

FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, kw_only=True)
class IntegerPart:
    """Integer codes with a scale for each group, or row; `format` where a QTensor holds them as they are."""

    module: str
    codes: Stored
    """I32 words [..., F, N·bits/32], or I8 [..., F, N], whose zero is 0."""
    scales: Stored
    zeros: Stored | None
    bits: int
    width: int
    format: Format | None

    @property
    def rows(self) -> int:
        return self.codes.rows

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (self.zeros.nbytes if self.zeros else 0)

    def read(self, start: int, stop: int) -> Rows:
        words, scales = self._words(start, stop), flat(self.scales, self.rows).read(start, stop)
        try:
            if self.format is not None:
                groups = self.format.groups_per_row(self.width)
                fine = np.repeat(bits_of(scales), groups // scales.shape[1], 1)
                return carry(words, fine, format=self.format)
        except DgemmaError as error:
            raise DgemmaError(f"{quoted(self.module)}: {error}") from None
        codes = unpack(words, self.bits).astype(np.float32).reshape(stop - start, scales.shape[1], -1)
        if self.zeros is None:
            codes -= np.float32(1 << (self.bits - 1))
        else:
            codes -= self._zeros(self.zeros, start, stop)[..., None]
        with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite, and the result then says so
            codes *= scales.astype(np.float32)[..., None]
        return codes.reshape(stop - start, self.width)

    def _words(self, start: int, stop: int) -> np.ndarray:
        read = self.codes.read(start, stop)
        return read.view(np.uint32) if read.dtype == np.int32 else (read.view(np.uint8) ^ 0x80).view(np.uint32)

    def _zeros(self, stored: Stored, start: int, stop: int) -> np.ndarray:
        """Return zero points as codes, float32 [rows, groups]."""
        groups = stored.entry.shape[-1]
        if stored.entry.dtype == "I8":
            return flat(stored, self.rows).read(start, stop).astype(np.float32) + (1 << (self.bits - 1))
        rows, packed = self.codes.entry.shape[-2], stored.entry.shape[-2]
        found = []
        for expert in range(start // rows, -(-stop // rows)):
            words = stored.read(expert * packed, (expert + 1) * packed).view(np.uint32)
            codes = unpack(np.ascontiguousarray(words.T), self.bits).T[:rows]
            found.append(codes[max(start - expert * rows, 0) : stop - expert * rows])
        return np.concatenate(found).astype(np.float32).reshape(stop - start, groups)


@dataclass(frozen=True, kw_only=True)
class Float8BlockPart:
    """F8_E4M3 codes [..., F, N] with a scale for each block of rows and columns; the last of either may be short."""

    codes: Stored
    scales: Stored
    """F32, BF16, F16 or F8_E8M0 [..., ⌈F/rows⌉, ⌈N/columns⌉]."""
    block: tuple[int, int]

    @property
    def rows(self) -> int:
        return self.codes.rows

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def read(self, start: int, stop: int) -> np.ndarray:
        rows, width = self.codes.entry.shape[-2:]
        per = self.scales.entry.shape[-2]
        row = np.arange(start, stop)
        at = row // rows * per + row % rows // self.block[0]
        scales = self.scales.read(int(at[0]), int(at[-1]) + 1)
        wide = np.take(E8M0, scales) if self.scales.entry.dtype == "F8_E8M0" else scales.astype(np.float32)
        value = np.take(E4M3, self.codes.read(start, stop).view(np.uint8))
        with np.errstate(invalid="ignore", over="ignore"):
            value *= np.repeat(wide, self.block[1], 1)[at - at[0], :width]
        return value


def flat(stored: Stored, rows: int) -> Stored:
    """See a tensor of so many rows, whatever its leading axes, as [rows, the rest]."""
    return reshaped(stored, (rows, math.prod(stored.entry.shape) // rows))


def integer_part(
    module: str, codes: Stored, scales: Stored, zeros: Stored | None, width: int
) -> tuple[IntegerPart, tuple[int, ...]]:
    """Check the parts of an integer weight against each other → the part, the shape of the weight.

    Args:
        module: its name, for messages while it is read.
        codes, scales, zeros: as stored.
        width: N, which packed words alone do not tell.

    Raises:
        DgemmaError: parts that do not fit each other, or bits and groups that cannot be read.
    """
    entry = codes.entry
    if entry.dtype not in ("I32", "I8") or len(entry.shape) < 2:
        raise DgemmaError(f"codes are {entry.dtype} {_of(entry)}, expected I32 [F, N·bits/32] or I8 [F, N]")
    stored = entry.shape[-1] * (32 if entry.dtype == "I32" else 8)
    if width <= 0 or stored not in (2 * width, 4 * width, 8 * width) or stored % 32:
        raise DgemmaError(f"codes are {entry.dtype} {_of(entry)}, which are not 2, 4 or 8 bits for rows of {width}")
    bits, lead = stored // width, entry.shape[:-1]
    rows = math.prod(lead)
    shape = scales.entry.shape
    if shape == lead:
        shape = (*lead, 1)
    if scales.entry.dtype not in FLOATS or shape[:-1] != lead or not shape[-1] or width % shape[-1]:
        raise DgemmaError(f"weight_scale is {scales.entry.dtype} {_of(scales.entry)}, expected {list(lead)} with a "
                          f"number of groups that divides {width}")  # fmt: skip
    groups = shape[-1]
    if zeros is not None:
        packed = (*lead[:-1], -(-lead[-1] * bits // 32), groups)
        fits = {"I32": packed, "I8": (*lead, groups)}.get(zeros.entry.dtype) == zeros.entry.shape
        if not fits:
            raise DgemmaError(
                f"weight_zero_point is {zeros.entry.dtype} {_of(zeros.entry)}, expected I32 {list(packed)}"
            )
    size = next((one for one in reversed(AFFINE_GROUPS) if width // groups % one == 0), None)
    exact = zeros is None and size is not None and scales.entry.dtype != "F32"
    kind = Format(bits=bits, group_size=size, symmetric=True) if exact and size else None
    part = IntegerPart(
        module=module, codes=codes, scales=flat(scales, rows), zeros=zeros, bits=bits, width=width, format=kind
    )
    return part, (*lead, width)


def float8_block_part(codes: Stored, scales: Stored, block: tuple[int, int]) -> Float8BlockPart:
    """Check float8 codes against the scales of their blocks.

    Besides blocks as declared there may be one scale for a matrix, or for each row; and transformers gives gate and up
    of stacked experts a scale each where both would share a block.

    Raises:
        DgemmaError: the scales are none of these.
    """
    shape, found = codes.entry.shape, scales.entry.shape
    fits = scales.entry.dtype in (*FLOATS, "F8_E8M0") and len(found) == len(shape) >= 2 and found[:-2] == shape[:-2]
    if fits and 0 not in (*found, *shape):
        rows, width = shape[-2:]
        grid = (-(-rows // block[0]), -(-width // block[1]))
        known = {(1, 1): (rows, width), (rows, 1): (1, width), grid: block}
        if len(shape) == 3 and grid[0] == 1 and rows % 2 == 0:
            known[2, grid[1]] = (rows // 2, block[1])
        if kind := known.get((found[-2], found[-1])):
            return Float8BlockPart(codes=codes, scales=scales, block=kind)
    raise DgemmaError(
        f"scales are {scales.entry.dtype} {_of(scales.entry)} for {_of(codes.entry)}; of float8 only scales per row, "
        f"for blocks of {block[0]} x {block[1]}, or per tensor can be read"
    )


def _of(entry: Entry) -> str:
    return quoted(list(entry.shape), 60)
