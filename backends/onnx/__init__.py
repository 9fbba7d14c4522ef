"""ONNX Runtime on the CPU and on CUDA: whole passes as sessions over the graphs that `dgemma export` writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...checkpoints import loading, weights
from ...checkpoints.checkpoint import Checkpoint
from ...core.errors import DgemmaError

if TYPE_CHECKING:
    from ...core.primitives import DType
    from .passes import OrtPasses


def open(
    checkpoint: Checkpoint, device: str, dtype: DType, progress: Callable[[int, int], None] | None = None
) -> OrtPasses:
    """Load a checkpoint on a device: `auto` is CUDA where the installed package has it, else the CPU.

    Raises:
        DgemmaError: no such device here, a width that the graphs do not have, or graphs that the runtime does not take.
    """
    from .passes import WIDTHS, OrtPasses

    where = device_of(device)
    if dtype not in WIDTHS:
        raise DgemmaError(f"backend 'onnx' computes in float32 or float16, not in {dtype}")
    checks = loading.mapped(checkpoint)
    passes = OrtPasses(checkpoint, where, dtype)
    passes.checks = checks
    get = loading.reader(checkpoint, dtype, progress)
    for name in weights.shapes(checkpoint.config):
        get(name)  # the sessions have their own view of it; here it is looked at
    return passes


def device_of(device: str) -> str:
    """Return the runtime's device, `cpu` or `cuda:N`.

    Raises:
        DgemmaError: no such device here.
    """
    if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,4})?", device):
        raise DgemmaError(f"device {device!r} is not one that onnx has; choose from auto, cpu, cuda, cuda:N")
    from .session import provider_of

    return provider_of(device)
