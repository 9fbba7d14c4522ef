"""Backends by name. A framework is imported only when one of its backends is made."""

from __future__ import annotations

import platform
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..core.errors import DgemmaError

if TYPE_CHECKING:
    from ..core.ops import DType, Ops

MODULES = {"mlx": "mlx", "torch": "torch", "onnx": "onnxruntime", "numpy": "numpy"}
"""Backend names that users see, and the module each needs."""

DTYPES = ("float32", "bfloat16", "float16")


def available() -> dict[str, str | None]:
    """Return every backend's name with None, or with why it cannot run here. Imports nothing."""
    return {
        name: None if find_spec(module) else f"not installed: pip install 'dgemma[{name}]'"
        for name, module in MODULES.items()
    }


def choose(name: str = "auto") -> str:
    """Return the backend that `name` stands for: `auto` is mlx on Apple silicon and torch elsewhere.

    Raises:
        DgemmaError: no such backend, or it is not installed.
    """
    reasons = available()
    if name == "auto":
        apple = sys.platform == "darwin" and platform.machine() == "arm64"
        order = ("mlx", "torch") if apple else ("torch", "mlx")
        return next((one for one in order if reasons[one] is None), "numpy")
    if name not in reasons:
        raise DgemmaError(f"backend {name!r} does not exist; choose from auto, {', '.join(reasons)}")
    if reasons[name] is not None:
        raise DgemmaError(f"backend {name!r} is {reasons[name]}")
    return name


def native(name: str, device: str = "auto") -> tuple[DType, ...] | None:
    """Return the low precisions that the processor multiplies faster than float32; None where that is not known.

    It is of torch on the CPU alone, and asking imports torch.
    """
    if name != "torch" or available()["torch"] is not None or device.startswith("cuda"):
        return None
    import torch

    from .torch import processor

    return None if device == "auto" and torch.cuda.is_available() else processor.native()


def make(name: str, *, device: str = "auto", dtype: DType = "float32") -> Ops:
    """Return a backend's ops, ready to run.

    Args:
        name: from `choose`.
        device: `auto`, `cpu`, `cuda` or `cuda:N` (torch), `gpu` (mlx).

    Raises:
        DgemmaError: a device or dtype that the backend does not have here.
    """
    if dtype not in DTYPES:
        raise DgemmaError(f"dtype {dtype!r} is not supported; choose from auto, {', '.join(DTYPES)}")
    if name == "torch":
        from .torch import torch_backend

        return torch_backend(device, dtype)
    if name == "mlx":
        from .mlx import mlx_backend

        return mlx_backend(device, dtype)
    if name == "onnx":
        from .onnx.passes import ort_backend

        return ort_backend(device, dtype)
    if device not in ("auto", "cpu"):
        raise DgemmaError(f"backend 'numpy' runs on the cpu only, not on {device!r}")
    from .numpy import NumpyOps

    return NumpyOps(dtype)
