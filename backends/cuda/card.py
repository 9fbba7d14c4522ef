"""What a card asks of the host, whichever kernels run: nothing waits, memory is asked for first, weights stream in.

Every copy between host and card goes through pinned memory, which is the only kind that does not stop the host until
all the work before it is done. The engine looks one pass ahead (`Ops.lookahead`), so what it reads of a pass has been
copied while the next one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, Self

import numpy as np
import torch

from ...checkpoints.quant import QTensor
from ...core.config import ModelConfig
from ...core.errors import DgemmaError
from ...core.ops import KV, DType
from ..torch.blocks import Weight
from ..torch.head import VocabHead
from ..torch.inference import InferenceOps
from ..torch.packed import QuantizedTensor, Scratch, as_scales
from ..torch.primitives import TORCH_DTYPES, Array
from .graph import Buffers, Capture, Graphs, on
from .load import Stager, bucketed, free_memory, refusal, releasing, room

LEAST_CONTEXT = 1024
"""Tokens of prompt and answer that a card must have room for, or loading is refused."""


class CardOps(InferenceOps):
    """`InferenceOps` on a card.

    Args:
        dtype: of weights and activations.
        device: `cuda` or `cuda:N`; `cpu` is for tests.
        capture: what captures and replays functions given to `compile`; None runs them as they are.
        encode_sizes: lengths that encode passes are captured for.
    """

    def __init__(
        self, dtype: DType = "bfloat16", device: str = "cuda", *, capture: Capture | None = None,
        encode_sizes: tuple[int, ...] = (256, 1024),
    ) -> None:  # fmt: skip
        super().__init__(dtype, device, products=dtype)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())  # `set_device` asks for a number
        if self.device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(self.device)  # for who uses ops by themselves; see `graph.on`
        # A graph goes on writing where it was captured: a buffer that is kept from call to call, and replaced when it
        # becomes too small, would by then be somebody else's memory. torch's allocator makes new ones cheap here.
        self._scratch = Scratch(keep=False)
        self._head = VocabHead(self._scratch)
        self.prefill_chunk = 1024
        self._capture = capture
        self._plain = False
        self._sizes = encode_sizes
        self._constants: dict[Any, Array] = {}
        self._buffers = Buffers()
        self._stager: Stager | None = None

    def plain(self) -> Self:
        """Return these ops over the same weights, running passes as they are: what captured ones are compared with.

        Caches are as long as captured ones': attention cuts its keys by that, and rounds by how it cuts.
        """
        twin = copy(self)
        twin._plain = True
        return twin

    @property
    def _can_capture(self) -> bool:
        return self._capture is not None

    @property
    def captures(self) -> bool:
        """Whether functions given to `compile` run as graphs."""
        return self._can_capture and not self._plain

    @property
    def encode_sizes(self) -> tuple[int, ...]:  # type: ignore[override]
        return self._sizes if self.captures else ()

    @property
    def lookahead(self) -> int:  # type: ignore[override]
        return 1 if self.captures else 0

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

    def fetch(self, *arrays: Array) -> Callable[[], list[np.ndarray]]:
        if self.device.type == "cpu":
            kept = [x.clone() for x in arrays]
            return lambda: [self.to_numpy(x) for x in kept]
        hosts = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in arrays]
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))

        def read() -> list[np.ndarray]:
            event.synchronize()
            return [self.to_numpy(x).copy() for x in hosts]  # of their own: pinned memory is scarce

        return read

    def extent(self, length: int) -> int | Array:
        if not self.captures:
            return super().extent(length)
        return torch.full((1,), length, dtype=torch.int32, device=self.device)

    # ---- Passes -------------------------------------------------------------------------------------------------

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return Graphs(function, self._capture, self.device) if self._capture and self.captures else function

    def new_cache(self, batch: int, kv_heads: int, head_dim: int, capacity: int) -> KV:
        if not self._can_capture:
            return super().new_cache(batch, kv_heads, head_dim, capacity)
        rows = bucketed(capacity)
        if self._plain:
            return super().new_cache(batch, kv_heads, head_dim, rows)
        shape, dtype = (batch, kv_heads, rows, head_dim), TORCH_DTYPES[self.dtype]
        keys, values = (self._buffers.lend(shape, dtype, self.device) for _ in range(2))
        return KV(keys, values)

    # ---- Weights and memory -------------------------------------------------------------------------------------

    def admit(self, config: ModelConfig, weight_bytes: Callable[[], int]) -> None:
        if self.device.type == "cpu":
            return
        free, total = free_memory(self.device)
        width = TORCH_DTYPES[self.dtype].itemsize
        found = room(
            config, weight_bytes(), width=width, free=free, total=total, chunk=self.prefill_chunk,
            buckets=self._can_capture,
        )  # fmt: skip
        if why := refusal(found, min(LEAST_CONTEXT, config.max_positions), str(self.device)):
            raise DgemmaError(f"the model does not fit: {why}")

    @contextmanager
    def guarded(self, doing: str) -> Iterator[None]:
        remedy = "take a shorter context, or a smaller recipe (dgemma convert --recipe 4bit)"
        try:
            with on(self.device), releasing(self.device, doing, remedy):
                yield
        except DgemmaError:
            self._buffers.release()
            raise
        finally:
            if self._stager is not None:
                self._stager.close()
                self._stager = None

    def memory(self) -> int | None:
        """Return the most bytes that torch has held of the card: what graphs keep for themselves counts."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None

    def pack(self, weight: Any) -> Weight:
        """Bring one stored weight to the card, packed as it is; what is there already is taken as it is."""
        if isinstance(weight, torch.Tensor | QuantizedTensor):
            return weight
        return super().pack(weight) if self.device.type == "cpu" else self.staged(weight)

    def staged(self, weight: np.ndarray | QTensor) -> Weight:
        """Copy a stored weight through the ring of pinned buffers (`load.Stager`)."""
        if not isinstance(weight, QTensor):
            return self._send(np.asarray(weight)).to(TORCH_DTYPES[self.dtype])
        factor = weight.global_scale
        return QuantizedTensor(
            words=self._send(weight.words),
            scales=as_scales(self._send(weight.scales)),
            biases=None if weight.biases is None else as_scales(self._send(weight.biases)),
            global_scale=None if factor is None else self._send(np.asarray(factor)),
            format=weight.format,
        )

    def _send(self, array: np.ndarray) -> Array:
        if self._stager is None:
            self._stager = Stager(self.device)
        # What torch has no type for travels as integers of its width.
        known = {"bfloat16": torch.bfloat16, "uint16": torch.int16, "uint32": torch.int32}
        dtype = known.get(array.dtype.name) or torch.from_numpy(np.empty(0, array.dtype)).dtype
        return self._stager.send(array, dtype)
