"""What tests of single kernels share: guarded allocations, the law, and the limits of the cards compiled for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch

from dgemma.backends.numpy.ops import NumpyOps
from kernel_harness import Built, Guarded, compile_ahead_launch, launched, running
from law import assert_close_f32, assert_low_precision

SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
"""Bytes of shared memory that one program may have."""

WIDTHS = ("float32", "bfloat16")
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int32": torch.int32, "bool": torch.bool}


class Bench:
    """A device with sentinels around every tensor put there and every tensor that a wrapper allocates."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.guard = Guarded(device=device)

    def put(self, x: np.ndarray, dtype: str) -> torch.Tensor:
        return self.guard.like(torch.from_numpy(np.ascontiguousarray(x)).to(TORCH[dtype]))

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a kernel's wrapper; then look at all sentinels."""

        def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
            return self.guard.scratch(*shape, dtype=dtype)

        def empty_like(x: torch.Tensor) -> torch.Tensor:
            return self.guard.scratch(*x.shape, dtype=x.dtype)

        with mock.patch.multiple(torch, empty=empty, empty_like=empty_like):
            out = function(*args, **kwargs)
        self.guard.check()
        return out


@contextmanager
def bench(device: str) -> Iterator[Bench]:
    """Kernels run on the device while this lasts; on the CPU, in the interpreter."""
    with running(device):
        yield Bench(device)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()


def hold(got: Any, oracle: Callable[[NumpyOps], Any], width: str, what: str) -> None:
    """Hold results to the law: `oracle` computes the same with NumPy in float64, and for bfloat16 rounded as well."""
    exact = _each(oracle(NumpyOps("float64")))
    rounded = _each(oracle(NumpyOps("bfloat16"))) if width == "bfloat16" else exact
    for i, (a, b, c) in enumerate(zip(_each(got), rounded, exact, strict=True)):
        a = to_numpy(a) if isinstance(a, torch.Tensor) else a
        if width == "float32":
            assert_close_f32(a, c, f"{what}, result {i}")
        else:
            assert_low_precision(a, np.asarray(b, np.float64), c, f"{what}, result {i}")


def _each(results: Any) -> Sequence[Any]:
    return results if isinstance(results, (tuple, list)) else (results,)


def cast(x: np.ndarray, ops: NumpyOps) -> np.ndarray:
    """The numbers that bfloat16 holds exactly, in an oracle's own width."""
    return ops.asarray(x.astype(ml_dtypes.bfloat16).astype(np.float32), ops.dtype)


def built(run: Callable[[], Any], arch: str, only: Sequence[str] | None = None, *, spills: int = 0) -> dict[str, Built]:
    """Compile what a call on meta tensors launches, each kernel once; none may spill or need too much memory.

    spills: bytes a thread may, stores and loads together.
    """
    results: dict[str, Built] = {}
    for launch in launched(run):
        if launch.name in results or (only is not None and launch.name not in only):
            continue
        result = results[launch.name] = compile_ahead_launch(launch, arch)
        assert max(result.spills, result.stack) <= spills, f"{launch.name} on {arch} spills: {result}"
        assert result.shared <= SHARED[arch], f"{launch.name} on {arch} needs {result.shared} bytes of shared memory"
        assert not result.serialized, f"{launch.name} on {arch}: matrix instructions wait for one another"
    return results


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
