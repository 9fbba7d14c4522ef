"""The one tolerance law. Every numeric comparison of the suite goes through here.

* float32: the normalised mean squared error ‖got − want‖² / ‖want‖² is at most 1e-10.
* Low precision: ‖got − exact‖ is at most twice ‖rounded − exact‖, the error that the NumPy oracle makes itself when it
  rounds every op to that width. `exact` is the oracle in float64 (or float32) on the very same rounded inputs.
* NaN and infinities stand in the same places, with the same sign, under both.

A test that needs a looser number says why beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NMSE = 1e-10
"""Largest normalised mean squared error between two float32 computations: 1e-5 of the signal."""

LOW_PRECISION = 2.0
"""Largest error of a low-precision computation, in units of the oracle's own rounding error."""


def nmse(got: Any, want: Any) -> float:
    """Return ‖got − want‖² / ‖want‖² over the finite entries, in float64; 0 for two zeros, inf for an error on zero."""
    got, want = _matching(got, want, "got", "want")
    finite = np.isfinite(want)
    error, signal = _square(got[finite] - want[finite]), _square(want[finite])
    return error / signal if signal else (np.inf if error else 0.0)


def assert_close_f32(got: Any, want: Any, what: str = "result") -> float:
    """Hold two float32 computations of the same thing to the law; returns the NMSE, which a failure also shows."""
    figure = nmse(got, want)
    if not figure <= NMSE:
        worst, where = _worst(got, want)
        raise AssertionError(
            f"{what}: NMSE {figure:.3e} is over the law's {NMSE:.0e}; worst |error| {worst:.3e} at {where}, "
            f"where got {np.asarray(got)[where]!s} and want {np.asarray(want)[where]!s}"
        )
    return figure


def assert_low_precision(got: Any, rounded: Any, exact: Any, what: str = "result") -> float:
    """Hold a low-precision computation to twice the oracle's own rounding error.

    Args:
        got: the computation under test, in any width.
        rounded: `NumpyOps` of that width on the same inputs.
        exact: `NumpyOps("float64")` on the same inputs.

    Returns:
        ‖got − exact‖ / ‖rounded − exact‖, which a failure also shows.
    """
    got, target = _matching(got, exact, "got", "exact")
    rounded, target = _matching(rounded, exact, "rounded", "exact")
    finite = np.isfinite(target)
    error, own = (np.sqrt(_square(x[finite] - target[finite])) for x in (got, rounded))
    signal = np.sqrt(_square(target[finite])) or 1.0
    if not error <= LOW_PRECISION * own:
        raise AssertionError(
            f"{what}: error {error:.3e} is over {LOW_PRECISION:g} times the oracle's own {own:.3e} "
            f"(of the signal: {error / signal:.2e} against {own / signal:.2e})"
        )
    return float(error / own) if own else 0.0


def _matching(a: Any, b: Any, a_name: str, b_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, once shapes and the places of NaN and infinities are known to agree."""
    a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
    assert a.shape == b.shape, f"shape of {a_name} {a.shape} differs from that of {b_name} {b.shape}"
    for kind, at in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = np.argwhere(at(a) != at(b))
        assert not len(wrong), (
            f"{kind} in different places: {a_name} has {at(a).sum()}, {b_name} {at(b).sum()}; first at {wrong[0]}"
        )
    return a, b


def _square(x: np.ndarray) -> float:
    return float(np.sum(x * x))


def _worst(got: Any, want: Any) -> tuple[float, tuple[int, ...]]:
    a, b = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    error = np.where(np.isfinite(b), np.abs(a - np.where(np.isfinite(b), b, 0.0)), 0.0)
    where = np.unravel_index(int(np.argmax(error)), error.shape)
    return float(error[where]), tuple(int(i) for i in where)
