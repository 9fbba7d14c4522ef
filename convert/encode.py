"""Rows of a source's weight to the bytes of a target: the part of a conversion that takes the time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..checkpoints.quant import QTensor, carry, dequantize, quantize
from ..checkpoints.quant_bits import from_bf16, to_bf16
from ..checkpoints.quant_fit import NVFP4_RANGE
from ..core.errors import DgemmaError, quoted
from .plan import Item
from .stored import Rows

BLOCK = 1 << 22  # weights that a thread works on at once: 8 MB of bf16
PIECE = 1 << 16  # weights whose error is measured at once
MEASURED = 8  # of a large weight, every so manieth piece
_EXPONENTS = {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Bytes of one run of rows, by component, and how far from the source they are."""

    data: dict[str, np.ndarray]
    wrong: float
    """Σ (ŵ − w)² over the measured pieces."""
    total: float
    """Σ w² over them."""


def runs(item: Item) -> Iterator[tuple[int, int]]:
    """Cut a weight's rows as threads take them; whole pieces, so that what is measured depends on nothing else."""
    piece = _piece_rows(item)
    step = max(piece, BLOCK // max(item.weight.width, 1) // piece * piece)
    return ((start, min(start + step, item.weight.rows)) for start in range(0, item.weight.rows, step))


def largest(item: Item, start: int, stop: int) -> float:
    """Return the largest magnitude among rows, which sets nvfp4's global scale."""
    found = float(np.abs(values(item.weight.read(start, stop), item.weight.dtype)).max(initial=0))
    if not np.isfinite(found):
        raise _unfit(item)
    return found


def factor_of(magnitude: float) -> float:
    """Return the global scale that puts a magnitude at the end of nvfp4's range; 1 for zeros."""
    scale = float(np.float32(magnitude / NVFP4_RANGE))
    return scale if scale > 0 else 1.0


def encode(item: Item, start: int, stop: int, factor: float | None) -> Encoded:
    """Read rows and bring them into the item's form.

    Raises:
        DgemmaError: NaN or infinity, by the tensor's name.
    """
    rows = item.weight.read(start, stop)
    try:
        return _encode(item, rows, start, factor)
    except DgemmaError as error:
        raise DgemmaError(f"{quoted(item.weight.name)}: {error}") from None


def _encode(item: Item, rows: Rows, start: int, factor: float | None) -> Encoded:
    if item.format is None:
        return _encode_float(item, rows, start)
    if item.how == "carried":
        assert isinstance(rows, QTensor)
        return Encoded(data=_parts(item, _carried(rows, item)), wrong=0.0, total=0.0)
    w = dequantize(rows) if isinstance(rows, QTensor) else rows
    q = quantize(w, item.format, global_scale=factor)
    wrong = total = 0.0
    for a, b in measured(item, start, len(w)):
        error, square = squares(dequantize(q[a:b]), values(w[a:b], item.weight.dtype))
        wrong, total = wrong + error, total + square
    return Encoded(data=_parts(item, q), wrong=wrong, total=total)


def _encode_float(item: Item, rows: Rows, start: int) -> Encoded:
    if item.how == "stored":
        assert not isinstance(rows, QTensor)
        if not item.image:  # where an infinity can mean: no limit
            _check_finite(rows, item.dtype)
        return Encoded(data={"weight": rows}, wrong=0.0, total=0.0)
    wide = dequantize(rows) if isinstance(rows, QTensor) else values(rows, item.weight.dtype)
    narrow = to_bf16(wide)
    _check_finite(narrow, "BF16")
    wrong = total = 0.0
    for a, b in measured(item, start, len(wide)):
        error, square = squares(from_bf16(narrow[a:b]), wide[a:b])
        wrong, total = wrong + error, total + square
    return Encoded(data={"weight": narrow}, wrong=wrong, total=total)


def _carried(q: QTensor, item: Item) -> QTensor:
    """Give codes the item's format: the same, or another that states the same values."""
    kind = item.format
    if kind is None or q.format == kind:
        return q
    return carry(q.words, q.scales, q.mlx_biases(), format=kind)


def _parts(item: Item, q: QTensor) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {"weight": q.words, "scales": q.scales}
    for one in item.components:
        # Both widths take two bytes, so that a slip would write sound files of wrong weights.
        if one.kind == "scales" and (one.dtype == "F16") != (q.scales.dtype == np.float16):
            raise DgemmaError(f"{item.weight.name}: scales of another width than planned, by a fault of dgemma's")
        if one.kind == "biases":
            biases = q.mlx_biases()
            assert biases is not None
            found["biases"] = biases
        elif one.kind == "global_scale":
            found["global_scale"] = np.asarray(q.global_scale, np.float32)
    return found


def values(rows: Rows, dtype: str) -> np.ndarray:
    """Return float32 values of rows as stored."""
    if isinstance(rows, QTensor):
        return dequantize(rows)
    return from_bf16(rows.view(np.uint16)) if dtype == "BF16" else rows.astype(np.float32, copy=False)


def _check_finite(rows: np.ndarray, dtype: str) -> None:
    kind, mask = _EXPONENTS[dtype]
    bits = rows.view(kind) & kind(mask)
    if (bits == mask).any():
        raise DgemmaError("NaN or infinity in it, which no model can use; the source is damaged")


def _unfit(item: Item) -> DgemmaError:
    return DgemmaError(f"{quoted(item.weight.name)}: the weights hold NaN or infinity, which no quantization can keep")


def _piece_rows(item: Item) -> int:
    return max(1, PIECE // max(item.weight.width, 1))


def measured(item: Item, start: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield the runs, within rows that begin at `start`, whose error is measured: all of a small weight."""
    piece = _piece_rows(item)
    every = MEASURED if item.parameters > 16 * PIECE else 1
    for a in range(0, count, piece):
        if (start + a) // piece % every == 0:
            yield a, min(a + piece, count)


def squares(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    error = np.subtract(got, want, dtype=np.float64)
    return float(np.square(error, out=error).sum()), float(np.square(want, dtype=np.float64).sum())
