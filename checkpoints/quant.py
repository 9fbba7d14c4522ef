"""Quantized weights: formats, tensors as stored, and the one definition of their value. NumPy only.

The byte layout is MLX's (FACTS §5), so that MLX, Triton and ONNX's MatMulNBits all read a checkpoint as it stands:
codes lie along the input dimension N as a little-endian bit stream in uint32 words, and `group_size` neighbours share a
scale. With q the code of a weight, its value is

    affine            scale·q + bias                           scale, bias: bf16, or float16 both
    affine symmetric  scale·q + bias, bias = -2^(bits-1)·scale  exact in either width, hence not stored
    mxfp4, mxfp8      2^(scale-127) · e2m1(q) or e4m3(q)       scale: uint8, E8M0
    nvfp4             (e4m3(scale)·global_scale) · e2m1(q)     scale: uint8, E4M3; global_scale: float32, 1 where absent

computed in float32 and rounded once to the dtype asked for. A product is exact in float32 (11 significant bits at most
in a scale, 8 in a code; only a global scale makes it round), so a fused multiply-add gives the same, and the sum is
all that rounds before the dtype does. What we quantize has bf16 scales; float16 ones are others', GGUF's and MLX's, and
are kept because bf16 would round them. Metal's kernels compute this since mlx 0.32.2, and so, bit for bit, does
`mx.dequantize` on the CPU when given float32 scales. Given bf16 scales, MLX's CPU path multiplies and adds in bf16: two
roundings, not ours.

How scales and codes are found is in `quant_fit.py`, how bits are laid in `quant_bits.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DgemmaError
from .quant_bits import (
    E2M1,
    E4M3,
    E8M0,
    F32,
    U32,
    from_bf16,
    pack,
    row_pieces,
    symmetric_biases,
    to_bf16,
    unpack,
    widen,
)
from .quant_fit import NVFP4_RANGE, WIDEST, FitScratch

__all__ = [
    "Format", "QTensor", "carry", "dequantize", "from_bf16", "is_symmetric", "nvfp4_global_scale", "pack", "quantize",
    "relative_error", "scale_values", "symmetric_biases", "to_bf16", "unpack",
]  # fmt: skip

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)  # 16 is nvfp4's alone: mx.quantize refuses it for affine
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits and group size
CHUNK = 1 << 16  # weights fitted at once: four float32 buffers of them fit in an L2 cache


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a tensor is quantized; equal where the same bytes mean the same weights.

    `symmetric` (affine only) fixes the zero point at 2^(bits-1) and drops the biases. Raises DgemmaError for a
    combination MLX does not have.
    """

    mode: str = "affine"
    bits: int = 4
    group_size: int = 32
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.mode == "affine":
            if self.bits not in AFFINE_BITS:
                raise DgemmaError(f"affine quantization has {_either(AFFINE_BITS)} bits, not {self.bits!r}")
            if self.group_size not in AFFINE_GROUPS:
                raise DgemmaError(
                    f"affine quantization has groups of {_either(AFFINE_GROUPS)}, not {self.group_size!r}"
                )
            if not isinstance(self.symmetric, bool):
                raise DgemmaError(f"symmetric is true or false, not {self.symmetric!r}")
        elif self.mode in FLOAT_MODES:
            if (self.bits, self.group_size) != FLOAT_MODES[self.mode]:
                bits, size = FLOAT_MODES[self.mode]
                asked = f"{self.bits!r} bits in groups of {self.group_size!r}"
                raise DgemmaError(f"{self.mode} has {bits} bits in groups of {size}, not {asked}")
            if self.symmetric:
                raise DgemmaError(f"symmetric is an option of affine quantization, not of {self.mode}")
        else:
            raise DgemmaError(f"unknown quantization mode {self.mode!r}; known: affine, {', '.join(FLOAT_MODES)}")

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> Format:
        """Read one entry of config.json's `quantization`, such as {"group_size": 64, "bits": 4, "mode": "affine"}.

        What an entry leaves out has MLX's default. The per-module entries that stand beside must be taken out before.
        """
        if unknown := [key for key in entry if key not in cls.__dataclass_fields__]:
            raise DgemmaError(
                f"unknown key {unknown[0]!r} in a quantization entry; known: mode, bits, group_size, symmetric"
            )
        mode = entry.get("mode", "affine")
        bits, size = FLOAT_MODES.get(mode, (4, 64))
        return cls(
            mode=mode,
            bits=entry.get("bits", bits),
            group_size=entry.get("group_size", size),
            symmetric=entry.get("symmetric", False),
        )

    def to_config(self, *, mlx: bool = False) -> dict[str, Any]:
        """Return the entry for config.json.

        With `mlx`, one for a file that stores the biases of symmetric tensors too: mlx-lm passes every key on as an
        argument and would stumble over `symmetric`.
        """
        entry: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        return entry | {"symmetric": True} if self.symmetric and not mlx else entry

    @property
    def stores_biases(self) -> bool:
        return self.mode == "affine" and not self.symmetric

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight as stored, scales and biases included; a global scale is not."""
        return self.bits + (8 if self.mode != "affine" else 32 if self.stores_biases else 16) / self.group_size

    def groups_per_row(self, width: int) -> int:
        """Return N / group_size; DgemmaError where the groups do not divide a row."""
        if width <= 0 or width % self.group_size:
            raise DgemmaError(
                f"rows of {width} weights do not divide into groups of {self.group_size}; "
                "choose smaller groups or keep the tensor unquantized"
            )
        return width // self.group_size

    def words_per_row(self, width: int) -> int:
        """Return the uint32 words that N weights take; a group fills whole words in every format."""
        return self.groups_per_row(width) * self.group_size * self.bits // 32


@dataclass(frozen=True, kw_only=True, eq=False)
class QTensor:
    """A quantized weight as stored. Arrays are held, never copied: they may be views of a mapped file.

    words         uint32 [..., N·bits/32]
    scales        [..., N/group_size]: uint16 of bf16 bits or float16 (affine), uint8 (E8M0 for mxfp4 and mxfp8, E4M3
                  for nvfp4)
    biases        as scales; None exactly where the format derives them (symmetric) or has none
    global_scale  nvfp4 only, factor on all scales, None for 1: modelopt's `weight_scale_2`, MLX's `global_scale`/2688.
                  A number, or float32 [..., 1], one for each row, where experts were quantized one by one
    """

    words: U32
    scales: NDArray[Any]
    biases: NDArray[Any] | None = None
    global_scale: np.float32 | F32 | None = None
    format: Format

    def __post_init__(self) -> None:
        kind = self.format
        if self.words.dtype != np.uint32 or not self.words.ndim or self.words.shape[-1] * 32 % kind.bits:
            raise DgemmaError(
                f"words should be uint32 [..., N·{kind.bits}/32], not {self.words.dtype} {list(self.words.shape)}"
            )
        want = [*self.words.shape[:-1], kind.groups_per_row(self.shape[-1])]
        dtype = np.dtype(np.uint16 if kind.mode == "affine" else np.uint8)
        if kind.mode == "affine" and self.scales.dtype == np.float16:
            dtype = self.scales.dtype
        for name, array in (("scales", self.scales), ("biases", self.biases)):
            if array is not None and (array.dtype != dtype or list(array.shape) != want):
                raise DgemmaError(
                    f"{name} should be {dtype} {want} for {kind.bits}-bit {kind.mode} in groups of {kind.group_size}, "
                    f"not {array.dtype} {list(array.shape)}"
                )
        if (self.biases is not None) != kind.stores_biases:
            name = "symmetric" if kind.symmetric else kind.mode
            raise DgemmaError(f"{name} quantization {'needs biases' if kind.stores_biases else 'stores no biases'}")
        _check_global_scale(self.global_scale, kind, self.words.shape[:-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, [..., N]."""
        return (*self.words.shape[:-1], self.words.shape[-1] * 32 // self.format.bits)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        parts = (self.words, self.scales, self.biases, self.global_scale)
        return sum(part.nbytes for part in parts if part is not None)

    def __getitem__(self, index: Any) -> QTensor:
        """Index the axes before N, as NumPy does: an expert, a slice of rows (a view), rows by number (a copy)."""
        index = (*(index if isinstance(index, tuple) else (index,)), ..., slice(None))
        return self._map(lambda array: array[index])

    def rows(self) -> QTensor:
        """Return the tensor with all axes before N as one, [R, N]; a view where the strides allow."""
        return self._map(lambda array: array.reshape(-1, array.shape[-1]))

    def mlx_biases(self) -> NDArray[Any] | None:
        """Return the biases MLX wants, as wide as scales: those stored, or -2^(bits-1)·scale; None for float modes."""
        return symmetric_biases(self.scales, self.format.bits) if self.format.symmetric else self.biases

    def _map(self, change: Any) -> QTensor:
        return QTensor(
            words=change(self.words),
            scales=change(self.scales),
            biases=None if self.biases is None else change(self.biases),
            global_scale=change(self.global_scale) if isinstance(self.global_scale, np.ndarray) else self.global_scale,
            format=self.format,
        )


def quantize(w: NDArray[Any], format: Format, *, global_scale: float | None = None, workers: int = 1) -> QTensor:
    """Return weights [..., N] in a format, each group fitted to least squared error.

    w             float32, float16, bfloat16, or bf16 bits as uint16; any strides
    global_scale  nvfp4 only, see `nvfp4_global_scale`; None for a tensor without, as MLX's checkpoints have them
    workers       threads; NumPy gives up the GIL in the operations that take the time

    Temporary memory is about 2 MB per worker, however large w. The bytes depend neither on the machine, nor on workers,
    nor on what else stands in w. Codes are those nearest under the scales and biases as rounded for storage; scales of
    affine formats come from a search over grids with least squares in each, those of float formats from trying their
    neighbours.

    Raises DgemmaError for NaN, infinity, a magnitude above 2^125 (above 2688 times the global scale for nvfp4), or rows
    that the groups do not divide.
    """
    _check_weights(w)
    width, size = w.shape[-1] if w.ndim else 0, format.group_size
    groups = format.groups_per_row(width)
    factor = None if global_scale is None else np.float32(global_scale)
    _check_global_scale(factor, format, ())
    words = np.empty((*w.shape[:-1], format.words_per_row(width)), np.uint32)
    scales: NDArray[Any] = np.empty((*w.shape[:-1], groups), np.uint16 if format.mode == "affine" else np.uint8)
    biases = np.empty_like(scales) if format.stores_biases else None
    group_words, group_scales = words.reshape(-1, size * format.bits // 32), scales.reshape(-1)
    group_biases = None if biases is None else biases.reshape(-1)
    limit = WIDEST
    if format.mode == "nvfp4":  # a hair above, for a global scale that was rounded down
        limit = min(limit, 1.01 * NVFP4_RANGE * float(1 if factor is None else factor))
    pieces = list(row_pieces(w.reshape(-1, size) if w.flags.c_contiguous else w, CHUNK))
    capacity = max((piece.size for piece in pieces), default=0) // size

    def fit(mine: list[NDArray[Any]], starts: list[int]) -> None:
        scratch = FitScratch(size, capacity)
        for piece, start in zip(mine, starts, strict=True):
            scratch.load(piece.reshape(-1, size))
            low, high = scratch.extent()
            largest = max(float(high.max()), -float(low.min()))
            if not largest <= limit:
                raise DgemmaError(f"the weights hold {_too_large(largest, limit)}")
            part = slice(start, start + len(low))
            if group_biases is not None:
                group_scales[part], group_biases[part] = scratch.affine(low, high, format.bits)
            elif format.symmetric:
                group_scales[part] = scratch.symmetric(low, high, format.bits)
            else:
                group_scales[part] = scratch.floating(low, high, format.mode, factor)
            group_words[part] = scratch.words(format.bits)

    starts = [0, *np.cumsum([piece.size // size for piece in pieces]).tolist()][: len(pieces)]
    if workers <= 1 or len(pieces) < 2:
        fit(pieces, starts)
    else:
        with ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(fit, pieces[i::workers], starts[i::workers]) for i in range(workers)]:
                done.result()
    return QTensor(words=words, scales=scales, biases=biases, global_scale=factor, format=format)


def nvfp4_global_scale(w: NDArray[Any]) -> np.float32:
    """Return the global scale that puts the largest weight at nvfp4's end, max|w| / 2688 (modelopt's); 1 for zeros."""
    _check_weights(w)
    largest = max((float(np.abs(widen(piece)).max()) for piece in row_pieces(w, CHUNK)), default=0.0)
    if not np.isfinite(largest):
        raise DgemmaError(f"the weights hold {_too_large(largest, WIDEST)}")
    scale = np.float32(largest / NVFP4_RANGE)
    return scale if scale > 0 else np.float32(1)


def dequantize(q: QTensor, dtype: str = "float32") -> NDArray[Any]:
    """Return the weights [..., N] that a tensor means, by the definition at the top of this file.

    dtype is "float32", "float16" (overflow becomes infinity) or "bfloat16", whose bits come as uint16. Temporary memory
    is about 1 MB.
    """
    results = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
    if dtype not in results:
        raise DgemmaError(f"cannot dequantize to {dtype!r}; known: {', '.join(results)}")
    flat, width, size = q.rows(), q.shape[-1], q.format.group_size
    out = np.empty((len(flat.words), width), results[dtype])
    step = max(1, CHUNK // width)
    table = {"mxfp4": E2M1, "mxfp8": E4M3, "nvfp4": E2M1}.get(q.format.mode)
    with np.errstate(over="ignore", invalid="ignore"):  # a stored scale may be infinite, and the result then says so
        for start in range(0, len(out), step):
            part = flat[start : start + step]
            codes = unpack(part.words, q.format.bits).reshape(len(part.words), -1, size)
            value = codes.astype(np.float32) if table is None else np.take(table, codes)
            value *= scale_values(part)[..., None]
            if part.biases is not None:
                value += widen(part.biases)[..., None]
            elif part.format.symmetric:
                value += scale_values(part)[..., None] * np.float32(-(1 << (part.format.bits - 1)))
            value = value.reshape(-1, width)
            out[start : start + step] = to_bf16(value) if dtype == "bfloat16" else value
    return out.reshape(q.shape)


def scale_values(q: QTensor) -> F32:
    """Return the scales as float32 [..., N/group_size], the global scale included."""
    if q.format.mode == "affine":
        return widen(q.scales)
    value = np.take(E4M3 if q.format.mode == "nvfp4" else E8M0, q.scales)
    return value if q.global_scale is None else value * q.global_scale


def carry(
    words: U32,
    scales: NDArray[Any],
    biases: NDArray[Any] | None = None,
    *,
    format: Format,
    global_scale: float | np.float32 | F32 | None = None,
) -> QTensor:
    """Return a tensor over arrays that someone else quantized: nothing is rounded, repacked or copied.

    For a symmetric format, biases that are -2^(bits-1)·scale may come along and are dropped. Raises DgemmaError where
    they are something else, where a scale or bias is NaN or infinite, and where shapes or dtypes do not fit.
    """
    if format.symmetric and biases is not None:
        if not is_symmetric(scales, biases, format.bits):
            raise DgemmaError(f"biases are not -{1 << (format.bits - 1)}·scale: the tensor is affine but not symmetric")
        biases = None
    factor = np.float32(global_scale) if isinstance(global_scale, int | float) else global_scale
    q = QTensor(words=words, scales=scales, biases=biases, global_scale=factor, format=format)
    finite = np.isfinite(scale_values(q)).all() and (q.biases is None or np.isfinite(widen(q.biases)).all())
    if not finite:
        raise DgemmaError("the scales or biases of a quantized tensor hold NaN or infinity")
    return q


def is_symmetric(scales: NDArray[Any], biases: NDArray[Any], bits: int) -> bool:
    """Return whether biases are -2^(bits-1)·scale, both bf16 bits or float16, and need not be stored.

    Zeros may have any sign.
    """
    if scales.dtype not in (np.uint16, np.float16) or biases.dtype != scales.dtype or scales.shape != biases.shape:
        return False
    return bool((widen(symmetric_biases(scales, bits)) == widen(biases)).all())


def relative_error(w: NDArray[Any], q: QTensor) -> float:
    """Return ‖w - ŵ‖ / ‖w‖, ŵ in float32, summed in float64; 0 where both are zero."""
    _check_weights(w)
    if w.shape != q.shape:
        raise DgemmaError(f"weights {list(w.shape)} and their quantized form {list(q.shape)} differ in shape")
    flat, wrong, total, start = q.rows(), 0.0, 0.0, 0
    for piece in row_pieces(w, CHUNK):
        piece = widen(piece.reshape(-1, w.shape[-1])).astype(np.float64)
        wrong += float(np.square(piece - dequantize(flat[start : start + len(piece)])).sum())
        total += float(np.square(piece).sum())
        start += len(piece)
    return (wrong / total) ** 0.5 if total else (float("inf") if wrong else 0.0)


def _check_weights(w: NDArray[Any]) -> None:
    if w.dtype.name not in ("float32", "float16", "bfloat16", "uint16") or not w.ndim:
        raise DgemmaError(f"weights should be float32, float16 or bfloat16 [..., N], not {w.dtype} {list(w.shape)}")


def _check_global_scale(scale: np.float32 | F32 | None, kind: Format, leading: tuple[int, ...]) -> None:
    if scale is None:
        return
    if kind.mode != "nvfp4":
        raise DgemmaError(f"a global scale belongs to nvfp4, not to {kind.mode}")
    if scale.dtype != np.float32 or scale.shape not in ((), (*leading, 1)):
        want = f"one float32, or float32 {[*leading, 1]}"
        raise DgemmaError(f"a global scale should be {want}, not {scale.dtype} {list(scale.shape)}")
    if not (np.greater(scale, 0) & np.isfinite(scale)).all():
        raise DgemmaError(f"a global scale should be positive and finite, not {np.min(scale)}")


def _too_large(largest: float, limit: float) -> str:
    if not np.isfinite(largest):
        return "NaN or infinity, which no quantization can keep"
    remedy = "" if limit == WIDEST else "; give nvfp4 a global scale"
    return f"a magnitude of {largest:.3g}, above the {limit:.3g} that the format can keep{remedy}"


def _either(values: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"
