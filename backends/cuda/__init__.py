"""PyTorch on CUDA: Triton's kernels and CUDA graphs, and what a card asks of the host."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...core.ops import DType, Ops


def card_ops(dtype: DType, device: str) -> Ops:
    """Return the ops for a card: with kernels where there is Triton and the card has bfloat16 matrix units."""
    import torch

    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        from .card import CardOps

        return CardOps(dtype, device)
    from .graph import CudaCapture
    from .ops import CudaOps

    return CudaOps(dtype, device, capture=CudaCapture(torch.device(device)))
