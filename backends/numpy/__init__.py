"""The oracle: every op as its default body says it, in NumPy."""

from .ops import NumpyOps

__all__ = ["NumpyOps"]
