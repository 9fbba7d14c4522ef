"""Whether two stored tensors are the same numbers: what a copy of a tied weight has to be of the weight itself.

transformers ties two weights only where both have the same values, and runs with two where they differ. Here there is
one, so a file in which they differ is another model, and is refused by the copy's name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from ..core.errors import DgemmaError, quoted, shown
from .quant import QTensor, dequantize, from_bf16

_BLOCK = 1 << 20  # values compared at a time: what fits a cache
_SAMPLES = 64
_FLOATS = ("float32", "float16", "bfloat16")


class Numbers(Protocol):
    """A tensor read by rows, [R, N]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, start: int, stop: int) -> np.ndarray | QTensor: ...


class Held:
    """A tensor that is mapped already, as `Numbers`."""

    def __init__(self, tensor: np.ndarray | QTensor) -> None:
        self.shape = tuple(tensor.shape)
        if isinstance(tensor, QTensor):
            self._rows = tensor.rows()
        else:
            self._rows = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)

    def read(self, start: int, stop: int) -> np.ndarray | QTensor:
        return self._rows[start:stop]


def same(one: Numbers, other: Numbers, *, sample: bool = False) -> bool:
    """Return whether two tensors agree in shape and in every value, whatever width or format each is stored in.

    Args:
        one, other: the tensors.
        sample: look at 64 rows of them only, for an answer before gigabytes are read.
    """
    if one.shape != other.shape and math.prod(one.shape) * math.prod(other.shape) != 1:
        return False
    return all(_equal(one.read(*run), other.read(*run)) for run in _runs(one.shape, sample))


def check(one: Numbers, other: Numbers, copy: str, name: str, folder: Path, *, sample: bool = False) -> None:
    """Refuse a copy that is not the same as the weight it is tied to.

    Raises:
        DgemmaError: it differs; the line names both, and what can be done.
    """
    if not same(one, other, sample=sample):
        raise DgemmaError(
            f"{shown(folder)}: {quoted(copy, 90)} differs from {quoted(name, 90)}, to which this runtime ties it; "
            "save the model with the two tied"
        )


def _runs(shape: tuple[int, ...], sample: bool) -> Iterator[tuple[int, int]]:
    rows, width = math.prod(shape[:-1]), max(1, shape[-1] if shape else 1)
    step = max(1, _BLOCK // width)
    if sample and rows > _SAMPLES:
        step, starts = 1, [rows * i // _SAMPLES for i in range(_SAMPLES)]
    else:
        starts = range(0, rows, step)
    return ((start, min(start + step, rows)) for start in starts)


def _equal(one: np.ndarray | QTensor, other: np.ndarray | QTensor) -> bool:
    if _same_bits(one, other):
        return True
    a, b = (_wide(tensor) for tensor in (one, other))  # of the same value, 0 and −0 or two widths, bits may differ
    if a is None or b is None:
        return False
    equal = a.ravel() == b.ravel()
    return bool(equal.all() or (equal | (np.isnan(a) & np.isnan(b)).ravel()).all())


def _same_bits(one: np.ndarray | QTensor, other: np.ndarray | QTensor) -> bool:
    if isinstance(one, QTensor) and isinstance(other, QTensor):
        parts = [(one.words, other.words), (one.scales, other.scales), (one.biases, other.biases),
                 (one.global_scale, other.global_scale)]  # fmt: skip
        found = (a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in parts)
        return one.format == other.format and all(found)
    if isinstance(one, QTensor) or isinstance(other, QTensor):
        return False
    return one.dtype == other.dtype and np.array_equal(_bits(one), _bits(other))


def _wide(tensor: np.ndarray | QTensor) -> np.ndarray | None:
    """The values in float32, which holds those of every width; None of what is no number here."""
    if isinstance(tensor, QTensor):
        return dequantize(tensor)
    if tensor.dtype.name == "bfloat16":
        return from_bf16(np.ascontiguousarray(tensor).view(np.uint16))  # 20 times as fast as ml_dtypes' cast
    return tensor.astype(np.float32) if tensor.dtype.name in _FLOATS else None


def _bits(tensor: np.ndarray) -> np.ndarray:
    """The bytes, eight at a time where they are so many."""
    flat = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    return flat if flat.size % 8 else flat.view(np.uint64)
