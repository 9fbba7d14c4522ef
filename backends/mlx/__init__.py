"""The MLX backend: Apple silicon through Metal, and the same code on Linux's CPU through `mlx[cpu]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.errors import DgemmaError

if TYPE_CHECKING:
    from ...core.ops import DType, Ops


def mlx_backend(device: str, dtype: DType) -> Ops:
    """Return MLX's ops on a device: `auto` is the GPU where MLX has one, else the CPU.

    MLX has one default device for the whole process; this sets it.

    Raises:
        DgemmaError: no such device here.
    """
    import mlx.core as mx

    from .ops import MlxOps

    gpu = mx.is_available(mx.gpu)
    if device == "auto":
        device = "gpu" if gpu else "cpu"
    if device not in ("cpu", "gpu"):
        raise DgemmaError(f"device {device!r} is not one that mlx has; choose from auto, cpu, gpu")
    if device == "gpu" and not gpu:
        raise DgemmaError("device 'gpu' is not usable: this mlx sees no GPU; choose cpu, or see dgemma doctor")
    mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
    return MlxOps(dtype)
