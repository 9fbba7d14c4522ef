"""Many boards at once: rows of one engine, which is how `train.py` and `evaluate.py` find out how many are solved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import boards
import nano
from dgemma import backends
from dgemma.core.config import ModelConfig, SamplerConfig
from dgemma.core.engine import Engine
from dgemma.core.events import Commit, Done
from dgemma.core.row import Request

ROWS = 256
"""Boards in a pass."""


def inference_engine(config: ModelConfig, weights: Mapping[str, Any]) -> Engine:
    """The fast torch backend in float32 over float32 weights."""
    passes = backends.passes_of("torch", config, lambda name: np.asarray(weights[name]), device="cpu", dtype="float32")
    return Engine(passes, None, most_rows=ROWS, prefix_bytes=0)


def solve_rate(
    engine: Engine, sampler: SamplerConfig, tests: np.ndarray, solutions: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Solve boards [N, cells]: which answers are exactly right, bool [N], and the steps they took [N]."""
    handles = [
        engine.add(
            Request(
                prompt=tuple(prompt.tolist()), max_new_tokens=nano.CANVAS, seed=seed + i, sampler=sampler,
                eos_token_ids=(), drafts=False,
            )
        )
        for i, prompt in enumerate(nano.prompts(tests))
    ]  # fmt: skip
    right, steps = np.zeros(len(handles), bool), np.zeros(len(handles), int)
    for i, (handle, want) in enumerate(zip(handles, nano.answers(solutions), strict=True)):
        for event in handle.events():
            if isinstance(event, Commit):
                right[i] = event.tokens == tuple(want.tolist())  # rows, end of turn and fill
            elif isinstance(event, Done):
                steps[i] = event.stats.steps
    return right, steps


def by_givens(tests: np.ndarray, right: np.ndarray) -> dict[int, tuple[int, int]]:
    """Number of givens → (solved, boards)."""
    givens = (tests > 0).sum(1)
    return {int(g): (int(right[givens == g].sum()), int((givens == g).sum())) for g in np.unique(givens)}


def held_out_set(source: boards.Source, count: int, seed: int = 12345) -> tuple[np.ndarray, np.ndarray]:
    """The same held-out boards every time."""
    return source.batch(np.random.default_rng([seed, source.size.side]), count, test=True)
