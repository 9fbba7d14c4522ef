"""PyTorch on the CPU and on CUDA, there with Triton's kernels and CUDA graphs."""

from __future__ import annotations

import re
from importlib.util import find_spec
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

    from .inference import InferenceOps

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
    return card_ops(dtype, f"cuda:{index or torch.cuda.current_device()}")


def card_ops(dtype: DType, device: str) -> Ops:
    """Return the ops for a card: with kernels where there is Triton and the card has bfloat16 matrix units."""
    import torch

    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        from .card import CardOps

        return CardOps(dtype, device)
    from .graph import CudaCapture
    from .ops import CudaOps

    return CudaOps(dtype, device, capture=CudaCapture(torch.device(device)))
