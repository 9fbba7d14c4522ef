"""Weights in the formats that the CUDA kernels read, their values for the oracle, and guarded outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch

from dgemma.backends.numpy import NumpyOps
from dgemma.backends.torch.packed import QuantizedTensor
from dgemma.checkpoints.quant import Format, QTensor, dequantize, quantize
from kernel_harness import Guarded

FORMATS: dict[str, Format | None] = {
    "bf16": None,
    "symmetric4": Format(bits=4, group_size=32, symmetric=True),
    "affine4": Format(bits=4, group_size=64),
    "symmetric8": Format(bits=8, group_size=32, symmetric=True),
    "affine8": Format(bits=8, group_size=64),
    "nvfp4": Format(mode="nvfp4", bits=4, group_size=16),
}
EXACT, ROUNDED = NumpyOps("float64"), NumpyOps("bfloat16")


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32) * scale).bfloat16()


def weight(rng: np.random.Generator, form: str, *shape: int, device: str = "cpu") -> tuple[Any, np.ndarray]:
    """Return a random weight as kernels take it, and its values, float32, rounded to nothing narrower."""
    values = rng.standard_normal(shape).astype(np.float32) * np.float32(0.05)
    kind = FORMATS[form]
    if kind is None:
        made = torch.from_numpy(values).bfloat16()
        return made.to(device), made.float().numpy()
    q = quantize(values, kind)
    if kind.mode == "nvfp4":  # a global scale for each row, as for experts that were quantized one by one
        factor = rng.uniform(0.5, 2.0, (*shape[:-1], 1)).astype(np.float32)
        q = QTensor(words=q.words, scales=q.scales, global_scale=factor, format=kind)
    return QuantizedTensor.from_host(q, device), dequantize(q)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_weight(form: str, *shape: int) -> Any:
    """Return a weight of a real size without any data, for `launched`."""
    kind = FORMATS[form]
    if kind is None:
        return meta(*shape)
    grouped = (*shape[:-1], shape[-1] // kind.group_size)
    scales = meta(*grouped, dtype=torch.uint8 if kind.mode == "nvfp4" else torch.bfloat16)
    return QuantizedTensor(
        words=meta(*shape[:-1], shape[-1] * kind.bits // 32, dtype=torch.int32),
        scales=scales,
        biases=scales if kind.stores_biases else None,
        global_scale=meta(*shape[:-1], 1, dtype=torch.float32) if kind.mode == "nvfp4" else None,
        format=kind,
    )


def exact(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def narrow(x: np.ndarray | torch.Tensor) -> np.ndarray:
    """As the oracle in bfloat16 takes it."""
    return (x.float().cpu().numpy() if isinstance(x, torch.Tensor) else x).astype(ml_dtypes.bfloat16)


@contextmanager
def guarded(device: str) -> Iterator[None]:
    """Within, every tensor that kernels' wrappers allocate has sentinels around and in it, which are checked after."""
    guard = Guarded(device=device)

    def empty(shape: Any, *, dtype: torch.dtype, device: Any) -> torch.Tensor:
        return guard.empty(*((shape,) if isinstance(shape, int) else shape), dtype=dtype)

    def empty_like(x: torch.Tensor) -> torch.Tensor:
        return guard.empty(*x.shape, dtype=x.dtype)

    with mock.patch.object(torch, "empty", empty), mock.patch.object(torch, "empty_like", empty_like):
        yield
    guard.check()
