"""The oracle: every op as its default body says it, in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...checkpoints import loading, weights
from ...checkpoints.checkpoint import Checkpoint
from ...core.config import ModelConfig
from ...core.errors import DgemmaError
from ...core.primitives import DType
from .ops import NumpyOps
from .passes import NumpyPasses

__all__ = ["NumpyOps", "NumpyPasses", "device_of", "open", "passes_of"]


def open(
    checkpoint: Checkpoint, device: str, dtype: DType, progress: Callable[[int, int], None] | None = None
) -> NumpyPasses:
    """Load a checkpoint.

    Raises:
        DgemmaError: a device that is not the CPU.
    """
    device_of(device)
    checks = loading.mapped(checkpoint)
    passes = passes_of(checkpoint.config, loading.reader(checkpoint, dtype, progress), device, dtype, 0)
    passes.checks = checks
    return passes


def passes_of(config: ModelConfig, weight: Callable[[str], Any], device: str, dtype: DType, nbytes: int) -> NumpyPasses:
    """Make a model of weights that are at hand."""
    ops = NumpyOps(dtype)
    return NumpyPasses(ops, weights.build(config, lambda name: ops.pack(weight(name))))


def device_of(device: str) -> str:
    """Return `cpu`.

    Raises:
        DgemmaError: a device that is not the CPU.
    """
    if device not in ("auto", "cpu"):
        raise DgemmaError(f"backend 'numpy' runs on the cpu only, not on {device!r}")
    return "cpu"
