"""`core.graph_passes` over torch on the CPU, where nothing is compiled and the pool is memory that the host lends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

from ...core.errors import DgemmaError
from ...core.graph_passes import GraphPasses
from .primitives import TORCH_DTYPES, Array


class TorchPasses(GraphPasses):
    workers = "openmp"

    @staticmethod
    def among_workers() -> AbstractContextManager[None]:
        # Asking sets it: in a new thread OpenMP's number of threads is every logical core, until torch has looked.
        torch.get_num_threads()
        return nullcontext()

    def zeros(self, shape: tuple[int, ...]) -> Array:
        # NumPy's zeros are pages that the kernel has not given yet: what no row reaches takes no memory.
        dtype = TORCH_DTYPES[self.ops.dtype]
        empty = np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), np.uint8)
        return torch.from_numpy(empty).view(dtype)

    def copied(self, x: Array) -> Array:
        return x.clone(memory_format=torch.contiguous_format)

    @contextmanager
    def guarded(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            raise DgemmaError(f"out of memory while {doing}; take a shorter context or a smaller recipe") from None
