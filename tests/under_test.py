"""The backends that every rung of the ladder is climbed with: one list, no skips.

A backend that cannot be imported fails the suite. Imports stand inside the branch that asks for them, so that a test
of one backend runs while another is being written.
"""

from __future__ import annotations

from dgemma.core.ops import DType, Ops

BACKENDS = ("numpy", "torch", "inference")
"""Held to the law in float32. "torch" is the default bodies on torch's primitives, "inference" what users run."""

LOW_PRECISION_BACKENDS = ("torch", "inference")
"""Held to the law in bfloat16 as well."""


def make_ops(name: str, dtype: DType) -> Ops:
    """Return one backend on the CPU."""
    match name:
        case "numpy":
            from dgemma.backends.numpy.ops import NumpyOps

            return NumpyOps(dtype)
        case "torch":
            from dgemma.backends.cuda.torch_ops import TorchOps

            return TorchOps(dtype)
        case "inference":
            from dgemma.backends.cuda.inference import InferenceOps

            return InferenceOps(dtype)
        case "mlx":
            from dgemma.backends.mlx.ops import MlxOps

            return MlxOps(dtype)
    raise ValueError(f"no backend called {name!r}")
