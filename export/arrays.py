"""Arrays that are not there yet: a value of the ONNX graph under the operators that `core/model.py` uses.

Two things are lazy, and both save nodes. A reshape is only noted: most are taken back by the next op, or by a matrix
product that wants rows. And sizes that the graph learns when it runs, such as the batch, are `Size`s, polynomials of
named dimensions that become nodes only where an op asks for their value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .graph import NUMPY, Value

Dim = "int | Size"


@dataclass(frozen=True, eq=False)
class Size:
    """A size known when the graph runs: a sum of products of named dimensions, such as `2·B·L + 3`."""

    terms: tuple[tuple[tuple[str, ...], int], ...]
    """Sorted ((names of the factors, sorted), coefficient)."""

    @classmethod
    def named(cls, name: str) -> Size:
        return cls((((name,), 1),))

    @classmethod
    def of(cls, terms: dict[tuple[str, ...], int]) -> int | Size:
        kept = {names: count for names, count in terms.items() if count}
        if not kept.keys() - {()}:
            return kept.get((), 0)
        return cls(tuple(sorted(kept.items())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(self.terms)

    def __add__(self, other: int | Size) -> int | Size:
        terms = dict(self.terms)
        for names, count in _terms(other).items():
            terms[names] = terms.get(names, 0) + count
        return Size.of(terms)

    def __mul__(self, other: int | Size) -> int | Size:
        terms: dict[tuple[str, ...], int] = {}
        for a, x in self.terms:
            for b, y in _terms(other).items():
                names = tuple(sorted((*a, *b)))
                terms[names] = terms.get(names, 0) + x * y
        return Size.of(terms)

    __radd__, __rmul__ = __add__, __mul__

    def __sub__(self, other: int | Size) -> int | Size:
        return self + -1 * other

    def __rsub__(self, other: int) -> int | Size:
        return -1 * self + other

    def __str__(self) -> str:
        return " + ".join(
            "*".join((*([str(count)] if count != 1 or not names else []), *names)) for names, count in self.terms
        )


def _terms(x: int | Size) -> dict[tuple[str, ...], int]:
    return dict(x.terms) if isinstance(x, Size) else {(): int(x)}


class Writer(Protocol):
    """What an array asks of the ops that it was made by."""

    def reshaped(self, raw: Value, held: Sequence[int | Size], shape: Sequence[int | Size]) -> Value: ...
    def binary(self, kind: str, a: Any, b: Any, dtype: str | None) -> Array: ...
    def sliced(self, x: Array, index: Any) -> Array: ...


class Array:
    """A value, its logical shape and its dtype in the contract's names."""

    __slots__ = ("dtype", "held", "ops", "raw", "shape")
    __hash__ = None  # type: ignore[assignment] - `==` writes a node

    def __init__(self, ops: Writer, raw: Value, shape: tuple[Any, ...], dtype: str, held: Any = None) -> None:
        self.ops = ops
        self.raw = raw
        self.shape = shape
        self.dtype = dtype
        self.held = shape if held is None else held
        """The shape that the value itself has."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def value(self) -> Value:
        """The value in its logical shape."""
        if self.held != self.shape:
            self.raw = self.ops.reshaped(self.raw, self.held, self.shape)
            self.held = self.shape
        return self.raw

    def rows(self) -> Value:
        """The value as [rows, last axis], whatever the leading axes."""
        if not (len(self.held) == 2 and self.held[-1] == self.shape[-1]):
            rows = (product(self.shape[:-1]), self.shape[-1])
            self.raw = self.ops.reshaped(self.raw, self.held, rows)
            self.held = rows
        return self.raw

    # ---- Operators --------------------------------------------------------------------------------------------

    def _with(self, kind: str, other: Any, *, swap: bool = False, dtype: str | None = None) -> Array:
        return self.ops.binary(kind, other, self, dtype) if swap else self.ops.binary(kind, self, other, dtype)

    def __add__(self, other: Any) -> Array:
        return self._with("Add", other)

    def __radd__(self, other: Any) -> Array:
        return self._with("Add", other)

    def __sub__(self, other: Any) -> Array:
        return self._with("Sub", other)

    def __rsub__(self, other: Any) -> Array:
        return self._with("Sub", other, swap=True)

    def __mul__(self, other: Any) -> Array:
        return self._with("Mul", other)

    def __rmul__(self, other: Any) -> Array:
        return self._with("Mul", other)

    def __truediv__(self, other: Any) -> Array:
        return self._with("Div", other)

    def __rtruediv__(self, other: Any) -> Array:
        return self._with("Div", other, swap=True)

    def __floordiv__(self, other: int) -> Array:
        return self._with("Div", other)  # integers, and none here is negative

    def __lt__(self, other: Any) -> Array:
        return self._with("Less", other, dtype="bool")

    def __le__(self, other: Any) -> Array:
        return self._with("LessOrEqual", other, dtype="bool")

    def __gt__(self, other: Any) -> Array:
        return self._with("Greater", other, dtype="bool")

    def __ge__(self, other: Any) -> Array:
        return self._with("GreaterOrEqual", other, dtype="bool")

    def __eq__(self, other: Any) -> Array:  # type: ignore[override]
        return self._with("Equal", other, dtype="bool")

    def __and__(self, other: Any) -> Array:
        return self._with("And", other, dtype="bool")

    def __or__(self, other: Any) -> Array:
        return self._with("Or", other, dtype="bool")

    def __getitem__(self, index: Any) -> Array:
        return self.ops.sliced(self, index)


def scalar(x: Any, dtype: str) -> np.ndarray:
    return np.asarray(x, NUMPY[dtype])


def product(shape: Any) -> int | Size:
    return math.prod(shape)


def quotient(x: int | Size, by: int | Size) -> int | Size:
    """Divide sizes that divide: a monomial out of every term."""
    if isinstance(x, int) and isinstance(by, int):
        return x // by
    ((names, count),) = _terms(by).items()
    terms = {}
    for mine, times in _terms(x).items():
        left = list(mine)
        for name in names:
            left.remove(name)
        terms[tuple(left)] = times // count
    return Size.of(terms)


def broadcast(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the shape that two broadcast to. A size of run time is taken to be the other's, unless that is 1."""
    longest = max(len(a), len(b))
    a, b = (1,) * (longest - len(a)) + a, (1,) * (longest - len(b)) + b
    return tuple(y if isinstance(x, int) and x == 1 else x for x, y in zip(a, b, strict=True))
