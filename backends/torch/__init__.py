"""PyTorch on any device: the primitives, and the ops for inference on a CPU; `backends.cuda` is what a card needs."""

from __future__ import annotations

import re
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
    """Load a checkpoint on a device: `auto` is the first CUDA card, or the CPU.

    Raises:
        DgemmaError: no such device here, or the model does not fit on it.
    """
    where = device_of(device)
    if where != "cpu":
        from .. import cuda

        return cuda.open(checkpoint, where, dtype, progress)
    checks = loading.mapped(checkpoint)
    passes = passes_of(checkpoint.config, loading.reader(checkpoint, dtype, progress), where, dtype, 0)
    passes.checks = checks
    return passes


def passes_of(config: ModelConfig, weight: Callable[[str], Any], device: str, dtype: DType, nbytes: int) -> GraphPasses:
    """Make a model of weights that are at hand."""
    if device != "cpu":
        from .. import cuda

        return cuda.passes_of(config, weight, device, dtype, nbytes)
    from .inference import InferenceOps
    from .passes import TorchPasses

    ops = InferenceOps(dtype)
    return TorchPasses(ops, weights.build(config, lambda name: ops.pack(weight(name))))


def device_of(device: str) -> str:
    """Return torch's name of a device, `cpu` or `cuda:N`.

    Raises:
        DgemmaError: no such device here.
    """
    import torch

    cuda = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    kind, _, index = device.partition(":")
    if not re.fullmatch("cpu|cuda(:[0-9]{1,4})?", device):
        raise DgemmaError(f"device {device!r} is not one that torch has here; choose from auto, cpu, cuda, cuda:N")
    if kind == "cuda" and not cuda:
        raise DgemmaError("device 'cuda' is not usable: this torch sees no CUDA card; choose cpu, or see dgemma doctor")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise DgemmaError(f"device {device!r} does not exist: there are {torch.cuda.device_count()} CUDA cards")
    return "cpu" if kind == "cpu" else f"cuda:{index or torch.cuda.current_device()}"
