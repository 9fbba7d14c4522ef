"""The MLX backend: Apple silicon through Metal, and the same code on Linux's CPU through `mlx[cpu]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...checkpoints import loading, weights
from ...checkpoints.checkpoint import Checkpoint
from ...core.errors import DgemmaError

if TYPE_CHECKING:
    from ...core.config import ModelConfig
    from ...core.graph_passes import GraphPasses
    from ...core.primitives import DType


def open(
    checkpoint: Checkpoint, device: str, dtype: DType, progress: Callable[[int, int], None] | None = None
) -> GraphPasses:
    """Load a checkpoint on a device: `auto` is the GPU where MLX has one, else the CPU.

    MLX's default device, of the calling thread, becomes that one.

    Raises:
        DgemmaError: no such device here, or a dtype that MLX does not compute in.
    """
    return passes_of(checkpoint.config, loading.reader(checkpoint, dtype, progress), device_of(device), dtype, 0)


def passes_of(config: ModelConfig, weight: Callable[[str], Any], device: str, dtype: DType, nbytes: int) -> GraphPasses:
    """Make a model of weights that are at hand."""
    import mlx.core as mx

    from .ops import MlxOps
    from .passes import MlxPasses

    mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
    ops = MlxOps(dtype, compile=True)
    return MlxPasses(ops, weights.build(config, lambda name: ops.pack(weight(name))))


def device_of(device: str) -> str:
    """Return `cpu` or `gpu`.

    Raises:
        DgemmaError: no such device here.
    """
    import mlx.core as mx

    gpu = mx.is_available(mx.gpu)
    if device == "auto":
        device = "gpu" if gpu else "cpu"
    if device not in ("cpu", "gpu"):
        raise DgemmaError(f"device {device!r} is not one that mlx has; choose from auto, cpu, gpu")
    if device == "gpu" and not gpu:
        raise DgemmaError("device 'gpu' is not usable: this mlx sees no GPU; choose cpu, or see dgemma doctor")
    return device
