"""The primitives in PyTorch, on any device; with the default bodies they are differentiable, which training uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...core.ops import Ops
from ...core.primitives import NUMPY_DTYPES, DType, Reduction, Unary

Array = torch.Tensor

TORCH_DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "int32": torch.int32, "bool": torch.bool,
}  # fmt: skip


class TorchOps(Ops):
    name = "torch"

    def __init__(self, dtype: DType = "float32", device: str = "cpu") -> None:
        self.dtype = dtype
        self.wide = "float64" if dtype == "float64" else "float32"
        self.device = torch.device(device)

    def asarray(self, x: Any, dtype: DType | None = None) -> Array:
        if isinstance(x, np.ndarray):
            # torch cannot read ml_dtypes' bfloat16; its bits are the same
            narrow = x.dtype == NUMPY_DTYPES["bfloat16"]
            tensor = torch.from_numpy(np.ascontiguousarray(x.view(np.int16) if narrow else x))
            x = tensor.view(torch.bfloat16) if narrow else tensor
        return torch.as_tensor(x, dtype=None if dtype is None else TORCH_DTYPES[dtype], device=self.device)

    def to_numpy(self, x: Array) -> np.ndarray:
        return (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()

    def cast(self, x: Array, dtype: DType) -> Array:
        return x.to(TORCH_DTYPES[dtype])

    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        return x.reshape(tuple(shape))

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        return x.permute(tuple(axes))

    def concat(self, xs: Sequence[Array], axis: int) -> Array:
        return torch.cat(list(xs), axis)

    def split(self, x: Array, parts: int, axis: int) -> Sequence[Array]:
        return x.chunk(parts, axis)

    def where(self, condition: Array, a: Any, b: Any) -> Array:
        return torch.where(condition, a, b)

    def take(self, x: Array, index: Array, axis: int) -> Array:
        flat = x.index_select(axis, index.reshape(-1))
        axis = axis % x.ndim
        return flat.reshape(x.shape[:axis] + index.shape + x.shape[axis + 1 :])

    def take_along(self, x: Array, index: Array, axis: int) -> Array:
        shape = list(x.shape)
        shape[axis] = index.shape[axis]
        return torch.gather(x, axis, index.long().expand(shape))

    def arange(self, n: int) -> Array:
        return torch.arange(n, dtype=torch.int32, device=self.device)

    def matmul(self, a: Array, b: Array) -> Array:
        return torch.matmul(a, b)

    def grouped_matmul(self, x: Array, w: Array, counts: Array) -> Array:
        runs = x.split(counts.tolist())
        return torch.cat([run @ one.T for run, one in zip(runs, w, strict=True)])

    def reduce(self, x: Array, how: Reduction, axis: int, keepdims: bool = False) -> Array:
        if how == "argmax":
            return x.argmax(axis, keepdim=keepdims).int()
        if how in ("max", "min"):
            return getattr(torch, f"a{how}")(x, axis, keepdim=keepdims)
        out = getattr(torch, how)(x, axis, keepdim=keepdims)
        return out.int() if x.dtype == torch.int32 else out

    def unary(self, x: Array, how: Unary) -> Array:
        return getattr(torch, how)(x)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        values, index = torch.topk(x, k, -1)
        return values, index.int()

    def argsort(self, x: Array) -> Array:
        return torch.argsort(x, dim=-1, stable=True).int()

    def cumsum(self, x: Array, axis: int) -> Array:
        return torch.cumsum(x, axis)
