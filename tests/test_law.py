"""The law itself: what it lets through, and what it does not."""

from __future__ import annotations

import numpy as np
import pytest

from law import assert_close_f32, assert_low_precision, nmse

WANT = np.random.default_rng(0).normal(size=(7, 9))


def test_rounding_to_float32_is_within_the_law() -> None:
    assert assert_close_f32(WANT.astype(np.float32), WANT) < 1e-14


@pytest.mark.parametrize("error", [1.1e-5, -1.1e-5])
def test_float32_error_is_bounded(error: float) -> None:
    with pytest.raises(AssertionError, match=r"NMSE 1\.21"):
        assert_close_f32(WANT * (1 + error), WANT)
    assert_close_f32(WANT * (1 + error / 1.2), WANT)


def test_low_precision_error_is_bounded_by_the_oracles_own() -> None:
    assert assert_low_precision(WANT * 1.019, WANT * 1.01, WANT) == pytest.approx(1.9)
    with pytest.raises(AssertionError, match="over 2 times"):
        assert_low_precision(WANT * 1.021, WANT * 1.01, WANT)
    with pytest.raises(AssertionError, match="over 2 times"):
        assert_low_precision(WANT * 1.001, WANT, WANT)  # where rounding costs nothing, nothing is forgiven


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_non_finite_numbers_stand_in_the_same_places(odd: float) -> None:
    marked = WANT.copy()
    marked[2, 3] = odd
    assert nmse(marked, marked) == 0.0
    elsewhere = WANT.copy()
    elsewhere[3, 2] = odd
    for a, b in ((marked, WANT), (WANT, marked), (marked, elsewhere), (marked, np.where(marked == odd, -odd, WANT))):
        with pytest.raises(AssertionError, match="different places"):
            assert_close_f32(a, b)
        with pytest.raises(AssertionError, match="different places"):
            assert_low_precision(a, b, b)


def test_shapes_never_broadcast() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close_f32(WANT[:1], WANT)


def test_of_nothing_but_zeros_only_zeros_are_right() -> None:
    assert assert_close_f32(np.zeros(3), np.zeros(3)) == 0.0
    with pytest.raises(AssertionError):
        assert_close_f32(np.full(3, 1e-30), np.zeros(3))
