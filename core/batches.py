"""Rows that share a denoising pass: which can, what the pass is given, how it is begun."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import sampler
from .canvas import Chosen
from .errors import DgemmaError
from .parts import Draws, Masses
from .passes import Passes, Starts, StepResult
from .row import Row

Mark = tuple[Row, int, int]
"""A row, with the canvas and the step that a pass is of."""


def alike(rows: list[Row]) -> list[list[Row]]:
    """Rows whose canvases, and what is to be read before, are of one length, and that look at the same classes of
    tokens if at any, in the order in which they came."""
    groups: dict[tuple[int, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.length, len(row.tokens) - row.read, row.classes), []).append(row)
    return list(groups.values())


def next_pass(rows: list[Row]) -> tuple[list[Mark], Draws, Starts]:
    """Return what rows' next pass is marked with and given, and count it as begun."""
    starts = {row.slot: noise for row in rows if (noise := row.start()) is not None}
    marks = [(row, row.index, row.begun) for row in rows]
    return marks, sampler.stacked([row.draws() for row in rows]), starts


def begin(passes: Passes, rows: list[Row]) -> tuple[list[Mark], Callable[[], StepResult]]:
    """Begin a pass of some rows that are alike; the call that comes back waits for its results."""
    marks, draws, starts = next_pass(rows)
    slots, constraint = [row.slot for row in rows], rows[0].request.constraint
    if constraint is None:
        return marks, passes.step(slots, draws, starts)
    result = passes.step_within(slots, draws, starts, constraint.classes, lambda masses: _chosen(rows, draws, masses))
    return marks, lambda: result


def _chosen(rows: list[Row], draws: Draws, masses: Masses) -> Chosen:
    """Let each row's walk choose in its part of a pass."""
    choices = []
    for i, row in enumerate(rows):
        chosen = _nothing(draws.held.shape[1])
        if np.isfinite(masses.mass[i]).all():
            try:
                chosen = row.choose(
                    Masses(*(one[i] for one in masses)), uniforms=draws.uniforms[i], held=draws.held[i],
                    bound=float(draws.entropy_bound[i, 0]), greedy=bool(draws.greedy[i, 0]),
                )  # fmt: skip
            except DgemmaError as error:  # this row's own
                row.fail(error)
        choices.append(chosen)
    columns = list(zip(*choices, strict=True))
    return Chosen(*(np.stack(one) for one in columns[:-1]), factors=_factors(columns[-1]))


def _nothing(length: int) -> Chosen:
    """Return what a row gets whose pass came to NaN or infinity: the entropies say so, as without a constraint."""
    zeros = np.zeros(length, np.int32)
    return Chosen(zeros, zeros, zeros.astype(np.float32), zeros, np.full(length, np.nan, np.float32))


def _factors(column: tuple[np.ndarray | None, ...]) -> np.ndarray | None:
    """Stack rows' factors; a row that has none beside one that has is fed back as it came."""
    known = next((one for one in column if one is not None), None)
    return None if known is None else np.stack([np.ones_like(known) if one is None else one for one in column])
