"""What a backend must supply: one to three lines for each primitive.

Arrays are whatever the backend's framework has. The graph uses Python's arithmetic and comparison operators on them,
slices, and the primitives below, nothing else. Three rules keep the frameworks from disagreeing: constants are Python
floats, indices are int32, and every change of width is an `ops.cast`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np

from .parts import Array

DType = Literal["float64", "float32", "bfloat16", "float16", "int32", "bool"]
Reduction = Literal["sum", "max", "min", "mean", "any", "all", "argmax"]
Unary = Literal["exp", "log", "tanh", "rsqrt", "cos", "sin"]

NUMPY_DTYPES: dict[str, Any] = {
    "float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16,
    "int32": np.int32, "bool": np.bool_,
}  # fmt: skip


class Primitives(ABC):
    """Arithmetic on arrays of one framework, on one device, in one width."""

    name: ClassVar[str]
    device: Any = "cpu"
    dtype: DType
    """Width of weights and activations."""
    wide: DType
    """Width of norms, softmax and sampling: float32, and float64 in the oracle."""

    @abstractmethod
    def asarray(self, x: Any, dtype: DType | None = None) -> Array:
        """Bring a NumPy array or Python numbers to the device, as `dtype` or in their own width."""

    @abstractmethod
    def to_numpy(self, x: Array) -> np.ndarray:
        """Bring an array to the host; bfloat16 arrives as float32."""

    @abstractmethod
    def cast(self, x: Array, dtype: DType) -> Array: ...

    @abstractmethod
    def reshape(self, x: Array, shape: Sequence[int]) -> Array: ...

    @abstractmethod
    def transpose(self, x: Array, axes: Sequence[int]) -> Array: ...

    @abstractmethod
    def concat(self, xs: Sequence[Array], axis: int) -> Array: ...

    @abstractmethod
    def split(self, x: Array, parts: int, axis: int) -> Sequence[Array]:
        """Cut into equal parts."""

    @abstractmethod
    def where(self, condition: Array, a: Array | float, b: Array | float) -> Array: ...

    @abstractmethod
    def take(self, x: Array, index: Array, axis: int) -> Array:
        """Pick along one axis with an index of any shape (`np.take`)."""

    @abstractmethod
    def take_along(self, x: Array, index: Array, axis: int) -> Array:
        """Pick along one axis, row by row; all other axes broadcast (`np.take_along_axis`)."""

    @abstractmethod
    def arange(self, n: int) -> Array:
        """Return int32 [n]."""

    @abstractmethod
    def matmul(self, a: Array, b: Array) -> Array: ...

    @abstractmethod
    def grouped_matmul(self, x: Array, w: Array, counts: Array) -> Array:
        """Multiply runs of rows by their own matrices.

        x [N, D] sorted by group, w [E, F, D], counts int32 [E] rows of each group, summing to N → [N, F] = x · wᵀ.
        """

    @abstractmethod
    def reduce(self, x: Array, how: Reduction, axis: int, keepdims: bool = False) -> Array:
        """Fold one axis; `argmax` gives int32 and the first of equals."""

    @abstractmethod
    def unary(self, x: Array, how: Unary) -> Array: ...

    @abstractmethod
    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        """Return the k largest along the last axis and their int32 indices, in any order."""

    @abstractmethod
    def argsort(self, x: Array) -> Array:
        """Return int32 indices that sort the last axis, stable."""

    @abstractmethod
    def cumsum(self, x: Array, axis: int) -> Array: ...

    def rounded(self, value: float) -> float:
        """Return a constant as the compute dtype would hold it: 53.066 is 53.0 in bfloat16."""
        return float(np.asarray(value, NUMPY_DTYPES[self.dtype]))
