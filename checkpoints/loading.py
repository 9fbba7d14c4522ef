"""Weights on their way from a checkpoint to a backend: read one by one, checked, and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from ..core import finite
from ..core.primitives import DType
from .checkpoint import Checkpoint
from .quant import QTensor, dequantize

HELD = 256 << 20
"""Bytes of weight files that are read into memory at once, so that nothing that becomes of the files matters; larger
ones are mapped where the backend computes from the map, and looked at before each generation."""


def dense(weight: Any, dtype: DType) -> np.ndarray:
    """Return a stored weight as an array: as it is or, where quantized, its values, rounded once to the dtype."""
    if not isinstance(weight, QTensor):
        return np.asarray(weight)
    if dtype == "bfloat16":
        return dequantize(weight, dtype).view(ml_dtypes.bfloat16)
    return dequantize(weight, "float16" if dtype == "float16" else "float32")


def reader(
    checkpoint: Checkpoint, dtype: DType, progress: Callable[[int, int], None] | None = None
) -> Callable[[str], Any]:
    """Return what gets a stored weight by its name, for a model that computes in a dtype.

    A vector that holds NaN or infinity is refused, and so is a tied copy that differs. `progress` is called with bytes
    done and in all.
    """
    total = checkpoint.nbytes + sum(map(checkpoint.copied_bytes, checkpoint.names))
    done = 0

    def get(name: str) -> Any:
        nonlocal done
        tensor = checkpoint.tensor(name)
        finite.check_vector(name, tensor, dtype)
        checkpoint.check_copies(name)  # now, while the weight itself is read too
        done += tensor.nbytes + checkpoint.copied_bytes(name)
        if progress is not None:
            progress(done, total)
        return tensor

    return get


def mapped(checkpoint: Checkpoint) -> tuple[Callable[[], None], ...]:
    """Prepare a checkpoint for a backend whose weights are views of its files; return `Passes.checks`."""
    if sum(file.size for file in checkpoint.files) <= HELD:
        for file in checkpoint.files:
            file.hold()
    return tuple(file.check_unchanged for file in checkpoint.files)
