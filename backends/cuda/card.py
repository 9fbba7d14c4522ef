"""What a card asks of ops, whichever kernels run: numbers come without waiting, and weights through pinned memory.

Every copy between host and card goes through pinned memory, which is the only kind that does not stop the host until
all the work before it is done.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...checkpoints.quant import QTensor
from ...core.parts import Model
from ...core.primitives import DType
from ..torch.blocks import Weight
from ..torch.head import VocabHead
from ..torch.inference import InferenceOps
from ..torch.packed import QuantizedTensor, Workspace, as_scales
from ..torch.primitives import TORCH_DTYPES, Array
from .load import Stager


class CardOps(InferenceOps):
    """`InferenceOps` on a card; `device` is `cuda` or `cuda:N`, and `cpu` for tests."""

    def __init__(self, dtype: DType = "bfloat16", device: str = "cuda") -> None:
        super().__init__(dtype, device, products=dtype)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())  # `set_device` asks for a number
        if self.device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(self.device)  # for who uses ops by themselves; passes see to it: `CardPasses.home`
        # A graph goes on writing where it was captured: a buffer that is kept from call to call, and replaced when it
        # becomes too small, would by then be somebody else's memory. torch's allocator makes new ones cheap here.
        self._workspace = Workspace(keep=False)
        self._head = VocabHead(self._workspace)
        self._constants: dict[Any, Array] = {}

    def can_capture(self, weights: Model) -> bool:
        """Whether a pass over these weights reads nothing back to the host, so that a CUDA graph can hold it."""
        return False

    def can_capture_classes(self, weights: Model) -> bool:
        """The same of a pass that ends in `class_head`: torch's lays classes out on the host."""
        return False

    # ---- Between host and card ----------------------------------------------------------------------------------

    def asarray(self, x: Any, dtype: DType | None = None) -> Array:
        """Bring numbers to the card without waiting. Lists and tuples are constants and stay there."""
        if isinstance(x, list | tuple):
            key = (tuple(x), dtype)
            if key not in self._constants:
                self._constants[key] = super().asarray(x, dtype)
            return self._constants[key]
        if not isinstance(x, np.ndarray) or self.device.type == "cpu":
            array = super().asarray(x, dtype)
            return array.clone() if isinstance(x, np.ndarray) else array
        bits = x.view(np.int16) if x.dtype.name == "bfloat16" else x
        host = torch.from_numpy(np.ascontiguousarray(bits))
        host = host.view(torch.bfloat16) if x.dtype.name == "bfloat16" else host
        # Pinned memory comes from torch's cache, which hands it out again only when the copy is done.
        array = host.pin_memory().to(self.device, non_blocking=True)
        return array if dtype is None else array.to(TORCH_DTYPES[dtype])

    # ---- Weights ------------------------------------------------------------------------------------------------

    def pack(self, weight: Any, stager: Stager | None = None) -> Weight:
        """Bring one stored weight to the card, packed as it is, by a stager; what is there already stays as it is."""
        if isinstance(weight, torch.Tensor | QuantizedTensor):
            return weight
        return super().pack(weight) if stager is None else self._staged(weight, stager)

    def _staged(self, weight: np.ndarray | QTensor, stager: Stager) -> Weight:
        if not isinstance(weight, QTensor):
            return _sent(np.asarray(weight), stager).to(TORCH_DTYPES[self.dtype])
        factor = weight.global_scale
        return QuantizedTensor(
            words=_sent(weight.words, stager),
            scales=as_scales(_sent(weight.scales, stager)),
            biases=None if weight.biases is None else as_scales(_sent(weight.biases, stager)),
            global_scale=None if factor is None else _sent(np.asarray(factor), stager),
            format=weight.format,
        )

    def stack(self, part: Any) -> Any:
        """Lay weights of an `Attention` or an `Mlp` that read the same activations together; here they stay apart."""
        return part


def _sent(array: np.ndarray, stager: Stager) -> Array:
    # What torch has no type for travels as integers of its width.
    known = {"bfloat16": torch.bfloat16, "uint16": torch.int16, "uint32": torch.int32}
    dtype = known.get(array.dtype.name) or torch.from_numpy(np.empty(0, array.dtype)).dtype
    return stager.send(array, dtype)
