"""How probable a model finds tokens of a finished canvas."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ..core import finite
from ..core.canvas import Classes
from ..core.engine import Engine
from .model import open_behind


def log_probabilities(
    engine: Engine, prompt: Sequence[int], canvas: Sequence[int], places: Sequence[int]
) -> np.ndarray:  # fmt: skip
    """Return log p of the canvas's own tokens at some places, float32 [n], nats.

    One pass over the canvas as it is, at temperature 1 and without self-conditioning: each token given all others of
    the canvas, itself among them, as noise could have left it there. No chain of conditionals, so no probability of the
    whole; it ranks candidates for the same places.

    Raises:
        DgemmaError: the pass came to NaN or infinity, or finds no room.
    """
    if not len(places):
        return np.zeros(0, np.float32)
    tokens, passes = np.asarray(canvas, np.int32), engine.passes
    wanted = np.unique(tokens[list(places)])
    of = np.full(passes.config.vocab_size, -1, np.int32)
    of[wanted] = np.arange(len(wanted))
    classes = Classes(of=of, count=len(wanted), key=hashlib.sha256(b"each" + wanted.tobytes()).hexdigest())

    def run() -> np.ndarray:
        slot = open_behind(engine, prompt, len(tokens))
        try:
            score = passes.masses(slot, tokens, classes).score
        finally:
            passes.close(slot)
        finite.check_results(score, passes.dtype)
        return np.asarray([score[i, of[tokens[i]]] for i in places], np.float32)

    return engine.run("scoring", run)
