"""Backends by name. A framework is imported only when one of its backends is made."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..core.errors import DgemmaError

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint
    from ..core.config import ModelConfig
    from ..core.graph_passes import GraphPasses
    from ..core.passes import Passes
    from ..core.primitives import DType

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
    from torch import cuda

    from .torch import processor

    return None if device == "auto" and cuda.is_available() else processor.native()


def open(
    name: str, checkpoint: Checkpoint, *, device: str = "auto", dtype: DType = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> Passes:  # fmt: skip
    """Load a checkpoint on a backend.

    Args:
        name: from `choose`.
        checkpoint: its weights.
        device: `auto`, `cpu`, `cuda` or `cuda:N` (torch, onnx), `gpu` (mlx).
        dtype: what weights act as, activations and the cache.
        progress: called with bytes done and in all.

    Raises:
        DgemmaError: a device or dtype that the backend does not have here, or weights that are damaged.
    """
    if dtype not in DTYPES:
        raise DgemmaError(f"dtype {dtype!r} is not supported; choose from auto, {', '.join(DTYPES)}")
    return import_module(f".{name}", __name__).open(checkpoint, device, dtype, progress)


def device_of(name: str, device: str = "auto") -> str:
    """Return a backend's own name of the device that one stands for: `cpu`, `cuda:N`, `gpu`.

    Raises:
        DgemmaError: no such device here.
    """
    return import_module(f".{name}", __name__).device_of(device)


def passes_of(
    name: str, config: ModelConfig, weight: Callable[[str], Any], *, device: str, dtype: DType, nbytes: int = 0
) -> GraphPasses:
    """Make a model of weights that are at hand, for benchmarks and tests; not where passes are exported graphs.

    Args:
        name: from `choose`.
        config: the model's.
        weight: returns a weight by its name, as checkpoints store it (NumPy's arrays and `QTensor`s) or, on a card,
            where it is already.
        device: from `device_of`.
        dtype: as `open`.
        nbytes: what all weights take, which a card is asked for before the first is made.

    Raises:
        DgemmaError: a width that the backend does not have there, or no room.
    """
    return import_module(f".{name}", __name__).passes_of(config, weight, device, dtype, nbytes)
