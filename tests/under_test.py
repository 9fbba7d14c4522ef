"""The backends that every rung of the ladder is climbed with: one list, no skips.

A backend that cannot be imported fails the suite. Imports stand inside the branch that asks for them, so that a test
of one backend runs while another is being written.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from dgemma.backends.numpy.ops import NumpyOps
from dgemma.core.ops import DType, Ops

BACKENDS = ("numpy", "torch", "inference", "mlx")
"""Held to the law in float32. "torch" is the default bodies on torch's primitives, "inference" what users run."""

LOW_PRECISION_BACKENDS = ("torch", "inference", "mlx")
"""Held to the law in bfloat16 as well."""


def make_ops(name: str, dtype: DType) -> Ops:
    """Return one backend on the CPU."""
    match name:
        case "numpy":
            return NumpyOps(dtype)
        case "torch":
            from dgemma.backends.torch.primitives import TorchOps

            return TorchOps(dtype)
        case "inference":
            from dgemma.backends.torch.inference import InferenceOps

            return InferenceOps(dtype)
        case "mlx":
            from dgemma.backends.mlx.ops import MlxOps

            # On Linux MLX compiles through g++, a minute for each shape of model. That a compiled pass equals a plain
            # one is the backend's own test.
            return MlxOps(dtype, compile=False)
    raise ValueError(f"no backend called {name!r}")


def values(seed: int, *shape: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Return random float32 numbers that bfloat16 holds exactly."""
    draw = np.random.default_rng(seed).normal(shift, scale, shape)
    return draw.astype(ml_dtypes.bfloat16).astype(np.float32)


class Margins(NumpyOps):
    """The oracle, noting how near each choice of experts was to another.

    Where two experts all but tie, two right float32 runtimes choose differently and differ by far more than the law
    allows: such inputs must not be tested with, whatever the seed.
    """

    def __init__(self) -> None:
        super().__init__("float64")
        self.smallest = 1.0

    def top_k(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        last, next_one = (-np.partition(-x, (k - 1, k), -1)[..., i] for i in (k - 1, k))
        self.smallest = min(self.smallest, float(np.min((last - next_one) / last)))
        return super().top_k(x, k)
