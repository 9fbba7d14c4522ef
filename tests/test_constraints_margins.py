"""Where a last bit would decide, a pass inside a language looks instead of guessing."""

from __future__ import annotations

import numpy as np

from dgemma.constraints.lattice import Row
from dgemma.constraints.walk import MARGIN, _unknown


def test_draws_near_a_border_are_looked_into() -> None:
    """A class whose likeliest token has three quarters of it covers [1/4, 3/4) whatever stands before it."""
    share, near, far = 0.75, 0.5 * MARGIN, 2 * MARGIN
    rest = np.array([share - far, share - near, share + near, 1 - share + far, 1 - share + near, 1 - share - near, 0.5])
    mass = np.full((7, 2), -3.0)  # how likely the class itself is does not come into it
    score = mass + np.log(np.column_stack([np.full(7, share), np.ones(7)]))
    row = Row(
        mass=mass, score=score, best=np.zeros((7, 2), int), moment=np.zeros((7, 2)),
        held=np.full(7, -1), start=0, final=np.ones(1, bool),
    )  # fmt: skip
    first, second = np.zeros(7, int), np.ones(7, int)
    for size in (2.0, 3.0):
        found = _unknown(row, first, rest, np.array([size, 1.0]))
        assert found.tolist() == [False, True, True, False, True, True, False]
    assert not _unknown(row, second, rest, np.array([3.0, 1.0])).any()
