"""PyTorch on any device: the primitives, and the ops for inference on a CPU."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ...core.errors import DgemmaError

if TYPE_CHECKING:
    from ...core.ops import DType, Ops


def torch_backend(device: str, dtype: DType) -> Ops:
    """Return torch's ops on a device: `auto` is the first CUDA card, or the CPU.

    Raises:
        DgemmaError: no such device here.
    """
    import torch

    from ..torch.inference import InferenceOps

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
    if kind == "cpu":
        return InferenceOps(dtype, device)
    from ..cuda import card_ops

    return card_ops(dtype, f"cuda:{index or torch.cuda.current_device()}")
