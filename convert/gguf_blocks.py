"""Blocks of GGUF's types: the plain ones become our formats, bit for bit; the others are dequantized by the library.

    Q4_0, Q5_0, Q8_0    32 codes and a float16 scale; zero is 8, 16, and for Q8_0's signed codes 0: symmetric formats
    Q4_1, Q5_1          32 codes, a float16 scale and a float16 minimum: affine formats
    MXFP4               32 codes and an E8M0 scale

Codes of 4 bits stand in halves there, the first 16 of a block in the low half of each byte; here in order. K-quants and
their like have scales of scales, which no format here holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.gguf import Tensor
from ..checkpoints.quant import Format, QTensor, carry, pack
from ..checkpoints.safetensors import Entry
from ..core.errors import DgemmaError, quoted, shown
from .stored import Rows, SourcePart, Stored

FLOATS = ("F32", "F16", "BF16")
FORMATS = {
    "Q4_0": Format(bits=4, group_size=32, symmetric=True),
    "Q5_0": Format(bits=5, group_size=32, symmetric=True),
    "Q8_0": Format(bits=8, group_size=32, symmetric=True),
    "Q4_1": Format(bits=4, group_size=32),
    "Q5_1": Format(bits=5, group_size=32),
    "MXFP4": Format(mode="mxfp4", bits=4, group_size=32),
}
_PIECE = 1 << 18  # weights that the library dequantizes at once: it makes several copies of them


@dataclass(frozen=True, kw_only=True)
class GgufPart:
    """A quantized tensor of a GGUF file, [rows, N]."""

    name: str
    path: Path
    tensor: Tensor

    @property
    def rows(self) -> int:
        return math.prod(self.tensor.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def read(self, start: int, stop: int) -> Rows:
        """Return rows: a QTensor where `FORMATS` has one, else float32."""
        rows, kind = self.rows, self.tensor.kind
        entry = Entry(
            dtype="U8", shape=(rows, self.nbytes // rows), start=self.tensor.start, nbytes=self.nbytes
        )  # fmt: skip
        raw = Stored(path=self.path, entry=entry).read(start, stop)
        if kind not in FORMATS:
            return _dequantized(raw, kind, self.tensor.shape[-1])
        try:
            return _carried(raw, kind)
        except DgemmaError as error:
            raise DgemmaError(f"{quoted(self.name)}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Run:
    """Some consecutive rows of another part: an expert of a stack."""

    part: SourcePart
    first: int
    rows: int

    @property
    def nbytes(self) -> int:
        return self.part.nbytes // self.part.rows * self.rows

    def read(self, start: int, stop: int) -> Rows:
        return self.part.read(self.first + start, self.first + stop)


def _carried(raw: np.ndarray, kind: str) -> QTensor:
    form = FORMATS[kind]
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "MXFP4": 17}[kind]
    blocks = raw.reshape(len(raw), -1, size)
    if kind == "MXFP4":
        return carry(_words(_halves(blocks[..., 1:])), blocks[..., 0].copy(), format=form)
    scales = _float16(blocks[..., :2])
    if kind == "Q8_0":
        words = (blocks[..., 2:] ^ 0x80).reshape(len(raw), -1).view(np.uint32)
        return carry(words, scales, format=form)
    biases = _float16(blocks[..., 2:4]) if kind.endswith("_1") else None
    rest = blocks[..., 2 if biases is None else 4 :]
    if kind.startswith("Q4"):
        return carry(_words(_halves(rest)), scales, biases, format=form)
    codes = _halves(rest[..., 4:])
    codes |= np.unpackbits(rest[..., :4], axis=-1, bitorder="little") << 4
    return carry(pack(codes.reshape(len(raw), -1), 5), scales, biases, format=form)


def _float16(pairs: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pairs).view("<f2")[..., 0]


def _halves(low_and_high: np.ndarray) -> np.ndarray:
    """Codes of 4 bits in order: uint8 [..., 16] → [..., 32]."""
    return np.concatenate([low_and_high & 15, low_and_high >> 4], -1)


def _words(codes: np.ndarray) -> np.ndarray:
    """Pack codes of 4 bits: uint8 [rows, blocks, 32] → uint32 [rows, blocks·4]."""
    pairs = codes[..., 0::2] | codes[..., 1::2] << 4
    return pairs.reshape(len(codes), -1).view(np.uint32)


def _dequantized(raw: np.ndarray, kind: str, width: int) -> np.ndarray:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    out = np.empty((len(raw), width), np.float32)
    step = max(1, _PIECE // width)
    with np.errstate(all="ignore"):  # damaged scales give NaN, which is looked for behind
        for start in range(0, len(raw), step):
            out[start : start + step] = dequantize(raw[start : start + step], GGMLQuantizationType[kind])
    return out


def readable(kind: str) -> bool:
    """Whether a type is a float, has a format here, or is one that the library dequantizes."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind in FLOATS or kind in FORMATS:
        return True
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    try:
        return block > 1 and _dequantized(np.zeros((1, size), np.uint8), kind, block).shape == (1, block)
    except (NotImplementedError, ValueError):
        return False


def part_of(path: Path, name: str, tensor: Tensor) -> Stored | GgufPart:
    """Return a tensor as rows are read from it.

    Raises:
        DgemmaError: a type that cannot be read.
    """
    if tensor.kind in FLOATS:
        entry = Entry(dtype=tensor.kind, shape=tensor.shape, start=tensor.start, nbytes=tensor.nbytes)
        return Stored(path=path, entry=entry)
    if not readable(tensor.kind):
        raise DgemmaError(f"{shown(path)}: the tensor {quoted(name)} is {tensor.kind}, which cannot be read")
    return GgufPart(name=name, path=path, tensor=tensor)


def form_of(part: Any) -> dict[str, Any]:
    """Return what a `SourceWeight` says of a part's dtype, format and scales."""
    if isinstance(part, Stored):
        return {"dtype": part.entry.dtype, "format": None}
    kind = part.tensor.kind
    return {"dtype": "quantized", "format": FORMATS.get(kind), "kind": kind, "scales": "F16"}
