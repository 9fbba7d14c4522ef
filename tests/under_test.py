"""The backends that every rung of the ladder is climbed with: one list, no skips.

A backend that cannot be imported fails the suite. Imports stand inside the branch that asks for them, so that a test
of one backend runs while another is being written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from dgemma.backends.numpy import NumpyOps, NumpyPasses
from dgemma.checkpoints import weights
from dgemma.checkpoints.loading import dense
from dgemma.core.config import ModelConfig
from dgemma.core.graph_passes import GraphPasses
from dgemma.core.ops import DType, Ops
from dgemma.core.parts import Draws, Model

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

            class PlainTorch(TorchOps):
                def pack(self, weight: Any) -> Any:
                    return self.asarray(dense(weight, self.dtype), self.dtype)

            return PlainTorch(dtype)
        case "inference":
            from dgemma.backends.torch.inference import InferenceOps

            return InferenceOps(dtype)
        case "mlx":
            from dgemma.backends.mlx.ops import MlxOps

            return MlxOps(dtype)
    raise ValueError(f"no backend called {name!r}")


def build(ops: Any, config: ModelConfig, get: Callable[[str], Any]) -> Model:
    """Return a model of stored weights, as a backend's ops take them."""
    return weights.build(config, lambda name: ops.pack(get(name)))


def passes_of(ops: Ops, model: Model, **how: Any) -> GraphPasses:
    """Return the passes that the engine drives; nothing is compiled.

    Of the plain torch ops it is `GraphPasses` as it stands, whose caches are new arrays after each reading pass.
    """
    from dgemma.backends.torch.inference import InferenceOps
    from dgemma.backends.torch.passes import TorchPasses

    if isinstance(ops, NumpyOps):
        return NumpyPasses(ops, model, **how)
    if ops.name == "mlx" and not how:
        from dgemma.backends.mlx.passes import MlxPasses

        return MlxPasses(ops, model)  # type: ignore[arg-type]
    return (TorchPasses if isinstance(ops, InferenceOps) else GraphPasses)(ops, model, **how)


def on_device(ops: Ops, draws: Draws) -> Draws:
    """Bring a pass's draws to the device: as they are, but for numbers of the sampler in the wide dtype."""
    wide = ("entropy_bound", "confidence")
    return Draws(*(ops.asarray(x, ops.wide if name in wide else None) for name, x in draws._asdict().items()))


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
